"""Adaptive preference scaling: each pair's margin is divided by a scale of its own."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import ops

SOLVERS = ("closed_form", "newton")

_LOG_2 = math.log(2.0)
_FAR = 256.0
"""A scaled margin whose sigmoid is 1 in any dtype; larger ones add nothing but inf."""


class AdaptiveOutput(NamedTuple):
    """What `adaptive_scaling` returns.

    Fields:
        values: loss per pair, float32 or wider, the margins' shape; also negative ones.
        tau: the scale of each pair, same dtype and shape, without gradient. Exactly
            `tau_min` or `tau_max` where it lies at a bound.
    """

    values: jax.Array
    tau: jax.Array


def check_adaptive_scaling(
    *,
    rho0: float,
    tau_min: float,
    tau_max: float | None = None,
    quadratic: bool = False,
    solver: str = "closed_form",
    newton_steps: int = 5,
) -> None:
    """ValueError for settings that `adaptive_scaling` refuses."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}.")
    if newton_steps < 1:
        raise ValueError(f"newton_steps must be at least 1, got {newton_steps}.")
    if not 0.0 < tau_min < math.inf:
        raise ValueError(f"tau_min must be positive and finite, got {tau_min}.")
    if not 0.0 < rho0 < math.inf:
        raise ValueError(
            f"rho0 must be positive and finite, got {rho0}: at 0, tau goes to "
            "its upper bound for every pair."
        )
    if quadratic:
        if tau_max is not None:
            raise ValueError(
                f"tau_max must be None with quadratic=True, got {tau_max}: tau stays "
                "below log(2) / (2 rho0) by itself."
            )
        if 2.0 * rho0 * tau_min >= _LOG_2:
            raise ValueError(
                f"rho0 * tau_min must be below log(2) / 2 = 0.3466, got {rho0} * "
                f"{tau_min}: tau would be tau_min for every pair; use bradley_terry."
            )
        return
    if tau_max is None:
        raise ValueError("tau_max must be given unless quadratic=True.")
    if not tau_min <= tau_max < math.inf:
        raise ValueError(
            f"tau_max must be finite and at least tau_min = {tau_min}, got {tau_max}."
        )
    if rho0 >= _LOG_2:
        raise ValueError(
            f"rho0 must be below log(2) = 0.6931, got {rho0}: tau would be tau_min for "
            "every pair; use bradley_terry on margins / tau_min."
        )


def adaptive_scaling(
    margins: jax.Array,
    *,
    rho0: float,
    tau_min: float,
    tau_max: float | None = None,
    quadratic: bool = False,
    solver: str = "closed_form",
    newton_steps: int = 5,
) -> AdaptiveOutput:
    """Logistic loss at the scale that minimises it, under a penalty on the scale.

    `min over tau in [tau_min, tau_max] of
    -tau log sigmoid(m / tau) + (rho0 - log 2) tau`.
    The minimiser is `clip(|m| / x, tau_min, tau_max)`, with `x > 0` such that the
    entropy of `sigmoid(x)` is `log 2 - rho0`: between the bounds the loss is linear on
    each side of zero (a pinball loss), outside logistic. With `quadratic=True` the
    penalty is `rho0 tau**2 - tau log 2`, without an upper bound. By the envelope
    theorem the slope is `-sigmoid(-m / tau)`.

    A large scale means a clear preference, the opposite of a temperature. It depends on
    `|m|` only, so a pair confidently ordered wrongly has a large one too.

    Args:
        margins: float `[B]`, or any shape. The paper has no `beta`; with margins scaled
            by `beta` the bounds are on that scale too (`tau / beta` in the paper's).
        rho0: penalty on the scale, the radius of the KL ball around an even choice. In
            (0, log 2); with `quadratic=True`, in (0, log(2) / (2 tau_min)).
        tau_min: lower bound, the paper's tau_0, positive.
        tau_max: upper bound; None with `quadratic=True`, where `tau` stays below
            `log(2) / (2 rho0)` by itself.
        quadratic: the variant of eq. 12.
        solver: `"closed_form"` is exact (the quadratic variant has none: Newton steps
            from below, in the logarithm, until float precision). `"newton"` repeats the
            published `newton_steps` projected steps from `tau = 1`; they need not
            converge, and at `rho0 = 0.5, tau_max = 3` jump to and fro for ever where
            `|m|` is 0.67 to 1.56.
        newton_steps: steps of `"newton"`, ignored otherwise.

    Returns:
        `AdaptiveOutput(values, tau)`. At infinite margins `tau` is its upper bound,
        values are the limit and slopes finite. NaN stays NaN. Second derivatives are
        exact with `"closed_form"`; `"newton"` takes `tau` as a constant.

    Raises:
        ValueError: a setting is outside the ranges above, `solver` is unknown, or
            `newton_steps` is below 1.

    Source: Hong et al. (2024), "Adaptive Preference Scaling for Reinforcement Learning
    with Human Feedback", arXiv 2406.02764, eqs. 4-6, 8, 9 and 12. The closed form is
    ours. The published code adds an epsilon inside its logarithms, which silences pairs
    that are badly wrong, its DPO part bounds the quadratic variant, and reports a loss
    without the penalty; none of that is done here.
    """
    check_adaptive_scaling(
        rho0=rho0,
        tau_min=tau_min,
        tau_max=tau_max,
        quadratic=quadratic,
        solver=solver,
        newton_steps=newton_steps,
    )
    (margins,) = ops.at_least_float32(margins)
    sizes = jnp.abs(margins)
    if solver == "newton":
        tau = _published_newton(
            jax.lax.stop_gradient(sizes),
            rho0=rho0,
            tau_min=tau_min,
            tau_max=tau_max,
            quadratic=quadratic,
            steps=newton_steps,
        )
    elif quadratic:
        tau = _quadratic_tau(sizes, rho0=rho0, tau_min=tau_min)
    else:
        tau = jnp.clip(sizes / interior_logit(rho0), tau_min, tau_max)
    penalty = (rho0 * tau - _LOG_2) * tau if quadratic else (rho0 - _LOG_2) * tau
    return AdaptiveOutput(_dual(margins, tau, penalty), jax.lax.stop_gradient(tau))


@jax.custom_jvp
def _dual(margins: jax.Array, tau: jax.Array, penalty: jax.Array) -> jax.Array:
    """`-tau log sigmoid(margins / tau) + penalty`, at a `tau` that minimises it."""
    return tau * jax.nn.softplus(-margins / tau) + penalty


@_dual.defjvp
def _dual_jvp(primals, tangents):
    margins, tau, _ = primals
    # The term in d tau is zero (envelope theorem). Differentiating this rule again
    # takes d tau along, as second derivatives must.
    slope = -jax.nn.sigmoid(-margins / tau)
    return _dual(*primals), slope * tangents[0]


@functools.lru_cache
def interior_logit(rho0: float) -> float:
    """`x > 0` whose `sigmoid(x)` has entropy `log 2 - rho0`, by float64 bisection."""
    low, high = 0.0, 64.0  # at 64 the entropy is below the rounding of any rho0
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return high
        # KL(sigmoid(2h) || 1/2) = h tanh h - log cosh h, exact also for a small h.
        half = 0.5 * middle
        log_cosh = math.log1p(2.0 * math.sinh(0.5 * half) ** 2)
        if half * math.tanh(half) - log_cosh < rho0:
            low = middle
        else:
            high = middle


def _divergence_from_even(logit: jax.Array) -> jax.Array:
    """`KL(sigmoid(x) || 1/2)` in nats for `x >= 0`: 0 at 0, to log 2."""
    # Each form is exact to rounding where it is used, and harmless elsewhere.
    small, large = jnp.minimum(logit, 1.0), jnp.minimum(logit, _FAR)
    tanh = jnp.tanh(0.5 * small)
    near = 0.5 * (small * tanh + jnp.log1p(-jnp.square(tanh)))
    entropy = large * jax.nn.sigmoid(-large) + jax.nn.softplus(-large)
    return jnp.where(logit < 1.0, near, _LOG_2 - entropy)


def _quadratic_tau(sizes: jax.Array, *, rho0: float, tau_min: float) -> jax.Array:
    """Root of `2 rho0 tau = KL(sigmoid(|m| / tau) || 1/2)`, at least `tau_min`.

    In `x = |m| / tau` it reads `F(x) = x KL(x) = 2 rho0 |m|`. `log F` is increasing and
    concave in `log x`, its slope falling from 3 to 1. So Newton steps in these
    coordinates, begun at or below the root, rise to it and never pass it.
    """
    upper = _LOG_2 / (2.0 * rho0)
    at_min = _divergence_from_even(sizes / tau_min) <= 2.0 * rho0 * tau_min
    # Pairs at the lower bound get a stand-in, since log F(0) is -inf. Beyond 128 upper,
    # tau is `upper` to the last digit.
    inside = jnp.where(at_min, jnp.full_like(sizes, tau_min), sizes)
    inside = jax.lax.stop_gradient(jnp.minimum(inside, 128.0 * upper))
    target = 2.0 * rho0 * inside

    def step(_, x):
        divergence = _divergence_from_even(x)
        slope = 1.0 + jnp.square(x) * _variance(x) / divergence
        return x * jnp.exp((jnp.log(target) - jnp.log(x * divergence)) / slope)

    start = jnp.maximum(jnp.cbrt(8.0 * target), target / _LOG_2)  # F <= x^3/8, x log 2
    tau = inside / jax.lax.fori_loop(0, 8, step, start)
    # The implicit function theorem: adds zero, with the derivative of the root.
    gap = 2.0 * rho0 * tau - _divergence_from_even(sizes / tau)
    x = jnp.minimum(inside / tau, _FAR)
    curvature = jnp.square(x) * _variance(x) / tau + 2.0 * rho0
    tau = tau - (gap - jax.lax.stop_gradient(gap)) / curvature
    return jnp.where(at_min, tau_min, jnp.clip(tau, tau_min, upper))


def _published_newton(
    sizes: jax.Array,
    *,
    rho0: float,
    tau_min: float,
    tau_max: float | None,
    quadratic: bool,
    steps: int,
) -> jax.Array:
    """Algorithm 1: projected Newton from `tau = 1`, curvature at least 1e-8.

    The objective is even in the margin, so its size is enough.
    """

    def step(_, tau):
        x = jnp.minimum(sizes / tau, _FAR)
        gradient = jax.nn.softplus(-x) - _LOG_2 + x * jax.nn.sigmoid(-x)
        gradient = gradient + (2.0 * rho0 * tau if quadratic else rho0)
        curvature = jnp.square(x) * _variance(x) / tau
        curvature = curvature + 2.0 * rho0 if quadratic else curvature
        # 1e-8 is the robotics code's floor; the DPO code has 1e-6.
        return jnp.clip(tau - gradient / jnp.maximum(curvature, 1e-8), tau_min, tau_max)

    return jax.lax.fori_loop(0, steps, step, jnp.ones_like(sizes))


def _variance(logit: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit)
