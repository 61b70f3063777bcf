"""The guide's examples run as printed."""

import pathlib
import re

import numpy as np
import pytest

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "policy_optimisation.md"


def test_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    printed = capsys.readouterr().out
    values = {
        name: np.array(numbers.split(), float)
        for name, numbers in re.findall(r"(\w+) \[(.*?)\]", printed)
    }
    np.testing.assert_allclose(values["token"], [1 / 4] * 4, atol=1e-6)
    np.testing.assert_allclose(values["sequence"], [1 / 2, *[1 / 6] * 3], atol=1e-6)
    np.testing.assert_allclose(values["group"], [1 / 4] * 4, atol=1e-6)
    np.testing.assert_allclose(values["constant"], [1 / 8] * 4, atol=1e-6)
    estimates = dict(re.findall(r"(k\d) (\S+)", printed))
    assert float(estimates["k1"]) == pytest.approx(float(estimates["k3"]), rel=1e-5)
    assert float(estimates["k2"]) != pytest.approx(float(estimates["k1"]), rel=1e-2)


def test_tests_that_it_names_are_there():
    text = GUIDE.read_text("utf-8")
    root = GUIDE.parents[1]
    files = set(re.findall(r"tests/[\w/]+\.py", text))
    assert files
    for name in files:
        assert (root / name).is_file(), name
    estimators = (root / "tests/losses/test_policy_estimators.py").read_text("utf-8")
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in estimators, name
