"""Truncated importance weights between the model that samples and the one trained."""

import math

import chex
import jax
import jax.numpy as jnp

from jaxpost import ops
from jaxpost.typing import Metric

_LARGEST_LOG_RATIO = 20.0
"""Beyond it a ratio no longer means anything, and in float32 soon overflows."""


def importance_weights(
    logps: jax.Array, sampling_logps: jax.Array, mask: jax.Array, *, cap: float
) -> tuple[jax.Array, dict[str, Metric]]:
    """`min(exp(logps - sampling_logps), cap)`, factors of a policy loss's values.

    They correct for samples that were not drawn from the policy whose gradient is
    taken: another precision or kernel in the sampler, top-p, weights that have moved
    on. The cap bounds the variance, at the price of some bias.

    Args:
        logps: log-probabilities under the policy that the advantages belong to (the
            trainer's, before the update), float `[...]`, nats.
        sampling_logps: under the distribution that the tokens were drawn from, same
            shape.
        mask: True where a token counts, bool, same shape; elsewhere anything, even NaN.
        cap: largest weight, at least 1; `math.inf` does not truncate.

    Returns:
        Weights, float32 or wider, same shape, zero where masked, without gradient; and
        metrics for a `LossOutput`, under the names that TRL uses:
        `sampling/sampling_logp_difference/mean` and `max`, of the absolute difference
        in nats, and `sampling/importance_sampling_ratio/min`, `mean` and `max`, of the
        weights. Log-ratios are held within +-20. Where `mask` is True nowhere, means
        and maxima are 0 and the minimum is the cap.

    Raises:
        ValueError: `cap` is below 1 (every weight would be too small), or NaN.
        AssertionError: shapes differ, or `mask` is not boolean.

    Source: Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training" (truncated importance sampling); Ionides (2008), "Truncated
    Importance Sampling".
    """
    if not cap >= 1.0:
        raise ValueError(f"cap must be at least 1, got {cap}.")
    chex.assert_equal_shape([logps, sampling_logps, mask])
    chex.assert_type(mask, bool)
    logps, sampling_logps = ops.at_least_float32(
        jax.lax.stop_gradient(logps), jax.lax.stop_gradient(sampling_logps)
    )
    zero = jnp.zeros((), logps.dtype)
    difference = jnp.where(mask, logps - sampling_logps, zero)
    held = jnp.clip(difference, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    largest = min(cap, math.exp(_LARGEST_LOG_RATIO))
    weights = jnp.where(mask, jnp.minimum(jnp.exp(held), largest), zero)
    count = jnp.sum(mask, dtype=logps.dtype)
    absolute = jnp.abs(difference)
    least = jnp.min(jnp.where(mask, weights, largest), initial=largest)
    metrics = {
        "sampling_logp_difference/mean": Metric(jnp.sum(absolute), count),
        "sampling_logp_difference/max": Metric(
            jnp.max(absolute, initial=0.0), kind="max"
        ),
        "importance_sampling_ratio/min": Metric(least, kind="min"),
        "importance_sampling_ratio/mean": Metric(jnp.sum(weights), count),
        "importance_sampling_ratio/max": Metric(
            jnp.max(weights, initial=0.0), kind="max"
        ),
    }
    return weights, {f"sampling/{name}": metric for name, metric in metrics.items()}
