"""Log-probabilities of a few tokens and of all others together, from hidden states.

The support of a distribution is `K` tokens of its vocabulary; the tail is the rest as
one event. Two distributions on one support are compared as arrays `[B, T, K + 1]`,
where those over the vocabulary, `[B, T, V]`, would not fit. The logits are built, read
and dropped a chunk at a time, forward and backward.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpost.ops import _linear_chunk as chunks
from jaxpost.ops._chunks import Walk, default_chunk_size, plan_layout, plan_walk
from jaxpost.ops._dtypes import compute_dtype
from jaxpost.ops._linear_chunk import Inputs, Settings
from jaxpost.ops._logits import as_head, check_widths
from jaxpost.typing import Head


class Support(NamedTuple):
    """A distribution of the next token on a few tokens and the rest.

    Fields:
        ids: which tokens, distinct, int32 `[..., K]`.
        logps: their log-probabilities in the whole vocabulary, float32 or wider
            `[..., K]`, nats.
        tail: log-probability of any other token, float32 or wider `[...]`, nats; `-inf`
            if there is none.
    """

    ids: jax.Array
    logps: jax.Array
    tail: jax.Array


def linear_top_logps(
    hidden: jax.Array,
    head: Head | jax.Array,
    k: int,
    *,
    mask: jax.Array | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    vocab_axis: str | None = None,
) -> Support:
    """The `k` most likely tokens and their log-probabilities, without gradient.

    Args:
        hidden: states after the last norm, float `[B, T, D]` (any axes before `D`).
        head: a `Head`, or its bare weight `[D, V]`.
        k: how many, at most `V`.
        mask: tokens to score, bool `[B, T]`; None for all. The others cost no product
            with the head, and their support is zeros.
        temperature: divides the (capped) logits.
        chunk_size: tokens per chunk; see `linear_token_logps`.
        vocab_axis: inside `shard_map`, the mesh axis over which the head's `V` is
            split; see `linear_token_logps`. Only maxima, sums and each part's `k` are
            communicated.

    Returns:
        `Support` of `[B, T, k]`, most likely first, of equals the smaller id first.

    Raises:
        ValueError: shapes that do not fit; `k` outside `[1, V]`; a temperature or chunk
            size that is not positive.
    """
    head = as_head(head)
    check_sweep(hidden, head, mask, chunk_size, temperature)
    vocab = head.weight.shape[1]
    parts = 1 if vocab_axis is None else lax.axis_size(vocab_axis)
    if not 1 <= k <= vocab * parts:
        raise ValueError(f"k must lie in [1, V = {vocab * parts}], got {k}.")
    hidden, head = lax.stop_gradient((hidden, head))
    settings, walk = plan_sweep(hidden, head, mask, temperature, chunk_size, vocab_axis)
    inputs = sweep_inputs(walk, hidden, head, None)

    def body(i, found):
        scores = chunks.chunk_scores(
            settings, inputs, chunks.take_chunk(inputs.hidden, i, walk.layout.columns)
        )
        values, ids = _top_scores(settings, scores, k)
        inside, tail = _log_sums(settings, scores, ids, values)
        log_norm = jnp.logaddexp(inside, tail)
        part = Support(ids, values - log_norm[:, None], tail - log_norm)
        return jax.tree.map(lambda b, x: chunks.put_chunk(b, i, x), found, part)

    empty = _empty(settings, inputs, k)
    found = lax.fori_loop(0, walk.trips, body, empty)
    return jax.tree.map(walk.take_back, found)


def linear_support_logps(
    hidden: jax.Array,
    head: Head | jax.Array,
    ids: jax.Array,
    *,
    mask: jax.Array | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    vocab_axis: str | None = None,
) -> Support:
    """Log-probabilities of given tokens and of all others, without storing the logits.

    Gradients reach `hidden` and the head's weight and bias from both; the backward pass
    builds each chunk's logits again. The tail is summed over its own tokens, so that it
    stays exact where the support holds nearly everything. Reverse mode only.

    Args:
        hidden: states after the last norm, float `[B, T, D]` (any axes before `D`).
        head: a `Head`, or its bare weight `[D, V]`.
        ids: which tokens, distinct at each place, integer `[B, T, K]` in `[0, V)`; an
            id outside gives NaN.
        mask: tokens to score, bool `[B, T]`; None for all. The others cost no product
            with the head, their support is zeros, and whatever they hold, even NaN,
            reaches no result and no gradient.
        temperature: divides the (capped) logits.
        chunk_size: tokens per chunk; see `linear_token_logps`.
        vocab_axis: inside `shard_map`, the mesh axis over which the head's `V` is split
            into equal parts in order; `hidden` and `ids` must not differ along it.

    Returns:
        `Support` of `[B, T, K]`, with the `ids` that were given where scored.

    Raises:
        ValueError: shapes that do not fit; a temperature or chunk size that is not
            positive.
    """
    head = as_head(head)
    check_sweep(hidden, head, mask, chunk_size, temperature)
    if ids.ndim != hidden.ndim or ids.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            "ids must be [B, T, K] for hidden [B, T, D], got "
            f"{ids.shape} and {hidden.shape}."
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be integers, got dtype {ids.dtype}.")
    settings, walk = plan_sweep(hidden, head, mask, temperature, chunk_size, vocab_axis)
    ids = ids.astype(jnp.int32)
    inputs = sweep_inputs(walk, hidden, head, ids)
    rest = (inputs.targets, inputs.trips)
    parts: Any = _at(settings, inputs.hidden, inputs.weight, inputs.bias, rest)
    if mask is not None:
        ids = jnp.where(mask[..., None], ids, 0)
    return Support(ids, *(walk.take_back(x) for x in parts))


def plan_sweep(
    hidden: jax.Array,
    head: Head,
    mask: jax.Array | None,
    temperature: float,
    chunk_size: int | None,
    vocab_axis: str | None,
) -> tuple[Settings, Walk]:
    """How to walk the tokens of `hidden`, and the static choices."""
    dtype = compute_dtype(hidden, head.weight)
    if chunk_size is None:
        chunk_size = default_chunk_size(head.weight.shape[1], dtype.itemsize)
    walk = plan_walk(plan_layout(hidden.shape[:-1], chunk_size), mask)
    settings = Settings(
        walk.layout.columns,
        dtype,
        head.scale,
        head.softcap,
        float(temperature),
        False,
        False,
        vocab_axis,
    )
    return settings, walk


def sweep_inputs(
    walk: Walk, hidden: jax.Array, head: Head, targets: jax.Array | None
) -> Inputs:
    """The arrays of a sweep in the order of the walk."""
    if targets is None:
        targets = jnp.zeros(hidden.shape[:-1], jnp.int32)
    inputs = Inputs(
        walk.bring(hidden),
        head.weight,
        head.bias,
        walk.bring(targets),
        None,
        walk.trips,
    )
    return chunks.vary_together(inputs)


def check_sweep(hidden, head: Head, mask, chunk_size, temperature) -> None:
    """Raise `ValueError` for what no sweep can take."""
    check_widths(hidden, head)
    if hidden.ndim < 2:
        raise ValueError(f"hidden must be [B, T, D], got {hidden.shape}.")
    if mask is not None and (
        mask.dtype != jnp.bool_ or mask.shape != hidden.shape[:-1]
    ):
        raise ValueError(
            f"mask must be bool {hidden.shape[:-1]} for hidden {hidden.shape}, got "
            f"{mask.dtype} {mask.shape}."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")


def _empty(settings: Settings, inputs: Inputs, k: int) -> Support:
    """Buffers for a support of every token of the walk."""
    axes = chunks.all_varying_axes(inputs) - {settings.vocab_axis}
    shape = inputs.hidden.shape[:2]
    return Support(
        chunks.zeros_over((*shape, k), jnp.int32, axes),
        chunks.zeros_over((*shape, k), settings.dtype, axes),
        chunks.zeros_over(shape, settings.dtype, axes),
    )


def _top_scores(settings: Settings, scores: jax.Array, k: int):
    """The `k` highest scores of `[C, V]` and their ids in the whole vocabulary."""
    axis, vocab = settings.vocab_axis, scores.shape[1]
    values, ids = lax.top_k(scores, min(k, vocab))
    if axis is None:
        return values, ids
    # Every device lays its own best into its place of an array; the sum has them all.
    index, size = lax.axis_index(axis), lax.axis_size(axis)

    def join(part):
        whole = jnp.zeros((size, *part.shape), part.dtype)
        whole = chunks.vary_over(whole, chunks.varying_axes(part))
        whole = lax.psum(lax.dynamic_update_index_in_dim(whole, part, index, 0), axis)
        return jnp.moveaxis(whole, 0, 1).reshape(part.shape[0], -1)

    values, ids = join(values), join(ids + index.astype(ids.dtype) * vocab)
    values, places = lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, places, axis=1)


def _log_sums(settings: Settings, scores, ids, chosen):
    """`logsumexp` of the chosen scores, and of all others, both `[C]`."""
    inside = jax.nn.logsumexp(chosen, axis=1)
    others = _without(settings, scores, ids)
    top = chunks.over_vocab(settings, lax.pmax, jnp.max(others, axis=1))
    safe = jnp.where(jnp.isneginf(top), jnp.zeros((), top.dtype), top)
    exps = jnp.exp(others - safe[:, None])
    total = chunks.over_vocab(settings, lax.psum, jnp.sum(exps, axis=1))
    return inside, safe + jnp.log(total)


def _without(settings: Settings, scores, ids):
    """The scores, `-inf` at `ids` `[C, K]`."""
    rows, index = _places(settings, scores, ids)
    return scores.at[rows, index].set(-jnp.inf, mode="drop")


def _places(settings: Settings, scores, ids):
    """Row and column of each of `ids` `[C, K]`; past the end where not held here."""
    count, vocab = scores.shape
    local, owned = chunks.local_ids(settings, ids, vocab)
    index = jnp.where(owned, local, vocab)
    rows = lax.broadcasted_iota(index.dtype, (count, ids.shape[1]), 0)
    return rows, index


def _chosen(settings: Settings, scores, ids):
    """The scores, and those at `ids`, `[C, K]`; NaN for ids outside the vocabulary."""
    local, owned = chunks.local_ids(settings, ids, scores.shape[1])
    found = jnp.take_along_axis(scores, jnp.where(owned, local, 0), axis=1)
    # Read before the others overwrite the scores, or both are kept.
    scores, found = lax.optimization_barrier((scores, found))
    found = chunks.over_vocab(settings, lax.psum, jnp.where(owned, found, 0))
    owners = chunks.over_vocab(settings, lax.psum, owned.astype(jnp.int32))
    return scores, jnp.where(owners == 1, found, jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _at(settings: Settings, hidden, weight, bias, rest):
    return _forward(settings, hidden, weight, bias, rest)[0]


def _forward(settings, hidden, weight, bias, rest):
    ids, trips = rest
    inputs = Inputs(hidden, weight, bias, ids, None, trips)

    def body(i, found):
        part = chunks.take_chunk(ids, i, settings.columns)
        scores = chunks.chunk_scores(
            settings, inputs, chunks.take_chunk(hidden, i, settings.columns)
        )
        scores, chosen = _chosen(settings, scores, part)
        inside, tail = _log_sums(settings, scores, part, chosen)
        log_norm = jnp.logaddexp(inside, tail)
        parts = (chosen - log_norm[:, None], tail - log_norm, log_norm)
        return tuple(
            chunks.put_chunk(b, i, x) for b, x in zip(found, parts, strict=True)
        )

    empty = _empty(settings, inputs, ids.shape[2])
    start = (empty.logps, empty.tail, empty.tail)
    logps, tail, log_norm = lax.fori_loop(0, trips, body, start)
    return (logps, tail), (hidden, weight, bias, rest, tail, log_norm)


def _backward(settings, saved, cotangents):
    hidden, weight, bias, rest, tail, log_norm = saved
    ids, trips = rest
    inputs = Inputs(hidden, weight, bias, ids, None, trips)
    if settings.vocab_axis is not None and not chunks.varying_axes(hidden):
        # An unchecked shard_map: a sum over devices is transposed to a sum.
        cotangents = lax.psum(cotangents, settings.vocab_axis)
    logps_bar, tail_bar = cotangents

    def body(i, grads):
        def take(x):
            return chunks.take_chunk(x, i, settings.columns)

        bars, rest_bar = take(logps_bar), take(tail_bar)
        live = jnp.any(bars != 0, axis=1) | (rest_bar != 0)
        part = take(hidden)
        part = jnp.where(live[:, None], part, jnp.zeros((), part.dtype))
        scores = chunks.chunk_scores(settings, inputs, part)
        # Infinity makes every probability of a dead token zero.
        norm = jnp.where(live, take(log_norm), jnp.inf)
        rest_norm = norm + take(tail)
        rest_norm = jnp.where(jnp.isneginf(take(tail)), jnp.inf, rest_norm)
        total = jnp.sum(bars, axis=1) + rest_bar
        others = _without(settings, scores, take(ids))
        slopes = rest_bar[:, None] * jnp.exp(others - rest_norm[:, None])
        slopes = slopes - total[:, None] * jnp.exp(scores - norm[:, None])
        rows, index = _places(settings, scores, take(ids))
        slopes = slopes.at[rows, index].add(bars, mode="drop")
        factor = jnp.ones_like(rest_bar)
        of_chunk = chunks.slope_grads(settings, inputs, part, scores, slopes, factor)
        return chunks.with_chunk(grads, i, of_chunk)

    found = lax.fori_loop(0, trips, body, chunks.zero_grads(settings, inputs))
    return (
        found.hidden.astype(hidden.dtype),
        found.weight.astype(weight.dtype),
        None if found.bias is None else found.bias.astype(bias.dtype),
        None,
    )


_at.defvjp(_forward, _backward)
