"""The guide's examples run as printed, and its figure can be drawn again."""

import pathlib
import re
import runpy

import numpy as np
import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def test_examples_run():
    text = (DOCS / "preferences.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"preferences.md, block {number}", "exec"), names)
        if number == 0:
            np.testing.assert_allclose(names["margins"], [0.2, -0.7], rtol=1e-5)
            np.testing.assert_array_equal(names["outliers"], [False, True])


@pytest.mark.slow
def test_figure_is_drawn(tmp_path):
    script = runpy.run_path(str(DOCS / "figures" / "pairwise_losses.py"))
    drawn = script["draw"](tmp_path).read_text("utf-8")
    committed = (DOCS / "figures" / "pairwise_losses.svg").read_text("utf-8")
    for name in script["CURVES"]:
        assert name in drawn
        assert name in committed
    # "Where R³M cannot be seen it lies on Bradley-Terry": from its threshold on.
    curves = script["curves"]()
    margins, values, _ = curves["Bradley–Terry"]
    above = margins >= np.log(1.0 / 0.6 - 1.0)
    robust = curves["R³M, λ = 0.6"][1]
    np.testing.assert_allclose(robust[above], values[above], rtol=1e-6)
    assert (robust[~above] < values[~above]).all()
