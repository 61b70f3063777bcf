"""The outer loop: evaluate, step, search, adapt, until one of the ends in `Status`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.solvers._inner import Adaptive, newton_step
from jaxpost.solvers._kkt import (
    NewtonSystem,
    dense_system,
    is_singular,
    smallest_eigenvalue,
)
from jaxpost.solvers._line_search import backtrack
from jaxpost.solvers._matrix_free import free_system
from jaxpost.solvers._merit import merit_gradient, merit_value
from jaxpost.solvers._options import SolveOptions
from jaxpost.solvers._problem import Problem
from jaxpost.solvers._result import Counters, History, SolveResult
from jaxpost.solvers._status import Status

# (x, multipliers) -> (v -> P^-1 v) on `[n + m]`
Preconditioner = Callable[[jax.Array, jax.Array], Callable[[jax.Array], jax.Array]]


class _Point(NamedTuple):
    """An iterate and what was evaluated there; `jacobian` is None when matrix-free."""

    x: jax.Array
    multipliers: jax.Array
    objective: jax.Array
    constraint: jax.Array
    gradient: jax.Array
    jacobian: jax.Array | None
    eigenvalue: jax.Array
    kkt: jax.Array


class _State(NamedTuple):
    point: _Point
    adaptive: Adaptive
    key: jax.Array
    iteration: jax.Array
    status: jax.Array
    history: History
    counters: Counters


def run(
    problem: Problem,
    x0: jax.Array,
    multipliers: jax.Array,
    key: jax.Array,
    options: SolveOptions,
    preconditioner: Preconditioner | None,
) -> SolveResult:
    """Solve; everything is traced, nothing raises."""
    point = _evaluate(problem, x0, multipliers, options)
    first_kkt = point.kkt
    start = _State(
        point,
        Adaptive(
            *(
                jnp.asarray(value, x0.dtype)
                for value in (
                    options.penalty_constraint,
                    options.penalty_gradient,
                    options.delta,
                )
            )
        ),
        key,
        jnp.zeros((), jnp.int32),
        _status_at(point, jnp.zeros((), jnp.int32), options),
        _record_point(_empty_history(options, x0.dtype), point, 0),
        Counters(*(jnp.asarray(count, jnp.int32) for count in (1, 1, 1, 0, 0))),
    )

    def body(state):
        return _iterate(problem, state, first_kkt, options, preconditioner)

    end = jax.lax.while_loop(lambda s: s.status == Status.RUNNING, body, start)
    return SolveResult(
        end.point.x,
        end.point.multipliers,
        end.point.kkt,
        end.status,
        end.iteration,
        end.history,
        end.counters,
    )


def _iterate(problem, state, first_kkt, options, preconditioner) -> _State:
    point, size = state.point, state.point.x.shape[0]
    system, products = _newton_system(problem, point, options)
    merit = merit_gradient(products, point.gradient, point.constraint)
    theta = options.theta * jnp.minimum(1.0, point.kkt / first_kkt) ** (
        options.theta_power
    )
    key, key_inner = jax.random.split(state.key)
    bound = preconditioner and preconditioner(point.x, point.multipliers)
    step = newton_step(system, merit, state.adaptive, theta, key_inner, options, bound)
    direction, penalties = step.inner.z, step.adaptive.penalties

    def moved(alpha):
        z = alpha * direction
        return point.x + z[:size], point.multipliers + z[size:]

    def merit_at(alpha):
        x, multipliers = moved(alpha)
        value, constraint, gradient = problem.first_order(x, multipliers)
        return merit_value(value, constraint, gradient, multipliers, penalties)

    before = merit_value(
        point.objective, point.constraint, point.gradient, point.multipliers, penalties
    )
    search = backtrack(merit_at, before, merit.at(penalties) @ direction, options)
    failure = _failure(step, search)
    keep = failure != Status.RUNNING
    alpha = jnp.where(keep, 0.0, search.step_size)
    new = _evaluate(problem, *moved(alpha), options)
    new = jax.tree.map(lambda old, new: jnp.where(keep, old, new), point, new)
    iteration = state.iteration + jnp.where(keep, 0, 1).astype(jnp.int32)
    status = jnp.where(keep, failure, _status_at(new, iteration, options))

    entries = dict(
        step_size=alpha,
        merit_before=before,
        merit_after=jnp.where(keep, before, search.merit),
        inner_residual=jnp.linalg.norm(step.inner.residual) / point.kkt,
        hessian_shift=system.shift,
        penalty_constraint=penalties[0],
        penalty_gradient=penalties[1],
        delta=step.adaptive.delta,
        inner_steps=step.inner.steps,
        escaped=step.escaped.astype(jnp.int32),
    )
    history = _record(state.history, entries, state.iteration)
    counts = state.counters
    counters = Counters(
        counts.objective + search.trials + 1,
        counts.gradient + search.trials + 1,
        counts.jacobian + 1,
        counts.hessian + 1,
        counts.inner_steps + step.inner.steps,
    )
    return _State(
        new,
        step.adaptive,
        key,
        iteration,
        status.astype(jnp.int32),
        _record_point(history, new, iteration),
        counters,
    )


def _newton_system(problem, point, options) -> tuple[NewtonSystem, Callable]:
    """The system to solve, and products with the KKT matrix as it is."""
    right = -jnp.concatenate([point.gradient, point.constraint])
    if options.matrix_free:
        products = problem.kkt_products(point.x, point.multipliers)
        return free_system(products, right), products
    hessian = problem.hessian(point.x, point.multipliers)
    size = hessian.shape[0]
    jacobian = point.jacobian

    def products(v):
        along = hessian @ v[:size] + v[size:] @ jacobian
        return jnp.concatenate([along, jacobian @ v[:size]])

    return dense_system(hessian, jacobian, right, point.eigenvalue, options), products


def _evaluate(problem, x, multipliers, options) -> _Point:
    objective, constraint, gradient = problem.first_order(x, multipliers)
    kkt = jnp.sqrt(gradient @ gradient + constraint @ constraint)
    if options.matrix_free:
        jacobian, eigenvalue = None, jnp.full_like(kkt, jnp.nan)
    else:
        jacobian = problem.jacobian(x)
        eigenvalue = smallest_eigenvalue(jacobian)
    return _Point(
        x, multipliers, objective, constraint, gradient, jacobian, eigenvalue, kkt
    )


def _status_at(point: _Point, iteration: jax.Array, options: SolveOptions) -> jax.Array:
    """The first that holds: not finite, converged, singular, out of iterations."""
    finite = jnp.isfinite(point.kkt) & jnp.isfinite(point.objective)
    singular = jnp.asarray(False)
    if point.jacobian is not None:
        finite &= jnp.all(jnp.isfinite(point.jacobian))
        singular = is_singular(point.jacobian, point.eigenvalue, options)
    cases = [
        (~finite, Status.NON_FINITE),
        (point.kkt <= options.tolerance, Status.CONVERGED),
        (singular, Status.SINGULAR_JACOBIAN),
        (iteration >= options.max_iterations, Status.MAX_ITERATIONS),
    ]
    return _first(cases)


def _failure(step, search) -> jax.Array:
    """Why the step cannot be taken, or RUNNING."""
    return _first(
        [
            (~jnp.all(jnp.isfinite(step.inner.z)), Status.NON_FINITE),
            (step.capped, Status.INNER_CAP),
            (search.failed & step.escaped, Status.PENALTY_BLOWUP),
            (search.failed, Status.LINE_SEARCH_FAILED),
        ]
    )


def _first(cases) -> jax.Array:
    status = jnp.asarray(int(Status.RUNNING), jnp.int32)
    for holds, value in reversed(cases):
        status = jnp.where(holds, jnp.asarray(int(value), jnp.int32), status)
    return status


_INTEGERS = ("inner_steps", "escaped")


def _empty_history(options: SolveOptions, dtype: Any) -> History:
    shape = (options.max_iterations + 1,)
    return History(
        *(
            jnp.full(shape, -1, jnp.int32)
            if name in _INTEGERS
            else jnp.full(shape, jnp.nan, dtype)
            for name in History._fields
        )
    )


def _record(history: History, entries: dict[str, jax.Array], row: Any) -> History:
    return history._replace(
        **{
            name: getattr(history, name).at[row].set(value)
            for name, value in entries.items()
        }
    )


def _record_point(history: History, point: _Point, row: Any) -> History:
    entries = dict(
        kkt_residual=point.kkt,
        objective=point.objective,
        constraint_norm=jnp.linalg.norm(point.constraint),
        jacobian_eigenvalue=point.eigenvalue,
    )
    return _record(history, entries, row)
