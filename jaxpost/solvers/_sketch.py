"""Sketch-and-project steps on `A z = b`.

A step with sketch vector `s` projects `z` onto the solutions of `s . (A z - b) = 0`:

    z <- z - (s . r) / |A s|^2 A s,   r = A z - b

A block of vectors is projected onto at once. Vector steps are computed by the chunk:
with `W = S A` the factors of a chunk's steps, one after the other, solve the triangular
system `tril(W W^T) alpha = S r`, because each step's projection of the residual is the
chunk's first minus what the earlier steps took. Same iterates, in matrix products.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from jaxpost.solvers._kkt import NewtonSystem
from jaxpost.solvers._options import SolveOptions


class Inner(NamedTuple):
    """Where an inner solve stands.

    Fields:
        z: the step so far, `[n + m]`.
        residual: `A z - b`, `[n + m]`.
        steps: taken so far in this outer iteration, int32.
        key: for what is drawn next.
    """

    z: jax.Array
    residual: jax.Array
    steps: jax.Array
    key: jax.Array


class Sketches(NamedTuple):
    """Some sketch vectors `S`: `rows = S A`, `images = S A A`, `projections = S r`."""

    rows: jax.Array
    images: jax.Array
    projections: jax.Array


Draw = Callable[[jax.Array, jax.Array], Sketches]


def gaussian_sketches(system: NewtonSystem, count: int) -> Draw:
    """Standard normal vectors."""

    def draw(key, residual):
        vectors = jax.random.normal(key, (count, residual.shape[0]), residual.dtype)
        rows = system.rows(vectors)
        return Sketches(rows, system.rows(rows), vectors @ residual)

    return draw


def kaczmarz_sketches(system: NewtonSystem, count: int, weighted: bool) -> Draw:
    """Rows of `A`, drawn evenly or by their squared norm, with replacement."""
    size = system.right.shape[0]
    if system.matrix is None:
        return _kaczmarz_products(system, count)
    matrix = system.matrix
    square = matrix @ matrix
    logits = jnp.log(jnp.diagonal(square))

    def draw(key, residual):
        if weighted:
            chosen = jax.random.categorical(key, logits, shape=(count,))
        else:
            chosen = jax.random.randint(key, (count,), 0, size)
        return Sketches(matrix[chosen], square[chosen], residual[chosen])

    return draw


def _kaczmarz_products(system: NewtonSystem, count: int) -> Draw:
    size = system.right.shape[0]

    def draw(key, residual):
        chosen = jax.random.randint(key, (count,), 0, size)
        rows = system.rows(jax.nn.one_hot(chosen, size, dtype=residual.dtype))
        return Sketches(rows, system.rows(rows), residual[chosen])

    return draw


def step_factors(rows: jax.Array, projections: jax.Array) -> jax.Array:
    """Factors of steps taken one after another; zero for a sketch that `A` maps to 0.

    Args:
        rows: `S A`, `[c, n + m]`.
        projections: `S r` before the first step, `[c]`.

    Returns:
        `alpha [c]`: after the first `i` steps `z` has moved by `-alpha[:i] @ rows[:i]`.
    """
    products = rows @ rows.T
    squares = jnp.diagonal(products)
    dead = squares <= 0.0
    products = products + jnp.diag(jnp.where(dead, 1.0, 0.0))
    alpha = solve_triangular(products, jnp.where(dead, 0.0, projections), lower=True)
    return jnp.where(dead, 0.0, alpha)


def run_vectors(
    system: NewtonSystem,
    draw: Draw,
    inner: Inner,
    tolerance: Callable[[jax.Array], jax.Array],
    options: SolveOptions,
) -> Inner:
    """Single-vector steps until the residual's norm is `tolerance(z)` or the cap."""

    def body(inner):
        key, key_draw = jax.random.split(inner.key)
        rows, images, projections = draw(key_draw, inner.residual)
        alpha = step_factors(rows, projections)
        passed = inner.residual[None] - jnp.cumsum(alpha[:, None] * images, axis=0)
        there = jnp.linalg.norm(passed, axis=1) <= tolerance(inner.z)
        count = alpha.shape[0]
        taken = jnp.where(jnp.any(there), jnp.argmax(there) + 1, count)
        taken = jnp.minimum(taken, options.max_inner - inner.steps).astype(jnp.int32)
        alpha = jnp.where(jnp.arange(count) < taken, alpha, 0.0)
        z = inner.z - alpha @ rows
        residual = system.products(z) - system.right
        return Inner(z, residual, inner.steps + taken, key)

    return _until(body, inner, tolerance, options)


def run_blocks(
    system: NewtonSystem,
    inner: Inner,
    tolerance: Callable[[jax.Array], jax.Array],
    options: SolveOptions,
    size: int,
) -> Inner:
    """Steps onto the solutions of `size` sketched equations at a time."""
    assert system.matrix is not None
    matrix, total = system.matrix, system.right.shape[0]

    def body(inner):
        key, key_draw = jax.random.split(inner.key)
        if options.method == "block_gaussian":
            vectors = jax.random.normal(key_draw, (size, total), matrix.dtype)
            rows, projections = vectors @ matrix, vectors @ inner.residual
        else:
            chosen = jax.random.permutation(key_draw, total)[:size]
            rows, projections = matrix[chosen], inner.residual[chosen]
        z = inner.z - least_norm(rows, projections)
        residual = system.products(z) - system.right
        return Inner(z, residual, inner.steps + 1, key)

    return _until(body, inner, tolerance, options)


def least_norm(rows: jax.Array, right: jax.Array) -> jax.Array:
    """The shortest `d` with `rows d = right`, rows independent."""
    basis, triangle = jnp.linalg.qr(rows.T)
    return basis @ solve_triangular(triangle, right, trans="T", lower=False)


def _until(body, inner, tolerance, options) -> Inner:
    def unfinished(inner):
        far = jnp.linalg.norm(inner.residual) > tolerance(inner.z)
        return far & (inner.steps < options.max_inner)

    return jax.lax.while_loop(unfinished, body, inner)
