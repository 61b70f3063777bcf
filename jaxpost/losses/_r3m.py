"""R³M: a sparse bias per pair explains labels that the rewards disagree with."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import ops


class R3MOutput(NamedTuple):
    """What `r3m` returns.

    Fields:
        values: loss per pair, float32 or wider, the margins' shape, nats. It includes
            `lam * delta`, so it is not comparable with `bradley_terry`'s.
        delta: bias of each pair, same dtype and shape, never negative, without
            gradient. Exactly zero unless the pair is an outlier (`delta > 0`).
    """

    values: jax.Array
    delta: jax.Array


def check_r3m(*, lam: float) -> None:
    """ValueError for settings that `r3m` refuses."""
    if not 0.0 < lam < 1.0:
        raise ValueError(
            f"lam must lie in (0, 1), got {lam}: from 1 on no pair is ever an outlier "
            "(use bradley_terry), towards 0 every pair is one."
        )


def r3m(margins: jax.Array, *, lam: float) -> R3MOutput:
    """Logistic loss with a per-pair bias under an L1 penalty, the bias profiled out.

    `min over d of -log sigmoid(m + d) + lam * |d|`. With `c = log(1 / lam - 1)` the
    minimiser is `d = max(c - m, 0)`, so nothing has to be stored per pair. From `m = c`
    on this is the logistic loss; below, it goes on as its tangent. Its slope is
    `-min(sigmoid(-m), lam)`: Bradley-Terry with the gradient clipped.

    Args:
        margins: float `[B]`, or any shape; `beta` is inside for DPO.
        lam: penalty on the bias, the paper's lambda, in (0, 1). It is that of eq. 3.3
            (per pair), `n` times that of eq. 3.2 over `n` pairs. Above 0.5, only pairs
            that the model orders wrongly can be outliers.

    Returns:
        `R3MOutput(values, delta)`. At margin infinity 0 and 0, at minus infinity both
        infinite, with slope `-lam`. NaN stays NaN.

    Raises:
        ValueError: `lam` is outside (0, 1).

    Source: Bukharin et al. (2024), "Robust Reinforcement Learning from Corrupted Human
    Feedback", arXiv 2406.15568, eqs. 3.3 and 3.4. The profiled form is ours; by
    Danskin's theorem its gradient is that of the paper's step, which holds the bias
    fixed.
    """
    check_r3m(lam=lam)
    (margins,) = ops.at_least_float32(margins)
    threshold = math.log1p(-lam) - math.log(lam)
    excess = threshold - margins
    values = jnp.where(
        margins >= threshold,
        jax.nn.softplus(-margins),
        lam * excess - math.log1p(-lam),
    )
    return R3MOutput(values, jax.lax.stop_gradient(jnp.maximum(excess, 0.0)))
