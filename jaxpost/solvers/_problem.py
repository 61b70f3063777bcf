"""The problem as pure functions of a point, and the checks at the door.

`L(x, multipliers) = objective + multipliers . constraint`. Knows no algorithm.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

Objective = Callable[[jax.Array, Any], jax.Array]
Constraint = Callable[[jax.Array, Any], jax.Array]


TOGETHER = 64
"""Unit vectors that a derivative is asked for at once: their arrays stay in cache."""


class Problem(NamedTuple):
    """Functions of `x` alone; `constraint` always returns `[m]`."""

    objective: Callable[[jax.Array], jax.Array]
    constraint: Callable[[jax.Array], jax.Array]

    def lagrangian(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        return self.objective(x) + multipliers @ self.constraint(x)

    def first_order(
        self, x: jax.Array, multipliers: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Objective, constraint and gradient of the Lagrangian: one reverse pass."""
        both = lambda x: (self.objective(x), self.constraint(x))  # noqa: E731
        (value, constraint), pull = jax.vjp(both, x)
        (gradient,) = pull((jnp.ones_like(value), multipliers))
        return value, constraint, gradient

    def jacobian(self, x: jax.Array) -> jax.Array:
        """`G`, `[m, n]`."""
        return jacobian_of(self.constraint, x)

    def hessian(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        """Of the Lagrangian in `x`, `[n, n]`, symmetric to the last bit."""
        return hessian_of(lambda x: self.lagrangian(x, multipliers), x)

    def hessian_products(
        self, x: jax.Array, multipliers: jax.Array
    ) -> Callable[[jax.Array], jax.Array]:
        """`v -> H v`, `H` the Hessian of the Lagrangian in `x`."""
        return jax.linearize(lambda x: jax.grad(self.lagrangian)(x, multipliers), x)[1]

    def kkt_products(
        self, x: jax.Array, multipliers: jax.Array
    ) -> Callable[[jax.Array], jax.Array]:
        """`v -> A v`, `A` the KKT matrix: the Hessian of `L` in both arguments."""
        size = x.shape[0]

        def gradient(point):
            x, multipliers = point[:size], point[size:]
            _, constraint, in_x = self.first_order(x, multipliers)
            return jnp.concatenate([in_x, constraint])

        _, products = jax.linearize(gradient, jnp.concatenate([x, multipliers]))
        return products


def jacobian_of(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Of a vector of `x`, `[m, n]`, by rows or by columns, whichever are fewer."""
    size = jax.eval_shape(function, x).shape[0]
    if 2 * size <= x.shape[0]:
        _, pull = jax.vjp(function, x)
        return _of_units(lambda v: pull(v)[0], size, x.dtype)
    return _of_units(_pushed(function, x), x.shape[0], x.dtype).T


def hessian_of(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Of a scalar of `x`, `[n, n]`, symmetric to the last bit."""
    matrix = _of_units(_pushed(jax.grad(function), x), x.shape[0], x.dtype)
    return 0.5 * (matrix + matrix.T)


def _pushed(function, x):
    return lambda v: jax.jvp(function, (x,), (v,))[1]


def _of_units(linear: Callable, size: int, dtype: Any) -> jax.Array:
    """`linear` of every unit vector, in rows: its matrix transposed."""
    units = jnp.eye(size, dtype=dtype)
    if size <= TOGETHER:
        return jax.vmap(linear)(units)
    return jax.lax.map(linear, units, batch_size=TOGETHER)


def bind(objective: Objective, constraint: Constraint, args: Any) -> Problem:
    """The problem at these `args`."""
    return Problem(
        lambda x: objective(x, args), lambda x: jnp.atleast_1d(constraint(x, args))
    )


def checked_start(
    objective: Objective,
    constraint: Constraint,
    x0: Any,
    args: Any,
    multipliers: Any,
) -> tuple[jax.Array, jax.Array]:
    """`x0` and multipliers as float64 vectors, or an error that says what is wrong."""
    if jnp.result_type(float) != jnp.float64:
        raise RuntimeError(
            "solvers need float64: set JAX_ENABLE_X64=1, or call within "
            "`with jax.enable_x64(True):`. The accuracy asked of a step lies below "
            "what float32 can hold."
        )
    x0 = jnp.asarray(x0)
    if x0.ndim != 1 or x0.shape[0] == 0:
        raise ValueError(
            f"x0 must be a vector [n], got shape {x0.shape}; use jax.vmap for several "
            "starts."
        )
    if jnp.iscomplexobj(x0):
        raise ValueError("x0 must be real, got a complex array.")
    x0 = x0.astype(jnp.float64)
    if not isinstance(x0, Tracer) and not bool(jnp.all(jnp.isfinite(x0))):
        raise ValueError("x0 must be finite, got NaN or infinite entries.")
    size = _constraint_size(objective, constraint, x0, args)
    if multipliers is None:
        return x0, jnp.zeros((size,), jnp.float64)
    multipliers = jnp.asarray(multipliers)
    if multipliers.shape != (size,):
        raise ValueError(
            f"multipliers must have one entry per constraint, shape ({size},); got "
            f"{multipliers.shape}."
        )
    return x0, multipliers.astype(jnp.float64)


def _constraint_size(objective, constraint, x0, args) -> int:
    value = jax.eval_shape(objective, x0, args)
    if not hasattr(value, "shape") or value.shape != () or value.dtype != jnp.float64:
        raise ValueError(
            f"objective(x, args) must return a float64 scalar, got {value}."
        )
    values = jax.eval_shape(constraint, x0, args)
    if not hasattr(values, "shape") or len(values.shape) > 1:
        raise ValueError(
            f"constraint(x, args) must return a vector [m] or a scalar, got {values}."
        )
    size = values.shape[0] if values.shape else 1
    if size == 0:
        raise ValueError(
            "there is no constraint (m = 0): the problem is unconstrained; use "
            "jax.scipy.optimize.minimize or optax.lbfgs."
        )
    if values.dtype != jnp.float64:
        raise ValueError(f"constraint(x, args) must be float64, got {values.dtype}.")
    if size > x0.shape[0]:
        raise ValueError(
            f"{size} constraints on {x0.shape[0]} variables: the Jacobian cannot have "
            "full rank; drop dependent constraints or use least squares."
        )
    return size
