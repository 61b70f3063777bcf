"""The exact augmented Lagrangian: its value, its gradient, and the descent test.

    M(x, y) = L + eta1 / 2 |c|^2 + eta2 / 2 |grad_x L|^2,   L = f + y . c

With `A` the KKT matrix (the Hessian of `L` in both arguments) the gradient is

    grad M = (grad_x L; c) + A (eta2 grad_x L; eta1 c)

so the second derivatives are those of the Lagrangian, not of the objective alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def merit_value(
    parts: tuple[jax.Array, jax.Array, jax.Array],
    multipliers: jax.Array,
    penalties: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """`M` from what `Problem.first_order` returns; penalties are (eta1, eta2)."""
    objective, constraint, gradient = parts
    eta1, eta2 = penalties
    return (
        objective
        + multipliers @ constraint
        + 0.5 * eta1 * (constraint @ constraint)
        + 0.5 * eta2 * (gradient @ gradient)
    )


class MeritGradient(NamedTuple):
    """`grad M` as a function of the penalties, from two products with `A`.

    Fields, `[n + m]` each: `plain = (grad_x L; c)`, `of_constraint = A (0; c)`,
    `of_gradient = A (grad_x L; 0)`.
    """

    plain: jax.Array
    of_constraint: jax.Array
    of_gradient: jax.Array

    def at(self, penalties: tuple[jax.Array, jax.Array]) -> jax.Array:
        eta1, eta2 = penalties
        return self.plain + eta1 * self.of_constraint + eta2 * self.of_gradient


def merit_gradient(
    products: Callable[[jax.Array], jax.Array],
    gradient: jax.Array,
    constraint: jax.Array,
) -> MeritGradient:
    """From products with the KKT matrix of the unshifted Hessian."""
    return MeritGradient(
        jnp.concatenate([gradient, constraint]),
        products(jnp.concatenate([jnp.zeros_like(gradient), constraint])),
        products(jnp.concatenate([gradient, jnp.zeros_like(constraint)])),
    )


def is_descent(
    merit: MeritGradient, step: jax.Array, penalties: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Whether `grad M . step <= -eta2 / 2 |(grad_x L; c)|^2`."""
    bound = -0.5 * penalties[1] * (merit.plain @ merit.plain)
    return merit.at(penalties) @ step <= bound
