"""How a solve may end. Inside `jit` an end is a number, never an exception."""

import enum


class Status(enum.IntEnum):
    """Values of `SolveResult.status`."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    INNER_CAP = 2
    SINGULAR_JACOBIAN = 3
    LINE_SEARCH_FAILED = 4
    PENALTY_BLOWUP = 5
    NON_FINITE = 6
    RUNNING = 7  # never returned


MEANING = {
    Status.CONVERGED: "the KKT residual is within the tolerance",
    Status.MAX_ITERATIONS: "max_iterations steps were taken",
    Status.INNER_CAP: "max_inner steps did not solve the Newton system",
    Status.SINGULAR_JACOBIAN: "the constraint Jacobian lost rank",
    Status.LINE_SEARCH_FAILED: "no step length reduced the merit",
    Status.PENALTY_BLOWUP: "penalties passed their bounds without a descent direction",
    Status.NON_FINITE: "a function, a derivative or a step was not finite",
    Status.RUNNING: "not finished",
}
