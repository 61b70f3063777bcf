"""Logical axis names to shardings, and the placement of whole trees.

A model names the axes of its parameters ("vocab", "heads", ...); a rule table says
which mesh axes each of them is split over. Nothing here knows a model.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "layers": None,
    "head_dim": None,
    "rank": None,
    "batch": ("data", "fsdp"),
    "length": None,
}
"""Megatron's split over "tensor"; every matrix's model axis over "fsdp"."""


def shardings(
    axes: Any,
    mesh: Mesh,
    rules: Rules | None = None,
    *,
    shapes: Any = None,
) -> Any:
    """A `NamedSharding` for each tuple of logical axis names.

    Args:
        axes: tree whose leaves are tuples of names (None for an axis without one).
        mesh: from `make_mesh`.
        rules: logical name to mesh axis, mesh axes, or None; names that are missing
            come from `RULES`.
        shapes: the same tree with arrays or `jax.ShapeDtypeStruct`; if given, an axis
            whose size the mesh does not divide evenly stays whole.

    Returns:
        The same tree of shardings. A mesh axis is used once per array: the first
        logical axis that claims it has it.

    Raises:
        ValueError: a logical name without a rule, a rule that names no axis of the
            mesh, or a leaf of `shapes` with another rank.
    """
    table = dict(RULES) | dict(rules or {})

    def one(names: tuple[str | None, ...], leaf: Any = None) -> NamedSharding:
        if leaf is not None and len(leaf.shape) != len(names):
            raise ValueError(
                f"shardings: logical axes {names} name {len(names)} axes, but the "
                f"array has shape {tuple(leaf.shape)}."
            )
        used: set[str] = set()
        spec = []
        for i, name in enumerate(names):
            wanted = mesh_axes(name, table, mesh)
            chosen = tuple(axis for axis in wanted if axis not in used)
            parts = int(np.prod([mesh.shape[axis] for axis in chosen], dtype=int))
            if leaf is not None and leaf.shape[i] % parts:
                chosen = ()
            used.update(chosen)
            spec.append(chosen[0] if len(chosen) == 1 else chosen or None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    trees = (axes,) if shapes is None else (axes, shapes)
    return jax.tree.map(one, *trees, is_leaf=lambda x: isinstance(x, tuple))


def shardings_like(tree: Any, params: Any, placement: Any) -> Any:
    """Shardings for a tree that holds copies of parameters among other things.

    Moments of an optimizer and moving averages repeat the parameters' paths further
    down: a leaf whose path ends with that of a parameter of the same shape is placed
    like it, all other leaves are copied to every device.

    Args:
        tree: such as a training state; arrays or `jax.ShapeDtypeStruct`.
        params: the parameters, or their shapes.
        placement: their `NamedSharding`s, the same tree.

    Returns:
        A tree of shardings like `tree`.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    known = {
        (_names(path), tuple(leaf.shape)): sharding
        for (path, leaf), sharding in zip(flat, jax.tree.leaves(placement), strict=True)
    }
    mesh = jax.tree.leaves(placement)[0].mesh
    everywhere = NamedSharding(mesh, PartitionSpec())

    def one(path, leaf):
        names, shape = _names(path), tuple(np.shape(leaf))
        for start in range(len(names)):
            if (names[start:], shape) in known:
                return known[names[start:], shape]
        return everywhere

    return jax.tree_util.tree_map_with_path(one, tree)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def batch_sharding(mesh: Mesh, rules: Rules | None = None) -> NamedSharding:
    """The sharding of arrays `[B, ...]`: rows over the mesh axes of "batch"."""
    return shardings(("batch",), mesh, rules)


def place(tree: Any, placement: Any) -> Any:
    """Put every array of a tree where `placement` says.

    Args:
        tree: arrays of JAX or NumPy.
        placement: a tree of shardings like it, or one sharding for all.

    Returns:
        The tree of JAX arrays.

    Raises:
        ValueError: an array's axis is not divisible by its mesh axes; the message has
            the array's path.
    """
    if isinstance(placement, jax.sharding.Sharding):
        sharding = placement
        placement = jax.tree.map(lambda _: sharding, tree)

    def put(path, leaf, sharding):
        try:
            sharding.shard_shape(np.shape(leaf))
        except ValueError as error:
            raise ValueError(f"place: {jax.tree_util.keystr(path)}: {error}") from error
        return jax.device_put(leaf, sharding)

    return jax.tree_util.tree_map_with_path(put, tree, placement)


def mesh_axes(name: str | None, table: Rules, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that a table gives a logical axis, checked."""
    if name is None:
        return ()
    if name not in table:
        raise ValueError(
            f"shardings: no rule for the logical axis {name!r}; known are "
            f"{', '.join(sorted(table))}."
        )
    wanted = table[name]
    wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
    for axis in wanted:
        if axis not in mesh.shape:
            raise ValueError(
                f"shardings: the rule for {name!r} names the mesh axis {axis!r}; this "
                f"mesh has {', '.join(mesh.axis_names)}."
            )
    return wanted
