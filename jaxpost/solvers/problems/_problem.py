"""A problem: two functions, where to start, and what is known of its optimum."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Problem:
    """`min f(x)` subject to `c(x) = 0`, ready for `solvers.solve`.

    Fields:
        name: as tables show it.
        objective: `f(x, args)`, float64 `[n]` to a scalar.
        constraint: `c(x, args)`, float64 `[n]` to `[m]`.
        x0: where to start, float64 `[n]`.
        multipliers: where their estimate starts, float64 `[m]`.
        args: pytree of arrays that both functions take; `()` if they take none.
        optimum: smallest known value of the objective on the constraint, or None.
        preconditioner: what MINRES takes as `solve(preconditioner=...)`, or None.
        facts: what the family found out about this problem, by name.
    """

    name: str
    objective: Callable[[jax.Array, Any], jax.Array]
    constraint: Callable[[jax.Array, Any], jax.Array]
    x0: jax.Array
    multipliers: jax.Array
    args: Any = ()
    optimum: float | None = None
    preconditioner: Callable[..., Callable[[jax.Array], jax.Array]] | None = None
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def num_variables(self) -> int:
        """`n`."""
        return self.x0.size

    @property
    def num_constraints(self) -> int:
        """`m`."""
        return self.multipliers.size


def need_float64(what: str) -> None:
    """Refuses to go on in float32, in which the accuracies here cannot be met.

    Raises:
        RuntimeError: JAX's 64-bit mode is off.
    """
    if jnp.result_type(float) != jnp.float64:
        raise RuntimeError(
            f"{what} needs float64: set JAX_ENABLE_X64=1, or call within "
            "`with jax.enable_x64(True):`."
        )
