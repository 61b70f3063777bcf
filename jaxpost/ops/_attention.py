"""The one attention: causal by positions, segmented, grouped-query, soft-capped.

This file holds the public function, its masks, the plain implementation and the cuDNN
one; `_attention_chunked` holds the implementation whose memory is linear in length.
"""

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from ._attention_chunked import allowed_pairs, chunked_attention, poison_keys
from ._attention_scores import check_heads, score_weights

Implementation = Literal["xla", "chunked", "cudnn"]


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
    """Softmax attention of each query over the keys that it may see.

    A query sees a key if `0 <= query_position - key_position < window`, neither is
    in segment 0, and both are in the same segment, or the key in the trunk of the
    query's branch (`typing.BRANCH`; compared only if both are given).
    Keys and values are shared by `N / K` neighbouring query heads and not repeated in
    memory. Scores and softmax are float32 or wider.

    Whatever a query may not see changes nothing for it, even NaN. A query that sees
    nothing gets zeros; its gradient, and that of keys nobody sees, is exactly zero.

    Args:
        query: `[B, T, N, H]`.
        key, value: `[B, S, K, H]` with `N` a multiple of `K`, any float dtype.
        query_positions: int32 `[B, T]`.
        key_positions: int32 `[B, S]`.
        query_segments: int32 `[B, T]`, 0 where padded, or None.
        key_segments: int32 `[B, S]`, 0 where padded, or None.
        window: how many positions back a query sees, itself included; an int, an int32
            scalar (it may differ by layer of a scan), or None for all.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        scale: factor on scores, before the cap; None is `H ** -0.5`.
        implementation: "xla", dense, stores `[B, N, T, S]`, differentiable to any
            order; "chunked", online softmax over blocks, skips blocks that nobody
            sees, stores outputs and log-sum-exps, reverse mode only; "cudnn", fused
            kernels of an NVIDIA GPU, half precision, no soft cap, and keys must be
            finite wherever anyone sees them. None takes "xla" for a single query,
            "cudnn" where it applies, else "chunked".

    Returns:
        `[B, T, N, H]` in the dtype of `query`.

    Raises:
        ValueError: unknown implementation, or `N` is not a multiple of `K`.
        NotImplementedError: "cudnn" without an NVIDIA GPU, in a dtype other than
            float16 and bfloat16, or with a soft cap.
        AssertionError: shapes differ.

    Source: Vaswani et al. (2017), eq. 1; grouped heads: Ainslie et al. (2023), "GQA";
    soft cap: Gemma Team (2024), "Gemma 2", section 2.
    """
    # NumPy arrays cannot be indexed by the block numbers of a traced loop.
    query_positions, key_positions = map(jnp.asarray, (query_positions, key_positions))
    query_segments = None if query_segments is None else jnp.asarray(query_segments)
    key_segments = None if key_segments is None else jnp.asarray(key_segments)
    _check(query, key, value, query_positions, key_positions)
    _check_segments(query_segments, query_positions)
    _check_segments(key_segments, key_positions)
    if implementation is None:
        implementation = _choose(query, key, softcap)
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be one of {', '.join(get_args(Implementation))} or "
            f"None, got {implementation!r}."
        )
    factor = float(query.shape[-1] ** -0.5 if scale is None else scale)
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    if implementation == "chunked":
        return chunked_attention(
            query,
            key,
            value,
            (query_positions, key_positions, query_segments, key_segments, window),
            softcap=softcap,
            scale=factor,
        )
    allowed = allowed_pairs(
        query_positions, key_positions, query_segments, key_segments, window
    )
    attend = _cudnn if implementation == "cudnn" else _dense
    return _zeroed(attend, query, key, value, allowed, softcap, factor)


def _zeroed(attend, query, key, value, allowed, softcap, scale):
    """`attend`, where queries that see nothing and keys nobody sees are zero."""
    # Zeroed first: a product with an exact zero gradient would still turn NaN.
    seeing = jnp.any(allowed, axis=2)[:, :, None, None]
    seen = jnp.any(allowed, axis=1)[:, :, None, None]
    query = jnp.where(seeing, query, jnp.zeros_like(query))
    key = jnp.where(seen, key, jnp.zeros_like(key))
    value = jnp.where(seen, value, jnp.zeros_like(value))
    mixed = attend(query, key, value, allowed, softcap, scale)
    return jnp.where(seeing, mixed, jnp.zeros_like(mixed))


def _check(query, key, value, query_positions, key_positions):
    chex.assert_rank([query, key, value], 4)
    chex.assert_equal_shape([key, value])
    batch, length, heads, width = query.shape
    chex.assert_shape(key, (batch, None, None, width))
    chex.assert_shape(query_positions, (batch, length))
    chex.assert_shape(key_positions, (batch, key.shape[1]))
    check_heads(heads, key.shape[2])


def _check_segments(segments, positions):
    if segments is not None:
        chex.assert_equal_shape([segments, positions])


def _choose(query: jax.Array, key: jax.Array, softcap: float | None) -> Implementation:
    if query.shape[1] == 1:
        return "xla"
    half = query.dtype in (jnp.float16, jnp.bfloat16)
    width = query.shape[-1]
    # What the fused kernels take in every cuDNN version of the last years.
    fits = width % 8 == 0 and width <= 128
    fits = fits and query.shape[1] % 64 == 0 and key.shape[1] % 64 == 0
    if softcap is None and half and fits and _has_cudnn():
        return "cudnn"
    return "chunked"


def _has_cudnn() -> bool:
    return (
        jax.default_backend() == "gpu"
        and "nvidia" in jax.devices()[0].device_kind.lower()
    )


def _dense(query, key, value, allowed, softcap, scale):
    batch, length, heads, width = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    kv_heads = key.shape[2]
    if length > 1:  # a single query sees every key that was not zeroed
        key, value = poison_keys(key, value)
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = scale * jnp.einsum(
        "btkgh,bskh->bkgts", grouped, key, preferred_element_type=wide
    )
    weights, total = score_weights(scores, allowed[:, None, None, :, :], softcap)
    weights = weights / total
    # Heads and queries as the rows of one product: this order is ten times as fast on
    # CPU for a single query.
    weights = weights.reshape(batch, kv_heads, -1, key.shape[1])
    mixed = jnp.einsum(
        "bkrs,bksh->bkrh",
        weights.astype(value.dtype),
        value.swapaxes(1, 2),
        preferred_element_type=wide,
    )
    mixed = mixed.reshape(batch, kv_heads, heads // kv_heads, length, width)
    mixed = mixed.transpose(0, 3, 1, 2, 4)
    return mixed.reshape(query.shape).astype(query.dtype)


def _cudnn(query, key, value, allowed, softcap, scale):
    if softcap is not None:
        raise NotImplementedError(
            "attention implementation 'cudnn' has no soft cap; use 'chunked' or None."
        )
    if not _has_cudnn() or query.dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(
            "attention implementation 'cudnn' needs an NVIDIA GPU and float16 or "
            f"bfloat16, got {jax.default_backend()} and {query.dtype}; use 'chunked' "
            "or None."
        )
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=allowed[:, None, :, :],
        scale=scale,
        implementation="cudnn",
    )
