"""Every end of a solve is a status, and bad calls are refused by name."""

import hock_schittkowski as hs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import solvers
from jaxpost.solvers import SolveOptions, Status


def circle(x, args):
    return x @ x - 1.0


def first(x, args):
    return x[0]


PLACE = np.array([0.6, 0.8])
CASES = {
    "circle": (lambda x: x[0], lambda x: x @ x - 1.0),
    "small": (lambda x: x[0], lambda x: 1e-2 * (x @ x - 1.0)),
    # The value grows in every direction, and the derivative does not say so.
    "lying": (
        lambda x: x[0] + jax.lax.stop_gradient(100.0 * jnp.sum(jnp.abs(x - PLACE))),
        lambda x: x @ x - 1.0,
    ),
    "logarithm": (lambda x: jnp.log(x[0]), lambda x: x @ x - 1.0),
    # The first full step ends where the logarithm's argument is negative.
    "barrier": (
        lambda x: x[0] + x[1] ** 2 - 0.1 * jnp.log(x[0]),
        lambda x: x[1] - 1.0,
    ),
    "saddle": (lambda x: -0.5 * x[1] ** 2, lambda x: x[0]),
    "hs6": (hs.hs6, hs.hs6_constraint),
}
OBJECTIVES, CONSTRAINTS = zip(*CASES.values(), strict=True)


def objective_of(x, index):
    return jax.lax.switch(index, OBJECTIVES, x)


def constraint_of(x, index):
    return jax.lax.switch(index, CONSTRAINTS, x)


# What three of the ends need, in one program.
STRICT = SolveOptions.published("exact", hessian_check="none", max_iterations=3)


def end_of(case, start, key, options=None):
    """All cases in one compiled program for each of the options."""
    index, start = list(CASES).index(case), jnp.asarray(start, float)
    return solvers.solve(
        objective_of, constraint_of, start, index, options=options, key=key
    )


def check(result, status, words):
    assert Status(int(result.status)) is status
    assert words in solvers.explain(result)
    assert np.all(np.isfinite(result.x))


def test_out_of_iterations(key):
    result = end_of("hs6", (-1.2, 1.0), key, STRICT)
    check(result, Status.MAX_ITERATIONS, "after 3 iterations")
    assert int(result.iterations) == 3
    assert result.history.kkt_residual.shape == (4,)
    assert np.all(np.isfinite(result.history.kkt_residual))


def test_inner_cap(key):
    options = SolveOptions.published("gaussian", max_inner=3)
    result = solvers.solve(*hs.problem("hs6"), options=options, key=key)
    check(result, Status.INNER_CAP, "max_inner")
    # Steps that were short of the accuracy but passed the descent test were taken.
    assert int(result.counters.inner_steps) == 3 * (int(result.iterations) + 1)


def test_singular_jacobian(key):
    result = end_of("circle", (0.0, 0.0), key)
    check(result, Status.SINGULAR_JACOBIAN, "eigenvalue of G G^T 0 at iteration 0")
    assert int(result.iterations) == 0


def test_published_guard_refuses_a_small_jacobian_and_the_scaled_one_does_not(key):
    result = end_of("small", (-0.8, 0.3), key, STRICT)
    check(result, Status.SINGULAR_JACOBIAN, "singular_jacobian")
    assert float(result.history.jacobian_eigenvalue[0]) < 1e-2
    result = end_of("small", (-0.8, 0.3), key)
    check(result, Status.CONVERGED, "within the tolerance")
    np.testing.assert_allclose(result.x, [-1.0, 0.0], atol=1e-2)


def test_line_search_fails_where_the_derivative_lies(key):
    result = end_of("lying", PLACE, key)
    check(result, Status.LINE_SEARCH_FAILED, "no step length")
    np.testing.assert_array_equal(result.x, PLACE)


def test_penalty_blowup_without_curvature(key):
    result = end_of("saddle", (0.0, 1.0), key, STRICT)
    check(result, Status.PENALTY_BLOWUP, "penalties passed")
    assert result.history.escaped[0] == 1


def test_not_finite_at_the_start(key):
    check(end_of("logarithm", (-0.5, 0.5), key), Status.NON_FINITE, "not finite")


def test_a_trial_beyond_the_domain_is_only_a_shorter_step(key):
    result = end_of("barrier", (2.0, 3.0), key)
    check(result, Status.CONVERGED, "converged")
    assert result.history.step_size[0] < 1.0
    np.testing.assert_allclose(result.x, [0.1, 1.0], rtol=1e-3)


def test_float64_is_asked_for_by_name(key):
    with (
        jax.enable_x64(False),
        pytest.raises(RuntimeError, match="needs? float64.*JAX_ENABLE_X64=1"),
    ):
        solvers.solve(first, circle, jnp.ones(2), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("x0", "changes", "message"),
    [
        (np.ones((2, 2)), {}, "must be a vector"),
        (np.array([1.0, np.nan]), {}, "must be finite"),
        (np.ones(2, complex), {}, "must be real"),
        (np.ones(2), {"multipliers": np.ones(2)}, r"shape \(1,\); got \(2,\)"),
        (np.ones(2), {"constraint": lambda x, _: x[:0]}, "unconstrained; use"),
        (np.ones(1), {"constraint": lambda x, _: jnp.tile(x, 2)}, "2 constraints on 1"),
        (np.ones(2), {"constraint": lambda x, _: jnp.outer(x, x)}, "must return a vec"),
        (np.ones(2), {"objective": lambda x, _: x}, "must return a float64 scalar"),
        (
            np.ones(2),
            {"objective": lambda x, _: x[0].astype(jnp.float32)},
            "must return a float64 scalar",
        ),
        (np.ones(2), {"preconditioner": lambda *_: None}, "method='minres'"),
    ],
)
def test_bad_calls(x0, changes, message, key):
    changes = {"objective": first, "constraint": circle, **changes}
    with pytest.raises(ValueError, match=message):
        solvers.solve(
            changes.pop("objective"), changes.pop("constraint"), x0, key=key, **changes
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "newton"}, "method must be one of exact, hybrid, minres, gaussian"),
        ({"guard": "on"}, "guard must be one of"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"theta_power": -1.0}, "theta_power must be at least 0"),
        ({"penalty_factor": 1.0}, "penalties would never change"),
        ({"armijo": 0.5}, r"armijo must lie in \(0, 1/2\)"),
        ({"max_inner": 0}, "max_inner must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"matrix_free": True}, "matrix_free needs method"),
        ({"matrix_free": True, "method": "minres"}, "matrix_free needs hessian_check"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        SolveOptions(**changes)
