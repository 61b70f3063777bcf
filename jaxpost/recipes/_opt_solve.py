"""One solve of one problem by one method, timed, as a line of results."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxpost import solvers
from jaxpost.solvers.problems import Problem

PUBLISHED = "published-"
"""In front of a method: the paper's rule and constants instead of the defaults."""

Solve = Callable[[], solvers.SolveResult]


def options_of(method: str, **changes: Any) -> solvers.SolveOptions:
    """The settings of a method by name, `published-` ones with the paper's constants.

    Raises:
        ValueError: there is no such method, or a setting is out of range.
    """
    if method.startswith(PUBLISHED):
        name: Any = method.removeprefix(PUBLISHED)
        return solvers.SolveOptions.published(name, **changes)
    return solvers.SolveOptions(method=method, **changes)  # type: ignore[arg-type]


def measure(
    problem: Problem,
    options: solvers.SolveOptions,
    *,
    key: jax.Array,
    repeats: int = 1,
) -> tuple[Solve, dict[str, Any]]:
    """Solves a problem, compilation timed apart; MINRES with its preconditioner.

    Args:
        problem: what to solve.
        options: how.
        key: of the sketches.
        repeats: timed runs; their median counts. All give the same result.

    Returns:
        The compiled solve, which takes nothing, and what came of it as JSON values:
        counts, residuals, seconds, and the KKT residual of each iterate.
    """

    preconditioner = problem.preconditioner if options.method == "minres" else None

    def solve(x0, args, multipliers, key_data):
        return solvers.solve(
            problem.objective,
            problem.constraint,
            x0,
            args,
            multipliers=multipliers,
            options=options,
            preconditioner=preconditioner,
            key=jax.random.wrap_key_data(key_data),
        )

    # A key as such makes every call some ten microseconds slower than plain numbers do.
    key_data = jax.random.key_data(key)
    inputs = (problem.x0, problem.args, problem.multipliers, key_data)
    start = time.perf_counter()
    compiled = jax.jit(solve).lower(*inputs).compile()
    compile_s = time.perf_counter() - start
    seconds, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - start)
    assert result is not None
    return lambda: compiled(*inputs), {
        **_facts(problem, jax.device_get(result)),
        "compile_s": compile_s,
        "solve_s": statistics.median(seconds),
    }


def _facts(problem: Problem, result: solvers.SolveResult) -> dict[str, Any]:
    last = int(result.iterations)
    history = result.history
    counts = result.counters
    return {
        "n": problem.num_variables,
        "m": problem.num_constraints,
        **problem.facts,
        "status": solvers.Status(int(result.status)).name.lower(),
        "explained": solvers.explain(result),
        "iterations": last,
        "kkt_residual": _json(result.kkt_residual),
        "objective": _json(history.objective[last]),
        "optimum": problem.optimum,
        "constraint_norm": _json(history.constraint_norm[last]),
        "objective_evaluations": int(counts.objective),
        "gradient_evaluations": int(counts.gradient),
        "jacobian_evaluations": int(counts.jacobian),
        "hessian_evaluations": int(counts.hessian),
        "inner_steps": int(counts.inner_steps),
        "kkt_history": [_json(x) for x in history.kkt_residual[: last + 1]],
    }


def _json(value: Any) -> float | None:
    """JSON has no NaN and no infinities."""
    return float(value) if np.isfinite(value) else None
