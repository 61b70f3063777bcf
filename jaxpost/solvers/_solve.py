"""The outer loop: evaluate, step, search, adapt, until one of the ends in `Status`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.solvers._inner import Adaptive, Step, newton_step
from jaxpost.solvers._kkt import (
    NewtonSystem,
    dense_system,
    guarded_eigenvalue,
    hessian_shift,
    is_singular,
    kkt_matrix,
    square_system,
)
from jaxpost.solvers._line_search import LineSearch, backtrack
from jaxpost.solvers._matrix_free import free_system
from jaxpost.solvers._merit import merit_gradient, merit_value
from jaxpost.solvers._options import SolveOptions
from jaxpost.solvers._problem import Problem
from jaxpost.solvers._record import (
    empty_record,
    record_iterate,
    record_step,
    unpack_record,
)
from jaxpost.solvers._result import Counters, SolveResult
from jaxpost.solvers._status import Status

_MOST_SHIFTS = 12  # the last is 1e10 times the first

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
    record: jax.Array
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
    parts = problem.first_order(x0, multipliers)
    point = _point(problem, x0, multipliers, parts, options)
    first_kkt = point.kkt
    first = (options.penalty_constraint, options.penalty_gradient, options.delta)
    none = jnp.zeros((), jnp.int32)
    start = _State(
        point,
        Adaptive(*(jnp.asarray(value, x0.dtype) for value in first)),
        key,
        none,
        _status_at(point, none, options),
        _record_point(empty_record(options.max_iterations, x0.dtype), point, 0),
        Counters(none + 1, none + 1, none + 1, none, none),
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
        unpack_record(end.record),
        end.counters,
    )


def _iterate(problem, state, first_kkt, options, preconditioner) -> _State:
    point, size = state.point, state.point.x.shape[0]
    system_at, shift, products = _newton_system(problem, point, options)
    merit = merit_gradient(products, point.gradient, point.constraint)
    theta = options.theta * jnp.minimum(1.0, point.kkt / first_kkt) ** (
        options.theta_power
    )
    key, key_inner = jax.random.split(state.key)
    bound = preconditioner and preconditioner(point.x, point.multipliers)

    def step_at(shift):
        return newton_step(
            system_at(shift), merit, state.adaptive, theta, key_inner, options, bound
        )

    shift, step = _descending(step_at, shift, options)
    direction, penalties = step.z, step.adaptive.penalties

    def moved(alpha):
        z = alpha * direction
        return point.x + z[:size], point.multipliers + z[size:]

    def trial(alpha):
        x, multipliers = moved(alpha)
        parts = problem.first_order(x, multipliers)
        return merit_value(parts, multipliers, penalties), parts

    parts = (point.objective, point.constraint, point.gradient)
    before = merit_value(parts, point.multipliers, penalties)
    search = backtrack(trial, before, merit.at(penalties) @ direction, options)
    failure = _failure(step, search)
    keep = failure != Status.RUNNING
    alpha = jnp.where(keep, 0.0, search.step_size)
    new = _point(problem, *moved(alpha), search.found, options)
    new = jax.tree.map(lambda old, new: jnp.where(keep, old, new), point, new)
    iteration = state.iteration + jnp.where(keep, 0, 1).astype(jnp.int32)
    status = jnp.where(keep, failure, _status_at(new, iteration, options))

    record = record_step(
        state.record,
        dict(
            step_size=alpha,
            merit_before=before,
            merit_after=jnp.where(keep, before, search.merit),
            inner_residual=step.residual_norm / point.kkt,
            hessian_shift=shift,
            penalty_constraint=penalties[0],
            penalty_gradient=penalties[1],
            delta=step.adaptive.delta,
            inner_steps=step.inner_steps,
            escaped=step.escaped,
        ),
        state.iteration,
    )
    return _State(
        new,
        step.adaptive,
        key,
        iteration,
        status.astype(jnp.int32),
        _record_point(record, new, iteration),
        _counted(state.counters, search, step),
    )


def _counted(counts: Counters, search: LineSearch, step: Step) -> Counters:
    return Counters(
        counts.objective + search.trials,
        counts.gradient + search.trials,
        counts.jacobian + 1,
        counts.hessian + 1,
        counts.inner_steps + step.inner_steps,
    )


def _descending(step_at, shift, options) -> tuple[jax.Array, Step]:
    """The step, at ten times the shift again and again while it does not descend."""
    if options.hessian_check != "descent":
        return shift, step_at(shift)

    def more(state):
        shift, _, tries = state
        shift = jnp.where(tries == 0, 0.0, options.shift_margin * 10.0 ** (tries - 1))
        return shift, step_at(shift), tries + 1

    def unfinished(state):
        _, step, tries = state
        return ~step.descends & (tries < _MOST_SHIFTS)

    step = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(step_at, shift)
    )
    start = (shift, step, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(unfinished, more, start)[:2]


def _newton_system(
    problem: Problem, point: _Point, options: SolveOptions
) -> tuple[Callable[[jax.Array], NewtonSystem], jax.Array, Callable]:
    """The system by its shift, the shift to try first, and products without it."""
    right = -jnp.concatenate([point.gradient, point.constraint])
    size, none = point.x.shape[0], jnp.zeros((), right.dtype)
    if options.matrix_free:
        products = problem.kkt_products(point.x, point.multipliers)
        return lambda s: free_system(products, right, s, size), none, products
    assert point.jacobian is not None
    jacobian = point.jacobian
    square = jacobian.shape[0] == size
    if square and options.method == "exact" and options.accuracy == "relative":
        curved = problem.hessian_products(point.x, point.multipliers)
        system_at = square_system(curved, jacobian, right)
        return system_at, none, system_at(none).products
    hessian = problem.hessian(point.x, point.multipliers)
    whole = kkt_matrix(hessian, jacobian)
    return (
        lambda shift: dense_system(hessian, jacobian, right, shift, options),
        hessian_shift(hessian, jacobian, options),
        lambda v: whole @ v,
    )


def _point(problem, x, multipliers, parts, options) -> _Point:
    """The iterate; `parts` are those of `Problem.first_order` there."""
    objective, constraint, gradient = parts
    kkt = jnp.sqrt(gradient @ gradient + constraint @ constraint)
    if options.matrix_free:
        jacobian, eigenvalue = None, jnp.full_like(kkt, jnp.nan)
    else:
        jacobian = problem.jacobian(x)
        eigenvalue = guarded_eigenvalue(jacobian, options)
    return _Point(
        x, multipliers, objective, constraint, gradient, jacobian, eigenvalue, kkt
    )


def _status_at(point: _Point, iteration: jax.Array, options: SolveOptions) -> jax.Array:
    """The first that holds: not finite, converged, singular, out of iterations."""
    finite = jnp.isfinite(point.kkt) & jnp.isfinite(point.objective)
    singular = jnp.asarray(False)
    if point.jacobian is not None:
        finite &= jnp.all(jnp.isfinite(point.jacobian))
        singular = is_singular(point.eigenvalue, options)
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
            (~jnp.all(jnp.isfinite(step.z)), Status.NON_FINITE),
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


def _record_point(record: jax.Array, point: _Point, row: Any) -> jax.Array:
    entries = dict(
        kkt_residual=point.kkt,
        objective=point.objective,
        constraint_norm=jnp.linalg.norm(point.constraint),
        jacobian_eigenvalue=point.eigenvalue,
    )
    return record_iterate(record, entries, row)
