"""The exact augmented Lagrangian and its gradient."""

import chex
import hock_schittkowski as hs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import sketched_newton as oracle

from jaxpost.solvers._merit import is_descent, merit_gradient, merit_value
from jaxpost.solvers._problem import bind


def merit_of(name, penalties):
    objective, constraint, _, args = hs.problem(name)
    problem = bind(objective, constraint, args)

    @jax.jit
    def value(x, multipliers):
        parts = problem.first_order(x, multipliers)
        return merit_value(parts, multipliers, penalties)

    @jax.jit
    def gradient(x, multipliers):
        _, constraint, in_x = problem.first_order(x, multipliers)
        products = problem.kkt_products(x, multipliers)
        return merit_gradient(products, in_x, constraint).at(penalties)

    return value, gradient


@pytest.mark.usefixtures("strict_dtypes")
def test_hs6_where_the_objectives_hessian_is_not_enough():
    value, gradient = merit_of("hs6", (jnp.asarray(1.0), jnp.asarray(0.1)))
    x, multipliers = jnp.asarray([-1.2, 1.0]), jnp.asarray([0.3])
    assert float(value(x, multipliers)) == pytest.approx(14.042, abs=1e-12)
    np.testing.assert_allclose(
        gradient(x, multipliers), [-103.92, -41.0, 5.32], rtol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "size"), [("hs6", 2), pytest.param("hs42", 4, marks=pytest.mark.slow)]
)
def test_gradient_is_that_of_finite_differences(name, size):
    value, gradient = merit_of(name, (jnp.asarray(2.0), jnp.asarray(0.3)))
    rng = np.random.default_rng(1)
    count = 1 if name == "hs6" else 2
    x, multipliers = (
        jnp.asarray(rng.normal(size=size)),
        jnp.asarray(rng.normal(size=count)),
    )
    found = gradient(x, multipliers)
    point = np.concatenate([x, multipliers])
    both = jax.jit(lambda p: value(p[:size], p[size:]))
    for index in range(size + count):
        step = np.zeros(size + count)
        step[index] = 1e-5
        slope = (both(point + step) - both(point - step)) / 2e-5
        assert float(found[index]) == pytest.approx(float(slope), rel=1e-6, abs=1e-6)


def test_value_and_gradient_against_the_oracle():
    value, gradient = merit_of("hs7", (jnp.asarray(4.0), jnp.asarray(0.2)))
    x, multipliers = jnp.asarray([0.7, -1.1]), jnp.asarray([0.6])
    args = (oracle.HS7(), np.asarray(x), np.asarray(multipliers), 4.0, 0.2)
    np.testing.assert_allclose(value(x, multipliers), oracle.merit(*args), rtol=1e-13)
    np.testing.assert_allclose(
        gradient(x, multipliers), oracle.merit_gradient(*args), rtol=1e-12
    )


def test_descent_test_is_met_with_equality_at_its_bound():
    objective, constraint, _, args = hs.problem("hs42")
    problem = bind(objective, constraint, args)
    x, multipliers = jnp.ones(4), jnp.asarray([0.5, -1.0])
    _, constraint, in_x = problem.first_order(x, multipliers)
    merit = merit_gradient(problem.kkt_products(x, multipliers), in_x, constraint)
    penalties = (jnp.asarray(1.0), jnp.asarray(0.1))
    slope = merit.at(penalties)
    needed = 0.05 * float(merit.plain @ merit.plain)
    step = -slope * needed / (slope @ slope)
    chex.assert_shape(step, (6,))
    assert is_descent(merit, 1.000001 * step, penalties)
    assert not is_descent(merit, 0.999999 * step, penalties)
