"""What the implementations of attention that store scores share."""

import jax
import jax.numpy as jnp


def check_heads(heads: int, kv_heads: int) -> None:
    """Raises a ValueError unless each key serves as many query heads."""
    if heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads, which is not a multiple of the {kv_heads} heads "
            "of key and value."
        )


def score_weights(
    scores: jax.Array, allowed: jax.Array, softcap: float | None
) -> tuple[jax.Array, jax.Array]:
    """A softmax before its division: weights, and their sum on the last axis.

    Args:
        scores: scaled, float32 or wider, `[..., S]`.
        allowed: bool, broadcast to scores; the weight of the others is exactly 0.
        softcap: see `attention`.

    Returns:
        Weights `[..., S]`; sums `[..., 1]`, 1 in place of 0, to divide by.
    """
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(allowed, jnp.exp(scores - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights, jnp.where(total == 0, jnp.ones_like(total), total)
