"""Edits of Python sources: what they may change, and what must stay."""

import ast
import random
import symtable

import pytest

from jaxpost import data, prompts


@pytest.fixture(scope="module")
def functions():
    """Real functions, with the character at which their bodies begin."""
    rows = data.stdlib_rows("train", count=500)
    return [(row["prompt"] + row["completion"], len(row["prompt"])) for row in rows]


def scopes_of(source):
    """What each name is in each scope, scope by scope."""
    waiting, found = [symtable.symtable(source, "f", "exec")], []
    while waiting:
        scope = waiting.pop()
        waiting += scope.get_children()
        kinds = {
            symbol.get_name(): (
                *(symbol.is_local(), symbol.is_global(), symbol.is_free()),
                *(symbol.is_parameter(), symbol.is_imported()),
            )
            for symbol in scope.get_symbols()
        }
        found.append((scope.get_name(), kinds))
    return found


def test_renaming_changes_names_and_nothing_else(functions):
    """Same tree but for a one-to-one change of names, each of which is in each scope
    what the old one was, and meets none that was there."""
    changed = 0
    for source, start in functions:
        renamed = prompts.rename_variables(source, start=start)
        assert renamed[:start] == source[:start]
        trees = [ast.parse(text) for text in (source, renamed)]
        names = [
            [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
            for tree in trees
        ]
        new_of = {a.id: b.id for a, b in zip(*names, strict=True) if a.id != b.id}
        assert len(set(new_of.values())) == len(new_of)
        assert not any(new in source for new in new_of.values())
        for node in names[0]:
            node.id = new_of.get(node.id, node.id)
        assert ast.dump(trees[0]) == ast.dump(trees[1])
        before = [
            (name, {new_of.get(k, k): v for k, v in kinds.items()})
            for name, kinds in scopes_of(source)
        ]
        assert before == scopes_of(renamed)
        changed += bool(new_of)
    assert changed > len(functions) / 3


def test_what_is_renamed_and_what_is_not():
    source = (
        "import os\n"
        "LIMIT = 3\n"
        "def f(rows, *, key=None):\n"
        "    total, name = 0, 'ß'\n"
        "    for row in rows:\n"
        "        total += key(row, limit=LIMIT) + os.cpu_count()  # ß total\n"
        "    def inner(x): return total + x\n"
        "    text = f'{name}'\n"
        "    return [row for row in rows], inner, text\n"
    )
    renamed = prompts.rename_variables(source)
    assert renamed == (
        source.replace("total, name", "v1, name")
        .replace("for row in rows", "for v2 in rows")
        .replace("key(row,", "key(v2,")
        .replace("[row for", "[v2 for")
        .replace("total +=", "v1 +=")
        .replace("return total", "return v1")
        .replace("text = f", "v3 = f")
        .replace("inner, text", "inner, v3")
    )


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    x = 1\n    return locals()\n",
        "def f():\n    global x\n    x = 1\n",
        "x = 1\ndef f():\n    x = 2\n    return x\n",
        "def g():\n    return y\ndef f():\n    y = 2\n    return y\n",
        "class C:\n    z = 1\n    def f(self):\n        z = 2\n        return z\n",
        "def f():\n    try: pass\n    except OSError as e: e = 1\n    return e\n",
    ],
)
def test_names_that_mean_more_are_kept(source):
    assert prompts.rename_variables(source) == source


def test_new_names_do_not_meet_old_ones():
    source = "def f(v1):\n    a = v1.v2\n    b = a\n    return b\n"
    expected = "def f(v1):\n    v3 = v1.v2\n    v4 = v3\n    return v4\n"
    assert prompts.rename_variables(source) == expected


def test_comments_go_and_nothing_else_does(functions):
    changed = 0
    for source, start in functions:
        bare = prompts.drop_comments(source, start=start)
        assert bare[:start] == source[:start]
        assert ast.dump(ast.parse(bare)) == ast.dump(ast.parse(source))
        assert "#" not in bare[start:] or any(c in source for c in "'\"")
        changed += bare != source
    assert changed > 50


def test_lines_of_comment_go_whole():
    source = "# ä\nx = '#'  # one\n\n    # two\ny = 1\t# three"
    assert prompts.drop_comments(source) == "x = '#'\n\ny = 1"
    assert prompts.drop_comments(source, start=5) == "# ä\nx = '#'\n\ny = 1"


@pytest.mark.parametrize("edit", [prompts.rename_variables, prompts.drop_comments])
@pytest.mark.parametrize("source", ["def f(:\n  '''", "x = (1,\n", "if x:\n\ty\n  z\n"])
def test_what_is_no_python(edit, source):
    with pytest.raises(SyntaxError):
        edit(source)


@pytest.mark.parametrize("kind", ["substitute", "delete", "insert"])
def test_edits_at_a_rate(kind):
    items, pool = list(range(4000)), [-1, -2]
    edited = prompts.edit_items(
        items, kind=kind, rate=0.25, pool=pool, rng=random.Random(0)
    )
    kept = [item for item in edited if item >= 0]
    others = len(edited) - len(kept)
    assert kept == sorted(kept)
    if kind == "insert":
        assert kept == items
    else:
        assert abs(len(kept) / 4000 - 0.75) < 0.03  # four standard errors
    assert (others == 0) == (kind == "delete")
    if kind != "delete":
        assert abs(others / 4000 - 0.25) < 0.03
    for rate, expected in ((0.0, items), (1.0, [])):
        found = prompts.edit_items(
            items, kind="delete", rate=rate, pool=(), rng=random.Random(0)
        )
        assert found == expected


def test_a_substitute_is_another():
    edited = prompts.edit_items(
        [0] * 500, kind="substitute", rate=1.0, pool=[0, 1, 2], rng=random.Random(1)
    )
    assert set(edited) == {1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.5}, "rate must lie in"),
        ({"kind": "swap"}, "kind must be 'substitute'"),
        ({"pool": ()}, "pool is empty"),
    ],
)
def test_bad_edits(options, message):
    whole = {"kind": "insert", "rate": 0.1, "pool": [1], "rng": random.Random(0)}
    with pytest.raises(ValueError, match=message):
        prompts.edit_items([1, 2], **(whole | options))
