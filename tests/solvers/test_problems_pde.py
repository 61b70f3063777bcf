"""The PDE-constrained problem against loops, its known solution, and any grid size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import solver_problems as oracle

from jaxpost.solvers import problems


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("grid", [1, 2, 5])
def test_functions_equal_loops(grid, strict_dtypes):
    problem = problems.pde(grid, penalty=0.3)
    x = np.random.default_rng(grid).normal(size=2 * grid**2)
    value, constraint = oracle.pde(x, grid, 0.3)
    args = (jnp.asarray(x), problem.args)
    np.testing.assert_allclose(problem.objective(*args), value, rtol=1e-13)
    np.testing.assert_allclose(problem.constraint(*args), constraint, rtol=1e-12)
    assert problem.num_variables == 2 * grid**2
    assert problem.num_constraints == grid**2


def test_published_instance_has_its_solution():
    """The system that the loops define, solved by NumPy: the paper's saved numbers."""
    grid, n = 3, 18
    start = np.zeros(n)
    shift = oracle.pde(start, grid, 0.1)[1]
    columns = [oracle.pde(row, grid, 0.1)[1] - shift for row in np.eye(n)]
    jacobian = np.asarray(columns).T
    hessian = np.diag([1.0] * 9 + [0.1] * 9)
    problem = problems.pde(grid)
    gradient = jax.grad(problem.objective)(jnp.zeros(n), problem.args)
    kkt = oracle.kkt_matrix(hessian, jacobian)
    found = np.linalg.solve(kkt, -np.concatenate([gradient, shift]))
    value = float(problem.objective(jnp.asarray(found[:n]), problem.args))
    np.testing.assert_allclose(value, 9.644442051812, rtol=1e-11)
    np.testing.assert_allclose(found[4], -0.76438009, rtol=1e-7)
    np.testing.assert_allclose(found[13], -3.2332746, rtol=1e-7)
    np.testing.assert_allclose(found[n:], -0.1 * found[9:n], rtol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(kkt), 73.5057, rtol=1e-6)
    start = np.concatenate([problem.x0, problem.multipliers])
    moved = kkt @ start + np.concatenate([gradient, shift])
    np.testing.assert_allclose(np.linalg.norm(moved), 19.1867351, rtol=1e-8)


def test_a_large_grid_is_stencils_only():
    """Products with the KKT matrix hold a few vectors, at n = 2e4 and above."""
    problem = problems.pde(100)
    size = problem.num_variables

    def lagrangian(z):
        x, multipliers = z[:size], z[size:]
        constraint = problem.constraint(x, problem.args)
        return problem.objective(x, problem.args) + multipliers @ constraint

    z = jnp.concatenate([problem.x0, problem.multipliers])
    product = jax.jit(lambda z, v: jax.jvp(jax.grad(lagrangian), (z,), (v,))[1])
    memory = product.lower(z, z).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 40 * z.nbytes


def test_preconditioner_leaves_three_eigenvalues():
    """Of `P^-1 A`, as Murphy, Golub and Wathen have it for any such system."""
    problem = problems.pde(4, penalty=0.2)
    n, m = problem.num_variables, problem.num_constraints
    jacobian = jax.jacfwd(problem.constraint)(problem.x0, problem.args)
    hessian = jax.hessian(problem.objective)(problem.x0, problem.args)
    kkt = oracle.kkt_matrix(np.asarray(hessian), np.asarray(jacobian))
    inverse = problem.preconditioner(problem.x0, problem.multipliers, problem.args)
    matrix = np.asarray(jax.vmap(inverse)(jnp.eye(n + m)))
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert np.linalg.eigvalsh(matrix)[0] > 0.0
    found = np.sort(np.linalg.eigvals(matrix @ kkt).real)
    golden = np.asarray([1.0 - np.sqrt(5.0), 1.0 + np.sqrt(5.0)]) / 2.0
    wanted = np.sort(np.concatenate([np.repeat(golden, m), np.ones(n - m)]))
    np.testing.assert_allclose(found, wanted, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": 0}, "grid must be at least 1"),
        ({"penalty": 0.0}, "penalty must be positive"),
        ({"penalty": float("nan")}, "penalty must be positive"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        problems.pde(**arguments)


def test_float32_is_refused():
    with (
        jax.enable_x64(False),
        pytest.raises(RuntimeError, match="pde needs float64: set JAX_ENABLE_X64=1"),
    ):
        problems.pde()
