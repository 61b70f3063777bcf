"""SciPy's trust-constr and SLSQP at their best: exact derivatives, compiled by JAX:
those that our solver computes for itself.

Each asks for the objective and its gradient in one call. trust-constr stops at the
first iterate whose KKT residual, with its own multipliers, is within the tolerance;
SLSQP has no such test and gets a tight `ftol`.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.optimize

from jaxpost.solvers._problem import hessian_of, jacobian_of

MAX_ITERATIONS = 3000


class Found(NamedTuple):
    """As SciPy tells it; `kkt_residual` with least-squares multipliers for SLSQP."""

    x: np.ndarray
    kkt_residual: float
    converged: bool
    iterations: int
    objective: int
    gradient: int


class Functions:
    """Compiled functions of a problem: NumPy arrays in and out."""

    def __init__(self, problem: Any):
        objective, constraint = problem.objective, problem.constraint
        self._args = problem.args
        self.x0 = np.asarray(problem.x0)
        self.size = problem.num_constraints
        both = jax.value_and_grad(objective)
        self._value = self._compile(both)
        self._constraint = self._compile(constraint)

        def jacobian(x, args):
            return jacobian_of(lambda x: constraint(x, args), x)

        def hessian(x, args):
            return hessian_of(lambda x: objective(x, args), x)

        def curvature(x, args, weights):
            return hessian_of(lambda x: weights @ constraint(x, args), x)

        self._jacobian = self._compile(jacobian)
        self._hessian = self._compile(hessian)
        ones = np.ones(self.size)
        self._curvature = jax.jit(curvature).lower(self.x0, self._args, ones).compile()

    def _compile(self, function: Callable) -> Callable:
        return jax.jit(function).lower(self.x0, self._args).compile()

    def value_and_slope(self, x):
        value, slope = self._value(x, self._args)
        return float(value), np.asarray(slope)

    def constraint(self, x):
        return np.asarray(self._constraint(x, self._args))

    def jacobian(self, x):
        return np.asarray(self._jacobian(x, self._args))

    def hessian(self, x):
        return np.asarray(self._hessian(x, self._args))

    def curvature(self, x, weights):
        return np.asarray(self._curvature(x, self._args, np.asarray(weights)))

    def kkt_residual(self, x) -> float:
        """With the multipliers that make it least."""
        jacobian, slope = self.jacobian(x), self.value_and_slope(x)[1]
        weights = np.linalg.lstsq(jacobian.T, -slope, rcond=None)[0]
        parts = [slope + weights @ jacobian, self.constraint(x)]
        return float(np.linalg.norm(np.concatenate(parts)))


def trust_constr(functions: Functions, tolerance: float) -> Found:
    """Byrd-Omojokun trust-region SQP, as SciPy runs it for equality constraints."""
    last: dict[str, Any] = {}

    def reached(_, state):
        parts = [state.lagrangian_grad, *state.constr]
        last["kkt"] = float(np.linalg.norm(np.concatenate(parts)))
        return last["kkt"] <= tolerance

    equal = scipy.optimize.NonlinearConstraint(
        functions.constraint,
        0.0,
        0.0,
        jac=functions.jacobian,
        hess=functions.curvature,
    )
    with warnings.catch_warnings():
        # Square systems: "number of equality constraints >= variables" and the like.
        warnings.simplefilter("ignore")
        found = scipy.optimize.minimize(
            functions.value_and_slope,
            functions.x0,
            jac=True,
            hess=functions.hessian,
            method="trust-constr",
            constraints=[equal],
            callback=reached,
            options={"maxiter": MAX_ITERATIONS, "gtol": 1e-14, "xtol": 1e-14},
        )
    kkt = last.get("kkt", np.inf)
    return Found(
        found.x, kkt, kkt <= tolerance, int(found.nit), int(found.nfev), int(found.njev)
    )


def slsqp(functions: Functions, tolerance: float) -> Found:
    """Kraft's SQP with quasi-Newton updates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = scipy.optimize.minimize(
            functions.value_and_slope,
            functions.x0,
            jac=True,
            method="SLSQP",
            constraints={
                "type": "eq",
                "fun": functions.constraint,
                "jac": functions.jacobian,
            },
            options={"maxiter": MAX_ITERATIONS, "ftol": 1e-14},
        )
    kkt = functions.kkt_residual(found.x)
    return Found(
        found.x, kkt, kkt <= tolerance, int(found.nit), int(found.nfev), int(found.njev)
    )


RIVALS = {"SciPy trust-constr": trust_constr, "SciPy SLSQP": slsqp}


def timed(name: str, functions: Functions, tolerance: float) -> tuple[Found, float]:
    """One solve and its seconds; functions are compiled already."""
    start = time.perf_counter()
    found = RIVALS[name](functions, tolerance)
    return found, time.perf_counter() - start
