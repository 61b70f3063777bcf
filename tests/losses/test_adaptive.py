"""Adaptive scaling: worked values, the oracle, the published solver's failures."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import pairwise as oracle

from jaxpost import losses
from jaxpost.losses._adaptive import interior_logit

pytestmark = pytest.mark.usefixtures("strict_dtypes")

WORKED = {"rho0": 0.1, "tau_min": 0.1, "tau_max": 4.0}
QUADRATIC = {"rho0": 0.5, "tau_min": 0.1, "quadratic": True}
vectors = st.lists(st.floats(-40.0, 40.0), min_size=6, max_size=6).map(np.array)


@functools.cache
def compiled(**options):
    def function(margins):
        values, tau = losses.adaptive_scaling(margins, **options)
        return jnp.sum(values), (values, tau)

    return jax.jit(jax.grad(function, has_aux=True))


def run(margins, **options):
    """`(values, tau, slopes)` in float64."""
    with jax.enable_x64(True):
        found, (values, tau) = compiled(**options)(jnp.asarray(margins, "float64"))
        assert values.dtype == tau.dtype == found.dtype == "float64"
        return tuple(map(np.asarray, (values, tau, found)))


def scale(margins, **options):
    return run(margins, **options)[1]


def slopes(margins, **options):
    return run(margins, **options)[2]


# --- worked values ---


def test_worked_values():
    margins = [-6.0, -2.0, -0.5, -0.05, 0.0, 0.05, 0.2, 1.0, 3.5, 5.0, 20.0]
    tau = [4, 2.1199, 0.5300, 0.1, 0.1, 0.1, 0.2120, 1.0599, 3.7098, 4, 4]
    values = [4.433064, 1.439589, 0.359897, 0.038093, 0.010000, -0.011907]
    values += [-0.056041, -0.280205, -0.980719, -1.364872, -2.345727]
    slope = [None, -0.719795, -0.719795, -0.622459, -0.5, -0.377541]
    slope += [-0.280205, -0.280205, -0.280205, -0.222700, None]
    found_values, found_tau, found_slope = run(margins, **WORKED)
    np.testing.assert_allclose(found_tau, tau, rtol=0, atol=0.51e-4)
    np.testing.assert_allclose(found_values, values, rtol=0, atol=0.51e-6)
    known = [i for i, s in enumerate(slope) if s is not None]
    wanted = [slope[i] for i in known]
    np.testing.assert_allclose(found_slope[known], wanted, rtol=0, atol=0.51e-6)
    assert (found_tau[[3, 4, 5]] == 0.1).all()
    assert (found_tau[[0, 9, 10]] == 4.0).all()


def test_worked_quadratic_values():
    found = scale([0.0, 0.3, 1.0, 3.0, -1.0], **QUADRATIC)
    np.testing.assert_allclose(
        found, [0.1, 0.2069, 0.4118, 0.6409, 0.4118], atol=0.51e-4
    )


@pytest.mark.parametrize(
    ("rho0", "probability", "logit"),
    [
        (0.05, 0.656782, 0.648985),
        (0.1, 0.719795, 0.943443),
        (0.3, 0.866414, 1.869617),
        (0.5, 0.951811, 2.983241),
        (0.6, 0.981247, 3.957448),
    ],
)
def test_worked_interior_logits(rho0, probability, logit):
    np.testing.assert_allclose(interior_logit(rho0), logit, rtol=0, atol=0.51e-6)
    found = oracle.sigmoid(interior_logit(rho0))
    np.testing.assert_allclose(found, probability, rtol=0, atol=0.51e-6)


@pytest.mark.parametrize("rho0", [1e-12, 1e-6, 0.01, 0.4, 0.6931, 0.693147])
def test_interior_logit_solves_its_equation(rho0):
    """Entropy `log 2 - rho0`, by a series where the entropy itself would cancel."""
    x = interior_logit(rho0)
    if rho0 < 1e-3:  # KL(sigmoid(x) || 1/2) = x^2 / 8 - x^4 / 64 + ...
        np.testing.assert_allclose(x**2 / 8 - x**4 / 64, rho0, rtol=1e-8)
    else:
        p = oracle.sigmoid(x)
        entropy = -p * math.log(p) - (1 - p) * oracle.log_sigmoid(-x)
        np.testing.assert_allclose(entropy, math.log(2.0) - rho0, atol=2e-15)


@pytest.mark.parametrize(
    ("preference", "tau"), [(0.6, 0.1007), (0.9, 1.8403), (0.99, 3.1857)]
)
def test_quadratic_scale_at_a_known_preference(preference, tau):
    """Proposition 3.2: at its best margin `tau logit(p)`, tau follows from `p`."""
    logit = math.log(preference / (1.0 - preference))
    entropy = -preference * math.log(preference)
    entropy -= (1.0 - preference) * math.log(1.0 - preference)
    exact = (math.log(2.0) - entropy) / (2.0 * 0.1)
    np.testing.assert_allclose(exact, tau, rtol=0, atol=0.51e-4)
    found = scale([exact * logit], rho0=0.1, tau_min=0.1, quadratic=True)
    np.testing.assert_allclose(found, exact, rtol=1e-12)


# --- the oracle ---

SETTINGS = [
    WORKED,
    {"rho0": 0.05, "tau_min": 0.1, "tau_max": 5.0},
    {"rho0": 0.5, "tau_min": 0.1, "tau_max": 3.0},
    {"rho0": 0.69, "tau_min": 0.01, "tau_max": 1.0},
    QUADRATIC,
    {"rho0": 0.01, "tau_min": 0.05, "quadratic": True},
    {"rho0": 3.0, "tau_min": 0.001, "quadratic": True},
]


@pytest.mark.parametrize("options", SETTINGS)
def test_equals_the_oracle(options):
    margins = np.concatenate([np.linspace(-9.0, 9.0, 37), [-300.0, 1e-4, 70.0]])
    wanted = np.array([oracle.adaptive(m, **options) for m in margins]).T
    values, tau, _ = run(margins, **options)
    np.testing.assert_allclose(values, wanted[0], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(tau, wanted[1], rtol=1e-8)
    _, (values, tau) = compiled(**options)(jnp.float32(margins))
    assert values.dtype == tau.dtype == "float32"
    np.testing.assert_allclose(values, wanted[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tau, wanted[1], rtol=1e-5)


@pytest.mark.parametrize("margin", [-3.0, -0.4, -0.02, 0.0, 0.05, 0.7, 2.0])
def test_is_the_dual_of_the_robust_problem(margin):
    found, *_ = run([margin], rho0=0.1, tau_min=0.1, tau_max=1e6)
    wanted = oracle.adaptive_primal(margin, rho0=0.1, tau_min=0.1)
    np.testing.assert_allclose(found, wanted, atol=2e-5)  # 3 spacings of the grid


@pytest.mark.parametrize("rho0", [1e-5, 1e-3, 0.1, 10.0])
def test_quadratic_solver_over_nine_decades(rho0):
    """The residual of its equation, at margins where tau is not at its bound."""
    margins = np.logspace(-4.0, 5.0, 40)
    tau = scale(margins, rho0=rho0, tau_min=1e-6, quadratic=True)
    assert (tau > 1e-6).all()
    assert (tau <= math.log(2.0) / (2.0 * rho0)).all()
    half = 0.5 * margins / tau
    log_cosh = np.where(
        half < 1.0,
        np.log1p(2.0 * np.sinh(0.5 * np.minimum(half, 1.0)) ** 2),
        half + np.log1p(np.exp(-2.0 * half)) - math.log(2.0),
    )
    divergence = half * np.tanh(half) - log_cosh
    np.testing.assert_allclose(divergence, 2.0 * rho0 * tau, rtol=1e-9)


# --- what the derivation promises ---

every_variant = pytest.mark.parametrize("options", [WORKED, QUADRATIC])


@every_variant
@settings(max_examples=30, deadline=None)
@given(margins=vectors, factor=st.sampled_from([0.1, 7.0]))
def test_symmetry_minimum_and_units(options, margins, factor):
    values, tau, _ = run(margins, **options)
    mirrored = run(-margins, **options)
    np.testing.assert_array_equal(mirrored[1], tau)
    np.testing.assert_allclose(mirrored[0] - values, margins, atol=1e-12)
    quadratic, rho0 = options.get("quadratic", False), options["rho0"]
    high = options.get("tau_max", math.log(2.0) / (2.0 * rho0))
    for other in np.geomspace(options["tau_min"], high, 15):
        for margin, value in zip(margins, values, strict=True):
            fixed = oracle.adaptive_value(margin, other, rho0, quadratic)
            assert value <= fixed + 1e-12
    # Margins and bounds in another unit (the quadratic rho0 is per unit of tau).
    scaled = {**options, "tau_min": factor * options["tau_min"]}
    if quadratic:
        scaled["rho0"] = rho0 / factor
    else:
        scaled["tau_max"] = factor * options["tau_max"]
    found = run(factor * margins, **scaled)
    np.testing.assert_allclose(found[0], factor * values, atol=1e-10)
    np.testing.assert_allclose(found[1], factor * tau, rtol=1e-9)


def test_equal_bounds_leave_a_fixed_scale():
    margins = jnp.float32([-5.0, -0.3, 0.0, 2.0])
    fixed = losses.adaptive_scaling(margins, rho0=0.3, tau_min=1.0, tau_max=1.0)
    wanted = losses.bradley_terry(margins) + (0.3 - math.log(2.0))
    np.testing.assert_allclose(fixed.values, wanted, rtol=1e-6)
    fixed = losses.adaptive_scaling(margins, rho0=0.3, tau_min=2.0, tau_max=2.0)
    np.testing.assert_array_equal(fixed.tau, 2.0)
    wanted = 2.0 * losses.bradley_terry(margins / 2.0) + 2.0 * (0.3 - math.log(2.0))
    np.testing.assert_allclose(fixed.values, wanted, rtol=1e-6)


def test_pinball_loss_between_the_bounds():
    p = oracle.sigmoid(interior_logit(0.1))
    margins = np.array([-3.0, -1.0, -0.2, 0.2, 1.0, 3.0])
    values, tau, _ = run(margins, **WORKED)
    assert (tau > 0.1).all()
    assert (tau < 4.0).all()
    wanted = np.where(margins > 0, -(1.0 - p) * margins, -p * margins)
    np.testing.assert_allclose(values, wanted, rtol=1e-12)
    with jax.enable_x64(True):
        slope = lambda m: compiled(**WORKED)(m)[0]  # noqa: E731
        margins = jnp.asarray(margins)
        curvature = jax.jvp(slope, (margins,), (jnp.ones_like(margins),))[1]
        np.testing.assert_allclose(curvature, 0.0, atol=1e-14)


@every_variant
def test_second_derivatives_take_the_scale_along(options):
    margins, step = np.array([-5.0, -1.0, -0.04, 0.03, 0.7, 6.0]), 1e-5
    up, down = (slopes(margins + s, **options) for s in (step, -step))
    with jax.enable_x64(True):
        slope = lambda m: compiled(**options)(m)[0]  # noqa: E731
        found = jax.jvp(slope, (jnp.asarray(margins),), (jnp.ones(6),))[1]
        np.testing.assert_allclose(found, (up - down) / (2 * step), atol=1e-8)


# --- the published solver ---


@pytest.mark.parametrize("quadratic", [False, True])
def test_published_steps_equal_the_oracle(quadratic):
    margins = np.array([-6.0, -0.96, 0.0, 0.3, 1.2, 20.0])
    if quadratic:
        # After 5 steps it agrees with the exact scale to four digits.
        found = scale([0.3, 1, 3, -1], **QUADRATIC, solver="newton")
        np.testing.assert_allclose(
            found, scale([0.3, 1, 3, -1], **QUADRATIC), atol=1e-4
        )
        return
    for steps in (1, 3, 5):
        found = scale(margins, **WORKED, solver="newton", newton_steps=steps)
        wanted = [oracle.adaptive_newton(m, 0.1, 0.1, 4.0, steps)[-1] for m in margins]
        np.testing.assert_allclose(found, wanted, rtol=1e-10)


@pytest.mark.parametrize(
    ("rho0", "tau_max", "steps", "error", "share"),
    [
        (0.1, 4.0, 3, 0.104, 14.9),
        (0.1, 4.0, 5, 0.0006, 0.0),
        (0.05, 5.0, 3, 0.662, 15.8),
        (0.05, 5.0, 5, 0.012, 5.7),
        (0.05, 5.0, 8, 0.0, 0.0),
        (0.1, 1.0, 3, 0.093, 2.9),
        (0.5, 3.0, 3, 0.420, 6.0),
        (0.5, 3.0, 5, 0.423, 4.6),
        (0.5, 3.0, 20, 2.678, 4.5),
    ],
)
def test_how_far_the_published_steps_are_off(rho0, tau_max, steps, error, share):
    """Largest error of tau on 4000 margins in [-20, 20), and % of them above 1e-3."""
    options = {"rho0": rho0, "tau_min": 0.1, "tau_max": tau_max}
    margins = np.arange(-20.0, 20.0, 0.01)
    found = scale(margins, **options, solver="newton", newton_steps=steps)
    off = np.abs(found - scale(margins, **options))
    digits = 4 if error < 0.001 else 3
    np.testing.assert_allclose(off.max(), error, rtol=0, atol=0.51 * 10.0**-digits)
    np.testing.assert_allclose(100.0 * np.mean(off > 1e-3), share, rtol=0, atol=0.0501)


def test_ten_steps_are_not_enough_either():
    options = {"rho0": 0.3, "tau_min": 0.1, "tau_max": 3.0}
    margins = np.arange(-20.0, 20.0, 0.01)
    found = scale(margins, **options, solver="newton", newton_steps=10)
    off = np.abs(found - scale(margins, **options))
    np.testing.assert_allclose(100.0 * np.mean(off > 1e-2), 2.2, rtol=0, atol=0.0501)


def test_published_steps_cycle_between_the_bounds():
    options = {"rho0": 0.5, "tau_min": 0.1, "tau_max": 3.0}
    published = {**options, "solver": "newton"}
    trace = [scale([0.96], **published, newton_steps=k)[0] for k in (1, 2, 3, 4, 99)]
    np.testing.assert_allclose(trace, [0.1, 3.0, 0.1, 3.0, 0.1], rtol=1e-12)
    np.testing.assert_allclose(scale([0.96], **options), 0.3218, atol=0.51e-4)
    found = [
        -slopes([0.96], **published, newton_steps=3)[0],
        -slopes([0.96], **published, newton_steps=4)[0],
        -slopes([0.96], **options)[0],
    ]
    np.testing.assert_allclose(found, [6.8e-5, 0.42, 0.048], rtol=0.01)
    margins = np.linspace(-3.0, 3.0, 601)
    wanted, size = scale(margins, **options), np.round(np.abs(margins), 9)
    for steps in (50, 51):
        off = np.abs(scale(margins, **published, newton_steps=steps) - wanted) > 1e-3
        np.testing.assert_array_equal(off, (size >= 0.67) & (size <= 1.56))


def test_published_slope_holds_the_scale_fixed():
    margins = np.array([-2.0, -0.96, 0.5, 1.3])
    options = {**WORKED, "solver": "newton", "newton_steps": 2}
    tau = scale(margins, **options)
    wanted = [-oracle.sigmoid(-m / t) for m, t in zip(margins, tau, strict=True)]
    np.testing.assert_allclose(slopes(margins, **options), wanted, rtol=1e-12)


@pytest.mark.parametrize(("x", "published"), [(-14.0, 0.454), (-20.0, 0.002)])
@pytest.mark.parametrize("solver", ["closed_form", "newton"])
def test_slope_is_exact_where_an_epsilon_in_the_logarithm_fails(x, published, solver):
    probability = oracle.sigmoid(x)
    silenced = probability * (1.0 - probability) / (probability + 1e-6)
    np.testing.assert_allclose(silenced, published, rtol=0, atol=0.51e-3)
    options = {**WORKED, "solver": solver}
    np.testing.assert_allclose(scale([4.0 * x], **options), 4.0, rtol=0)
    found = slopes([4.0 * x], **options)
    np.testing.assert_allclose(found, -oracle.sigmoid(-x), rtol=1e-14)


# --- bounds of the domain ---


@pytest.mark.parametrize(
    "options", [WORKED, QUADRATIC, {**WORKED, "solver": "newton", "newton_steps": 3}]
)
def test_infinite_margins(options):
    high = options.get("tau_max", math.log(2.0) / (2.0 * options["rho0"]))
    found, (values, tau) = compiled(**options)(jnp.float32([jnp.inf, -jnp.inf]))
    np.testing.assert_allclose(tau, high, rtol=1e-6)
    penalty = options["rho0"] * high * (high if "quadratic" in options else 1.0)
    np.testing.assert_allclose(
        values, [penalty - math.log(2.0) * high, np.inf], rtol=1e-6
    )
    np.testing.assert_array_equal(found, [0.0, -1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_min": 0.0}, "tau_min must be positive and finite, got 0.0"),
        ({"tau_min": -1.0}, "tau_min must be positive"),
        ({"tau_max": 0.05}, "tau_max must be finite and at least tau_min = 0.1, got"),
        ({"tau_max": math.inf}, "tau_max must be finite"),
        ({"tau_max": None}, "tau_max must be given unless quadratic=True"),
        ({"rho0": 0.0}, "tau goes to its upper bound for every pair"),
        ({"rho0": -0.1}, "rho0 must be positive"),
        ({"rho0": math.nan}, "rho0 must be positive"),
        ({"rho0": math.log(2.0)}, r"below log\(2\) = 0.6931, .* tau_min for every"),
        ({"quadratic": True}, "tau_max must be None with quadratic=True, got 4.0"),
        (
            {"quadratic": True, "tau_max": None, "rho0": 4.0},
            r"rho0 \* tau_min must be below .* got 4.0 \* 0.1: tau would be tau_min",
        ),
        (
            {"solver": "secant"},
            "solver must be one of closed_form, newton, got 'secant'",
        ),
        ({"newton_steps": 0}, "newton_steps must be at least 1, got 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        losses.adaptive_scaling(jnp.zeros(1), **{**WORKED, **options})
    given = {k: v for k, v in {**WORKED, **options}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        losses.PairwiseConfig("adaptive_scaling", **given)
