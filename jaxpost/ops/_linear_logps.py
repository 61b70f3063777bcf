"""Log-probabilities straight from hidden states, a chunk of tokens at a time.

The `[B, T, V]` logits never exist: each chunk's are built, read and dropped, forward
and backward. Knows arrays, a head and perhaps the name of a mesh axis; no model, no
loss.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpost.ops._chunks import Layout, default_chunk_size, plan_layout, plan_walk
from jaxpost.ops._dtypes import compute_dtype
from jaxpost.ops._linear_chunk import (
    Grads,
    Inputs,
    Settings,
    forward_sweep,
    gradient_sweep,
    scale_if_foreseen,
    vary_together,
    varying_axes,
    zero_grads,
)
from jaxpost.ops._logits import as_head, check_widths, entropy, logits, token_logps
from jaxpost.typing import Head, TokenStats

IMPLEMENTATIONS = ("chunked", "dense")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["columns"],
    meta_fields=["function"],
)
@dataclasses.dataclass(frozen=True)
class TokenSlopes:
    """How a loss will depend on each token's log-prob, for `grad_weights`.

    Fields:
        columns: what the slope depends on besides, float `[B, T]` each.
        function: from log-probs `[C]` of some tokens and their parts of the columns to
            the loss's derivatives by the log-probs, up to one factor common to all
            tokens, `[C]`; finite for columns of zeros.
    """

    columns: tuple[jax.Array, ...]
    function: Callable[..., jax.Array]


def linear_token_logps(
    hidden: jax.Array,
    head: Head | jax.Array,
    targets: jax.Array,
    *,
    mask: jax.Array | None = None,
    grad_weights: jax.Array | TokenSlopes | None = None,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_top1: bool = False,
    vocab_axis: str | None = None,
    implementation: str | None = None,
) -> TokenStats:
    """Log-probability of each target, without storing the logits.

    That is, under `softmax(logits(hidden, head) / temperature)`. Gradients reach
    `hidden` and the head's weight and bias, from `logps` and `entropy`. They cost four
    products of the size of the logits' in all, since the backward pass builds each
    chunk's logits again. With `grad_weights`, three: the gradients are formed in the
    forward pass, from logits that are there anyway. Under `jit` with a batch sharded
    over devices, they add up the head's gradient once per chunk; within `shard_map`
    (with or without `vocab_axis`) once per call. Reverse mode only.

    Args:
        hidden: states after the last norm, float `[B, T, D]` (any axes before `D`).
        head: a `Head`, or its bare weight `[D, V]`.
        targets: what `hidden[:, t]` predicts (`shift_targets`), integer `[B, T]`, in
            `[0, V)`; an id outside gives NaN.
        mask: tokens to score, bool `[B, T]`; None for all. The others cost no product
            with the head, their statistics are zero, and whatever they hold, even NaN,
            reaches no result and no gradient.
        grad_weights: what the loss will multiply `logps` with, up to one factor common
            to all tokens, bool or float `[B, T]`: the loss mask, for a mean over
            tokens. Also the mask: tokens of weight zero are not scored. Otherwise a
            hint for speed only: should the cotangent of `logps` turn out different, or
            that of `entropy` not zero, the backward pass computes the gradients anew.
            No gradient reaches it. Where the factor depends on the log-prob, as that of
            a probability ratio does, `TokenSlopes`, which may go with `mask`.
        chunk_size: tokens per chunk; None chooses: 32 MiB of logits, but at least 512
            tokens on CPU and 2048 elsewhere.
        temperature: divides the (capped) logits.
        with_entropy: also return the entropy of the whole distribution.
        with_top1: also return 1.0 where the target is the greedy choice (the first of
            the highest scores), 0.0 elsewhere.
        vocab_axis: inside `shard_map`, the mesh axis over which the head's `V` is split
            into equal parts in order; `hidden` and `targets` must not differ along it.
            Only sums and maxima per token are communicated forward, and the gradient of
            `hidden` backward.
        implementation: `"chunked"`; `"dense"`, the plain reference, which stores the
            logits; or None to choose (`"chunked"`).

    Returns:
        `TokenStats(logps, entropy, top1)`, each `[B, T]`, float32 or wider, nats; None
        where not asked for.

    Raises:
        ValueError: shapes that do not fit; a temperature or chunk size that is not
            positive; both `mask` and `grad_weights`; an unknown implementation.
        NotImplementedError: `"dense"` with `vocab_axis`.

    Source: the chunked cross-entropy of Wijmans et al. (2024), "Cut Your Losses in
    Large-Vocabulary Language Models", and of Liger-Kernel (2024), which forms gradients
    in the forward pass; here per token, for any cotangent.
    """
    head = as_head(head)
    _check(hidden, head, targets, mask, grad_weights, chunk_size, temperature)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)} or None, got "
            f"{implementation!r}."
        )
    if mask is None and isinstance(grad_weights, jax.Array | np.ndarray):
        mask = grad_weights.astype(bool)
    if implementation == "dense":
        if vocab_axis is not None:
            raise NotImplementedError(
                "implementation='dense' holds whole rows of logits; use 'chunked' with "
                f"vocab_axis={vocab_axis!r}."
            )
        return _dense(hidden, head, targets, mask, temperature, with_entropy, with_top1)
    dtype = compute_dtype(hidden, head.weight)
    if chunk_size is None:
        chunk_size = default_chunk_size(head.weight.shape[1], dtype.itemsize)
    layout = plan_layout(targets.shape, chunk_size)
    settings = Settings(
        layout.columns,
        dtype,
        head.scale,
        head.softcap,
        float(temperature),
        with_entropy,
        with_top1,
        vocab_axis,
        grad_weights.function if isinstance(grad_weights, TokenSlopes) else None,
    )
    return _chunked(settings, layout, hidden, head, targets, mask, grad_weights)


def _chunked(settings, layout: Layout, hidden, head, targets, mask, grad_weights):
    """Bring scored tokens to the front of their rows, sweep, put results back."""
    walk = plan_walk(layout, mask)
    if isinstance(grad_weights, TokenSlopes):
        grad_weights = grad_weights.columns
    grad_weights = jax.tree.map(
        lambda x: walk.bring(lax.stop_gradient(x).astype(settings.dtype)), grad_weights
    )
    inputs = Inputs(
        walk.bring(hidden),
        head.weight,
        head.bias,
        walk.bring(targets),
        grad_weights,
        walk.trips,
    )
    found: Any = _sweep(settings, vary_together(inputs))
    logps, *others = found
    return TokenStats(
        walk.take_back(logps),
        *(x if x is None else walk.take_back(x) for x in others),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sweep(settings: Settings, inputs: Inputs):
    stats, _ = forward_sweep(settings, inputs, with_grads=False)
    return stats.logps, stats.entropy, stats.top1


def _sweep_fwd(settings, inputs):
    with_grads = inputs.grad_weights is not None
    stats, grads = forward_sweep(settings, inputs, with_grads=with_grads)
    return (stats.logps, stats.entropy, stats.top1), (inputs, stats, grads)


def _sweep_bwd(settings, saved, cotangents):
    inputs, stats, grads = saved
    logps_bar, entropy_bar, _ = cotangents
    if settings.vocab_axis is not None and not varying_axes(inputs.hidden):
        # An unchecked shard_map: a sum over devices is transposed to a sum.
        logps_bar, entropy_bar = lax.psum((logps_bar, entropy_bar), settings.vocab_axis)
    if grads is None:
        start, trips = zero_grads(settings, inputs), inputs.trips
    else:
        weights, bars = stats.weights, (logps_bar, entropy_bar)
        if weights is None:
            # Tokens of weight zero were not scored: nothing is to be had from theirs.
            weights = inputs.grad_weights
            bars = jax.tree.map(lambda bar: jnp.where(weights != 0, bar, 0), bars)
        start, trips = scale_if_foreseen(weights, inputs.trips, grads, *bars)
    bars = gradient_sweep(settings, inputs, stats, logps_bar, entropy_bar, start, trips)
    bars = jax.tree.map(
        lambda bar, x: bar.astype(x.dtype),
        bars,
        Grads(inputs.hidden, inputs.weight, inputs.bias),
    )
    return (
        Inputs(
            bars.hidden,
            bars.weight,
            bars.bias,
            np.zeros(inputs.targets.shape, jax.dtypes.float0),  # type: ignore[arg-type]
            jax.tree.map(jnp.zeros_like, inputs.grad_weights),
            np.zeros((), jax.dtypes.float0),  # type: ignore[arg-type]
        ),
    )


_sweep.defvjp(_sweep_fwd, _sweep_bwd)


def _dense(hidden, head, targets, mask, temperature, with_entropy, with_top1):
    """The plain reference, with the logits in memory."""
    if mask is not None:
        hidden = jnp.where(mask[..., None], hidden, jnp.zeros((), hidden.dtype))
    scores = logits(hidden, head) / temperature
    inside = (targets >= 0) & (targets < scores.shape[-1])
    logps = token_logps(scores, jnp.where(inside, targets, 0))
    logps = jnp.where(inside, logps, jnp.nan)
    hits = jnp.argmax(scores, axis=-1).astype(targets.dtype) == targets
    stats = TokenStats(
        logps,
        entropy(scores) if with_entropy else None,
        hits.astype(scores.dtype) if with_top1 else None,
    )
    if mask is None:
        return stats
    return jax.tree.map(lambda x: jnp.where(mask, x, jnp.zeros((), x.dtype)), stats)


def _check(hidden, head, targets, mask, grad_weights, chunk_size, temperature):
    check_widths(hidden, head)
    if hidden.ndim < 2 or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            "targets must be [B, T] for hidden [B, T, D], got "
            f"{targets.shape} and {hidden.shape}."
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers, got dtype {targets.dtype}.")
    columns = {"grad_weights": grad_weights}
    if isinstance(grad_weights, TokenSlopes):
        columns = {
            f"grad_weights.columns[{i}]": x for i, x in enumerate(grad_weights.columns)
        }
    elif mask is not None and grad_weights is not None:
        raise ValueError(
            "give mask or grad_weights, not both: tokens of weight zero are masked."
        )
    if mask is not None and mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be boolean, got dtype {mask.dtype}.")
    for name, x in {"mask": mask, **columns}.items():
        if x is not None and x.shape != targets.shape:
            raise ValueError(
                f"{name} must have the shape of targets {targets.shape}, got {x.shape}."
            )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
