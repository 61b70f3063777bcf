"""The key/value cache: slot number equals token position."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._config import DecoderConfig


class KVCache(NamedTuple):
    """Keys and values of every layer by position.

    Slot `s` of row `b` holds the token at position `s` that was written last. Slots
    beyond a row's current position may be stale: causality hides them.

    Fields:
        k, v: `[L, B, S, K, H]`.
    """

    k: jax.Array
    v: jax.Array


def init_cache(
    config: DecoderConfig,
    batch: int,
    length: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> KVCache:
    """An empty cache for `batch` rows of at most `length` positions."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def update_layer(
    cache: KVCache,
    layer: jax.Array | int,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    segments: jax.Array | None,
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Write new keys and values at their positions; return the layer's whole rows.

    Args:
        cache: all layers.
        layer: which one, int scalar.
        key, value: `[B, T, K, H]`.
        positions: slots to write, int32 `[B, T]`.
        segments: int32 `[B, T]`; tokens of segment 0 are not written.

    Returns:
        The updated cache; keys and values of this layer, `[B, S, K, H]`.
    """
    slots = positions
    if segments is not None:
        slots = jnp.where(segments != 0, positions, cache.k.shape[2])
    rows = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]
    k = cache.k.at[layer, rows, slots].set(key.astype(cache.k.dtype), mode="drop")
    v = cache.v.at[layer, rows, slots].set(value.astype(cache.v.dtype), mode="drop")
    cache = KVCache(k, v)
    key = jax.lax.dynamic_index_in_dim(k, layer, keepdims=False)
    value = jax.lax.dynamic_index_in_dim(v, layer, keepdims=False)
    return cache, key.astype(value.dtype), value
