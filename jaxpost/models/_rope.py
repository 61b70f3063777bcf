"""Rotary position embeddings: frequencies per family, rotation of queries and keys.

Angles are computed in float32 or wider whatever the compute dtype is.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ._config import DecoderConfig, RopeScaling


def rope_tables(
    config: DecoderConfig,
    positions: jax.Array,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every position's rotation.

    Args:
        config: its rotary fields are read.
        positions: int32 `[B, T]`.
        dtype: of the result, float32 or float64.

    Returns:
        cos, sin: `[B, T, R / 2]` with `R = config.rotary_dim`, times the attention
        factor of "yarn" and "longrope".

    Source: Su et al. (2021), "RoFormer", eq. 34. With "longrope" each row takes the
    long factors once its largest position reaches `original_max_positions` (the
    transformers library decides once for the whole batch, which would make a row
    depend on its neighbours).
    """
    short, long, factor = rope_frequencies(config)
    positions_f = positions.astype(dtype)[..., None]
    angles = positions_f * jnp.asarray(short, dtype)[None, None, :]
    if long is not None:
        scaling = config.rope_scaling
        assert scaling is not None
        assert scaling.original_max_positions is not None
        reaches = jnp.max(positions, axis=1) >= scaling.original_max_positions
        stretched = positions_f * jnp.asarray(long, dtype)[None, None, :]
        angles = jnp.where(reaches[:, None, None], stretched, angles)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first `R` dimensions of each head, halves paired as in GPT-NeoX.

    Args:
        x: queries or keys, `[B, T, N, H]`.
        cos, sin: `[B, T, R / 2]`, `R <= H`.

    Returns:
        `[B, T, N, H]` in the dtype of `x`, rotated in the dtype of `cos` or wider.
    """
    half = cos.shape[-1]
    wide = x.astype(jnp.promote_types(x.dtype, cos.dtype))
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = wide[..., :half], wide[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        parts.append(wide[..., 2 * half :])
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def rope_frequencies(
    config: DecoderConfig,
) -> tuple[np.ndarray, np.ndarray | None, float]:
    """Angular frequencies in radians per token, float64 `[R / 2]`.

    Returns:
        Frequencies; those of rows longer than pre-training's context ("longrope" only,
        else None); the factor on cosines and sines.
    """
    dim = config.rotary_dim
    base = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return base, None, 1.0
    if scaling.kind == "linear":
        return base / _factor(config, scaling), None, 1.0
    if scaling.kind == "llama3":
        return _llama3(base, scaling), None, 1.0
    if scaling.kind == "yarn":
        return _yarn(base, config, scaling)
    assert scaling.original_max_positions is not None
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        factor = _factor(config, scaling)
        attention_factor = math.sqrt(
            1 + math.log(factor) / math.log(scaling.original_max_positions)
        )
    short = base / np.asarray(scaling.short_factor, np.float64)
    long = base / np.asarray(scaling.long_factor, np.float64)
    return short, long, attention_factor


def _factor(config: DecoderConfig, scaling: RopeScaling) -> float:
    if scaling.factor is not None:
        return scaling.factor
    assert scaling.original_max_positions is not None
    return max(1.0, config.max_positions / scaling.original_max_positions)


def _llama3(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Low frequencies divided by the factor, high ones kept, a line between."""
    assert scaling.factor is not None
    assert scaling.original_max_positions is not None
    assert scaling.low_freq_factor is not None
    assert scaling.high_freq_factor is not None
    turns = scaling.original_max_positions * base / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * base + (1 - kept) * base / scaling.factor


def _yarn(
    base: np.ndarray, config: DecoderConfig, scaling: RopeScaling
) -> tuple[np.ndarray, None, float]:
    """Source: Peng et al. (2023), "YaRN", section 3.2 and eq. 22."""
    assert scaling.original_max_positions is not None
    dim, context = config.rotary_dim, scaling.original_max_positions
    factor = _factor(config, scaling)

    def dimension_of(turns: float) -> float:
        ratio = context / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low = dimension_of(scaling.beta_fast)
    high = dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp would divide by zero
    stretched = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    frequencies = base * (1 - stretched) + base / factor * stretched

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.attention_factor
    if attention_factor is None and scaling.mscale and scaling.mscale_all_dim:
        attention_factor = magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    elif attention_factor is None:
        attention_factor = magnitude(1.0)
    return frequencies, None, attention_factor
