"""Backtracking on the merit: halve the step until it brings its share of decrease."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.solvers._options import SolveOptions


class LineSearch(NamedTuple):
    """Where the search ended.

    Fields:
        step_size: share of the full step.
        merit: there.
        found: whatever else `trial` returned there.
        trials: made, int32.
        failed: even the shortest step was refused.
    """

    step_size: jax.Array
    merit: jax.Array
    found: Any
    trials: jax.Array
    failed: jax.Array


def backtrack(
    trial: Callable[[jax.Array], tuple[jax.Array, Any]],
    merit: jax.Array,
    slope: jax.Array,
    options: SolveOptions,
) -> LineSearch:
    """The first of 1, 1/2, 1/4, … with `M(alpha) <= M + alpha beta slope`.

    Args:
        trial: `alpha -> (merit, anything to keep)` at that share of the step.
        merit: merit at 0.
        slope: derivative of the merit along the step.
        options: `armijo` [beta] and `step_min`.

    A trial whose merit is not finite is refused. A few units of rounding of the merit
    are allowed for: near a solution the decrease is smaller than that.
    """
    slack = 8.0 * jnp.finfo(merit.dtype).eps * jnp.abs(merit)

    def refused(alpha, value):
        enough = value <= merit + alpha * options.armijo * slope + slack
        return ~(enough & jnp.isfinite(value))

    def unfinished(state):
        alpha, (value, _), _ = state
        return refused(alpha, value) & (alpha >= 2.0 * options.step_min)

    def halve(state):
        alpha, _, trials = state
        alpha = 0.5 * alpha
        return alpha, trial(alpha), trials + 1

    # The first trial is the loop's first halving: `trial` is compiled once.
    double = jnp.full_like(merit, 2.0)
    nothing = jax.tree.map(
        lambda a: jnp.full(a.shape, jnp.nan, a.dtype), jax.eval_shape(trial, double)
    )
    start = (double, nothing, jnp.zeros((), jnp.int32))
    alpha, (value, found), trials = jax.lax.while_loop(unfinished, halve, start)
    return LineSearch(alpha, value, found, trials, refused(alpha, value))
