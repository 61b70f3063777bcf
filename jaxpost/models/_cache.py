"""The key/value cache: slot number equals token position."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._config import DecoderConfig


class KVCache(NamedTuple):
    """Keys and values of every layer by position.

    Slot `s` of row `b` holds the token at position `s` that was written last. Slots
    beyond a row's current position may be stale: causality hides them.

    Either all layers are in one array, which layers that are scanned need, or each has
    its own, which spares a decoding step on CPU a copy of every layer it reads.

    Fields:
        k: `[L, B, K, H, S]`, or `L` arrays `[B, K, H, S]`. Slots come last, so that a
            decoding step multiplies a query by them without transposing.
        v: `[L, B, K, S, H]`, or `L` arrays `[B, K, S, H]`.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]

    @property
    def by_layer(self) -> bool:
        """Each layer has an array of its own."""
        return isinstance(self.k, tuple)


def init_cache(
    config: DecoderConfig,
    batch: int,
    length: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    by_layer: bool | None = None,
) -> KVCache:
    """An empty cache for `batch` rows of at most `length` positions.

    `by_layer` gives each layer an array of its own; None does on CPU, where nothing
    reads a part of an array without copying it.
    """
    layers, heads, width = config.num_layers, config.num_kv_heads, config.head_dim
    keys, values = (batch, heads, width, length), (batch, heads, length, width)
    if by_layer is None:
        by_layer = jax.default_backend() == "cpu"
    if by_layer:
        return KVCache(
            tuple(jnp.zeros(keys, dtype) for _ in range(layers)),
            tuple(jnp.zeros(values, dtype) for _ in range(layers)),
        )
    return KVCache(
        jnp.zeros((layers, *keys), dtype), jnp.zeros((layers, *values), dtype)
    )


def stack_layers(cache: KVCache) -> KVCache:
    """All layers of a cache by layer in one array."""
    return KVCache(jnp.stack(cache.k), jnp.stack(cache.v))


def split_layers(cache: KVCache) -> KVCache:
    """Each layer of a stacked cache in an array of its own."""
    return KVCache(tuple(cache.k), tuple(cache.v))


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
        layer: which one, int scalar; a Python int if the cache is by layer.
        key, value: `[B, T, K, H]`.
        positions: slots to write, int32 `[B, T]`.
        segments: int32 `[B, T]`; tokens of segment 0 are not written.

    Returns:
        The updated cache; keys `[B, K, H, S]` and values `[B, K, S, H]` of this layer.
    """
    old = cache.k[0]
    slots = positions
    if segments is not None:
        slots = jnp.where(segments != 0, positions, old.shape[-1])
    rows = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]
    key, value = key.astype(old.dtype), value.astype(old.dtype)
    k, v = cache
    if isinstance(k, tuple):
        assert isinstance(layer, int)
        keys = k[layer].at[rows, :, :, slots].set(key, mode="drop")
        values = v[layer].at[rows, :, slots].set(value, mode="drop")
        k = (*k[:layer], keys, *k[layer + 1 :])
        v = (*v[:layer], values, *v[layer + 1 :])
    else:
        assert not isinstance(v, tuple)
        # A scatter at (layer, row, slot) updates in place inside a decoding loop.
        k = k.at[layer, rows, :, :, slots].set(key, mode="drop")
        v = v.at[layer, rows, :, slots].set(value, mode="drop")
        keys = jax.lax.dynamic_index_in_dim(k, layer, keepdims=False)
        values = jax.lax.dynamic_index_in_dim(v, layer, keepdims=False)
    return KVCache(k, v), keys, values
