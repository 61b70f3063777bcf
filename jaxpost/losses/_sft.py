"""Supervised fine-tuning: the negative log-likelihood of the tokens trained on."""

import chex
import jax
import jax.numpy as jnp

from jaxpost import ops


def sft(token_logps: jax.Array, loss_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood, one value per token.

    The mean over tokens is `sum(values) / sum(weights)`, both summed over microbatches
    and devices first.

    Args:
        token_logps: log-probability of each target, float `[B, T]`, nats; anything,
            even NaN, where masked.
        loss_mask: True where the target is trained on, bool `[B, T]`, aligned with
            targets (`ops.shift_targets`).

    Returns:
        Values, float32 or wider, `[B, T]`, nats, zero where masked; and their weights,
        same dtype and shape, one where trained on, without gradient.

    Raises:
        AssertionError: shapes differ, or `loss_mask` is not boolean.
    """
    chex.assert_rank([token_logps, loss_mask], 2)
    chex.assert_equal_shape([token_logps, loss_mask])
    chex.assert_type(loss_mask, bool)
    dtype = ops.compute_dtype(token_logps)
    logps = jnp.where(loss_mask, token_logps.astype(dtype), jnp.zeros((), dtype))
    return -logps, loss_mask.astype(dtype)
