"""Dense derivatives by the chunk; the system of as many constraints as variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import solvers
from jaxpost.solvers._kkt import dense_system, square_system
from jaxpost.solvers._problem import TOGETHER, bind, hessian_of, jacobian_of


def curved(x, args=None):
    """As many equations as variables, none like another."""
    weights = jnp.cos(jnp.arange(x.size**2, dtype=x.dtype)).reshape(x.size, x.size)
    return x + 0.1 * jnp.sin(weights @ x) - 0.3


@pytest.mark.parametrize("size", [3, TOGETHER, TOGETHER + 3])
def test_chunks_of_unit_vectors_give_the_whole_matrix(size):
    x = jnp.linspace(-1.0, 1.0, size)
    scalar = lambda x: jnp.sum(curved(x) ** 2)  # noqa: E731
    few = lambda x: curved(x)[: size // 3]  # noqa: E731
    for function in (curved, few):
        found = jacobian_of(function, x)
        np.testing.assert_allclose(found, jax.jacrev(function)(x), atol=1e-14)
    found = hessian_of(scalar, x)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found, jax.hessian(scalar)(x), atol=1e-13)


def test_square_system_is_the_dense_one():
    problem = bind(lambda x, _: jnp.sum(x**4), curved, None)
    x, multipliers = jnp.asarray([0.3, -0.2, 0.5]), jnp.asarray([1.0, -2.0, 0.5])
    jacobian, shift = problem.jacobian(x), jnp.asarray(0.7)
    right = jnp.arange(1.0, 7.0)
    hessian = problem.hessian(x, multipliers)
    dense = dense_system(hessian, jacobian, right, shift, solvers.SolveOptions())
    products = problem.hessian_products(x, multipliers)
    square = square_system(products, jacobian, right)(shift)
    np.testing.assert_allclose(square.products(right), dense.products(right))
    assert square.inverse is not None
    assert dense.matrix is not None
    found = square.inverse(right)
    np.testing.assert_allclose(found, np.linalg.solve(dense.matrix, right))


def test_square_problems_take_the_same_steps_without_a_hessian(key):
    objective = lambda x, args: jnp.sum((x - args) ** 4)  # noqa: E731

    starts = jnp.asarray([[0.3, -0.2, 0.5], [1.0, 1.0, -1.0]])

    def run(options):
        def one(x0):
            return solvers.solve(objective, curved, x0, 0.5, options=options, key=key)

        return jax.vmap(one)(starts)

    square = run(solvers.SolveOptions(tolerance=1e-10))
    dense = run(solvers.SolveOptions.published("exact", tolerance=1e-10))
    np.testing.assert_array_equal(square.status, 0)
    np.testing.assert_allclose(square.x, dense.x, atol=1e-12)
    np.testing.assert_allclose(square.multipliers, dense.multipliers, atol=1e-10)
