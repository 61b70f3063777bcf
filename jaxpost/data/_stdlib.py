"""`builtin:python-stdlib`: functions of the Python standard library on this machine.

A prompt is a function's signature and docstring, the completion its body. Sources are
parsed with `ast`, never imported or run. The rows differ by Python version, so results
should carry `stdlib_fingerprint()`. The text is under the Python Software Foundation
License 2.0, which each row names.
"""

import ast
import functools
import hashlib
import os
import pathlib
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

LICENSE = "PSF-2.0"

# Tests, vendored packages and other people's licences are left out.
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib"),
    *("lib2to3", "ensurepip", "_vendor", "pydoc_data", "turtledemo", "__pycache__"),
}
_TEST_SHARE = 26 / 256  # of all distinct bodies


class StdlibFunction(NamedTuple):
    """One function of the library, source text dedented.

    Fields:
        module: dotted name, such as `json.decoder`.
        name: qualified name within the module, such as `JSONDecoder.decode`.
        head: signature (decorators included) and docstring.
        body: the statements after the docstring, indented as in the function.
    """

    module: str
    name: str
    head: str
    body: str


def stdlib_rows(
    split: Literal["train", "test"],
    *,
    count: int | None = None,
    max_chars: int = 2000,
    root: str | os.PathLike[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Functions as rows, in TRL's columns.

    The split goes by a hash of the body, so equal bodies never stand on both sides, and
    the order by a hash of the whole function: the same on every machine with the same
    library, and any prefix is a fair sample.

    Args:
        split: "train" or "test" (about one body in ten).
        count: at most so many rows; None for all.
        max_chars: longest prompt and completion together, characters.
        root: the library's folder; None finds that of the running Python.

    Returns:
        An iterator of rows: `prompt` (signature and docstring, ends in a line break),
        `completion` (body), `module`, `name`, `python` (version) and `license`.

    Raises:
        ValueError: an unknown split, or `count` or `max_chars` is negative.
        FileNotFoundError: the library's sources are not there.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    if max_chars < 0 or (count is not None and count < 0):
        raise ValueError(
            f"count and max_chars must be at least 0, got {count} and {max_chars}."
        )
    functions = [
        function
        for function in stdlib_functions(root)
        if _split(function) == split
        and len(function.head) + len(function.body) <= max_chars
    ]
    return map(_row, functions[:count])


def stdlib_functions(
    root: str | os.PathLike[str] | None = None,
) -> tuple[StdlibFunction, ...]:
    """All documented functions of both splits, no two alike, in the order of rows.

    Args:
        root: the library's folder; None finds that of the running Python.

    Raises:
        FileNotFoundError: no documented function is found there.
    """
    return _read_library(_library_folder(root))


def stdlib_fingerprint(root: str | os.PathLike[str] | None = None) -> str:
    """sha256 of the whole corpus, hexadecimal: other sources, other hash.

    Args:
        root: as in `stdlib_functions`.
    """
    digest = hashlib.sha256()
    for function in stdlib_functions(root):
        digest.update("\0".join(function).encode() + b"\1")
    return digest.hexdigest()


def _library_folder(root: str | os.PathLike[str] | None) -> pathlib.Path:
    return pathlib.Path(sysconfig.get_paths()["stdlib"] if root is None else root)


@functools.lru_cache(maxsize=2)
def _read_library(folder: pathlib.Path) -> tuple[StdlibFunction, ...]:
    found: dict[tuple[str, str], StdlibFunction] = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if _SKIPPED_FOLDERS.isdisjoint(parts[:-1]):
            module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
            for function in _functions_of(path, module):
                found.setdefault((function.head, function.body), function)
    if not found:
        raise FileNotFoundError(
            f"{folder}: no documented Python function in this folder; the standard "
            "library's sources are not installed here, use another data set."
        )
    return tuple(sorted(found.values(), key=_order))


def _functions_of(path: pathlib.Path, module: str) -> Iterator[StdlibFunction]:
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            # Old escapes in other people's strings are no concern of ours.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError):
        return  # a few files are templates, or bad on purpose
    yield from _walk(tree, module, "", source.splitlines(keepends=True))


def _walk(
    node: ast.AST, module: str, prefix: str, lines: list[str]
) -> Iterator[StdlibFunction]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, module, f"{prefix}{child.name}.", lines)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            function = _cut(child, module, prefix, lines)
            if function is not None:
                yield function


def _cut(
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    module: str,
    prefix: str,
    lines: list[str],
) -> StdlibFunction | None:
    """The source of a function in two, or None without a docstring or a body."""
    if ast.get_docstring(node, clean=False) is None or len(node.body) < 2:
        return None
    docstring = node.body[0]
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    middle, end = docstring.end_lineno or 0, node.end_lineno or 0
    if node.body[1].lineno <= middle:
        return None  # a statement on the docstring's own line
    text = textwrap.dedent("".join(lines[start:end]))
    pieces = text.splitlines(keepends=True)
    if len(pieces) != end - start or text[:1].isspace():
        return None  # a form feed, or a string or comment left of the function
    head, body = pieces[: middle - start], pieces[middle - start :]
    return StdlibFunction(
        module, prefix + node.name, "".join(head), "".join(body).rstrip()
    )


def _order(function: StdlibFunction) -> tuple[bytes, str, str]:
    digest = hashlib.sha256((function.head + function.body).encode()).digest()
    return digest, function.module, function.name


def _split(function: StdlibFunction) -> str:
    body = " ".join(function.body.split())
    digest = hashlib.sha256(body.encode()).digest()
    return "test" if digest[0] < 256 * _TEST_SHARE else "train"


def _row(function: StdlibFunction) -> dict[str, Any]:
    return {
        "prompt": function.head,
        "completion": function.body,
        "module": function.module,
        "name": function.name,
        "python": sys.version.split()[0],
        "license": LICENSE,
    }
