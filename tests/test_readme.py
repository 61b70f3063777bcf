"""The README's Python runs as pasted, and what it points at exists."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
        scope: dict = {}
        exec(compile(block, "README.md", "exec"), scope)
        assert float(scope["loss"]) > 0


def test_links_and_files_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    shown = re.findall(r"(?:configs|jaxpost|scripts)/[\w/.-]+\.(?:yaml|py)", TEXT)
    assert links
    assert shown
    missing = [path for path in [*links, *shown] if not (ROOT / path).exists()]
    assert not missing


def test_every_make_goal_shown_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for goal in set(re.findall(r"^make (\w[\w-]*)", TEXT, re.MULTILINE)):
        assert re.search(rf"^{goal}:", makefile, re.MULTILINE), goal
