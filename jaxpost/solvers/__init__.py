"""Constrained optimisation: sketched Newton on an exact augmented Lagrangian."""

from jaxpost.solvers._implicit import solve
from jaxpost.solvers._options import Method, SolveOptions
from jaxpost.solvers._result import Counters, History, SolveResult, explain
from jaxpost.solvers._status import Status

__all__ = [
    "Counters",
    "History",
    "Method",
    "SolveOptions",
    "SolveResult",
    "Status",
    "explain",
    "solve",
]
