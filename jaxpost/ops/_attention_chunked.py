"""Attention block by block with an online softmax, and its own backward pass.

Memory is linear in length: the forward pass keeps outputs and log-sum-exps, the
backward pass recomputes one block of scores at a time (Dao et al. 2022,
"FlashAttention", algorithms 1 and 4). Which key blocks a query block may see is data
(positions and segments are traced), so the inner loop goes through a list made at run
time: causality, windows, packing, other branches and padding skip work without a
promise from the caller.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpost.typing import BRANCH

from ._branches import branch_numbers, same_branch

# 128 x 128 was the fastest on CPU (a block of scores stays in cache).
_BLOCK_CPU = 128
_BLOCK_ACCELERATOR = 512
_FAR = 2**30
_MOST_BRANCHES = 2**31 // BRANCH  # in int32 ids: a segment and its branch fit too
_LOWEST = -1e30  # finite, so that a difference of two is 0 and not NaN


def allowed_pairs(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    window: int | jax.Array | None,
) -> jax.Array:
    """Which keys each query sees: bool `[B, T, S]` of `[B, T]` and `[B, S]`."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if query_segments is not None:
        allowed &= (query_segments != 0)[:, :, None]
    if key_segments is not None:
        allowed &= (key_segments != 0)[:, None, :]
    if query_segments is not None and key_segments is not None:
        allowed &= same_branch(query_segments[:, :, None], key_segments[:, None, :])
    return allowed


def poison_keys(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Move what is not finite from values into keys.

    A masked weight of exactly 0 times a NaN value is NaN, but a NaN score is dropped
    by the mask; so exactly the queries that may see the value become NaN.
    """
    finite = jnp.isfinite(value)
    whole = jnp.all(finite, axis=-1, keepdims=True)
    nan = jnp.full_like(key, jnp.nan)
    return jnp.where(whole, key, nan), jnp.where(finite, value, jnp.zeros_like(value))


class _Layout(NamedTuple):
    """Static numbers of one call: blocks, heads, and the score function."""

    query_blocks: int
    key_blocks: int
    heads: int
    kv_heads: int
    softcap: float | None
    scale: float


def attention_block() -> int:
    """Most queries, and keys, of a block of "chunked" attention."""
    return _BLOCK_CPU if jax.default_backend() == "cpu" else _BLOCK_ACCELERATOR


def chunked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: tuple,
    *,
    softcap: float | None,
    scale: float,
    block: int | None = None,
) -> jax.Array:
    """See `attention`; `mask` is the tuple of arguments of `allowed_pairs`."""
    block = attention_block() if block is None else block
    length, keys = query.shape[1], key.shape[1]
    query_blocks, key_blocks = -(-length // block), -(-keys // block)
    pad_queries = -length % query_blocks
    pad_keys = -keys % key_blocks
    query_positions, key_positions, query_segments, key_segments, window = mask
    if query_segments is None:
        query_segments = jnp.ones_like(query_positions)
    mask = (
        _pad(query_positions, pad_queries),
        _pad(key_positions, pad_keys, _FAR),
        _pad(query_segments, pad_queries),
        None if key_segments is None else _pad(key_segments, pad_keys),
        None if window is None else jnp.asarray(window, jnp.int32),
    )
    layout = _Layout(
        query_blocks, key_blocks, query.shape[2], key.shape[2], softcap, scale
    )
    mixed: jax.Array = _blockwise(  # pyright: ignore[reportAssignmentType]
        layout,
        _pad(query, pad_queries),
        _pad(key, pad_keys),
        _pad(value, pad_keys),
        mask,
    )
    return mixed[:, :length]


def _pad(x: jax.Array, count: int, fill: int = 0) -> jax.Array:
    if count == 0:
        return x
    widths = [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(layout, query, key, value, mask) -> jax.Array:
    return _forward(layout, query, key, value, mask)[0]


def _forward(layout, query, key, value, mask):
    queries = _query_blocks(query, layout)
    poisoned, clean = poison_keys(key, value)
    keys, values = _key_blocks(poisoned, layout), _key_blocks(clean, layout)
    blocks = _mask_blocks(mask, layout)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    size, width = queries.shape[3], queries.shape[4]
    rows = (*queries.shape[1:3], size)  # [B, K, G * block]

    def query_step(_, inputs):
        number, block_query, seen_blocks, count = inputs

        def key_step(turn, carry):
            peak, total, mixed = carry
            j = seen_blocks[turn]
            scores, _ = _scores(block_query, keys[j], layout)
            seen = _pairs(blocks, number, j, size)
            scores = jnp.where(seen, scores, _LOWEST)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
            weights = jnp.where(seen, jnp.exp(scores - new_peak[..., None]), 0.0)
            shrink = jnp.exp(peak - new_peak)
            update = _dot(weights.astype(query.dtype), values[j], "bkts,bksh->bkth")
            total = total * shrink + jnp.sum(weights, axis=-1)
            return new_peak, total, mixed * shrink[..., None] + update

        start = (
            jnp.full(rows, _LOWEST, wide),
            jnp.zeros(rows, wide),
            jnp.zeros((*rows, width), wide),
        )
        peak, total, mixed = jax.lax.fori_loop(0, count, key_step, start)
        empty = total == 0
        safe = jnp.where(empty, 1.0, total)
        lse = jnp.where(empty, jnp.inf, peak + jnp.log(safe))
        return None, ((mixed / safe[..., None]).astype(query.dtype), lse)

    numbers = jnp.arange(layout.query_blocks, dtype=jnp.int32)
    lists = checkpoint_name(_seen_blocks(blocks), "attention")
    _, (mixed, lse) = jax.lax.scan(query_step, None, (numbers, queries, *lists))
    # Named for rematerialisation policies: costly to compute, cheap to keep.
    mixed = checkpoint_name(_from_query_blocks(mixed, layout), "attention")
    lse = checkpoint_name(lse, "attention")
    return mixed, (query, key, value, mask, mixed, lse, lists)


def _backward(layout, residuals, gradient):
    query, key, value, mask, mixed, lse, lists = residuals
    query_positions, key_positions, query_segments, key_segments, window = mask
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # Rows that nothing depends on take no part, so their NaNs do not spread.
    active = jnp.any(gradient != 0, axis=(2, 3))
    query_segments = jnp.where(active, query_segments, 0)
    mask = (query_positions, key_positions, query_segments, key_segments, window)
    delta = jnp.sum(gradient.astype(wide) * mixed.astype(wide), axis=-1, keepdims=True)
    queries = _query_blocks(_finite(query), layout)
    deltas = _query_blocks(delta, layout)
    gradients = _query_blocks(gradient, layout)
    seeing = lse[..., None] != jnp.inf
    gradients = jnp.where(seeing, gradients, jnp.zeros_like(gradients))
    keys, values = (_key_blocks(_finite(x), layout) for x in (key, value))
    blocks = _mask_blocks(mask, layout)
    size = queries.shape[3]

    def query_step(carry, inputs):
        number, block_query, block_gradient, block_delta, block_lse = inputs[:5]
        seen_blocks, count = inputs[5:]

        def key_step(turn, carry):
            d_query, d_keys, d_values = carry
            j = seen_blocks[turn]
            scores, slope = _scores(block_query, keys[j], layout)
            seen = _pairs(blocks, number, j, size)
            weights = jnp.where(seen, jnp.exp(scores - block_lse[..., None]), 0.0)
            d_weights = _dot(block_gradient, values[j], "bkth,bksh->bkts")
            d_scores = weights * (d_weights - block_delta)
            if slope is not None:
                d_scores = d_scores * slope
            # Masked again: a row that saw NaN has a NaN delta in masked places too.
            d_scores = jnp.where(seen, d_scores, 0.0).astype(query.dtype)
            weights = weights.astype(query.dtype)
            d_query = d_query + _dot(d_scores, keys[j], "bkts,bksh->bkth")
            # Transposed: on CPU these products then run at nearly twice the speed.
            d_key = _dot(d_scores, block_query, "bkts,bkth->bkhs")
            d_value = _dot(weights, block_gradient, "bkts,bkth->bkhs")
            return d_query, d_keys.at[j].add(d_key), d_values.at[j].add(d_value)

        start = (jnp.zeros(block_query.shape, wide), *carry)
        d_query, *carry = jax.lax.fori_loop(0, count, key_step, start)
        return tuple(carry), d_query

    numbers = jnp.arange(layout.query_blocks, dtype=jnp.int32)
    zeros = jnp.zeros(keys.swapaxes(3, 4).shape, wide)
    inputs = (numbers, queries, gradients, deltas, lse, *lists)
    (d_keys, d_values), d_queries = jax.lax.scan(query_step, (zeros, zeros), inputs)
    d_keys, d_values = d_keys.swapaxes(3, 4), d_values.swapaxes(3, 4)
    d_query = layout.scale * _from_query_blocks(d_queries, layout)
    d_key = layout.scale * _from_key_blocks(d_keys)
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        _from_key_blocks(d_values).astype(value.dtype),
        None,
    )


_blockwise.defvjp(_forward, _backward)


def _dot(left: jax.Array, right: jax.Array, letters: str) -> jax.Array:
    wide = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.einsum(letters, left, right, preferred_element_type=wide)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def _scores(query, key, layout):
    """Scores of one block, float32 or wider, and the slope of their cap if any."""
    scores = layout.scale * _dot(query, key, "bkth,bksh->bkts")
    if layout.softcap is None:
        return scores, None
    ratio = jnp.tanh(scores / layout.softcap)
    return layout.softcap * ratio, 1.0 - jnp.square(ratio)


class _MaskBlocks(NamedTuple):
    """What `allowed_pairs` needs, by block: `[blocks, B, block]`, and the window."""

    query_positions: jax.Array
    key_positions: jax.Array
    query_segments: jax.Array
    key_segments: jax.Array | None
    window: jax.Array | None


def _mask_blocks(mask, layout) -> _MaskBlocks:
    def split(x, count):
        return x.reshape(x.shape[0], count, -1).swapaxes(0, 1)

    query_positions, key_positions, query_segments, key_segments, window = mask
    return _MaskBlocks(
        split(query_positions, layout.query_blocks),
        split(key_positions, layout.key_blocks),
        split(query_segments, layout.query_blocks),
        None if key_segments is None else split(key_segments, layout.key_blocks),
        window,
    )


def _pairs(blocks: _MaskBlocks, i, j, size: int) -> jax.Array:
    """Allowed pairs of query block `i` and key block `j`, `[B, 1, size, block]`."""
    segments = None if blocks.key_segments is None else blocks.key_segments[j]
    allowed = allowed_pairs(
        blocks.query_positions[i],
        blocks.key_positions[j],
        blocks.query_segments[i],
        segments,
        blocks.window,
    )
    groups = size // allowed.shape[1]  # heads that share a key, stacked along queries
    return jnp.tile(allowed, (1, groups, 1))[:, None]


def _seen_blocks(blocks: _MaskBlocks) -> tuple[jax.Array, jax.Array]:
    """Key blocks that each query block may see, ascending `[Q, S]`, and how many `[Q]`;
    what comes after those is of no use.

    Blocks are compared by extremes and, where rows allow it, by their places: there may
    be too many of them, never too few.
    """
    valid_query = blocks.query_segments != 0
    first_query, last_query = _extremes(blocks.query_positions, valid_query)
    if blocks.key_segments is None:
        valid_key = jnp.ones_like(blocks.key_positions, bool)
    else:
        valid_key = blocks.key_segments != 0
    first_key, last_key = _extremes(blocks.key_positions, valid_key)
    touch = last_query[:, None] >= first_key[None, :]  # [Q, S, B]
    if blocks.window is not None:
        touch &= first_query[:, None] - last_key[None, :] < blocks.window
    if blocks.key_segments is not None:
        query_segments, key_segments = blocks.query_segments, blocks.key_segments
        touch &= _overlap(
            _extremes(query_segments % BRANCH, valid_query),
            _extremes(key_segments % BRANCH, valid_key),
        )
        branches = _extremes(branch_numbers(key_segments), valid_key)
        touch &= (branches[0] == 0)[None, :] | _overlap(
            _extremes(branch_numbers(query_segments), valid_query), branches
        )
    touch &= jnp.any(valid_query, axis=2)[:, None] & jnp.any(valid_key, axis=2)[None]
    if blocks.key_segments is not None and valid_query.shape == valid_key.shape:
        # Where two answers, or two packed texts, meet within a block, extremes alone
        # would have it look at the next block too.
        later = ~jnp.tri(len(valid_query), dtype=bool)
        touch &= ~(later[:, :, None] & _in_order(blocks)[None, None])
    some = jnp.any(touch, axis=2)
    numbers = jnp.arange(some.shape[1], dtype=jnp.int32)
    numbers = jnp.sort(jnp.where(some, numbers, some.shape[1]), axis=1)
    return numbers, jnp.sum(some, axis=1, dtype=jnp.int32)


def _in_order(blocks: _MaskBlocks) -> jax.Array:
    """Whether no query of a row sees a key that comes after it in the row, `[B]`.

    So it is if queries and keys have the same positions and segments, trunks come
    before their branches and these in the order of their numbers, each in one piece
    with rising positions. Some rows may be in order and not be found to be.
    """
    positions, segments = (
        jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
        for x in (blocks.query_positions, blocks.query_segments)
    )
    real = segments != 0
    ranks = segments % BRANCH * _MOST_BRANCHES + branch_numbers(segments)
    ranks = jnp.where(real, ranks, -1)
    highest = jax.lax.cummax(ranks, axis=1)[:, :-1]
    goes_on = ranks[:, 1:] == ranks[:, :-1]
    goes_on &= positions[:, 1:] > positions[:, :-1]
    sorted_rows = jnp.all((ranks[:, 1:] > highest) | goes_on | ~real[:, 1:], axis=1)
    same = (blocks.query_segments == blocks.key_segments) & (
        (blocks.query_positions == blocks.key_positions) | (blocks.query_segments == 0)
    )
    return sorted_rows & jnp.all(same, axis=(0, 2))


def _overlap(queries, keys) -> jax.Array:
    """Whether ranges `(low, high)` of query and key blocks meet, `[Q, S, B]`."""
    (low_query, high_query), (low_key, high_key) = queries, keys
    reach = high_query[:, None] >= low_key[None, :]
    return reach & (high_key[None, :] >= low_query[:, None])


def _extremes(x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    low = jnp.min(jnp.where(valid, x, _FAR), axis=-1)
    return low, jnp.max(jnp.where(valid, x, -_FAR), axis=-1)


def _query_blocks(x: jax.Array, layout: _Layout) -> jax.Array:
    """`[B, T, N, H] -> [Q, B, K, G * block, H]`: heads of one key side by side."""
    batch, length, heads, width = x.shape
    blocks, kv_heads = layout.query_blocks, layout.kv_heads
    groups, block = heads // kv_heads, length // blocks
    x = x.reshape(batch, blocks, block, kv_heads, groups, width)
    x = x.transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(blocks, batch, kv_heads, groups * block, width)


def _from_query_blocks(x: jax.Array, layout: _Layout) -> jax.Array:
    """`[Q, B, K, G * block, H] -> [B, T, N, H]`."""
    blocks, batch, kv_heads, _, width = x.shape
    groups = layout.heads // kv_heads
    x = x.reshape(blocks, batch, kv_heads, groups, -1, width)
    x = x.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, -1, layout.heads, width)


def _key_blocks(x: jax.Array, layout: _Layout) -> jax.Array:
    """`[B, S, K, H] -> [blocks, B, K, block, H]`."""
    batch, _, heads, width = x.shape
    x = x.reshape(batch, layout.key_blocks, -1, heads, width)
    return x.transpose(1, 0, 3, 2, 4)


def _from_key_blocks(x: jax.Array) -> jax.Array:
    """`[blocks, B, K, block, H] -> [B, S, K, H]`."""
    blocks, batch, heads, block, width = x.shape
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(batch, blocks * block, heads, width)
