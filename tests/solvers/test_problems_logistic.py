"""Constrained logistic regression: loops, extremes, feasibility, rows over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import solver_problems as oracle

from jaxpost import parallel
from jaxpost.solvers import problems


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make(rows=13, width=16, seed=0, **options):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, width))
    labels = np.where(rng.uniform(size=rows) < 0.5, -1.0, 1.0)
    return problems.constrained_logistic(
        features, labels, key=jax.random.key(seed), num_linear=4, **options
    )


def test_functions_equal_loops(strict_dtypes):
    problem = make()
    w = np.random.default_rng(1).normal(size=16)
    parts = [np.asarray(problem.args[i]) for i in (0, 1, 3, 4)]
    value, constraint = oracle.logistic(w, *parts)
    found = problem.objective(jnp.asarray(w), problem.args)
    np.testing.assert_allclose(found, value, rtol=1e-13)
    found = problem.constraint(jnp.asarray(w), problem.args)
    np.testing.assert_allclose(found, constraint, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(problem.x0, np.ones(16))
    np.testing.assert_array_equal(problem.multipliers, np.ones(5))


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_large_margins_do_not_overflow(size):
    problem = make()
    w = jnp.full(16, size)
    value, slope = jax.value_and_grad(problem.objective)(w, problem.args)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_feasibility_is_the_distance_of_the_plane():
    """`b^T (A A^T)^-1 b` is the least `||w||^2` on `A w = b`."""
    problem = make()
    matrix, offsets = (np.asarray(problem.args[i]) for i in (3, 4))
    nearest = np.linalg.lstsq(matrix, offsets, rcond=None)[0]
    np.testing.assert_allclose(problem.facts["feasibility"], nearest @ nearest)


def test_contradicting_constraints_are_refused_with_the_value():
    message = r"b\^T \(A A\^T\)\^-1 b is \d+\.\d+, but .* take another key"
    with pytest.raises(problems.InfeasibleError, match=message):
        make(width=6, seed=2)


def test_bad_arguments():
    message = "tiny: num_linear must be at least 1 and below the 4"
    with pytest.raises(ValueError, match=message) as caught:
        make(width=4, name="tiny")
    assert not isinstance(caught.value, problems.InfeasibleError)
    with pytest.raises(AssertionError):
        problems.constrained_logistic(
            np.ones((3, 16)), np.ones(4), key=jax.random.key(0)
        )
    with jax.enable_x64(False), pytest.raises(RuntimeError, match="needs float64"):
        make()


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_rows_over_a_mesh_give_the_same_values(shape):
    """13 rows do not divide by the mesh: rows of weight zero fill it up."""
    problem = make()
    mesh = parallel.make_mesh(shape)
    split = problems.shard_rows(problem.args, mesh)
    parts = shape["data"] * shape.get("fsdp", 1)
    assert split.features.shape[0] % parts == 0
    assert len(split.features.addressable_shards) == 8
    held = split.features.addressable_shards[0].data.shape[0]
    assert held == split.features.shape[0] // parts
    w = jnp.asarray(np.random.default_rng(2).normal(size=16))
    whole = jax.jit(jax.value_and_grad(problem.objective))
    for one, eight in zip(whole(w, problem.args), whole(w, split), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-13, atol=1e-15)
