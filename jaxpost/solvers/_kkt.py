"""The Newton system of one iterate: `A z = b`, `b = -(grad_x L; c)`.

`A = [[B, G^T], [G, 0]]`, `B` the Hessian of the Lagrangian, shifted where its curvature
on the null space of `G` is not positive. The paper's constants of accuracy are here.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import lu_factor, lu_solve

from jaxpost.solvers._options import SolveOptions

# Of `eps norm(A) norm(z)`. A product alone is off by about one such unit; a chunk of
# sketches, each off by its share, comes to rest some tens above.
ROUNDING = 32.0


def _unbounded(eta1: jax.Array, eta2: jax.Array) -> jax.Array:
    return jnp.inf * eta2


class NewtonSystem(NamedTuple):
    """What the inner solvers see.

    Fields:
        products: `v -> A v`, `[n + m]` to the same.
        rows: `S -> S A`, sketch vectors in rows, `[s, n + m]` to the same.
        right: `b`, `[n + m]`.
        shift: what was added to the diagonal of the Hessian.
        matrix: `A` itself, or None when it is not formed.
        scale: `norm(A) Psi`, which the theory's accuracy is divided by; 1 for a
            relative accuracy.
        rounding: residual below which rounding hides any gain, relative to `norm(z)`.
        delta_bound: `eta1, eta2 -> delta_trial`.
        inverse: `v -> A^-1 v` where the structure of `A` gives it, else None.
    """

    products: Callable[[jax.Array], jax.Array]
    rows: Callable[[jax.Array], jax.Array]
    right: jax.Array
    shift: jax.Array
    matrix: jax.Array | None = None
    scale: jax.Array | float = 1.0
    rounding: jax.Array | float = 0.0
    delta_bound: Callable[[jax.Array, jax.Array], jax.Array] = _unbounded
    inverse: Callable[[jax.Array], jax.Array] | None = None


def kkt_matrix(hessian: jax.Array, jacobian: jax.Array) -> jax.Array:
    """`[[B, G^T], [G, 0]]`."""
    size = jacobian.shape[0]
    corner = jnp.zeros((size, size), hessian.dtype)
    return jnp.block([[hessian, jacobian.T], [jacobian, corner]])


def smallest_eigenvalue(jacobian: jax.Array) -> jax.Array:
    """Of `G G^T` [xi_G]."""
    return jnp.linalg.eigvalsh(jacobian @ jacobian.T)[0]


def guarded_eigenvalue(jacobian: jax.Array, options: SolveOptions) -> jax.Array:
    """What the guard looks at: the above, its rows first scaled to norm 1 if asked."""
    if options.guard == "scaled":
        norms = jnp.linalg.norm(jacobian, axis=1, keepdims=True)
        jacobian = jacobian / jnp.where(norms > 0.0, norms, 1.0)
    return smallest_eigenvalue(jacobian)


def is_singular(eigenvalue: jax.Array, options: SolveOptions) -> jax.Array:
    """Whether the guard ends the solve here."""
    if options.guard == "none":
        return jnp.asarray(False)
    return eigenvalue < (1e-2 if options.guard == "published" else options.guard_min)


def hessian_shift(
    hessian: jax.Array, jacobian: jax.Array, options: SolveOptions
) -> jax.Array:
    """What to add to the diagonal for curvature on the null space of `G`."""
    size = jacobian.shape[0]
    if options.hessian_check != "reduced_eig" or size == hessian.shape[0]:
        return jnp.zeros((), hessian.dtype)
    basis = jnp.linalg.qr(jacobian.T, mode="complete")[0][:, size:]
    reduced = basis.T @ hessian @ basis
    bound = options.curvature_min * jnp.eye(reduced.shape[0], dtype=reduced.dtype)
    # A factorisation costs a fraction of the eigenvalues, and mostly it exists.
    factor = jnp.linalg.cholesky(reduced - bound, symmetrize_input=False)
    curved = jnp.all(jnp.isfinite(factor))

    def needed():
        if options.hessian_shift == "frobenius":
            return options.shift_margin + jnp.linalg.norm(hessian)
        return options.shift_margin - jnp.linalg.eigvalsh(reduced)[0]

    return jax.lax.cond(curved, lambda: jnp.zeros((), hessian.dtype), needed)


def dense_system(
    hessian: jax.Array,
    jacobian: jax.Array,
    right: jax.Array,
    shift: jax.Array,
    options: SolveOptions,
) -> NewtonSystem:
    """The system with its matrix, `shift` added to the Hessian's diagonal."""
    shifted = hessian + shift * jnp.eye(hessian.shape[0], dtype=hessian.dtype)
    matrix = kkt_matrix(shifted, jacobian)
    norm = jnp.linalg.norm(matrix)
    rounding = ROUNDING * jnp.finfo(matrix.dtype).eps * norm
    scale, delta_bound = jnp.ones_like(norm), _unbounded
    if options.accuracy == "theory":
        psi = conditioning(shifted, smallest_eigenvalue(jacobian), options.shift_margin)
        upsilon = largest_norm(hessian, jacobian)
        scale = norm * psi
        delta_bound = lambda eta1, eta2: theory_accuracy(  # noqa: E731
            eta1, eta2, psi, upsilon, options.armijo
        )
    return NewtonSystem(
        lambda v: matrix @ v,
        lambda s: s @ matrix,
        right,
        shift,
        matrix=matrix,
        scale=scale,
        rounding=rounding,
        delta_bound=delta_bound,
    )


def square_system(
    hessian_products: Callable[[jax.Array], jax.Array],
    jacobian: jax.Array,
    right: jax.Array,
) -> Callable[[jax.Array], NewtonSystem]:
    """The system by its shift, of as many constraints as variables; no Hessian formed.

    The constraints alone decide `dx`; its one product with the Hessian gives `dy`. So
    what is factorised, once for all shifts, is the Jacobian.
    """
    size = jacobian.shape[0]
    factors = lu_factor(jacobian)

    def shifted(shift: jax.Array) -> NewtonSystem:
        def curved(v):
            return hessian_products(v) + shift * v

        def products(v):
            in_x = curved(v[:size]) + v[size:] @ jacobian
            return jnp.concatenate([in_x, jacobian @ v[:size]])

        def inverse(v):
            step = lu_solve(factors, v[size:])
            multipliers = lu_solve(factors, v[:size] - curved(step), trans=1)
            return jnp.concatenate([step, multipliers])

        # No rounding: a direct solve does not ask when to stop.
        return NewtonSystem(products, jax.vmap(products), right, shift, inverse=inverse)

    return shifted


def conditioning(shifted: jax.Array, eigenvalue: jax.Array, margin: float) -> jax.Array:
    """`Psi = 20 max(|B|_F^2, 1) / (min(xi_G, 1) min(xi_B, 1))`."""
    top = 20.0 * jnp.maximum(jnp.sum(shifted**2), 1.0)
    return top / (jnp.minimum(eigenvalue, 1.0) * min(margin, 1.0))


def largest_norm(hessian: jax.Array, jacobian: jax.Array) -> jax.Array:
    """`Upsilon = max(|G|_F, |Hessian of L|_F, 1)`."""
    largest = jnp.maximum(jnp.linalg.norm(jacobian), jnp.linalg.norm(hessian))
    return jnp.maximum(largest, 1.0)


def theory_accuracy(
    eta1: jax.Array,
    eta2: jax.Array,
    psi: jax.Array,
    upsilon: jax.Array,
    armijo: float,
) -> jax.Array:
    """`delta_trial = (1/2 - beta) eta2 / ((1 + eta1 + eta2) Upsilon^2 Psi^2)`."""
    return (0.5 - armijo) * eta2 / ((1.0 + eta1 + eta2) * upsilon**2 * psi**2)
