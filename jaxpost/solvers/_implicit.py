"""`solve`: the door, and derivatives of the solution by the implicit function theorem.

At a solution `F(x, y; args) = (grad_x L; c) = 0`, so `d(x, y) = -A^-1 (dF/dargs) dargs`
with the KKT matrix `A`, the Hessian of `L` as it is, whatever the solver shifted it by.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.solvers._kkt import kkt_matrix
from jaxpost.solvers._matrix_free import solve_products
from jaxpost.solvers._options import SolveOptions
from jaxpost.solvers._problem import Constraint, Objective, bind, checked_start
from jaxpost.solvers._result import SolveResult
from jaxpost.solvers._solve import run


def solve(
    objective: Objective,
    constraint: Constraint,
    x0: jax.Array,
    args: Any = (),
    *,
    multipliers: jax.Array | None = None,
    options: SolveOptions | None = None,
    preconditioner: Callable[..., Callable[[jax.Array], jax.Array]] | None = None,
    key: jax.Array,
) -> SolveResult:
    """Minimise `objective(x, args)` subject to `constraint(x, args) = 0`.

    Newton's method on the KKT conditions, its linear systems solved as exactly as the
    descent on an exact augmented Lagrangian needs, by random sketches or otherwise
    (`SolveOptions.method`). Compiled once per shape, pair of functions and options;
    `jax.vmap` runs over starts, multipliers, `args` and keys.

    The solution is differentiable in `args` (forward and reverse, also under `vmap`);
    its derivative in `x0`, `multipliers` and `key` is zero. What is differentiated must
    be in `args`, not in a closure. Derivatives hold where the solve converged and the
    solution is a strict one (full-rank Jacobian, positive reduced Hessian).

    Args:
        objective: `(x [n], args) -> float64 scalar`, twice differentiable by JAX.
        constraint: `(x [n], args) -> float64 [m]` or a scalar, likewise; `m <= n`.
        x0: start, `[n]`.
        args: pytree passed to both functions.
        multipliers: first multipliers, `[m]`; None for zeros. The Lagrangian is
            `objective + multipliers . constraint`.
        options: None for the defaults, `SolveOptions.published()` for the paper's.
        preconditioner: for `minres` and `hybrid`, `(x, multipliers, args) -> (v ->
            P^-1 v)` on `[n + m]`, `P` symmetric positive definite and near `|A|`.
        key: for the sketches.

    Returns:
        `SolveResult(x, multipliers, kkt_residual, status, iterations, history,
        counters)`. However it ends, the last iterate is returned with a `Status`.

    Raises:
        RuntimeError: float64 is not enabled.
        ValueError: `x0` is not a finite real vector, a function returns something else
            than said above, `m` is 0 or above `n`, `multipliers` has another length, or
            a preconditioner is given to a method without use for it.

    Source: Hong, Na, Mahoney & Kolar (2023), "Constrained Optimization via Exact
    Augmented Lagrangian and Randomized Iterative Sketching", arXiv 2305.18379. The
    gradient of the merit has the Hessian of the Lagrangian where the authors' code has
    that of the objective, and the sketches start from the residual `-b`.
    """
    options = options or SolveOptions()
    if preconditioner is not None and options.method not in ("minres", "hybrid"):
        raise ValueError(
            "preconditioner is for method='minres' or 'hybrid', got "
            f"method={options.method!r}."
        )
    x0, multipliers = checked_start(objective, constraint, x0, args, multipliers)
    return _solve(
        objective, constraint, preconditioner, options, x0, multipliers, args, key
    )


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _solution(
    objective, constraint, preconditioner, options, x0, multipliers, args, key
) -> SolveResult:
    bound = preconditioner and (lambda x, y: preconditioner(x, y, args))
    return run(bind(objective, constraint, args), x0, multipliers, key, options, bound)


@_solution.defjvp
def _solution_jvp(objective, constraint, preconditioner, options, primals, tangents):
    result = _solution(objective, constraint, preconditioner, options, *primals)
    args, dargs = primals[2], tangents[2]
    x, multipliers = result.x, result.multipliers

    def conditions(args):
        _, values, gradient = bind(objective, constraint, args).first_order(
            x, multipliers
        )
        return jnp.concatenate([gradient, values])

    _, moved = jax.jvp(conditions, (args,), (dargs,))
    problem = bind(objective, constraint, args)
    if options.matrix_free:
        bound = preconditioner and preconditioner(x, multipliers, args)
        change = -solve_products(problem.kkt_products(x, multipliers), moved, bound)
    else:
        matrix = kkt_matrix(problem.hessian(x, multipliers), problem.jacobian(x))
        change = -jnp.linalg.solve(matrix, moved)
    zeros = jax.tree.map(_no_tangent, result)
    size = x.shape[0]
    return result, zeros._replace(x=change[:size], multipliers=change[size:])


_solve = jax.jit(_solution, static_argnums=(0, 1, 2, 3))


def _no_tangent(value: jax.Array) -> Any:
    if jnp.issubdtype(value.dtype, jnp.floating):
        return jnp.zeros_like(value)
    return np.zeros(value.shape, jax.dtypes.float0)
