"""The Newton system by products alone: memory grows with `n + m`, not its square."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpost.solvers._kkt import NewtonSystem


def free_system(
    products: Callable[[jax.Array], jax.Array], right: jax.Array
) -> NewtonSystem:
    """From products with the KKT matrix, whose Hessian is taken as it is."""
    none = jnp.zeros((), right.dtype)
    # Norm of A along a vector of its image: an estimate from below, for rounding only.
    along = products(right)
    length = jnp.linalg.norm(right)
    norm = jnp.linalg.norm(along) / jnp.where(length > 0.0, length, 1.0)
    return NewtonSystem(
        products=products,
        rows=jax.vmap(products),
        right=right,
        matrix=None,
        shift=none,
        scale=none + 1.0,
        rounding=4.0 * jnp.finfo(right.dtype).eps * norm,
        delta_bound=lambda eta1, eta2: jnp.inf * eta2,
    )
