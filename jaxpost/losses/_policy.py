"""The clipped policy-gradient loss of PPO and GRPO, one value per step."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxpost import ops

_LARGEST_LOG_RATIO = 20.0
"""Beyond it a ratio no longer means anything, and in float32 soon overflows."""


class ClippedPolicyOutput(NamedTuple):
    """What `clipped_policy` returns.

    Fields:
        values: loss per step, float32 or wider, `[B, T]`, zero where masked.
        weights: one where a step counts, else zero, same shape and dtype.
        metrics: per step, same shape and dtype, zero where masked, without gradient;
            sum them and divide by the sum of `weights`. `val/ratio`: probability now
            over then. `policy/approxkl`: k3 estimate of KL(then, now), never negative.
            `clip_ratio/low`, `clip_ratio/high`: 1 where clipping from below or above
            holds the step's gradient back, `clip_ratio/region` either of them;
            `clip_ratio/dual`: 1 where the dual clip does.
    """

    values: jax.Array
    weights: jax.Array
    metrics: dict[str, jax.Array]


def clipped_policy(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> ClippedPolicyOutput:
    """Policy gradient that stops where the policy has moved far enough.

    `-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)` with
    `ratio = exp(logps - old_logps)`. With `dual_clip = c`, steps with negative
    advantage have at most the loss `-c * A`: without it, one whose probability has
    risen many times over dominates the batch.

    Args:
        logps: log-probabilities of the steps taken, of the policy that is trained,
            float `[B, T]`, nats.
        old_logps: those of the policy that the advantages belong to, same shape; no
            gradient flows into them.
        advantages: float, same shape, taken as constants.
        mask: True where a step counts, bool, same shape; elsewhere anything, even NaN.
        clip_low: how far the ratio may fall below 1, in (0, 1].
        clip_high: how far it may rise above 1, positive; larger than `clip_low` to
            leave room for unlikely tokens (DAPO).
        dual_clip: the bound `c`, above `1 + clip_high`; None for none.

    Returns:
        `ClippedPolicyOutput(values, weights, metrics)`. Log-ratios are held within
        +-20, beyond which there is no gradient.

    Raises:
        ValueError: a clip setting is outside its range.
        AssertionError: shapes differ, or `mask` is not boolean.

    Source: Schulman et al. (2017), "Proximal Policy Optimization Algorithms", arXiv
    1707.06347, eq. 7; two clip settings: Yu et al. (2025), DAPO, arXiv 2503.14476,
    section 3.1; dual clip: Ye et al. (2020), arXiv 1912.09729, eq. 5.
    """
    check_clips(clip_low, clip_high, dual_clip)
    chex.assert_rank(logps, 2)
    chex.assert_equal_shape([logps, old_logps, advantages, mask])
    chex.assert_type(mask, bool)
    logps, old_logps, advantages = ops.at_least_float32(logps, old_logps, advantages)
    zero, one = jnp.zeros((), logps.dtype), jnp.ones((), logps.dtype)
    # Set aside first, so that neither values nor gradients see what is masked.
    logps, old_logps, advantages = (
        jnp.where(mask, x, zero) for x in (logps, old_logps, advantages)
    )
    old_logps, advantages = map(jax.lax.stop_gradient, (old_logps, advantages))

    log_ratio = logps - old_logps
    log_ratio = jnp.clip(log_ratio, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    values = jnp.maximum(-ratio * advantages, -clipped * advantages)
    low = (ratio < 1.0 - clip_low) & (advantages < 0.0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0.0)
    flags = {"low": low, "high": high, "region": low | high}
    if dual_clip is not None:
        dual = (ratio > dual_clip) & (advantages < 0.0)
        values = jnp.where(dual, -dual_clip * advantages, values)
        flags["dual"] = dual
    metrics = {
        "val/ratio": jnp.where(mask, ratio, zero),
        "policy/approxkl": jnp.expm1(log_ratio) - log_ratio,
        **{f"clip_ratio/{k}": jnp.where(v, one, zero) for k, v in flags.items()},
    }
    return ClippedPolicyOutput(
        values,
        jnp.where(mask, one, zero),
        jax.tree.map(jax.lax.stop_gradient, metrics),
    )


def check_clips(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    """Refuses settings of `clipped_policy` that are out of range.

    Raises:
        ValueError: the message names the setting.
    """
    if not 0.0 < clip_low <= 1.0:
        raise ValueError(f"clip_low must lie in (0, 1], got {clip_low}.")
    if not 0.0 < clip_high < math.inf:
        raise ValueError(f"clip_high must be positive and finite, got {clip_high}.")
    if dual_clip is not None and not 1.0 + clip_high < dual_clip < math.inf:
        raise ValueError(
            f"dual_clip must be finite and above 1 + clip_high = {1.0 + clip_high}, "
            f"got {dual_clip}."
        )
