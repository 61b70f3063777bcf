"""Rows of a cache whose layout only the model knows: where they are, how they move.

The layout is found by asking for caches of several sizes and comparing their shapes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.typing import Cache, DecodeFns


class CacheAxes(NamedTuple):
    """Which axis of each leaf of a cache counts rows, and which counts positions.

    Fields:
        batch: one axis per leaf.
        length: one axis per leaf, or None where a leaf holds no positions.
    """

    batch: tuple[int, ...]
    length: tuple[int | None, ...]


def cache_axes(fns: DecodeFns, dtype: Any) -> CacheAxes:
    """The layout of the caches that `fns.init_cache` makes; allocates nothing.

    Raises:
        ValueError: a leaf has no axis that grows with the batch, or more than one that
            grows with the batch or with the length.
    """

    def shapes(batch: int, length: int) -> list[tuple[int, ...]]:
        cache = jax.eval_shape(lambda: fns.init_cache(batch, length, dtype))
        return [leaf.shape for leaf in jax.tree.leaves(cache)]

    plain = shapes(2, 16)
    batch_axes, length_axes = [], []
    for number, (leaf, wider, longer) in enumerate(
        zip(plain, shapes(3, 16), shapes(2, 17), strict=True)
    ):
        batch = [axis for axis, size in enumerate(leaf) if wider[axis] != size]
        length = [axis for axis, size in enumerate(leaf) if longer[axis] != size]
        if len(batch) != 1 or len(length) > 1:
            raise ValueError(
                f"leaf {number} of the cache has shapes {leaf}, {wider}, {longer} for "
                "2 rows of 16 positions, 3 of 16 and 2 of 17: expected one axis for "
                "the rows and at most one for the positions."
            )
        batch_axes.append(batch[0])
        length_axes.append(length[0] if length else None)
    return CacheAxes(tuple(batch_axes), tuple(length_axes))


def put_rows(cache: Cache, new: Cache, rows: jax.Array, axes: CacheAxes) -> Cache:
    """`cache` with the rows of `new` at `rows`.

    Args:
        cache: at least as long as `new`.
        new: `m` rows.
        rows: int32 `[m]`, different ones; those past the end are left out.
        axes: the layout of both.
    """
    leaves, structure = jax.tree.flatten(cache)
    out = []
    for leaf, part, batch, length in zip(
        leaves, jax.tree.leaves(new), *axes, strict=True
    ):
        where: list[Any] = [slice(None)] * leaf.ndim
        where[batch] = rows
        if length is not None:
            where[length] = slice(part.shape[length])
        out.append(leaf.at[tuple(where)].set(part, mode="drop"))
    return jax.tree.unflatten(structure, out)


def copy_row(
    source: Cache, row: jax.Array, target: Cache, slot: jax.Array, axes: CacheAxes
) -> Cache:
    """`target` with row `row` of `source`, no longer than it, at `slot`."""
    leaves, structure = jax.tree.flatten(target)
    out = []
    for leaf, other, batch in zip(
        leaves, jax.tree.leaves(source), axes.batch, strict=True
    ):
        part = jax.lax.dynamic_slice_in_dim(other, row, 1, batch)
        begin = [jnp.zeros((), jnp.int32)] * leaf.ndim
        begin[batch] = slot
        out.append(jax.lax.dynamic_update_slice(leaf, part, begin))
    return jax.tree.unflatten(structure, out)
