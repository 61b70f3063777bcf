"""The ten problems with known optima, residuals and iterations."""

import hock_schittkowski as hs
import numpy as np
import pytest
from oracles import sketched_newton as oracle

from jaxpost import solvers

EXACT = solvers.SolveOptions.published("exact", tolerance=1e-8, max_iterations=30)
QUADRATIC = ("hs28", "hs48", "hs51", "hs52")
ADAPTED = ("hs40", "hs42")  # problems whose penalties do not stay


def named(names):
    """Two shapes that no other problem shares are left to `make test-slow`."""
    slow = ("hs28", "hs48")
    return [
        pytest.param(name, marks=pytest.mark.slow) if name in slow else name
        for name in names
    ]


@pytest.fixture(scope="module")
def solved():
    """Each problem once, by the published rule with exact inner solves."""
    results = {}

    def get(name, key):
        if name not in results:
            results[name] = solvers.solve(*hs.problem(name), options=EXACT, key=key)
        return results[name]

    return get


def residuals(result):
    return np.asarray(result.history.kkt_residual)[: int(result.iterations) + 1]


def iterations(result):
    """To the tolerance of the published runs."""
    return int(np.argmax(residuals(result) <= 1e-4))


@pytest.mark.parametrize("name", named(hs.KNOWN))
def test_optimum_multipliers_and_iterations(name, solved, key):
    known, result = hs.KNOWN[name], solved(name, key)
    last = int(result.iterations)
    assert result.status == solvers.Status.CONVERGED
    assert result.history.objective[0] == pytest.approx(known.value, rel=2e-6)
    assert result.history.kkt_residual[0] == pytest.approx(known.kkt, rel=1e-5)
    assert float(result.history.objective[last]) == pytest.approx(
        known.optimum, abs=1e-6
    )
    multipliers = np.asarray(result.multipliers)
    if name == "hs40":  # optima come in pairs that differ in this sign
        multipliers = multipliers * [1.0, np.sign(multipliers[1]), 1.0]
    np.testing.assert_allclose(multipliers, known.multipliers, atol=1e-8)
    assert abs(iterations(result) - known.iterations) <= 1
    assert float(result.kkt_residual) == residuals(result)[-1] <= 1e-8


@pytest.mark.parametrize(
    ("name", "sequence"),
    [
        ("hs6", [6.22, 6.00, 5.71, 5.36, 4.98, 4.65, 4.03, 3.28, 1.32]),
        ("hs7", [25.0, 20.0, 17.7, 17.3, 17.3, 8.14, 6.94, 1.51, 0.143, 0.0021]),
        ("hs78", [11.3, 1.49, 0.0569, 1.63e-4]),
        ("hs79", [8.30, 1.22, 0.0768, 4.1e-4]),
    ],
)
def test_sequence_of_residuals(name, sequence, solved, key):
    found = residuals(solved(name, key))[: len(sequence)]
    np.testing.assert_allclose(found, sequence, rtol=1.3e-2)  # as printed, two digits


def test_steps_of_hs6(solved, key):
    steps = np.asarray(solved("hs6", key).history.step_size)[:9]
    np.testing.assert_array_equal(steps, [1 / 8] * 4 + [1 / 4] * 2 + [1 / 2, 1, 1])


@pytest.mark.parametrize(
    ("name", "eta1", "eta2"),
    [("hs40", 2.25, 0.1 / 1.5), ("hs42", 1.5**4, 0.1 / 1.5**2)],
)
def test_penalties_adapt(name, eta1, eta2, solved, key):
    result = solved(name, key)
    last = iterations(result) - 1
    assert result.history.penalty_constraint[last] == pytest.approx(eta1)
    assert result.history.penalty_gradient[last] == pytest.approx(eta2)


@pytest.mark.parametrize("name", named(n for n in hs.KNOWN if n not in ADAPTED))
def test_penalties_stay(name, solved, key):
    result = solved(name, key)
    last = int(result.iterations) - 1
    assert result.history.penalty_constraint[last] == 1.0
    assert result.history.penalty_gradient[last] == 0.1


@pytest.mark.parametrize(
    ("name", "problem"), [("hs42", oracle.HS42()), ("hs7", oracle.HS7())]
)
def test_every_number_of_the_history(name, problem, solved, key):
    result = solved(name, key)
    x, multipliers, rows = oracle.solve_published(
        problem, hs.KNOWN[name].start, tolerance=1e-8
    )
    count = int(result.iterations)
    assert count == len(rows) - 1
    history = result.history
    columns = ("kkt_residual", "step_size", "penalty_constraint", "penalty_gradient")
    for number, column in enumerate((*columns, "delta", "hessian_shift")):
        found = np.asarray(getattr(history, column))[:count]
        np.testing.assert_allclose(found, rows[:count, number], rtol=1e-6)
    np.testing.assert_allclose(result.x, x, rtol=1e-8)
    np.testing.assert_allclose(result.multipliers, multipliers, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", named(QUADRATIC))
def test_quadratic_programs_take_one_full_step(name, solved, key):
    result = solved(name, key)
    assert int(result.iterations) == 1
    assert result.history.step_size[0] == 1.0


@pytest.mark.parametrize("name", named(hs.KNOWN))
def test_merit_falls_within_each_step(name, solved, key):
    history, count = solved(name, key).history, int(solved(name, key).iterations)
    before, after = history.merit_before[:count], history.merit_after[:count]
    assert np.all(np.asarray(after) < np.asarray(before))
    assert not np.any(np.asarray(history.escaped)[:count] == 1)
