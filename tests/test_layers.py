"""Who may import whom: the table of the design, held by parsing every import."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxpost"

# "Level 0: `typing`, `prompts`" and so on; level 2 rooms never import each other.
LEVEL_0 = {"typing", "prompts"}
LEVEL_1 = {"ops", "parallel", "sandbox"}
LEVEL_2 = {
    "losses",
    "advantages",
    "pruning",
    "solvers",
    "models",
    "data",
    "reports",
}
LOWER_2 = LEVEL_0 | LEVEL_1
LOWER_3 = LOWER_2 | LEVEL_2
MAY_IMPORT: dict[str, set[str]] = {
    "typing": set(),
    "prompts": set(),
    **dict.fromkeys(LEVEL_1, LEVEL_0),
    **dict.fromkeys(LEVEL_2, LOWER_2),
    "weights": LOWER_3,
    "generation": {"ops", "parallel", "typing"},
    "training": {"ops", "parallel", "typing"},
    "graphs": {"losses", "ops", "parallel", "typing"},
    **dict.fromkeys(
        ("rewards", "evaluation", "testing"), LOWER_3 | {"generation", "training"}
    ),
}
BELOW_RECIPES = set(MAY_IMPORT)
MAY_IMPORT["recipes"] = BELOW_RECIPES
MAY_IMPORT["cli"] = BELOW_RECIPES | {"recipes"}

FLAX_ROOMS = {"models", "graphs"}
HEAVY = {"transformers", "datasets", "orbax", "tokenizers", "grain", "matplotlib"}
STRINGS_ONLY = {"prompts", "sandbox"}  # the standard library, and prompts also jinja2


def room_of(path: pathlib.Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(tree: ast.AST, path: pathlib.Path) -> list[tuple[int, str]]:
    """`(line, dotted name)` of everything imported, `from a import b` being `a.b`."""
    package = path.relative_to(ROOT).parts[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += (node.module,) if node.module else ()
            found += [(node.lineno, ".".join((*base, a.name))) for a in node.names]
    return found


def top_level_imports(tree: ast.Module, path: pathlib.Path) -> list[tuple[int, str]]:
    """Imports that happen when the module is imported."""
    found = []
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += imports_of(node, path)
        waiting += ast.iter_child_nodes(node)
    return found


def problems_of(path: pathlib.Path, source: str) -> list[str]:
    room, tree = room_of(path), ast.parse(source)
    shown = path.relative_to(ROOT)
    if room == "__init__":
        allowed = set()
    elif room in MAY_IMPORT:
        allowed = MAY_IMPORT[room]
    else:
        return [f"{shown}: the design has no room {room!r}"]
    found = []
    for line, name in imports_of(tree, path):
        parts = name.split(".")
        if parts[0] == "flax" and room not in FLAX_ROOMS:
            found.append(f"{shown}:{line}: Flax lives in models and graphs only")
        if room in STRINGS_ONLY and parts[0] not in (
            {"jaxpost", "jinja2"} | set(sys.stdlib_module_names)
        ):
            found.append(
                f"{shown}:{line}: {room} uses the standard library, not {name}"
            )
        if parts[0] != "jaxpost" or len(parts) == 1:
            continue
        target = parts[1]
        if target == "__version__" or target == room:
            continue
        if target not in allowed:
            found.append(f"{shown}:{line}: {room} may not import {target}")
        if any(part.startswith("_") for part in parts[2:]):
            found.append(f"{shown}:{line}: {name} is private to {target}")
    for line, name in top_level_imports(tree, path):
        if name.split(".")[0] in HEAVY:
            found.append(f"{shown}:{line}: import {name} inside the function")
    return found


def test_every_import_goes_down():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    problems = [p for f in files for p in problems_of(f, f.read_text("utf-8"))]
    assert not problems, "\n".join(problems)


def test_the_table_names_every_room_of_the_package():
    rooms = {room_of(p) for p in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("room", "line", "message"),
    [
        ("losses", "from jaxpost import models", "losses may not import models"),
        ("losses", "import jaxpost.data", "losses may not import data"),
        ("ops", "from jaxpost.losses import sft", "ops may not import losses"),
        ("generation", "from jaxpost.models import build", "may not import models"),
        ("recipes", "from jaxpost.data._load import x", "is private to data"),
        ("training", "def f():\n from jaxpost import data", "may not import data"),
        ("training", "from flax import nnx", "Flax lives in"),
        ("data", "import transformers", "inside the function"),
        ("prompts", "import numpy", "uses the standard library"),
        ("training", "from ..data import x", "training may not import data"),
        ("training", "from .. import models", "training may not import models"),
        ("kitchen", "import jax", "no room 'kitchen'"),
    ],
)
def test_breaches_are_found(room, line, message):
    problems = problems_of(PACKAGE / room / "_x.py", line)
    assert any(message in problem for problem in problems), problems


def test_lawful_imports_are_not_breaches():
    lawful = "from jaxpost import ops\ndef f():\n import transformers\n"
    assert not problems_of(PACKAGE / "data" / "_x.py", lawful)
    lawful = "from ._sft import sft\nfrom . import _sft\n"
    assert not problems_of(PACKAGE / "losses" / "_x.py", lawful)
    lawful = "from jaxpost.losses._sft import sft\nfrom jaxpost.typing import Head\n"
    assert not problems_of(PACKAGE / "losses" / "_x.py", lawful)
