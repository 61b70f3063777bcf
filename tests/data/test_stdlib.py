"""Functions of the standard library: cut right, never run, split by their bodies."""

import ast
import sys

import pytest

from jaxpost.data import _stdlib as stdlib

SOURCE = '''\
"""A module that must not be run."""
raise SystemExit("executed!")


def add(a, b):
    """The sum."""
    # why
    return a + b


class Thing:
    @property
    def size(self):
        """How large.

        In metres.
        """
        if self:
            return 1

        return 2

    def undocumented(self):
        return 3

    def empty(self):
        """Nothing follows."""

    def short(self): """On one line."""; return 4
'''


@pytest.fixture
def library(tmp_path):
    (tmp_path / "package" / "tests").mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_text(SOURCE)
    (tmp_path / "package" / "tests" / "hidden.py").write_text(SOURCE + "\n")
    (tmp_path / "copy.py").write_text("def add(a, b):\n    '''Sum.'''\n    return 9\n")
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    return tmp_path


def test_functions_are_cut_at_the_docstring(library):
    by_name = {f.name: f for f in stdlib.stdlib_functions(library)}
    assert set(by_name) == {"add", "Thing.size"}
    size = by_name["Thing.size"]
    assert size.module == "package"
    assert size.head.startswith("@property\ndef size(self):\n")
    assert size.head.endswith('    In metres.\n    """\n')
    assert size.body == "    if self:\n        return 1\n\n    return 2"


def test_comments_belong_to_the_body(library):
    functions = stdlib.stdlib_functions(library)
    bodies = {f.body for f in functions if f.name == "add"}
    assert "    # why\n    return a + b" in bodies


def test_rows_name_licence_and_origin(library):
    rows = [r for s in ("train", "test") for r in stdlib.stdlib_rows(s, root=library)]
    assert len(rows) == 3
    for row in rows:
        assert row["license"] == "PSF-2.0"
        assert sys.version.startswith(row["python"])
        ast.parse(row["prompt"] + row["completion"])


def test_fingerprint_follows_the_sources(library):
    before = stdlib.stdlib_fingerprint(library)
    stdlib._read_library.cache_clear()
    assert stdlib.stdlib_fingerprint(library) == before
    path = library / "copy.py"
    path.write_text(path.read_text().replace("9", "8"))
    stdlib._read_library.cache_clear()
    assert stdlib.stdlib_fingerprint(library) != before


def test_no_sources_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no documented Python function"):
        stdlib.stdlib_functions(tmp_path)


def test_wrong_arguments(library):
    with pytest.raises(ValueError, match="split must be"):
        stdlib.stdlib_rows("dev", root=library)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 0"):
        stdlib.stdlib_rows("train", count=-1, root=library)


@pytest.mark.slow
def test_this_machines_library():
    train = list(stdlib.stdlib_rows("train"))
    test = list(stdlib.stdlib_rows("test"))
    assert len(train) > 2000
    assert 0.06 < len(test) / (len(train) + len(test)) < 0.16
    bodies = {" ".join(row["completion"].split()) for row in train}
    assert not bodies & {" ".join(row["completion"].split()) for row in test}
    for row in train[::40]:
        assert len(row["prompt"]) + len(row["completion"]) <= 2000
        ast.parse(row["prompt"] + row["completion"])
    assert list(stdlib.stdlib_rows("train", count=5)) == train[:5]
