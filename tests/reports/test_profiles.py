"""Performance profiles by hand-counted shares; figures with what they must show."""

import math

import numpy as np
import pytest

from jaxpost import reports

COSTS = {
    "a": [1.0, 4.0, math.inf, 2.0],
    "b": [2.0, 1.0, math.inf, 2.0],
    "c": [math.inf, 3.0, math.inf, 8.0],
}


def test_shares_are_those_counted_by_hand():
    """Ratios: a 1 4 - 1; b 2 1 - 1; c - 3 - 4. Nobody solves the third problem."""
    profile = reports.performance_profile(COSTS)
    np.testing.assert_array_equal(profile.factors, [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(profile.shares["a"], [0.5, 0.5, 0.5, 0.75])
    np.testing.assert_array_equal(profile.shares["b"], [0.5, 0.75, 0.75, 0.75])
    np.testing.assert_array_equal(profile.shares["c"], [0.0, 0.0, 0.25, 0.5])


def test_a_profile_does_not_depend_on_units_and_rises():
    rng = np.random.default_rng(0)
    costs = {name: rng.lognormal(size=20) for name in "abc"}
    scale = rng.lognormal(size=20)
    one = reports.performance_profile(costs)
    other = reports.performance_profile({n: c * scale for n, c in costs.items()})
    for name, shares in one.shares.items():
        np.testing.assert_allclose(other.shares[name], shares)
        assert np.all(np.diff(shares) >= 0.0)
        assert shares[-1] == 1.0
    assert sum(shares[0] for shares in one.shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({}, "a solver and a problem at least"),
        ({"a": []}, "a solver and a problem at least"),
        ({"a": [1.0], "b": [1.0, 2.0]}, "of the same problems"),
        ({"a": [0.0]}, "must be positive"),
        ({"a": [math.nan]}, "must be positive"),
    ],
)
def test_bad_costs(costs, message):
    with pytest.raises(ValueError, match=message):
        reports.performance_profile(costs)


def test_figures_are_the_same_bytes_for_the_same_content(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        reports.draw_profiles({"time": COSTS, "steps": COSTS}, tmp_path / name)
    text = (tmp_path / "one.svg").read_text("utf-8")
    assert text == (tmp_path / "two.svg").read_text("utf-8")
    for word in ("time", "steps", "factor of the best", "share of problems solved"):
        assert f">{word}<" in text
    curves = {name: [[1.0, 0.1, 1e-9], [5.0, 0.0]] for name in "abcd"}
    reports.draw_convergence(curves, tmp_path / "curves.svg")
    assert ">KKT residual<" in (tmp_path / "curves.svg").read_text("utf-8")
