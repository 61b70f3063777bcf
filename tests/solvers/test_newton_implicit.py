"""Derivatives of a solution, and the solver under JAX's transformations."""

import hock_schittkowski as hs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import solvers

EXACT = solvers.SolveOptions(tolerance=1e-11)


def distance(x, args):
    """To a point, bent a little so that the Hessian depends on `x`."""
    return 0.5 * jnp.sum((x - args["point"]) ** 2) + 0.05 * jnp.sum(x**4)


def ellipse(x, args):
    return args["axes"] @ x**2 - 1.0


def closest(args, start, key):
    return solvers.solve(distance, ellipse, start, args, options=EXACT, key=key)


@pytest.fixture
def args():
    return {
        "point": jnp.asarray([1.0, 2.0, -0.5]),
        "axes": jnp.asarray([1.0, 0.5, 2.0]),
        "unused": jnp.asarray([3, 4]),
    }


START = np.array([0.5, 0.8, -0.3])


def weigh(result):
    return result.x @ jnp.asarray([1.0, -2.0, 3.0]) + 0.7 * result.multipliers[0]


def differences(args, key):
    """Central differences of `weigh` in every float of `args`."""
    found = {}
    for name in ("point", "axes"):
        found[name] = np.zeros(3)
        for index in range(3):
            ends = []
            for sign in (1, -1):
                moved = {**args, name: args[name].at[index].add(sign * 1e-5)}
                ends.append(float(weigh(closest(moved, START, key))))
            found[name][index] = (ends[0] - ends[1]) / 2e-5
    return found


@pytest.mark.slow
def test_reverse_and_forward_are_finite_differences(args, key):
    floats = {name: args[name] for name in ("point", "axes")}

    def value(floats):
        return weigh(closest({**args, **floats}, START, key))

    wanted = differences(args, key)
    found = jax.grad(value)(floats)
    for name, numbers in wanted.items():
        np.testing.assert_allclose(found[name], numbers, rtol=1e-6, atol=1e-8)
    along = jax.tree.map(jnp.cos, floats)
    _, slope = jax.jvp(value, (floats,), (along,))
    total = sum(wanted[name] @ along[name] for name in wanted)
    assert float(slope) == pytest.approx(float(total), rel=1e-6)


def test_under_vmap_over_problems(args, key):
    points = jnp.stack([args["point"], args["point"] * 1.3, args["point"] - 0.2])

    def value(point):
        return weigh(closest({**args, "point": point}, START, key))

    found = jax.vmap(jax.grad(value))(points)
    assert found.shape == (3, 3)
    for row, point in zip(found, points, strict=True):
        wanted = differences({**args, "point": point}, key)["point"]
        np.testing.assert_allclose(row, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_second_derivative(args, key):
    def value(shift):
        return weigh(closest({**args, "point": args["point"] + shift}, START, key))

    slope = jax.jit(jax.grad(value))
    wanted = float(slope(1e-5) - slope(-1e-5)) / 2e-5
    assert float(jax.grad(jax.grad(value))(0.0)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_start_and_multipliers_do_not_matter(args, key):
    def value(start, multipliers):
        result = solvers.solve(
            distance,
            ellipse,
            start,
            args,
            multipliers=multipliers,
            options=EXACT,
            key=key,
        )
        return weigh(result) + result.kkt_residual + jnp.nansum(result.history.delta)

    for slope in jax.grad(value, argnums=(0, 1))(jnp.asarray(START), jnp.zeros(1)):
        np.testing.assert_array_equal(slope, np.zeros(slope.shape))


@pytest.mark.slow
def test_vmap_over_starts_is_a_loop(key):
    objective, constraint, _, index = hs.problem("hs42")
    starts = jnp.asarray([[1.0] * 4, [2.0, 2.0, 0.5, 0.9], [1.5, 2.0, 1.0, 2.0]])

    def one(start):
        return solvers.solve(objective, constraint, start, index, key=key)

    together = jax.vmap(one)(starts)
    for index, start in enumerate(starts):
        alone = one(start)
        assert int(together.status[index]) == int(alone.status) == 0
        assert int(together.iterations[index]) == int(alone.iterations)
        np.testing.assert_allclose(together.x[index], alone.x, rtol=1e-10)
        np.testing.assert_allclose(
            together.history.kkt_residual[index],
            alone.history.kkt_residual,
            rtol=1e-6,
            atol=1e-12,
        )


def test_compiled_once_per_shape(key):
    traced = []

    def objective(x, args):
        traced.append(1)
        return args * x @ x

    def constraint(x, args):
        return jnp.sum(x) - 1.0

    for scale, start in ((1.0, [0.0, 3.0]), (2.0, [5.0, 1.0])):
        result = solvers.solve(
            objective, constraint, jnp.asarray(start), jnp.asarray(scale), key=key
        )
        np.testing.assert_allclose(result.x, [0.5, 0.5], atol=1e-8)
        before, traced[:] = len(traced), []
    # the checks at the door look at the output's shape; the solve itself is compiled
    assert before <= 1
