"""Sketch-and-project steps: by hand, in expectation, and by the chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import sketched_newton as oracle

from jaxpost.solvers import SolveOptions
from jaxpost.solvers._kkt import NewtonSystem
from jaxpost.solvers._sketch import (
    Inner,
    gaussian_sketches,
    kaczmarz_sketches,
    least_norm,
    run_blocks,
    run_vectors,
    step_factors,
)

MATRIX = np.array([[2.0, 1.0], [1.0, 3.0]])
RIGHT = np.array([3.0, 5.0])
SOLUTION = np.array([0.8, 1.4])


def system_of(matrix, right):
    matrix, right = jnp.asarray(matrix), jnp.asarray(right)
    none = jnp.zeros(())
    return NewtonSystem(
        products=lambda v: matrix @ v,
        rows=lambda s: s @ matrix,
        right=right,
        matrix=matrix,
        shift=none,
        scale=none + 1.0,
        rounding=none,
        delta_bound=lambda eta1, eta2: jnp.inf * eta2,
    )


def start_of(system, key):
    right = system.right
    return Inner(jnp.zeros_like(right), -right, jnp.zeros((), jnp.int32), key)


def symmetric(size, seed=0):
    """Indefinite, eigenvalues between 1 and 3 in size."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return basis @ np.diag(np.linspace(1, 3, size) * (-1) ** np.arange(size)) @ basis.T


def iterates(matrix, right, sketches):
    """All iterates from 0, by the factors of one chunk."""
    rows = sketches @ matrix
    alpha = step_factors(jnp.asarray(rows), jnp.asarray(sketches @ -right))
    return -np.cumsum(np.asarray(alpha)[:, None] * rows, axis=0)


def test_kaczmarz_by_hand():
    found = iterates(MATRIX, RIGHT, np.eye(2)[[0, 1, 0]])
    np.testing.assert_allclose(found, [[1.2, 0.6], [1.4, 1.2], [1.0, 1.0]], rtol=1e-12)
    errors = np.linalg.norm(found - SOLUTION, axis=1)
    np.testing.assert_allclose(errors, [0.89443, 0.63246, 0.44721], atol=1e-5)


def test_gaussian_step_by_hand():
    (found,) = iterates(MATRIX, RIGHT, np.ones((1, 2)))
    np.testing.assert_allclose(found, [0.96, 1.28], rtol=1e-12)
    assert abs(np.ones(2) @ (MATRIX @ found - RIGHT)) < 1e-12


def test_a_chunk_is_its_sketches_one_after_another():
    matrix, right = symmetric(7), np.arange(1.0, 8.0)
    sketches = np.random.default_rng(3).normal(size=(40, 7))
    z, wanted = np.zeros(7), []
    for sketch in sketches:
        z = oracle.sketch_step(matrix, right, z, sketch)
        wanted.append(z)
    np.testing.assert_allclose(
        iterates(matrix, right, sketches), wanted, rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("draw", ["gaussian", "kaczmarz"])
def test_expected_gain_with_the_identity(draw):
    """`1 - 1 / n` of the squared error is left after a step, with `A = I`."""
    size, count = 5, 20_000
    keys = jax.random.split(jax.random.key(1), 1)[0]
    if draw == "gaussian":
        sketches = np.asarray(jax.random.normal(keys, (count, size)))
    else:
        sketches = np.eye(size)[np.asarray(jax.random.randint(keys, (count,), 0, size))]
    right = np.array([1.0, -2.0, 0.5, 3.0, 1.5])
    after = np.stack(
        [oracle.sketch_step(np.eye(size), right, 0 * right, s) for s in sketches]
    )
    left = np.sum((after - right) ** 2, axis=1) / np.sum(right**2)
    assert np.mean(left) == pytest.approx(0.8, abs=4 * np.std(left) / np.sqrt(count))


def run(method, system, key, tolerance, chunk=16, max_inner=100_000, size=3):
    options = SolveOptions(method=method, chunk=chunk, max_inner=max_inner)
    bound = lambda z: jnp.asarray(tolerance)  # noqa: E731
    inner = start_of(system, key)
    if method.startswith("block"):
        return run_blocks(system, inner, bound, options, size)
    if method == "gaussian":
        draw = gaussian_sketches(system, chunk)
    else:
        draw = kaczmarz_sketches(system, chunk, method == "kaczmarz_norm")
    return run_vectors(system, draw, inner, bound, options)


@pytest.mark.parametrize(
    "method",
    ["gaussian", "kaczmarz", "kaczmarz_norm", "block_gaussian", "block_kaczmarz"],
)
def test_every_sketch_reaches_the_solution(method, key):
    matrix = symmetric(6, seed=4)
    right = np.arange(1.0, 7.0)
    found = run(method, system_of(matrix, right), key, 1e-10)
    wanted = np.linalg.solve(matrix, right)
    np.testing.assert_allclose(found.z, wanted, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(found.residual, matrix @ found.z - right, atol=1e-12)


def test_it_stops_at_the_first_sketch_that_is_exact_enough(key):
    """Chunks of 1 and of 16 with the same rows drawn stop after the same step."""
    matrix, right = symmetric(5, seed=2), np.ones(5)
    system = system_of(matrix, right)
    drawn = np.asarray(jax.random.randint(jax.random.split(key)[1], (16,), 0, 5))
    z, norms = np.zeros(5), []
    for row in drawn:
        z = oracle.sketch_step(matrix, right, z, np.eye(5)[row])
        norms.append(np.linalg.norm(matrix @ z - right))
    tolerance = min(norms[:12]) * (1 + 1e-9)  # the chunk rounds in another order
    assert tolerance < np.sqrt(5)
    found = run("kaczmarz", system, key, tolerance)
    assert int(found.steps) == 1 + next(
        i for i, n in enumerate(norms) if n <= tolerance
    )


def test_the_error_never_grows(key):
    matrix, right = symmetric(6, seed=4), np.arange(1.0, 7.0)
    wanted = np.linalg.solve(matrix, right)
    sketches = np.random.default_rng(0).normal(size=(60, 6))
    errors = np.linalg.norm(iterates(matrix, right, sketches) - wanted, axis=1)
    before = np.concatenate([[np.linalg.norm(wanted)], errors[:-1]])
    assert np.all(errors <= before * (1 + 1e-12))


def test_the_cap_holds_within_a_chunk(key):
    found = run(
        "gaussian", system_of(symmetric(6), np.ones(6)), key, 1e-30, max_inner=21
    )
    assert int(found.steps) == 21


def test_a_row_of_zeros_is_skipped():
    rows = jnp.asarray([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    alpha = step_factors(rows, jnp.asarray([3.0, 7.0, 4.0]))
    np.testing.assert_allclose(alpha, [3.0, 0.0, 1.0])


def test_least_norm():
    rows = np.array([[1.0, 2.0, 0.0, -1.0], [2.0, 3.0, 0.0, 0.5], [0.0, 1.0, 1.0, 4.0]])
    right = np.array([1.0, -1.0, 2.0])
    found = least_norm(jnp.asarray(rows), jnp.asarray(right))
    np.testing.assert_allclose(found, np.linalg.pinv(rows) @ right, atol=1e-12)
