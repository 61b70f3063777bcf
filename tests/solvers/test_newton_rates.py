"""Sketched solves end to end, and the rate at which accuracy lets them converge."""

import hock_schittkowski as hs
import numpy as np
import pytest
from oracles import sketched_newton as oracle

from jaxpost import solvers
from jaxpost.solvers import SolveOptions


def residuals(result):
    return np.asarray(result.history.kkt_residual)[: int(result.iterations) + 1]


def ratios(name, key, **changes):
    """Of successive KKT residuals, once steps are full."""
    options = SolveOptions(
        method="gaussian", tolerance=1e-11, hessian_shift="frobenius", **changes
    )
    result = solvers.solve(*hs.problem(name), options=options, key=key)
    assert int(result.status) == solvers.Status.CONVERGED, solvers.explain(result)
    values = residuals(result)
    return values[1:] / values[:-1]


@pytest.mark.parametrize("name", ["hs7", pytest.param("hs78", marks=pytest.mark.slow)])
def test_decreasing_theta_converges_superlinearly(name, key):
    found = ratios(name, key, theta_power=1.0, delta=0.5, theta=0.9)
    assert found[-1] < 1e-3
    assert found[-1] < found[-2] < found[-3]


@pytest.mark.slow
def test_constant_theta_converges_linearly(key):
    found = ratios("hs78", key, theta_power=0.0, delta=0.5, theta=0.9)
    assert np.min(found[-3:]) > 1e-3  # the accuracy asked for is the rate


@pytest.mark.parametrize(
    "method", ["gaussian", pytest.param("kaczmarz", marks=pytest.mark.slow)]
)
def test_published_rule_by_sketches(method, key):
    options = SolveOptions.published(method, max_iterations=30)
    result = solvers.solve(*hs.problem("hs42"), options=options, key=key)
    x, multipliers, rows = oracle.solve_published(oracle.HS42(), hs.KNOWN["hs42"].start)
    last = int(result.iterations)
    assert int(result.status) == 0
    assert last == len(rows) - 1 == hs.KNOWN["hs42"].iterations
    np.testing.assert_allclose(residuals(result), rows[:, 0], rtol=1e-6)
    np.testing.assert_allclose(result.x, x, rtol=1e-9)
    np.testing.assert_allclose(result.multipliers, multipliers, rtol=1e-8)
    per_step = np.asarray(result.history.inner_steps)[:last]
    assert per_step.min() > 200
    assert per_step.max() < 50_000
    assert per_step.sum() == int(result.counters.inner_steps)
    # the theory's accuracy lies near the rounding of float64
    assert np.all(np.asarray(result.history.inner_residual)[:last] < 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["minres", "kaczmarz_norm", "block_gaussian", "block_kaczmarz"]
)
def test_other_methods_reach_the_same_point(method, key):
    options = SolveOptions(method=method, tolerance=1e-8, theta_power=1.0)
    result = solvers.solve(*hs.problem("hs78"), options=options, key=key)
    assert int(result.status) == 0, solvers.explain(result)
    np.testing.assert_allclose(
        np.asarray(result.multipliers), hs.KNOWN["hs78"].multipliers, atol=1e-7
    )
