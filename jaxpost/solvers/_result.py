"""What a solve returns: the point, how it ended, and what happened on the way."""

from typing import NamedTuple

import jax
import numpy as np

from jaxpost.solvers._status import MEANING, Status


class History(NamedTuple):
    """One row per iterate, `[max_iterations + 1]` each; NaN or -1 where unused.

    Row `k` holds the iterate `k` (row 0 the start) and the step that led away from it.
    The last used row, number `iterations`, has no step, or one that failed, of size 0.

    Fields of the iterate, float64:
        kkt_residual: norm of (gradient of the Lagrangian, constraint).
        objective, constraint_norm: value, 2-norm.
        jacobian_eigenvalue: smallest eigenvalue of `G G^T`, its rows first scaled to
            norm one under the scaled guard; NaN when matrix-free.
    Fields of the step, float64:
        step_size: its length as a share of the full step.
        merit_before, merit_after: at this step's penalties, before and after it.
        inner_residual: `norm(A z - b) / norm(b)` of the Newton system.
        hessian_shift: what was added to the Hessian's diagonal.
        penalty_constraint, penalty_gradient, delta: after they adapted.
    Fields of the step, int32:
        inner_steps: sketches or Krylov steps; 0 for `exact`.
        escaped: 1 if accepted past the bounds of the penalties, without descent test.
    """

    kkt_residual: jax.Array
    objective: jax.Array
    constraint_norm: jax.Array
    jacobian_eigenvalue: jax.Array
    step_size: jax.Array
    merit_before: jax.Array
    merit_after: jax.Array
    inner_residual: jax.Array
    hessian_shift: jax.Array
    penalty_constraint: jax.Array
    penalty_gradient: jax.Array
    delta: jax.Array
    inner_steps: jax.Array
    escaped: jax.Array


class Counters(NamedTuple):
    """Work done, int32 each.

    Fields:
        objective: evaluations of objective and constraint together.
        gradient: evaluations of the gradient of the Lagrangian.
        jacobian, hessian: of the constraint Jacobian and of the Hessian of the
            Lagrangian; when matrix-free, of the linearised KKT conditions.
        inner_steps: sketches or Krylov steps, all outer iterations together.
    """

    objective: jax.Array
    gradient: jax.Array
    jacobian: jax.Array
    hessian: jax.Array
    inner_steps: jax.Array


class SolveResult(NamedTuple):
    """What `solve` returns.

    Fields:
        x: the last iterate, float64 `[n]`.
        multipliers: of `objective + multipliers . constraint`, float64 `[m]`.
        kkt_residual: norm of (gradient of the Lagrangian, constraint), float64.
        status: a `Status`, int32.
        iterations: steps taken, int32.
        history: row by row, see `History`.
        counters: work done, see `Counters`.
    """

    x: jax.Array
    multipliers: jax.Array
    kkt_residual: jax.Array
    status: jax.Array
    iterations: jax.Array
    history: History
    counters: Counters


def explain(result: SolveResult) -> str:
    """One sentence on how a solve ended, for people.

    Args:
        result: of one solve (index the fields of a batch first), concrete.

    Returns:
        The status, its meaning, the iteration, the KKT residual, and the smallest
        eigenvalue of `G G^T` where the Jacobian is to blame.
    """
    status, k = Status(int(result.status)), int(result.iterations)
    text = (
        f"{status.name.lower()} after {k} iterations: {MEANING[status]}; "
        f"KKT residual {float(result.kkt_residual):.3g}"
    )
    if status is Status.SINGULAR_JACOBIAN:
        value = float(np.asarray(result.history.jacobian_eigenvalue)[k])
        text += f"; smallest eigenvalue of G G^T {value:.3g} at iteration {k}"
    return text + "."
