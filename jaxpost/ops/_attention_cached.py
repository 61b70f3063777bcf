"""Attention of one new token per row to its cache, in the cache's own layout."""

import functools

import chex
import jax
import jax.numpy as jnp

from ._attention_scores import check_heads, score_weights

LONG_CACHE = 256
"""Slots from which on the CPU looks how much of a cache is in use."""


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    positions: jax.Array,
    segments: jax.Array | None = None,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """`attention` of a single query per row to the slots of a cache.

    Slot `s` holds the key and value of position `s`; a query sees those from its own
    position down. The layout lets both products read the cache as it lies. Scores and
    softmax are float32 or wider. Whatever a query may not see changes nothing for it,
    even NaN; a query of segment 0 gets zeros.

    Args:
        query: `[B, N, H]`.
        key: `[B, K, H, S]` with `N` a multiple of `K`, any float dtype.
        value: `[B, K, S, H]`.
        positions: of the queries, int32 `[B]`.
        segments: of the queries, int32 `[B]`, 0 where padded, or None.
        window: how many positions back a query sees, itself included; an int, an int32
            scalar, or None for all.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        scale: factor on scores, before the cap; None is `H ** -0.5`.

    Returns:
        `[B, N, H]` in the dtype of `query`.

    Raises:
        ValueError: `N` is not a multiple of `K`.
        AssertionError: shapes differ.

    Source: as `attention`.
    """
    chex.assert_rank([query, key, value], [3, 4, 4])
    batch, heads, width = query.shape
    kv_heads, slots = key.shape[1], key.shape[3]
    chex.assert_shape(key, (batch, kv_heads, width, slots))
    chex.assert_shape(value, (batch, kv_heads, slots, width))
    chex.assert_shape(positions, (batch,))
    check_heads(heads, kv_heads)
    if segments is not None:
        chex.assert_shape(segments, (batch,))
        query = jnp.where((segments != 0)[:, None, None], query, jnp.zeros_like(query))
    seen = _seen_slots(slots, positions, segments, window)
    factor = float(width**-0.5 if scale is None else scale)
    # Groups of heads that share keys and values are the rows of one product.
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)

    # Elsewhere than on CPU a branch costs more than the copies it spares.
    if jax.default_backend() != "cpu":
        mixed = _mix_seen(grouped, key, value, seen, softcap, factor)
    else:
        needed = positions
        if segments is not None:
            needed = jnp.where(segments != 0, positions, 0)
        mixed = _mix_beginning(
            grouped, key, value, seen, jnp.max(needed), softcap, factor
        )
    return mixed.reshape(query.shape).astype(query.dtype)


def _seen_slots(slots, positions, segments, window):
    """Which slots each query sees, bool `[B, S]`."""
    distance = positions[:, None] - jnp.arange(slots, dtype=jnp.int32)[None]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if segments is not None:
        seen &= (segments != 0)[:, None]
    return seen


def _mix_seen(query, key, value, seen, softcap, scale):
    """Values mixed per query, `[B, K, G, H]`; what nobody sees is zeroed first.

    Args:
        query: `[B, K, G, H]`.
        key, value: as in `cached_attention`.
        seen: bool `[B, S]`.
    """
    visible = seen[:, None, None, :]
    key = jnp.where(visible, key, jnp.zeros_like(key))
    value = jnp.where(visible.swapaxes(2, 3), value, jnp.zeros_like(value))
    return _mix(query, key, value, seen, softcap, scale)[0]


def _mix_beginning(query, key, value, seen, last, softcap, scale):
    """`_mix_uncopied` of a quarter, a half or all of the cache: what holds slot `last`.

    Cutting copies, but reads less from memory; a short cache is read whole.
    """
    slots = seen.shape[1]
    sizes = [slots // 4, slots // 2, slots] if slots >= LONG_CACHE else [slots]

    def mix(size):
        parts = key[..., :size], value[:, :, :size], seen[:, :size]
        return _mix_uncopied(query, *parts, softcap, scale)

    shorter = jnp.asarray(sizes[:-1], jnp.int32)
    which = jnp.sum(last >= shorter, dtype=jnp.int32)
    return jax.lax.switch(which, [functools.partial(mix, size) for size in sizes])


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _mix_uncopied(query, key, value, seen, softcap, scale):
    """`_mix_seen` that copies keys and values only where it has to.

    What nobody sees has weight 0, and harms only if it is not finite.
    """
    mixed, probe = _mix(query, key, value, seen, softcap, scale)
    return jax.lax.cond(
        jnp.isfinite(probe),
        lambda: mixed,
        lambda: _mix_seen(query, key, value, seen, softcap, scale),
    )


@_mix_uncopied.defjvp
def _mix_uncopied_jvp(softcap, scale, primals, tangents):
    # A gradient through both branches would multiply zeros with what is not finite.
    arrays, seen = primals[:3], primals[3]

    def mix(query, key, value):
        return _mix_seen(query, key, value, seen, softcap, scale)

    return jax.jvp(mix, arrays, tangents[:3])


def _mix(query, key, value, seen, softcap, scale):
    """As `_mix_seen`, of all keys; and a number that is finite if all is."""
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = scale * jnp.matmul(query, key, preferred_element_type=wide)
    weights, total = score_weights(scores, seen[:, None, None, :], softcap)
    mixed = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=wide)
    mixed = mixed / total
    return mixed, jnp.sum(scores) + jnp.sum(mixed)
