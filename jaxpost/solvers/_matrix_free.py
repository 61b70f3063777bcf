"""The Newton system by products alone: memory grows with `n + m`, not its square."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpost.solvers._kkt import ROUNDING, NewtonSystem
from jaxpost.solvers._minres import run_minres
from jaxpost.solvers._options import SolveOptions
from jaxpost.solvers._sketch import Inner

Products = Callable[[jax.Array], jax.Array]


def free_system(
    products: Products, right: jax.Array, shift: jax.Array, size: int
) -> NewtonSystem:
    """From products with the KKT matrix; `shift` raises its first `size` diagonals."""

    def shifted(v):
        return products(v) + shift * v.at[size:].set(0.0)

    # Norm of A along a vector of its image: an estimate from below, for rounding only.
    along = shifted(right)
    length = jnp.linalg.norm(right)
    norm = jnp.linalg.norm(along) / jnp.where(length > 0.0, length, 1.0)
    rounding = ROUNDING * jnp.finfo(right.dtype).eps * norm
    return NewtonSystem(shifted, jax.vmap(shifted), right, shift, rounding=rounding)


def solve_products(
    products: Products, right: jax.Array, preconditioner: Products | None
) -> jax.Array:
    """`A^-1 right` by MINRES, to rounding; differentiable, and linear in `right`."""
    options = SolveOptions(method="minres")

    def solve(products, right):
        system = free_system(products, right, jnp.zeros((), right.dtype), 0)
        start = Inner(
            jnp.zeros_like(right),
            -right,
            jnp.zeros((), jnp.int32),
            jax.random.key(0),  # MINRES draws nothing
        )
        asked = 1e-13 * jnp.linalg.norm(right)

        def tolerance(z):
            return jnp.maximum(asked, system.rounding * jnp.linalg.norm(z))

        return run_minres(system, start, tolerance, options, preconditioner).z

    return jax.lax.custom_linear_solve(products, right, solve, symmetric=True)
