"""The Python of the guide runs as pasted, from top to bottom."""

import pathlib
import re

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "data.md"


def test_the_guide_runs():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    exec(compile("\n".join(blocks), str(GUIDE), "exec"), {})
