"""Changes to Python sources that keep what they do, and random ones that do not.

What somebody may do to generated code before a detector sees it. `start` leaves what
comes before an answer (the prompt) alone.
"""

import ast
import builtins
import io
import keyword
import random
import re
import symtable
import tokenize
from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

Item = TypeVar("Item")
TokenEdit = Literal["substitute", "delete", "insert"]

# Names may be looked up by these without standing in the source.
_LOOK_UP_NAMES = frozenset({"locals", "globals", "vars", "eval", "exec", "dir"})


def edit_items(
    items: Sequence[Item],
    *,
    kind: TokenEdit,
    rate: float,
    pool: Sequence[Item],
    rng: random.Random,
) -> list[Item]:
    """Changes each item with probability `rate`, independently.

    Args:
        items: token ids, words or whatever else.
        kind: put another in its place, leave it out, or put another before it.
        rate: in [0, 1].
        pool: what others are drawn from, each as likely; a substitute differs from
            what it replaces if the pool allows.
        rng: the source of chance.

    Raises:
        ValueError: a rate outside [0, 1], an unknown kind, or an empty pool.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate must lie in [0, 1], got {rate}.")
    if kind not in ("substitute", "delete", "insert"):
        raise ValueError(
            f"kind must be 'substitute', 'delete' or 'insert', got {kind!r}."
        )
    if kind != "delete" and not pool:
        raise ValueError(f"pool is empty: there is nothing to {kind}.")
    out: list[Item] = []
    for item in items:
        if rng.random() >= rate:
            out.append(item)
        elif kind == "insert":
            out += [rng.choice(pool), item]
        elif kind == "substitute":
            other = rng.choice(pool)
            if other == item and len(pool) > 1:  # a neighbour in the pool, as likely
                at = rng.randrange(len(pool))
                spare = (pool[(at + i) % len(pool)] for i in range(len(pool)))
                other = next((s for s in spare if s != item), item)
            out.append(other)
    return out


def drop_comments(source: str, *, start: int = 0) -> str:
    """The source without comments, and without lines that held nothing else.

    Args:
        source: a Python program.
        start: character from which on comments are dropped.

    Raises:
        SyntaxError: the source cannot be split into tokens.
    """
    lines = _line_starts(source)
    cuts = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source, newline="").readline):
            if token.type == tokenize.COMMENT:
                cuts.append((lines[token.start[0] - 1] + token.start[1], token.string))
    except tokenize.TokenError as error:
        raise SyntaxError(f"not Python: {error.args[0]}") from error
    for place, comment in reversed(cuts):
        if place < start:
            continue
        first, last = place, place + len(comment)
        while first > start and source[first - 1] in " \t":
            first -= 1
        alone = first == 0 or source[first - 1] == "\n"
        if alone and source[last : last + 1] == "\n":
            last += 1
        source = source[:first] + source[last:]
    return source


def rename_variables(source: str, *, start: int = 0) -> str:
    """The source with other names for the local variables of its functions.

    Renamed are names that a function binds and that mean nothing else anywhere in the
    source: no parameters, globals, imports, attributes, functions or classes, and none
    that stands in an f-string. A program does the same as before; one that looks its
    variables up by name (`locals()`, `eval`) is left as it is.

    Args:
        source: a Python program.
        start: character from which on names are changed; a name that also stands before
            it is kept.

    Raises:
        SyntaxError: the source is not Python.
    """
    try:
        tree = ast.parse(source)
    except ValueError as error:  # a null byte
        raise SyntaxError(str(error)) from error
    identifiers = _identifiers(tree)
    # A lone carriage return is a line break to `ast`, and to nobody else.
    if identifiers & _LOOK_UP_NAMES or re.search(r"\r(?!\n)", source):
        return source
    lines = _line_starts(source)
    encoded = [line.encode() for line in source.split("\n")]

    def place_of(node: ast.Name) -> int:
        before = encoded[node.lineno - 1][: node.col_offset].decode()
        return lines[node.lineno - 1] + len(before)

    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    kept = _kept_names(source, tree)
    places: dict[str, list[int]] = {}
    for node in names:
        if node.id not in kept and not node.id.startswith("__"):  # changed in classes
            places.setdefault(node.id, []).append(place_of(node))
    wanted = {name: at for name, at in places.items() if min(at) >= start}
    ordered = sorted(wanted, key=lambda name: min(wanted[name]))
    fresh = _fresh_names(identifiers)
    renamed = {name: next(fresh) for name in ordered}
    edits = sorted(((at, name) for name in wanted for at in wanted[name]), reverse=True)
    for at, name in edits:
        source = source[:at] + renamed[name] + source[at + len(name) :]
    return source


def _kept_names(source: str, tree: ast.Module) -> set[str]:
    """Names that mean something else than a function's variable somewhere."""
    kept = {*dir(builtins), *keyword.kwlist, *keyword.softkwlist}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            kept.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            kept.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                kept.update((alias.asname or alias.name).split("."))
        elif isinstance(node, ast.Global | ast.Nonlocal):
            kept.update(node.names)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            kept.add(node.name or "")
        elif isinstance(node, ast.MatchMapping):
            kept.add(node.rest or "")
        elif isinstance(node, ast.JoinedStr):  # their places are not told before 3.12
            kept.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
    waiting = [symtable.symtable(source, "<source>", "exec")]
    while waiting:
        scope = waiting.pop()
        waiting += scope.get_children()
        inside = scope.get_type() == "function"
        kept.update(
            symbol.get_name()
            for symbol in scope.get_symbols()
            if symbol.is_global() or symbol.is_parameter() or not inside
        )
    return kept


def _identifiers(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        for _, value in ast.iter_fields(node):
            if isinstance(value, str) and value.isidentifier():
                found.add(value)
    return found


def _fresh_names(taken: set[str]) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        if (name := f"v{number}") not in taken:
            yield name


def _line_starts(source: str) -> list[int]:
    """Character at which each line begins, as `ast` and `tokenize` count lines."""
    starts = [0]
    starts += [place + 1 for place, char in enumerate(source) if char == "\n"]
    return starts
