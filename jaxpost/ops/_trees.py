"""Nested dictionaries of arrays put together."""

from collections.abc import Mapping
from typing import Any


def join_trees(first: Any, second: Any) -> Any:
    """The union of two nested dictionaries that share no leaf.

    Args:
        first: nested dict; whatever is no mapping is a leaf.
        second: another; None gives `first` itself, of any type.

    Returns:
        New dictionaries with the same leaves.

    Raises:
        ValueError: a leaf of one is at a place that the other has too; names it.
        TypeError: one of them is no mapping.
    """
    if second is None:
        return first
    for tree in (first, second):
        if not isinstance(tree, Mapping):
            raise TypeError(
                "join_trees: only nested dictionaries can be joined, got "
                f"{type(tree).__name__}."
            )
    return _join(first, second, ())


def _join(first: Mapping, second: Mapping, path: tuple[str, ...]) -> dict:
    joined = dict(first)
    for key, value in second.items():
        if key not in joined:
            joined[key] = value
        elif isinstance(joined[key], Mapping) and isinstance(value, Mapping):
            joined[key] = _join(joined[key], value, (*path, str(key)))
        else:
            raise ValueError(
                f"join_trees: {'/'.join((*path, str(key)))!r} is in both trees."
            )
    return joined
