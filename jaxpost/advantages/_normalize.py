"""Advantages of a batch brought to mean zero and variance one."""

import chex
import jax
import jax.numpy as jnp

from jaxpost import ops


def whiten(
    advantages: jax.Array, mask: jax.Array, *, ddof: int = 1, eps: float = 1e-8
) -> jax.Array:
    """`(a - mean) / sqrt(variance + eps)` with the moments of the whole mask.

    Over the whole batch, so call it before splitting into minibatches, and on the
    global array where a batch is split over devices.

    Args:
        advantages: float, any shape.
        mask: True where a step counts, bool, same shape; elsewhere anything, even NaN.
        ddof: subtracted from the count in the variance's denominator.
        eps: added to the variance, in the advantages' units squared; positive.

    Returns:
        Float32 or wider, same shape, zero where masked, without gradient. All zero
        where no more than `ddof` steps count, or all advantages are equal.

    Raises:
        ValueError: `eps` is not positive, or `ddof` negative.
        AssertionError: shapes differ, or `mask` is not boolean.
    """
    if not eps > 0.0:
        raise ValueError(f"eps must be positive, got {eps}.")
    if ddof < 0:
        raise ValueError(f"ddof must not be negative, got {ddof}.")
    chex.assert_equal_shape([advantages, mask])
    chex.assert_type(mask, bool)
    (advantages,) = ops.at_least_float32(jax.lax.stop_gradient(advantages))
    # From the least one on: equal advantages are then zero exactly, not up to rounding
    # that the division would blow up.
    least = jnp.min(advantages, where=mask, initial=jnp.inf)
    above = jnp.where(mask, advantages - least, jnp.zeros((), advantages.dtype))
    centred = above - ops.masked_mean(above, mask)
    variance = ops.masked_variance(above, mask, ddof=ddof)
    enough = jnp.sum(mask, dtype=jnp.int32) > ddof
    kept = mask & enough
    return jnp.where(kept, centred / jnp.sqrt(variance + eps), 0.0).astype(
        advantages.dtype
    )
