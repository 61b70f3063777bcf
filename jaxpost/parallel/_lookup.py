"""Rows of a table that is spread over a mesh, for ids that are spread over it too."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxpost.parallel._shardings import (
    RULES,
    Rules,
    batch_sharding,
    mesh_axes,
    shardings,
)

Lookup = Callable[[jax.Array, jax.Array], jax.Array]


def split_lookup(mesh: Mesh | None, rules: Rules | None = None) -> Lookup | None:
    """`table[ids]` that never sends more than the table, however large the batch.

    Left to itself, XLA's partitioner looks up parts of every device's rows everywhere,
    and with a `data` axis it copies the gradient of the whole batch's rows to every
    device ("involuntary full rematerialization"). Here each device either exchanges
    its rows with those that split the table's width with it, or gathers the table's
    width first: whichever sends less. A part of the vocabulary is looked up where it
    lies, and the parts are added.

    Args:
        mesh: from `make_mesh`; None returns None.
        rules: logical axes to mesh axes; "batch", "vocab" and "embed" matter here.

    Returns:
        A function of a table `[V, D]` and integer ids `[B, T]`, for use under `jit`,
        that returns `[B, T, D]`; the same object for the same arguments. Where rows or
        rules do not allow a split it is `table[ids]`.
    """
    if mesh is None:
        return None
    table = dict(RULES) | dict(rules or {})
    return _split_lookup(
        mesh,
        mesh_axes("batch", table, mesh),
        mesh_axes("vocab", table, mesh),
        mesh_axes("embed", table, mesh),
    )


@functools.lru_cache(maxsize=64)
def _split_lookup(mesh, batch, vocab, embed) -> Lookup:
    rules: Any = {"batch": batch, "vocab": vocab, "embed": embed}
    rows = batch_sharding(mesh, rules).spec
    parts = math.prod(mesh.shape[axis] for axis in batch)

    def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
        stored = shardings(("vocab", "embed"), mesh, rules, shapes=table).spec
        over, across = (_several(mesh, names) for names in (*stored, None, None)[:2])
        fits = ids.shape[0] % parts == 0 and not set(over) & set(batch)
        if not fits or not set(across) <= set(batch) or not (over or across):
            return table[ids]
        stored = PartitionSpec(over or None, across or None)
        exchanged = ids.size // parts
        gathered = table.shape[0] // math.prod(mesh.shape[axis] for axis in over)

        def local(part: jax.Array, ids: jax.Array) -> jax.Array:
            if not across:
                return _rows_of(part, ids, over)
            if gathered <= exchanged:
                part = lax.all_gather(part, across, axis=1, tiled=True)
                return _rows_of(part, ids, over)
            # Everybody's ids, my columns; then my rows, everybody's columns.
            ids = lax.all_gather(ids, across, axis=0, tiled=True)
            found = _rows_of(part, ids, over)
            return lax.all_to_all(found, across, 0, found.ndim - 1, tiled=True)

        return jax.shard_map(local, mesh=mesh, in_specs=(stored, rows), out_specs=rows)(
            table, ids
        )

    return lookup


def _several(mesh: Mesh, names: Any) -> tuple[str, ...]:
    """Axes of a spec's entry that split anything."""
    names = (names,) if isinstance(names, str) else tuple(names or ())
    return tuple(name for name in names if mesh.shape[name] > 1)


def _rows_of(part: jax.Array, ids: jax.Array, over: tuple[str, ...]) -> jax.Array:
    """Rows of this device's part of the vocabulary, added over all parts."""
    if not over:
        return part[ids]
    count = part.shape[0]
    ids = ids - lax.axis_index(over).astype(ids.dtype) * count
    owned = (ids >= 0) & (ids < count)
    found = part[jnp.where(owned, ids, 0)]
    found = jnp.where(owned[..., None], found, jnp.zeros((), found.dtype))
    return lax.psum(found, over)
