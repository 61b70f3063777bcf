"""The adapter to sif2jax: what it refuses and how; the real suite under `slow`."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.solvers import problems
from jaxpost.solvers.problems import _cutest


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Shape:
    """A problem in sif2jax's form: two variables, one equality that is a scalar."""

    y0 = jnp.asarray([1.0, 2.0])
    args = None
    bounds = None
    expected_objective_value = 3.0
    counts = (1, 0, 0)

    def objective(self, y, args):
        assert args is None
        return jnp.sum(y**2)

    def constraint(self, y):
        return y[0] - y[1], None

    def num_constraints(self):
        return self.counts


def with_(**attributes):
    return type("Changed", (Shape,), attributes)()


@pytest.fixture
def known(monkeypatch):
    """A table of problems in place of sif2jax's, which takes half a minute."""
    table = {"BT6": with_(), "HS6": Shape(), "HS61": with_()}
    module = types.SimpleNamespace(cutest=types.SimpleNamespace(problems_dict=table))
    monkeypatch.setitem(sys.modules, "sif2jax", module)
    return table


def test_a_scalar_equality_becomes_a_vector(known):
    problem = problems.from_sif2jax("hs6")
    assert problem.name == "HS6"
    np.testing.assert_array_equal(problem.constraint(problem.x0, ()), [-1.0])
    np.testing.assert_array_equal(problem.multipliers, [0.0])
    assert problem.optimum == 3.0
    assert problems.cutest_names() == ("HS6", "BT6")  # in the published order


def test_wrong_optima_are_replaced(known):
    assert problems.from_sif2jax("BT6").optimum == pytest.approx(0.2770447888)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": (1, 2, 0)}, "HS6 has inequalities: only equality constraints"),
        (
            {"bounds": (np.zeros(2), np.full(2, np.inf))},
            "HS6 has bounds: only equality",
        ),
        (
            {"counts": (1, 1, 0), "bounds": (np.zeros(2), np.ones(2))},
            "HS6 has inequalities and bounds",
        ),
        ({"counts": (0, 0, 0)}, "HS6 is unconstrained: use a solver for such"),
        ({"counts": (3, 0, 0)}, "HS6 has 3 constraints on 2 variables"),
    ],
)
def test_other_problems_are_refused_by_name(known, change, message):
    known["HS6"] = with_(**change)
    with pytest.raises(ValueError, match=message):
        problems.from_sif2jax("HS6")


def test_infinite_bounds_are_none(known):
    known["HS6"] = with_(bounds=(np.full(2, -np.inf), np.full(2, np.inf)))
    assert problems.from_sif2jax("HS6").num_variables == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("HS66", r"no problem 'HS66'; close names: HS6, HS61\."),
        ("XYZ", r"no problem 'XYZ'; no name is close\."),
        ("PRICE4NE", "PRICE4NE is one of the 47 published problems, but the installed"),
    ],
)
def test_unknown_names(known, name, message):
    with pytest.raises(problems.UnknownProblemError, match=message):
        problems.from_sif2jax(name)


def test_without_sif2jax_and_without_float64(monkeypatch):
    monkeypatch.setitem(sys.modules, "sif2jax", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxpost\[bench\]'"):
        problems.from_sif2jax("HS6")
    with jax.enable_x64(False), pytest.raises(RuntimeError, match="needs float64"):
        problems.from_sif2jax("HS6")


def test_the_published_list_is_whole():
    assert len(set(problems.PUBLISHED_CUTEST)) == 47
    assert "sif2jax" not in _cutest.__dict__  # imported only where it is needed


# Of the ten oracle problems: f(x0) and the first KKT residual at multipliers of zero.
STARTS = {
    "HS6": (4.84, 6.22254),
    "HS7": (-0.390562, 25.0328),
    "HS28": (13.0, 7.48331),
    "HS40": (-0.4096, 1.08638),
    "HS42": (14.0, 7.54983),
    "HS48": (84.0, 25.6125),
    "HS51": (8.5, 6.55744),
    "HS52": (42.0, 49.558),
    "HS78": (-6.0, 11.3227),
    "HS79": (1.0, 8.29837),
}


@pytest.mark.slow
def test_the_real_suite():
    pytest.importorskip("sif2jax")
    names = problems.cutest_names()
    assert len(names) >= 35
    assert set(STARTS) <= set(names)
    for name in names:
        problem = problems.from_sif2jax(name)
        value = problem.objective(problem.x0, problem.args)
        constraint = problem.constraint(problem.x0, problem.args)
        assert value.dtype == constraint.dtype == jnp.float64
        assert constraint.shape == (problem.num_constraints,)
        assert problem.optimum is not None
        if name in STARTS:
            slope = jax.grad(problem.objective)(problem.x0, problem.args)
            found = np.linalg.norm(np.concatenate([slope, constraint]))
            np.testing.assert_allclose(float(value), STARTS[name][0], rtol=2e-6)
            np.testing.assert_allclose(found, STARTS[name][1], rtol=1e-5)
    with pytest.raises(ValueError, match="HS71 has inequalities and bounds"):
        problems.from_sif2jax("HS71")
    with pytest.raises(ValueError, match="HS1 has bounds"):
        problems.from_sif2jax("HS1")
    with pytest.raises(ValueError, match="ROSENBR is unconstrained"):
        problems.from_sif2jax("ROSENBR")
    with pytest.raises(problems.UnknownProblemError, match="close names: .*HS66"):
        problems.from_sif2jax("HS666")
