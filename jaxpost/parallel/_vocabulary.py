"""Log-probabilities over a mesh: the head's vocabulary split, rows where they are."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
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

    def of_heads(heads, rows, *, vocab_axis, **options):
        hidden, targets, mask, grad_weights = rows
        return token_logps(
            hidden,
            heads[0],
            targets,
            mask=mask,
            grad_weights=grad_weights,
            vocab_axis=vocab_axis,
            **options,
        )

    split = split_heads(of_heads, mesh, rules)

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
        return split((whole,), (hidden, targets, mask, grad_weights), **options)

    return call


def split_heads(
    function: Callable[..., Any], mesh: Mesh | None, rules: Rules | None = None
) -> Callable[..., Any]:
    """A function of heads and rows, such as `ops.linear_divergence` of two heads, for
    arrays that are spread over a mesh: `split_vocabulary` for any number of heads.

    Args:
        function: `(heads, rows, *, vocab_axis, **options) -> arrays [B, ...]`, with
            heads a tuple of `Head` and rows a pytree of arrays `[B, ...]`; it handles
            parts of the vocabulary as `ops.linear_token_logps` does.
        mesh, rules: as of `split_vocabulary`.

    Returns:
        A function `(heads, rows, **options)` of whole arrays; for use under `jit`.

    Raises:
        ValueError: "vocab" takes several mesh axes, or one that splits the batch.
    """
    if mesh is None:
        return functools.partial(function, vocab_axis=None)
    table = dict(RULES) | dict(rules or {})
    batch = batch_sharding(mesh, rules).spec
    wanted = mesh_axes("vocab", table, mesh)
    wanted = tuple(axis for axis in wanted if mesh.shape[axis] > 1)
    if len(wanted) > 1 or set(wanted) & set(mesh_axes("batch", table, mesh)):
        raise ValueError(
            f"split_vocabulary: the vocabulary takes the mesh axes {wanted}; it must "
            "be one, and none of the batch's."
        )

    def stored(weight: jax.Array) -> jax.Array:
        # Its gradient then is kept in the parts that the head is stored in; without,
        # every device would hold the sum over all rows whole.
        parts = shardings(("embed", "vocab"), mesh, rules, shapes=weight)
        return jax.lax.with_sharding_constraint(weight, parts)

    def call(heads: Sequence[Head], rows: Any, **options: Any) -> Any:
        axis = wanted[0] if wanted else None
        if axis is not None and any(
            head.weight.shape[1] % mesh.shape[axis] for head in heads
        ):
            axis = None  # stored whole as well, see `shardings`

        def one(weights, biases, rows):
            parts = tuple(
                dataclasses.replace(head, weight=weight, bias=bias)
                for head, weight, bias in zip(heads, weights, biases, strict=True)
            )
            return function(parts, rows, vocab_axis=axis, **options)

        return jax.shard_map(
            one,
            mesh=mesh,
            in_specs=(PartitionSpec(None, axis), PartitionSpec(axis), batch),
            out_specs=batch,
        )(
            tuple(stored(head.weight) for head in heads),
            tuple(head.bias for head in heads),
            rows,
        )

    return call
