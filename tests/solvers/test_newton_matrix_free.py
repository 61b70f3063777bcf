"""The Poisson control problem, with matrices and without."""

import dataclasses

import hock_schittkowski as hs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import solvers
from jaxpost.solvers import SolveOptions, problems
from jaxpost.solvers._kkt import conditioning, kkt_matrix, smallest_eigenvalue
from jaxpost.solvers._problem import bind

FREE = SolveOptions(
    method="minres",
    matrix_free=True,
    hessian_check="none",
    guard="none",
    delta=1e-6,
    tolerance=1e-8,
)


def solve_pde(count, options, preconditioner=None):
    problem = problems.pde(count)
    return solvers.solve(
        problem.objective,
        problem.constraint,
        problem.x0,
        problem.args,
        multipliers=problem.multipliers,
        options=options,
        preconditioner=preconditioner and problem.preconditioner,
        key=jax.random.key(0),
    )


def check_solution(result, accuracy):
    state, control = np.asarray(result.x).reshape(2, 3, 3)
    assert int(result.status) == solvers.Status.CONVERGED
    assert float(result.history.objective[result.iterations]) == pytest.approx(
        9.644442051812, rel=1e-12 + accuracy
    )
    near = {"rtol": 0.0, "atol": 1e-8 + accuracy}
    np.testing.assert_allclose(
        state[0], [-0.41344279, -0.56193877, -0.41600857], **near
    )
    np.testing.assert_allclose(state[1, 1], -0.76438009, **near)
    np.testing.assert_allclose(
        control[0], [-2.12479537, -2.61569458, -2.15250098], **near
    )
    np.testing.assert_allclose(control[1, 1], -3.2332746, atol=1e-7 + accuracy)
    np.testing.assert_allclose(result.multipliers[0], 0.21247954, **near)
    np.testing.assert_allclose(result.multipliers, -0.1 * control.ravel(), **near)


@pytest.mark.slow
def test_poisson_control_in_one_exact_step():
    result = solve_pde(3, SolveOptions.published("exact", hessian_check="none"))
    history = result.history
    assert float(history.kkt_residual[0]) == pytest.approx(19.1867351, abs=1e-7)
    assert float(history.jacobian_eigenvalue[0]) == pytest.approx(22.9613280, abs=1e-6)
    assert int(result.iterations) == 1
    check_solution(result, 0.0)


@pytest.mark.slow
def test_constants_of_the_poisson_system():
    problem = problems.pde(3)
    bound = bind(problem.objective, problem.constraint, problem.args)
    hessian = bound.hessian(problem.x0, problem.multipliers)
    jacobian = bound.jacobian(problem.x0)
    matrix = kkt_matrix(hessian, jacobian)
    assert np.linalg.cond(matrix) == pytest.approx(275.05, abs=5e-3)
    assert float(jnp.linalg.norm(matrix)) == pytest.approx(73.5057, abs=5e-5)
    psi = conditioning(hessian, smallest_eigenvalue(jacobian), 0.1)
    # |B|_F^2 = 9 + 9 * 0.1^2 = 9.09, the two other factors are 1 and xi_B = 0.1
    assert float(psi) == pytest.approx(1818.0, rel=1e-12)


@pytest.mark.parametrize(
    "preconditioner", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_poisson_control_without_matrices(preconditioner):
    result = solve_pde(3, FREE, preconditioner)
    check_solution(result, 1e-8)
    if preconditioner:
        # Three distinct eigenvalues: three steps of MINRES for each Newton step.
        assert int(result.counters.inner_steps) <= 4 * int(result.iterations)


@pytest.mark.slow
def test_hybrid_factorises_where_a_few_steps_are_not_enough():
    options = SolveOptions(method="hybrid", delta=1e-6, tolerance=1e-8)
    alone, helped = (solve_pde(6, options, helped) for helped in (False, True))
    for result in (alone, helped):
        assert int(result.status) == solvers.Status.CONVERGED
    assert int(alone.iterations) == 1
    assert int(alone.history.inner_steps[0]) == 108 // 12  # and then LU
    assert int(helped.history.inner_steps[0]) < 108 // 12  # and never LU
    assert float(alone.history.inner_residual[0]) < 1e-13
    assert float(helped.history.inner_residual[0]) < 1e-6
    np.testing.assert_allclose(helped.x, alone.x, atol=1e-7)


def test_negative_curvature_is_shifted_away_by_the_descent_test():
    def valley(x, args):  # a ridge at x[1] = 0, the valley's floor at 1
        return -0.5 * x[1] ** 2 + 0.25 * x[1] ** 4

    def line(x, args):
        return x[0] - 0.3

    result = solvers.solve(
        valley,
        line,
        jnp.asarray([0.3, 0.25]),
        options=dataclasses.replace(FREE, hessian_check="descent"),
        key=jax.random.key(0),
    )
    assert int(result.status) == solvers.Status.CONVERGED
    np.testing.assert_allclose(np.abs(result.x), [0.3, 1.0], atol=1e-8)  # either side
    shifts = np.asarray(result.history.hessian_shift)[: int(result.iterations)]
    # 0.1 does not suffice where the curvature is -1 + 3 * 0.25^2.
    assert shifts[0] == 1.0
    assert shifts[-1] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gaussian", "kaczmarz"])
def test_sketches_without_matrices(method):
    settings = {"method": method, "hessian_check": "none", "guard": "none"}
    free, wanted = (
        solvers.solve(
            *hs.problem("hs28"),
            options=SolveOptions(matrix_free=matrix_free, **settings),
            key=jax.random.key(2),
        )
        for matrix_free in (True, False)
    )
    assert int(free.status) == 0
    assert int(free.counters.inner_steps) == int(wanted.counters.inner_steps) > 0
    np.testing.assert_allclose(free.x, wanted.x, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_memory_grows_linearly():
    def peak_bytes(count):
        problem = problems.pde(count)

        def solve(x, args, key):
            return solvers.solve(
                problem.objective, problem.constraint, x, args, options=FREE, key=key
            )

        inputs = (problem.x0, problem.args, jax.random.key(0))
        memory = jax.jit(solve).lower(*inputs).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    small, large = peak_bytes(16), peak_bytes(32)
    assert 3.0 < large / small < 4.5
    assert large < 100 * 8 * (3 * 32**2)  # a hundred vectors of n + m
