"""Rivals of the sketched Newton method: l1-SQP with GMRES, its adaptive form, and the
augmented Lagrangian; compiled as ours are, their Jacobians and Hessians computed by the
same functions as ours.

`min f(x)` subject to `c(x) = 0`; `L = f + lambda . c`, `G` the Jacobian of `c`, `B` the
Hessian of `L`, shifted as in arXiv 2305.18379 where it is not positive on the null
space of `G`. GMRES is never restarted and its iterates are tested one by one: the
fewest products with the matrix that it can need.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.solvers._problem import Problem, bind, hessian_of

GUARD = 1e-6  # smallest eigenvalue of G G^T
SHORTEST = 2.0**-40  # step of the line searches
LARGEST_PENALTY = 1e10


class Found(NamedTuple):
    """How a solve ended.

    Fields:
        x, multipliers: the last iterate.
        kkt_residual: norm of (gradient of the Lagrangian, constraint).
        converged: whether that is within the tolerance.
        iterations: outer iterations (of the augmented Lagrangian: Newton steps).
        rounds: multiplier updates of the augmented Lagrangian, else as `iterations`.
        objective: evaluations of objective and constraint together.
        gradient: evaluations of the gradient of the Lagrangian.
        products: GMRES iterations.
    """

    x: jax.Array
    multipliers: jax.Array
    kkt_residual: jax.Array
    converged: jax.Array
    iterations: jax.Array
    rounds: jax.Array
    objective: jax.Array
    gradient: jax.Array
    products: jax.Array


class Local(NamedTuple):
    """What a problem is at an iterate."""

    value: jax.Array
    constraint: jax.Array
    slope: jax.Array  # of the objective
    jacobian: jax.Array
    gradient: jax.Array  # of the Lagrangian
    kkt: jax.Array


def local(problem: Problem, x: jax.Array, multipliers: jax.Array) -> Local:
    value, slope = jax.value_and_grad(problem.objective)(x)
    constraint = problem.constraint(x)
    jacobian = problem.jacobian(x)
    gradient = slope + multipliers @ jacobian
    kkt = jnp.sqrt(gradient @ gradient + constraint @ constraint)
    return Local(value, constraint, slope, jacobian, gradient, kkt)


def shifted_hessian(
    problem: Problem, x: jax.Array, multipliers: jax.Array, jacobian: jax.Array
) -> jax.Array:
    """Of the Lagrangian; plus `0.1` and its norm on the diagonal where needed."""
    hessian = problem.hessian(x, multipliers)
    m, n = jacobian.shape
    if m == n:
        return hessian
    null = jnp.linalg.qr(jacobian.T, mode="complete")[0][:, m:]
    least = jnp.linalg.eigvalsh(null.T @ hessian @ null)[0]
    shift = jnp.where(least < 1e-6, 0.1 + jnp.linalg.norm(hessian), 0.0)
    return hessian + shift * jnp.eye(n)


class Krylov(NamedTuple):
    """GMRES on `A z = b` after `size` iterations, from zero."""

    basis: jax.Array  # [N + 1, N]
    triangle: jax.Array  # [N, N], of the rotated Hessenberg matrix; identity beyond
    rotations: jax.Array  # [N, 2]
    right: jax.Array  # [N + 1]
    size: jax.Array
    exhausted: jax.Array


def start_gmres(right: jax.Array) -> Krylov:
    n = right.shape[0]
    length = jnp.linalg.norm(right)
    basis = jnp.zeros((n + 1, n)).at[0].set(right / jnp.where(length > 0, length, 1.0))
    return Krylov(
        basis,
        jnp.eye(n),
        jnp.tile(jnp.asarray([1.0, 0.0]), (n, 1)),
        jnp.zeros(n + 1).at[0].set(length),
        jnp.zeros((), jnp.int32),
        length == 0.0,
    )


def advance(matrix: jax.Array, state: Krylov) -> Krylov:
    """One iteration: a product, orthogonalised twice, and a rotation."""
    n, j = matrix.shape[0], state.size
    vector = matrix @ state.basis[j]
    size = jnp.linalg.norm(vector)
    first = state.basis @ vector
    vector = vector - first @ state.basis
    second = state.basis @ vector
    vector = vector - second @ state.basis
    column, rest = first + second, jnp.linalg.norm(vector)
    exhausted = (rest <= 1e-14 * size) | (j + 1 >= n)
    basis = state.basis.at[j + 1].set(jnp.where(rest > 0, vector / rest, 0.0))

    def rotate(i, column):
        c, s = state.rotations[i, 0], state.rotations[i, 1]
        top, low = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
        return column.at[i].set(top).at[i + 1].set(low)

    column = jax.lax.fori_loop(0, j, rotate, column)
    length = jnp.hypot(column[j], rest)
    safe = jnp.where(length > 0, length, 1.0)
    c, s = column[j] / safe, rest / safe
    triangle = state.triangle.at[:, j].set(
        jnp.where(jnp.arange(n) < j, column[:n], 0.0).at[j].set(safe)
    )
    right = state.right.at[j + 1].set(-s * state.right[j])
    right = right.at[j].set(c * state.right[j])
    rotations = state.rotations.at[j].set(jnp.stack([c, s]))
    return Krylov(basis, triangle, rotations, right, j + 1, exhausted)


def solution(state: Krylov) -> jax.Array:
    n = state.triangle.shape[0]
    right = jnp.where(jnp.arange(n) < state.size, state.right[:n], 0.0)
    weights = jax.scipy.linalg.solve_triangular(state.triangle, right)
    return weights @ state.basis[:n]


def iterate_gmres(
    matrix: jax.Array, state: Krylov, enough: Callable[[jax.Array], jax.Array]
) -> tuple[Krylov, jax.Array]:
    """Goes on until `enough(z)` holds or the space is exhausted; at least one step."""

    def body(carry):
        state, _, _ = carry
        state = advance(matrix, state)
        z = solution(state)
        return state, z, enough(z)

    z = solution(state)
    carry = (state, z, (state.size > 0) & enough(z))
    state, z, _ = jax.lax.while_loop(
        lambda carry: ~carry[2] & ~carry[0].exhausted, body, carry
    )
    return state, z


class _Sqp(NamedTuple):
    x: jax.Array
    multipliers: jax.Array
    at: Local
    penalty: jax.Array
    kappa: jax.Array
    counts: jax.Array  # iterations, objective, gradient, products
    failed: jax.Array


def _norm1(vector: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(vector))


def l1_sqp(
    problem: Problem,
    x: jax.Array,
    multipliers: jax.Array,
    *,
    adaptive: bool,
    tolerance: float = 1e-4,
    max_iterations: int = 10_000,
) -> Found:
    """Inexact SQP with the merit `f + mu ||c||_1`.

    Args:
        adaptive: the relative residual is bounded by `kappa`, which is divided by
            `nu^2` (and `mu` multiplied by `nu`) when the model is not reduced enough;
            else Byrd, Curtis and Nocedal's two termination tests.
        tolerance: of the KKT residual.
    """
    n = x.shape[0]
    step = _adaptive_step if adaptive else _tested_step

    def body(state: _Sqp) -> _Sqp:
        at = state.at
        hessian = shifted_hessian(problem, state.x, state.multipliers, at.jacobian)
        m = at.jacobian.shape[0]
        matrix = jnp.block([[hessian, at.jacobian.T], [at.jacobian, jnp.zeros((m, m))]])
        right = -jnp.concatenate([at.gradient, at.constraint])
        z, penalty, kappa, products = step(matrix, right, hessian, at, state)
        merit = at.value + penalty * _norm1(at.constraint)
        gain = _reduction(z[:n], hessian, at, penalty)

        def too_long(carry):
            alpha, trial, _ = carry
            ok = trial <= merit - 1e-8 * alpha * gain
            return ~ok & (alpha > SHORTEST)

        def at_length(alpha):
            moved = state.x + alpha * z[:n]
            return problem.objective(moved) + penalty * _norm1(
                problem.constraint(moved)
            )

        def halve(carry):
            alpha, _, trials = carry
            return alpha / 2, at_length(alpha / 2), trials + 1

        first = (jnp.float64(1.0), at_length(1.0), jnp.int32(1))
        alpha, _, trials = jax.lax.while_loop(too_long, halve, first)
        new_x, new_y = state.x + alpha * z[:n], state.multipliers + alpha * z[n:]
        new = local(problem, new_x, new_y)
        counts = state.counts + jnp.stack([1, trials + 1, 1, products])
        failed = (alpha <= SHORTEST) | ~jnp.isfinite(new.kkt) | _lost_rank(new)
        return _Sqp(new_x, new_y, new, penalty, kappa, counts, failed)

    at = local(problem, x, multipliers)
    counts = jnp.asarray([0, 1, 1, 0], jnp.int32)
    kappa = jnp.float64(0.1)
    state = _Sqp(x, multipliers, at, jnp.float64(1.0), kappa, counts, _lost_rank(at))
    end = jax.lax.while_loop(
        lambda s: (s.at.kkt > tolerance) & ~s.failed & (s.counts[0] < max_iterations),
        body,
        state,
    )
    iterations, objective, gradient, products = end.counts
    return Found(
        end.x,
        end.multipliers,
        end.at.kkt,
        end.at.kkt <= tolerance,
        iterations,
        iterations,
        objective,
        gradient,
        products,
    )


def _lost_rank(at: Local) -> jax.Array:
    return jnp.linalg.eigvalsh(at.jacobian @ at.jacobian.T)[0] < GUARD


def _reduction(
    d: jax.Array, hessian: jax.Array, at: Local, penalty: jax.Array
) -> jax.Array:
    """Of the quadratic model of the merit."""
    left = _norm1(at.constraint + at.jacobian @ d)
    model = -(at.slope @ d) - 0.5 * d @ (hessian @ d)
    return model + penalty * (_norm1(at.constraint) - left)


def _reduced_enough(d, hessian, at, penalty, sigma) -> jax.Array:
    size = _norm1(at.constraint)
    left = _norm1(at.constraint + at.jacobian @ d)
    wanted = sigma * penalty * jnp.maximum(size, left - size)
    return _reduction(d, hessian, at, penalty) >= wanted


def _tested_step(matrix, right, hessian, at, state: _Sqp):
    """Until one of the two tests of Byrd, Curtis and Nocedal (2008) holds."""
    n = hessian.shape[0]
    tau, epsilon = 0.1, 0.1
    sigma = tau * (1.0 - epsilon)
    size = _norm1(at.constraint)
    beta = jnp.maximum(_norm1(at.gradient) / (size + 1.0), 1.0)

    def tests(z):
        residual = matrix @ z - right
        dual, primal = _norm1(residual[:n]), _norm1(residual[n:])
        first = _reduced_enough(z[:n], hessian, at, state.penalty, sigma)
        first &= dual <= jnp.maximum(0.1 * _norm1(at.gradient), beta * size)
        first &= dual + primal <= _norm1(right)
        second = (primal <= epsilon * size) & (dual <= beta * size)
        return first, second

    krylov, z = iterate_gmres(
        matrix, start_gmres(right), lambda z: jnp.any(jnp.stack(tests(z)))
    )
    d = z[:n]
    left = _norm1(at.constraint + at.jacobian @ d)
    needed = (at.slope @ d + 0.5 * d @ (hessian @ d)) / jnp.where(
        size > left, (1.0 - tau) * (size - left), jnp.inf
    )
    raised = (state.penalty < needed) & ~tests(z)[0]
    penalty = jnp.where(raised, needed + 1e-4, state.penalty)
    return z, penalty, state.kappa, krylov.size


def _adaptive_step(matrix, right, hessian, at, state: _Sqp):
    """Until the residual is within `kappa` and the model is reduced enough."""
    n, nu, sigma = hessian.shape[0], 1.5, 0.09

    def body(carry):
        krylov, _, penalty, kappa, _ = carry
        krylov, z = iterate_gmres(
            matrix,
            krylov,
            lambda z: _norm1(matrix @ z - right) <= kappa * _norm1(right),
        )
        good = _reduced_enough(z[:n], hessian, at, penalty, sigma)
        good |= penalty > LARGEST_PENALTY
        penalty = jnp.where(good, penalty, penalty * nu)
        kappa = jnp.where(good, kappa, jnp.maximum(kappa / nu**2, 1e-12))
        return krylov, z, penalty, kappa, good

    start = start_gmres(right)
    carry = (start, right, state.penalty, state.kappa, jnp.asarray(False))
    krylov, z, penalty, kappa, _ = jax.lax.while_loop(lambda c: ~c[4], body, carry)
    return z, penalty, kappa, krylov.size


def augmented_lagrangian(
    problem: Problem,
    x: jax.Array,
    multipliers: jax.Array,
    *,
    tolerance: float = 1e-4,
    max_rounds: int = 100,
    max_inner: int = 100,
) -> Found:
    """Newton-GMRES on `L + mu/2 ||c||^2`, then `lambda += mu c` and `mu *= 1.5`."""
    n = x.shape[0]

    def minimise(x, multipliers, penalty, accuracy, counts):
        def value(x):
            constraint = problem.constraint(x)
            quadratic = 0.5 * penalty * constraint @ constraint
            return problem.objective(x) + multipliers @ constraint + quadratic

        def body(carry):
            x, now, slope, counts, _ = carry
            hessian = hessian_of(value, x)
            least = jnp.linalg.eigvalsh(hessian)[0]
            shift = jnp.where(least < 1e-6, 1.0 - least, 0.0)
            hessian = hessian + shift * jnp.eye(n)
            bound = 1e-4 * jnp.linalg.norm(slope)
            krylov, d = iterate_gmres(
                hessian,
                start_gmres(-slope),
                lambda d: jnp.linalg.norm(hessian @ d + slope) <= bound,
            )

            def too_long(carry):
                alpha, trial, _ = carry
                return ~(trial <= now + 0.1 * alpha * slope @ d) & (alpha > SHORTEST)

            def halve(carry):
                alpha, _, trials = carry
                return alpha / 2, value(x + alpha / 2 * d), trials + 1

            first = (jnp.float64(1.0), value(x + d), jnp.int32(1))
            alpha, new, trials = jax.lax.while_loop(too_long, halve, first)
            x = x + alpha * d
            counts = counts + jnp.stack([1, trials, 1, krylov.size])
            return x, new, jax.grad(value)(x), counts, alpha <= SHORTEST

        def more(carry):
            _, _, slope, new_counts, stuck = carry
            steps = new_counts[0] - counts[0]
            return (jnp.linalg.norm(slope) > accuracy) & ~stuck & (steps < max_inner)

        now, slope = jax.value_and_grad(value)(x)
        counts = counts + jnp.asarray([0, 1, 1, 0], jnp.int32)
        carry = (x, now, slope, counts, jnp.asarray(False))
        end = jax.lax.while_loop(more, body, carry)
        return end[0], end[3]

    def body(carry):
        x, multipliers, penalty, accuracy, counts, rounds, _ = carry
        x, counts = minimise(x, multipliers, penalty, accuracy, counts)
        multipliers = multipliers + penalty * problem.constraint(x)
        kkt = local(problem, x, multipliers).kkt
        accuracy = jnp.maximum(0.1 * accuracy, 0.1 * tolerance)
        return x, multipliers, 1.5 * penalty, accuracy, counts, rounds + 1, kkt

    kkt = local(problem, x, multipliers).kkt
    counts = jnp.asarray([0, 1, 1, 0], jnp.int32)
    start = (x, multipliers, jnp.float64(1.0), jnp.float64(0.1), counts, 0, kkt)
    end = jax.lax.while_loop(
        lambda c: (c[6] > tolerance) & (c[5] < max_rounds) & jnp.isfinite(c[6]),
        body,
        start,
    )
    x, multipliers, _, _, counts, rounds, kkt = end
    iterations, objective, gradient, products = counts
    return Found(
        x,
        multipliers,
        kkt,
        kkt <= tolerance,
        iterations,
        rounds,
        objective,
        gradient,
        products,
    )


BASELINES: dict[str, Callable[..., Found]] = {
    "l1-SQP, GMRES": lambda *a, **k: l1_sqp(*a, adaptive=False, **k),
    "l1-SQP, GMRES, adaptive": lambda *a, **k: l1_sqp(*a, adaptive=True, **k),
    "augmented Lagrangian": augmented_lagrangian,
}


def compiled(name: str, problem: Any, tolerance: float) -> Callable[[], Found]:
    """A baseline on one of jaxpost's problems, compiled; call it to solve."""

    def solve(x0, args, multipliers):
        bound = bind(problem.objective, problem.constraint, args)
        return BASELINES[name](bound, x0, multipliers, tolerance=tolerance)

    inputs = (problem.x0, problem.args, problem.multipliers)
    program = jax.jit(solve).lower(*inputs).compile()
    return lambda: program(*inputs)
