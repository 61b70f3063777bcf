"""The one attention: causal by positions, segmented, grouped-query."""

import jax
import jax.numpy as jnp


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of `[B, T, N, H]` queries over `[B, S, K, H]` keys."""
    del implementation
    batch, length, heads, width = query.shape
    groups = heads // key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if query_segments is not None:
        allowed &= (query_segments != 0)[:, :, None]
    if key_segments is not None:
        allowed &= (key_segments != 0)[:, None, :]
    if query_segments is not None and key_segments is not None:
        allowed &= query_segments[:, :, None] == key_segments[:, None, :]
    used = jnp.any(allowed, axis=1)[:, :, None, None]
    key = jnp.where(used, key, jnp.zeros_like(key))
    value = jnp.where(used, value, jnp.zeros_like(value))
    scale = width**-0.5 if scale is None else scale
    grouped = query.reshape(batch, length, -1, groups, width)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=wide)
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = allowed[:, None, None, :, :]
    scores = jnp.where(mask, scores, jnp.finfo(wide).min)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    mixed = jnp.einsum(
        "bkgts,bskh->btkgh",
        weights.astype(value.dtype),
        value,
        preferred_element_type=wide,
    )
    return mixed.reshape(query.shape).astype(query.dtype)
