"""Optimal control of Poisson's equation on a square grid of any size.

Both functions are stencils, so derivatives and products with them take memory and time
linear in the number of unknowns; nothing here is a matrix.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.solvers.problems._problem import Problem, need_float64

SIDE = 2.0


class PdeData(NamedTuple):
    """What the problem depends on; a solution can be differentiated in it.

    Fields:
        target: the wanted state `W_d`, float64 `[N, N]`, first axis the second
            coordinate.
        penalty: weight of the control, float64 scalar.
        spacing: distance `h` of grid points, float64 scalar.
    """

    target: jax.Array
    penalty: jax.Array
    spacing: jax.Array


def pde(grid: int = 3, *, penalty: float = 0.1) -> Problem:
    """The control `Z` that brings the state `W` of a membrane near a target.

    `min ||W - W_d||^2 / 2 + penalty ||Z||^2 / 2` subject to `lap(W) / h^2 + Z = 0`: the
    five-point Laplacian, `W = 0` on the boundary, `h = 2 / (N + 1)`. Linear-quadratic:
    one exact Newton step solves it. `x` is `W` then `Z`, columns first; everything
    starts at one.

    Args:
        grid: interior points per side, `N`; `n = 2 N^2` and `m = N^2`.
        penalty: weight of the control.

    Raises:
        RuntimeError: JAX's 64-bit mode is off.
        ValueError: `grid` is below one, or `penalty` is not positive and finite.

    Source: the PDE problem of arXiv 2305.18379, Section 5, whose code has N = 3.
    """
    need_float64("pde")
    if grid < 1:
        raise ValueError(f"grid must be at least 1 point per side, got {grid}.")
    if not 0.0 < penalty < math.inf:
        raise ValueError(f"penalty must be positive and finite, got {penalty}.")
    places = (0.1 / math.sqrt(15.0)) * (jnp.arange(1.0, grid + 1.0) - (grid + 1) / 2)
    first, second = jnp.sin(4.0 + places), jnp.cos(3.0 + places)
    data = PdeData(
        target=first[None, :] + second[:, None],
        penalty=jnp.float64(penalty),
        spacing=jnp.float64(SIDE / (grid + 1)),
    )
    return Problem(
        name=f"PDE-{grid}",
        objective=pde_objective,
        constraint=pde_constraint,
        x0=jnp.ones(2 * grid**2),
        multipliers=jnp.ones(grid**2),
        args=data,
        preconditioner=pde_preconditioner,
        facts={"grid": grid},
    )


def pde_objective(x: jax.Array, data: PdeData) -> jax.Array:
    """Distance of the state from its target and size of the control, a scalar."""
    state, control = _split(x, data)
    off = jnp.sum(jnp.square(state - data.target))
    return 0.5 * off + 0.5 * data.penalty * jnp.sum(jnp.square(control))


def pde_constraint(x: jax.Array, data: PdeData) -> jax.Array:
    """What is left of the equation at each grid point, `[N^2]`."""
    state, control = _split(x, data)
    padded = jnp.pad(state, 1)
    neighbours = (
        padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    )
    laplacian = (neighbours - 4.0 * state) / jnp.square(data.spacing)
    return jnp.ravel(laplacian + control)


def pde_preconditioner(
    x: jax.Array, multipliers: jax.Array, data: PdeData
) -> Callable[[jax.Array], jax.Array]:
    """The inverse of the block diagonal of Hessian and Schur complement.

    The latter is `lap^2 / h^4 + 1 / penalty`, which the sine transform makes diagonal.
    MINRES then ends in three steps in exact arithmetic, on any grid: the preconditioned
    matrix has the eigenvalues 1 and `(1 +- sqrt(5)) / 2`. Holds `N^2` numbers.

    Args:
        x: not read: the problem is linear-quadratic.
        multipliers: not read.
        data: of the problem.

    Returns:
        The product with the inverse, `[n + m]` to `[n + m]`.

    Source: Murphy, Golub & Wathen (2000), "A note on preconditioning for indefinite
    linear systems".
    """
    del x, multipliers
    grid = data.target.shape[0]
    places = jnp.arange(1.0, grid + 1.0)
    angle = jnp.pi / (grid + 1)
    sines = jnp.sin(angle * places[:, None] * places[None, :])
    sines = sines * math.sqrt(2.0 / (grid + 1))  # symmetric, its own inverse
    waves = 2.0 * (jnp.cos(angle * places) - 1.0) / jnp.square(data.spacing)
    schur = jnp.square(waves[:, None] + waves[None, :]) + 1.0 / data.penalty

    def apply(v: jax.Array) -> jax.Array:
        state, control, dual = jnp.reshape(v, (3, grid, grid))
        dual = sines @ ((sines @ dual @ sines) / schur) @ sines
        return jnp.ravel(jnp.stack([state, control / data.penalty, dual]))

    return apply


def _split(x: jax.Array, data: PdeData) -> tuple[jax.Array, jax.Array]:
    both = jnp.reshape(x, (2, *data.target.shape))
    return both[0], both[1]
