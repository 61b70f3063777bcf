"""The key/value cache: slot number equals token position."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._config import DecoderConfig

APART_BYTES = 256 * 2**20
"""Largest layers, all together in float32, that are decoded one by one on a CPU."""


class KVCache(NamedTuple):
    """Keys and values of every layer by position.

    Slot `s` of row `b` holds the token at position `s` that was written last. Slots
    beyond a row's current position may be stale: causality hides them.

    Fields:
        k, v: `[L, B, K, S, H]`: heads before slots, so that a decoding step reads a
            layer without transposing it (1.5 times faster on CPU). Or a tuple of the
            layers, `[B, K, S, H]` each: then the model does not scan them, see
            `layers_apart`.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]


def layers_apart(config: DecoderConfig) -> bool:
    """Whether the cache keeps its layers apart, for a program without a scan.

    XLA on CPU copies what a scan slices, so each decoding step would copy every layer's
    weights, keys and values. Layers one by one read them where they are (weights are
    sliced once for a whole loop of steps). That takes memory and, the deeper a model,
    time to compile: small models only.
    """
    width, heads = config.hidden_size, config.num_heads + config.num_kv_heads
    layer = 2 * width * heads * config.head_dim + 3 * width * config.intermediate_size
    small = 4 * config.num_layers * layer <= APART_BYTES
    return small and jax.default_backend() == "cpu"


def init_cache(
    config: DecoderConfig,
    batch: int,
    length: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> KVCache:
    """An empty cache for `batch` rows of at most `length` positions."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)

    def zeros() -> jax.Array | tuple[jax.Array, ...]:
        if layers_apart(config):
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
        return jnp.zeros((config.num_layers, *shape), dtype)

    return KVCache(zeros(), zeros())


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
        layer: which one, int scalar; a Python int if they are apart.
        key, value: `[B, T, K, H]`.
        positions: slots to write, int32 `[B, T]`.
        segments: int32 `[B, T]`; tokens of segment 0 are not written.

    Returns:
        The updated cache; keys and values of this layer, `[B, S, K, H]`.
    """
    length = jax.tree.leaves(cache)[0].shape[-2]
    slots = positions
    if segments is not None:
        slots = jnp.where(segments != 0, positions, length)
    rows = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]

    def write(stored, new):
        new = new.astype(jax.tree.leaves(stored)[0].dtype)
        # A scatter at (layer, row, slot) updates in place inside a decoding loop.
        if isinstance(stored, tuple):
            whole = stored[layer].at[rows, :, slots].set(new, mode="drop")
            stored = (*stored[:layer], whole, *stored[layer + 1 :])
        else:
            stored = stored.at[layer, rows, :, slots].set(new, mode="drop")
            whole = jax.lax.dynamic_index_in_dim(stored, layer, keepdims=False)
        return stored, whole.swapaxes(1, 2)

    k, keys = write(cache.k, key)
    v, values = write(cache.v, value)
    return KVCache(k, v), keys, values
