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
        k, v: `[L, B, K, S, H]`: heads before slots, so that a decoding step reads a
            layer without transposing it (1.5 times faster on CPU).
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
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
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
        slots = jnp.where(segments != 0, positions, cache.k.shape[3])
    rows = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]

    def write(stored: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
        # A scatter at (layer, row, slot) updates in place inside a decoding loop.
        where = stored.at[layer, rows, :, slots]
        stored = where.set(new.astype(stored.dtype), mode="drop")
        whole = jax.lax.dynamic_index_in_dim(stored, layer, keepdims=False)
        return stored, whole.swapaxes(1, 2)

    k, keys = write(cache.k, key)
    v, values = write(cache.v, value)
    return KVCache(k, v), keys, values
