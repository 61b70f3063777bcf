"""Log-probabilities over a mesh: the head's vocabulary split, rows where they are."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxpost.parallel._shardings import (
    RULES,
    Rules,
    batch_sharding,
    mesh_axes,
    shardings,
)
from jaxpost.typing import Head, TokenStats


def split_vocabulary(
    token_logps: Callable[..., TokenStats],
    mesh: Mesh | None,
    rules: Rules | None = None,
) -> Callable[..., TokenStats]:
    """`ops.linear_token_logps` for arrays that are spread over a mesh.

    Each device scores its own rows against its own part of the vocabulary; per-token
    maxima and sums are all that is sent forward, the gradient of the hidden states and,
    once, that of the head backward.

    Args:
        token_logps: `ops.linear_token_logps`, or a function like it that takes
            `vocab_axis`.
        mesh: from `make_mesh`; None gives `token_logps` back.
        rules: logical axes to mesh axes; "batch" and "vocab" matter here.

    Returns:
        A function with the same arguments, but for `vocab_axis`; for use under `jit`.

    Raises:
        ValueError: "vocab" takes several mesh axes, or one that splits the batch.
    """
    if mesh is None:
        return token_logps
    table = dict(RULES) | dict(rules or {})
    rows = batch_sharding(mesh, rules).spec
    wanted = mesh_axes("vocab", table, mesh)
    wanted = tuple(axis for axis in wanted if mesh.shape[axis] > 1)
    if len(wanted) > 1 or set(wanted) & set(mesh_axes("batch", table, mesh)):
        raise ValueError(
            f"split_vocabulary: the vocabulary takes the mesh axes {wanted}; it must "
            "be one, and none of the batch's."
        )

    def call(
        hidden: jax.Array,
        head: Head | jax.Array,
        targets: jax.Array,
        *,
        mask: jax.Array | None = None,
        grad_weights: jax.Array | None = None,
        **options: Any,
    ) -> TokenStats:
        whole = head if isinstance(head, Head) else Head(head)
        axis = wanted[0] if wanted else None
        if axis is not None and whole.weight.shape[1] % mesh.shape[axis]:
            axis = None  # stored whole as well, see `shardings`
        # Its gradient then is kept in the parts that the head is stored in; without,
        # every device would hold the sum over all rows whole.
        stored = shardings(("embed", "vocab"), mesh, rules, shapes=whole.weight)
        weight = jax.lax.with_sharding_constraint(whole.weight, stored)

        def one(hidden, weight, bias, targets, mask, grad_weights):
            return token_logps(
                hidden,
                dataclasses.replace(whole, weight=weight, bias=bias),
                targets,
                mask=mask,
                grad_weights=grad_weights,
                vocab_axis=axis,
                **options,
            )

        columns = PartitionSpec(None, axis)
        return jax.shard_map(
            one,
            mesh=mesh,
            in_specs=(rows, columns, PartitionSpec(axis), rows, rows, rows),
            out_specs=rows,
        )(hidden, weight, whole.bias, targets, mask, grad_weights)

    return call
