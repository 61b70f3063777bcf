"""Draw tokens from logits, exactly, with the numbers a trainer needs.

One pass of exponentials serves the draw, the log-probability and the entropy. Draws are
by inverse CDF in two levels: a block of the vocabulary by its mass, then a token within
the block. That needs two uniform numbers per sequence instead of one Gumbel number per
word of the vocabulary, and no cumulative sum over the whole vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.generation._config import SamplerPlan, SamplerValues

BLOCK = 128
"""Vocabulary entries per block of the two-level draw."""

NEAR = 1e-5
"""How close a draw is to another one that rounding might turn it into, at most."""


class Draw(NamedTuple):
    """A drawn token per sequence and its statistics, `[B]` each.

    Fields:
        tokens: int32.
        logps: log-probability under raw / temperature, float32, nats.
        sampling_logps: under the distribution drawn from, float32, nats.
        entropies: of raw / temperature, float32, nats.
        near: the draw is within `NEAR` of another token, bool: a cumulative sum of its
            level, the border of a filter (both as fractions of the mass), or a second
            largest logit if greedy.
    """

    tokens: jax.Array
    logps: jax.Array
    sampling_logps: jax.Array
    entropies: jax.Array
    near: jax.Array


def sample(
    raw: jax.Array,
    processed: jax.Array,
    uniforms: jax.Array,
    plan: SamplerPlan,
    values: SamplerValues,
) -> Draw:
    """One token per row.

    A token of probability zero is never drawn, whatever the rounding. Uniform numbers
    have 23 bits on each level, so tokens below about 1e-7 of their block's mass, and
    blocks below 1e-7 of the whole, are drawn only as often as that grid allows.

    Args:
        raw: the model's logits, float32 `[B, V]`.
        processed: logits after the processors, float32 `[B, V]`; pass `raw` itself if
            there are none, and the softmax is computed once.
        uniforms: float32 `[B, 2]` in [0, 1).
        plan: which filters apply.
        values: their settings.

    Returns:
        The draw. Where processors forbid every token of a row, its `sampling_logps` is
        NaN or minus infinity and its token arbitrary.

    Source: inverse transform sampling, Devroye (1986), "Non-Uniform Random Variate
    Generation", section III.2.
    """
    # Subtracted before scaling, so that scaled logits are never stored.
    shifted = raw_shifted = raw - jnp.max(raw, axis=-1, keepdims=True)
    if plan.unit_temperature:
        inverse = 1.0
        weights, blocks, total, entropies = spread(raw)
        log_total = jnp.log(total)
    else:
        inverse = 1.0 / values.temperature
        shifted = raw_shifted = raw_shifted * inverse
        weights = jnp.exp(shifted)
        blocks = _block_sums(weights)
        total = jnp.sum(blocks, axis=-1)
        log_total = jnp.log(total)
        entropies = log_total - weighted_sums(weights, shifted) / total

    same = processed is raw
    if not same:
        maximum = jnp.max(processed, axis=-1, keepdims=True)
        shifted = processed - maximum
        shifted = shifted if plan.unit_temperature else shifted * inverse
    if plan.greedy:
        tokens = _first_maximum(processed)
        sampling_logps = jnp.zeros_like(total)
        near = _count(shifted >= -NEAR * inverse) > 1
    elif plan.top_k is not None:
        tokens, sampling_logps, near = _draw_top_k(
            shifted, uniforms[:, 0], plan, values
        )
    else:
        filtered = plan.use_top_p or plan.use_min_p
        border = jnp.zeros(total.shape, jnp.bool_)
        if not same or filtered:
            weights = jnp.exp(shifted)
            if filtered:
                weights, border = _keep_likely(weights, plan, values)
            blocks = _block_sums(weights)
        tokens, near = _draw_blocked(weights, blocks, uniforms)
        near |= border
        chosen = _pick(shifted, tokens)
        sampling_logps = chosen - jnp.log(jnp.sum(blocks, axis=-1))
    logps = _pick(raw_shifted, tokens) - log_total
    return Draw(tokens, logps, sampling_logps, entropies, near)


class Spread(NamedTuple):
    """A softmax at temperature 1 before its division.

    Fields:
        weights: exponentials, the largest of a row 1, `[B, V]`.
        blocks: their sums per vocabulary block, `[B, blocks]`.
        total: their sum, `[B]`.
        entropies: nats, `[B]`.
    """

    weights: jax.Array
    blocks: jax.Array
    total: jax.Array
    entropies: jax.Array


def spread(logits: jax.Array) -> Spread:
    """One pass of exponentials over `[B, V]`; minus infinity removes a token.

    A processor that asks for the raw logits' spread and the sampler at temperature 1
    compute the same, which the compiler then does once.
    """
    maximum = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - maximum)
    blocks = _block_sums(weights)
    total = jnp.sum(blocks, axis=-1)
    # Of the logits as they are: shifted ones would have to be stored. The rounding is
    # that of the logits themselves.
    mean = weighted_sums(weights, logits) / total
    entropies = jnp.log(total) + maximum[:, 0] - mean
    return Spread(weights, blocks, total, entropies)


def draw_index(weights: jax.Array, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index drawn in proportion to weights, by inverse CDF, `[B, n] -> [B]`.

    Made for small `n`: the cumulative sum is a product with a triangle of ones.
    An index of weight 0 is never returned unless all are 0.

    Returns:
        The index, int32, and whether it is within `NEAR` of another one, bool.
    """
    n = weights.shape[-1]
    cumulative = weights @ jnp.triu(jnp.ones((n, n), weights.dtype))
    total = cumulative[:, -1:]
    target = uniforms[:, None] * total
    near = jnp.any(jnp.abs(cumulative - target) < NEAR * total, axis=-1)
    positive = weights > 0.0
    index = jnp.arange(n, dtype=jnp.int32)[None]
    first = jnp.min(jnp.where((cumulative > target) & positive, index, n), axis=-1)
    # Rounding may leave the target just above the last sum.
    last = jnp.max(jnp.where(positive, index, 0), axis=-1)
    return jnp.minimum(first, last), near


def _count(condition: jax.Array) -> jax.Array:
    return jnp.sum(condition, axis=-1, dtype=jnp.int32)


def weighted_sums(weights: jax.Array, values: jax.Array) -> jax.Array:
    """`sum_v weights values` of each row, where a weight of 0 counts as 0, `[B]`."""

    def products(values: jax.Array) -> jax.Array:
        # A product per row, because XLA on CPU would store terms to be summed.
        return jnp.einsum(
            "bv,bv->b", weights, values, precision=jax.lax.Precision.HIGHEST
        )

    sums = products(values)
    # Forbidden tokens have weight 0 and value -inf, and their product is NaN.
    return jax.lax.cond(
        jnp.all(jnp.isfinite(sums)),
        lambda: sums,
        lambda: products(jnp.where(weights > 0.0, values, 0.0)),
    )


def _block_sums(weights: jax.Array) -> jax.Array:
    """Mass of each vocabulary block, `[B, V] -> [B, ceil(V / BLOCK)]`."""
    batch, vocab = weights.shape
    padding = -vocab % BLOCK
    if padding:
        weights = jnp.pad(weights, ((0, 0), (0, padding)))
    return jnp.sum(weights.reshape(batch, -1, BLOCK), axis=-1)


def _draw_blocked(
    weights: jax.Array, blocks: jax.Array, uniforms: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Token by two-level inverse CDF, int32 `[B]`; and whether it is near another."""
    vocab = weights.shape[-1]
    block, near_block = draw_index(blocks, uniforms[:, 0])
    columns = block[:, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[None]
    inside = jnp.take_along_axis(weights, jnp.minimum(columns, vocab - 1), axis=-1)
    inside = jnp.where(columns < vocab, inside, 0.0)
    token, near_token = draw_index(inside, uniforms[:, 1])
    return block * BLOCK + token, near_block | near_token


def _draw_top_k(
    shifted: jax.Array, uniforms: jax.Array, plan: SamplerPlan, values: SamplerValues
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token among the k likeliest, log-probability among those kept, `Draw.near`."""
    assert plan.top_k is not None
    top, ids = top_k(shifted, plan.top_k)  # [B, k], descending
    near = _count(shifted >= top[:, -1:] - NEAR) > plan.top_k
    weights = jnp.exp(top)
    if plan.use_top_p:
        n = plan.top_k
        before = weights @ jnp.triu(jnp.ones((n, n), weights.dtype), k=1)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        wanted = values.top_p * total
        near |= jnp.any(jnp.abs(before - wanted) < NEAR * total, axis=-1)
        weights = jnp.where(before < wanted, weights, 0.0)
    if plan.use_min_p:
        near |= _touches(weights, values.min_p)
        weights = jnp.where(weights >= values.min_p, weights, 0.0)
    index, near_index = draw_index(weights, uniforms)
    sampling_logps = _pick(top, index) - jnp.log(jnp.sum(weights, axis=-1))
    return _pick(ids, index), sampling_logps, near | near_index


def _touches(weights: jax.Array, border: jax.Array | np.ndarray) -> jax.Array:
    """Whether a weight is as good as equal to `border`, `[B, n] -> [B]` bool."""
    return jnp.any(jnp.abs(weights - border) <= NEAR * border, axis=-1)


def top_k(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest logits, descending, and their ids; ties go to the lower id.

    Looks only into the k blocks with the largest maxima, which hold all of them: a
    block left out has no entry above k blocks' maxima.
    """
    batch, vocab = logits.shape
    count = -(-vocab // BLOCK)
    if k >= count:
        return jax.lax.top_k(logits, k)
    padded = jnp.pad(
        logits, ((0, 0), (0, count * BLOCK - vocab)), constant_values=-jnp.inf
    )
    maxima = jnp.max(padded.reshape(batch, count, BLOCK), axis=-1)
    # Ascending blocks keep ids ascending, which ties rely on.
    chosen = jnp.sort(jax.lax.top_k(maxima, k)[1], axis=-1)
    columns = chosen[:, :, None] * BLOCK + jnp.arange(BLOCK)[None, None]
    columns = columns.reshape(batch, k * BLOCK)
    candidates = jnp.take_along_axis(padded, columns, axis=-1)
    top, index = jax.lax.top_k(candidates, k)
    return top, _pick_many(columns, index)


def _keep_likely(
    weights: jax.Array, plan: SamplerPlan, values: SamplerValues
) -> tuple[jax.Array, jax.Array]:
    """Weights with the unlikely ones set to 0; and whether one is near the border.

    The largest weight is 1.
    """
    near = jnp.zeros((weights.shape[0],), jnp.bool_)
    threshold = jnp.zeros((weights.shape[0],), weights.dtype)
    if plan.use_top_p:
        threshold = top_p_threshold(weights, values.top_p)
        cut = threshold[:, None]
        total = jnp.sum(weights, axis=-1)
        wanted = values.top_p * total
        mass = jnp.sum(jnp.where(weights >= cut, weights, 0.0), axis=-1)
        above = jnp.sum(jnp.where(weights > cut, weights, 0.0), axis=-1)
        # The last token kept could do without, or not suffice; or another one, as good
        # as equal, take its place.
        near = jnp.minimum(mass - wanted, wanted - above) < NEAR * total
        near |= _touches(jnp.where(weights == cut, 0.0, weights), cut)
    if plan.use_min_p:
        near |= _touches(weights, values.min_p)
        threshold = jnp.maximum(threshold, values.min_p)
    return jnp.where(weights >= threshold[:, None], weights, 0.0), near


def top_p_threshold(weights: jax.Array, top_p: jax.typing.ArrayLike) -> jax.Array:
    """Largest t such that the weights of at least t have the mass `top_p`, `[B]`.

    Bisects the float32 numbers of [0, 1] by their bit patterns, which are ordered as
    the numbers are: exact up to the rounding of the sums, without sorting.

    Args:
        weights: unnormalised probabilities, float32 `[B, V]`, the largest of a row 1.
        top_p: fraction of the mass to keep, in (0, 1).
    """
    total = jnp.sum(weights, axis=-1)
    wanted = top_p * total
    # Below this even V tokens lack the mass to matter, so the answer lies above it.
    floor = 0.5 * (1.0 - top_p) * total / weights.shape[-1]
    low = jax.lax.bitcast_convert_type(floor, jnp.int32)
    one = jax.lax.bitcast_convert_type(jnp.ones((), weights.dtype), jnp.int32)
    high = jnp.full_like(low, one + 1)

    def unsettled(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(bounds[1] - bounds[0] > 1)

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        cut = jax.lax.bitcast_convert_type(middle, weights.dtype)
        mass = jnp.sum(jnp.where(weights >= cut[:, None], weights, 0.0), axis=-1)
        enough = mass >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.while_loop(unsettled, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, weights.dtype)


def _first_maximum(logits: jax.Array) -> jax.Array:
    """Index of the first maximum, int32 `[B]`.

    Two vectorised passes: XLA's argmax is a scalar loop on CPU.
    """
    vocab = logits.shape[-1]
    index = jnp.arange(vocab, dtype=jnp.int32)[None]
    hit = logits == jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(hit, index, vocab), axis=-1)
    return jnp.minimum(first, vocab - 1)


def _pick(array: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array, index[:, None], axis=-1)[:, 0]


def _pick_many(array: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array, index, axis=-1)
