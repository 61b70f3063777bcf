"""Advantages among the answers to one prompt: each compared with its group."""

import chex
import jax
import jax.numpy as jnp

from jaxpost import ops


def group_relative(
    rewards: jax.Array,
    *,
    mask: jax.Array | None = None,
    eps: float = 1e-6,
    ddof: int = 1,
) -> jax.Array:
    """`(r - mean) / (std + eps)` within each group of answers, as in GRPO.

    Args:
        rewards: one per answer, float `[B, G]`, G answers to each of B prompts.
        mask: True where an answer has a verdict, bool `[B, G]`; the others do not count
            and may hold anything, even NaN. None: all have one.
        eps: added to the standard deviation, in reward units; not negative.
        ddof: subtracted from the count in the variance's denominator; the paper does
            not say, 1 is what most implementations do.

    Returns:
        Advantages, float32 or wider, `[B, G]`, without gradient; exactly zero where
        masked, where all rewards of a group are equal, and where no more than `ddof`
        answers (or a single one) have a verdict.

    Raises:
        ValueError: there is only one answer per prompt, `eps` or `ddof` is negative.
        AssertionError: `rewards` is not `[B, G]`, `mask` has another shape or is not
            boolean.

    Source: Shao et al. (2024), "DeepSeekMath", arXiv 2402.03300, section 4.1.2.
    """
    if eps < 0.0:
        raise ValueError(f"eps must not be negative, got {eps}.")
    if ddof < 0:
        raise ValueError(f"ddof must not be negative, got {ddof}.")
    above, mask = _above_least(rewards, mask)
    variance = ops.masked_variance(above, mask, axis=1, ddof=ddof)
    scale = jnp.sqrt(variance)[:, None] + eps
    mean = ops.masked_mean(above, mask, axis=1)[:, None]
    # A variance of zero: all equal, or too few to have one.
    kept = mask & (variance > 0.0)[:, None]
    return jnp.where(kept, (above - mean) / jnp.where(kept, scale, 1.0), 0.0).astype(
        above.dtype
    )


def leave_one_out(rewards: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Each reward minus the mean of the others of its group, as in RLOO.

    The baseline of an answer does not depend on that answer, so the policy gradient
    stays unbiased, which that of `group_relative` is not.

    Args:
        rewards: one per answer, float `[B, G]`.
        mask: as in `group_relative`.

    Returns:
        Advantages, float32 or wider, `[B, G]`, without gradient; exactly zero where
        masked, where all rewards of a group are equal, and for an answer that has no
        other to be compared with.

    Raises:
        ValueError: there is only one answer per prompt.
        AssertionError: as in `group_relative`.

    Source: Kool et al. (2019), "Buy 4 REINFORCE Samples, Get a Baseline for Free!";
    Ahmadian et al. (2024), arXiv 2402.14740, eq. 8.
    """
    above, mask = _above_least(rewards, mask)
    total = ops.masked_sum(above, mask, axis=1)[:, None]
    others = jnp.sum(mask, axis=1, keepdims=True, dtype=above.dtype) - 1.0
    # With no other, the baseline is zero, and so is a lone reward from itself on.
    others = jnp.broadcast_to(jnp.maximum(others, 0.0), above.shape)
    baseline = ops.ratio(total - above, others)
    return jnp.where(mask, above - baseline, 0.0).astype(above.dtype)


def _above_least(
    rewards: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Rewards from the least of each group on, zero where masked, and the mask.

    Advantages do not change, and equal rewards become zero exactly: their mean would
    differ from them by rounding, which `group_relative` would divide by `eps`.
    """
    chex.assert_rank(rewards, 2)
    if rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must have at least 2 answers per prompt, got {rewards.shape[1]}: "
            "a group of one has nothing to be compared with."
        )
    if mask is None:
        mask = jnp.ones(rewards.shape, bool)
    chex.assert_equal_shape([rewards, mask])
    chex.assert_type(mask, bool)
    (rewards,) = ops.at_least_float32(jax.lax.stop_gradient(rewards))
    least = jnp.min(rewards, axis=1, where=mask, initial=jnp.inf, keepdims=True)
    return jnp.where(mask, rewards - least, jnp.zeros((), rewards.dtype)), mask
