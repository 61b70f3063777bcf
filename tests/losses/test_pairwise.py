"""Margins and the plain losses of a margin; what every pairwise loss has in common."""

import functools
import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import pairwise as oracle

from jaxpost import losses

pytestmark = pytest.mark.usefixtures("strict_dtypes")

MARGINS = [-30.0, -5.0, -1.3, -0.2, 0.0, 0.4, 0.9, 2.5, 30.0]
CONFIGS = [
    losses.PairwiseConfig("bradley_terry"),
    losses.PairwiseConfig("bradley_terry", label_smoothing=0.1),
    losses.PairwiseConfig("robust_dpo", flip_rate=0.2),
    losses.PairwiseConfig("hinge"),
    losses.PairwiseConfig("ipo", tau=0.25),
    losses.PairwiseConfig("r3m", lam=0.25),
    losses.PairwiseConfig("r3m", lam=0.75),
    losses.PairwiseConfig("adaptive_scaling", rho0=0.1, tau_min=0.1, tau_max=4.0),
    losses.PairwiseConfig("adaptive_scaling", rho0=0.5, tau_min=0.1, quadratic=True),
    losses.PairwiseConfig(
        "adaptive_scaling", rho0=0.1, tau_min=0.1, tau_max=4.0, solver="newton"
    ),
]
every_loss = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: "-".join(map(str, [c.name, *c.settings()]))
)
vectors = st.lists(st.floats(-40.0, 40.0), min_size=6, max_size=6).map(np.array)


def values_of(config):
    return lambda margins: losses.pairwise_loss(config)(margins).values


def slopes(function, margins):
    return jax.grad(lambda m: jnp.sum(function(m)))(margins)


@functools.cache
def compiled(config):
    """Values and slopes at six margins at a time, compiled once for all tests."""
    function = values_of(config)
    both = jax.jit(lambda margins: (function(margins), slopes(function, margins)))
    return lambda margins: tuple(map(np.asarray, both(margins)))


# --- margins ---


def some_logps(seed, batch=5):
    draw = np.random.default_rng(seed)
    policy, reference = -40.0 * draw.random((2, 2, batch))
    return policy, reference, draw.integers(1, 50, (2, batch))


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("with_lengths", [True, False])
def test_margins_equal_the_oracle(with_reference, with_lengths):
    policy, reference, lengths = some_logps(0)
    wanted = oracle.dpo_margins(
        policy,
        reference if with_reference else None,
        0.3,
        lengths if with_lengths else None,
    )
    with jax.enable_x64(True):
        found = losses.dpo_margins(
            *map(jnp.asarray, policy),
            *(map(jnp.asarray, reference) if with_reference else (None, None)),
            beta=0.3,
            chosen_lengths=jnp.asarray(lengths[0]) if with_lengths else None,
            rejected_lengths=jnp.asarray(lengths[1]) if with_lengths else None,
        )
    assert found.dtype == "float64"
    np.testing.assert_allclose(found, wanted, rtol=1e-13)


def test_margins_change_sign_with_the_labels_and_ignore_the_level():
    policy, reference, _ = some_logps(1)
    with jax.enable_x64(True):
        policy, reference = jnp.asarray(policy), jnp.asarray(reference)
        margins = losses.dpo_margins(*policy, *reference, beta=0.2)
        swapped = losses.dpo_margins(*policy[::-1], *reference[::-1], beta=0.2)
        shifted = losses.dpo_margins(*(policy + 3.0), *reference, beta=0.2)
    np.testing.assert_allclose(margins, -swapped, rtol=1e-13)
    np.testing.assert_allclose(margins, shifted, rtol=1e-12)


def test_margin_gradients_and_the_constant_reference():
    policy, reference, lengths = some_logps(2)
    arguments = [jnp.float32(x) for x in (*policy, *reference)]

    def total(*logps):
        return jnp.sum(
            losses.dpo_margins(
                *logps,
                beta=0.5,
                chosen_lengths=jnp.asarray(lengths[0]),
                rejected_lengths=jnp.asarray(lengths[1]),
            )
        )

    found = jax.grad(total, (0, 1, 2, 3))(*arguments)
    np.testing.assert_allclose(found[0], 0.5 / lengths[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], -0.5 / lengths[1], rtol=1e-6)
    np.testing.assert_array_equal(found[2], 0.0)
    np.testing.assert_array_equal(found[3], 0.0)


def test_a_padded_row_of_length_zero_has_a_finite_margin():
    zero = jnp.zeros(1)
    lengths = jnp.zeros(1, jnp.int32)
    margins = losses.dpo_margins(
        zero,
        zero,
        None,
        None,
        beta=1.0,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
    )
    np.testing.assert_array_equal(margins, 0.0)


def test_margins_are_computed_in_float32_at_least():
    policy, reference, _ = some_logps(3)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (*policy, *reference)]
    found = losses.dpo_margins(*low, beta=0.1)
    assert found.dtype == "float32"
    wide = [np.asarray(x, np.float64) for x in low]
    wanted = oracle.dpo_margins(wide[:2], wide[2:], 0.1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    mixed = losses.dpo_margins(low[0], jnp.float32(policy[1]), None, None, beta=0.1)
    assert mixed.dtype == "float32"


def test_margin_errors():
    one, two = jnp.zeros(1), jnp.zeros(2)
    for beta in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beta must be positive and finite, got"):
            losses.dpo_margins(one, one, one, one, beta=beta)
    with pytest.raises(ValueError, match=r"one shape, got .*ref_rejected \(2,\)"):
        losses.dpo_margins(one, one, one, two, beta=0.1)
    with pytest.raises(ValueError, match=r"one shape, got .*rejected_lengths \(2,\)"):
        losses.dpo_margins(
            one, one, one, one, beta=0.1, chosen_lengths=one, rejected_lengths=two
        )
    with pytest.raises(ValueError, match="ref_chosen was given without ref_rejected"):
        losses.dpo_margins(one, one, one, None, beta=0.1)
    with pytest.raises(ValueError, match="rejected_lengths was given without chosen_"):
        losses.dpo_margins(one, one, one, one, beta=0.1, rejected_lengths=one)


# --- plain losses ---


@pytest.mark.parametrize(
    ("function", "wanted", "options"),
    [
        (losses.bradley_terry, oracle.bradley_terry, {}),
        (losses.bradley_terry, oracle.bradley_terry, {"label_smoothing": 0.3}),
        (losses.robust_dpo, oracle.robust_dpo, {"flip_rate": 0.0}),
        (losses.robust_dpo, oracle.robust_dpo, {"flip_rate": 0.3}),
        (losses.hinge, oracle.hinge, {}),
        (losses.ipo, oracle.ipo, {}),
        (losses.ipo, oracle.ipo, {"tau": 0.1}),
    ],
)
def test_equal_the_oracle(function, wanted, options):
    wanted = [wanted(m, **options) for m in MARGINS]
    found = function(jnp.float32(MARGINS), **options)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    with jax.enable_x64(True):
        found = function(jnp.asarray(MARGINS), **options)
        assert found.dtype == "float64"
    np.testing.assert_allclose(found, wanted, rtol=1e-13)


@settings(max_examples=30, deadline=None)
@given(margins=vectors, rate=st.floats(0.0, 0.45))
def test_flipping_labels(margins, rate):
    with jax.enable_x64(True):
        margins = jnp.asarray(margins)
        clean = losses.bradley_terry(margins)
        # cDPO: expected loss under flipped labels, and the difference of both labels.
        smooth = losses.bradley_terry(margins, label_smoothing=rate)
        swapped = losses.bradley_terry(-margins, label_smoothing=rate)
        expected = (1.0 - rate) * clean + rate * losses.bradley_terry(-margins)
        np.testing.assert_allclose(smooth, expected, atol=1e-12)
        np.testing.assert_allclose(
            smooth - swapped, -(1.0 - 2.0 * rate) * margins, atol=1e-12
        )
        # Robust DPO: its own expectation under flipped labels is the clean loss.
        robust = losses.robust_dpo(margins, flip_rate=rate)
        flipped = losses.robust_dpo(-margins, flip_rate=rate)
        np.testing.assert_allclose(
            (1.0 - rate) * robust + rate * flipped, clean, atol=1e-10
        )
        # They differ from the plain loss by lines of opposite slopes.
        np.testing.assert_allclose(smooth, clean + rate * margins, atol=1e-12)
        slope = rate / (1.0 - 2.0 * rate)
        np.testing.assert_allclose(robust, clean - slope * margins, atol=1e-10)


def test_minima():
    with jax.enable_x64(True):
        e = 0.2
        best = jnp.log((1.0 - e) / jnp.full(1, e))
        smoothed = slopes(lambda m: losses.bradley_terry(m, label_smoothing=e), best)
        np.testing.assert_allclose(smoothed, 0.0, atol=1e-15)
        # With beta in the margins, tau = 1 is the published tau = beta, times beta^2.
        gaps, beta = jnp.asarray(MARGINS), 0.1
        np.testing.assert_allclose(
            losses.ipo(beta * gaps), beta**2 * losses.ipo(gaps, tau=beta), rtol=1e-12
        )
        np.testing.assert_allclose(losses.ipo(jnp.full(1, 5.0), tau=beta), 0.0)
    np.testing.assert_array_equal(
        slopes(losses.hinge, jnp.float32([0.99, 1.0])), [-1, 0]
    )


@pytest.mark.parametrize(
    ("kind", "config", "normalized"),
    [
        ("sigmoid", losses.PairwiseConfig("bradley_terry"), False),
        ("sigmoid_norm", losses.PairwiseConfig("bradley_terry"), True),
        ("hinge", losses.PairwiseConfig("hinge"), False),
        ("ipo", losses.PairwiseConfig("ipo", tau=0.3), True),
        ("robust", losses.PairwiseConfig("robust_dpo", flip_rate=0.2), False),
    ],
)
def test_equal_trl(kind, config, normalized):
    """Values that TRL's own code gave; `record_trl_losses.py` wrote them."""
    text = pathlib.Path(__file__).with_name("trl_losses.json").read_text("utf-8")
    recorded = json.loads(text)
    assert (recorded["beta"], recorded["label_smoothing"]) == (0.3, 0.2)
    for dtype, tolerance in (("float32", 1e-6), ("float64", 1e-13)):
        with jax.enable_x64(dtype == "float64"):
            policy, reference, lengths = (
                jnp.asarray([pair[key] for pair in recorded["pairs"]], dtype).T
                for key in ("policy", "reference", "lengths")
            )
            margins = losses.dpo_margins(
                *policy,
                *reference,
                beta=1.0 if kind == "ipo" else 0.3,
                chosen_lengths=lengths[0] if normalized else None,
                rejected_lengths=lengths[1] if normalized else None,
            )
            found = values_of(config)(margins)
        wanted = recorded["losses"][kind]
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


# --- what every pairwise loss has in common ---


@every_loss
def test_gradient_equals_finite_differences(config):
    margins, step = np.array([-5.0, -0.2, -0.03, 0.4, 0.9, 6.0]), 1e-5
    with jax.enable_x64(True):
        (up, _), (_, found), (down, _) = (
            compiled(config)(jnp.asarray(margins + s)) for s in (step, 0.0, -step)
        )
    # The published steps stop near the best scale, where a fixed scale's slope differs.
    tolerance = 1e-3 if config.solver == "newton" else 1e-9
    np.testing.assert_allclose(found, (up - down) / (2 * step), atol=tolerance)


@every_loss
@settings(max_examples=20, deadline=None)
@given(margins=vectors)
def test_monotone_and_convex(config, margins):
    with jax.enable_x64(True):
        _, found = compiled(config)(jnp.asarray(np.sort(margins)))
    falls = config.name != "ipo" and not config.label_smoothing
    assert not falls or (found <= 0.0).all()
    if config.solver != "newton":
        assert (np.diff(found) >= -1e-12).all()


@every_loss
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_margins(config, dtype):
    unbounded = config.name == "ipo"
    with jax.enable_x64(dtype == "float64"):
        values, found = compiled(config)(
            jnp.asarray([1e4, -1e4, 40.0, -40.0, 0.0, -0.0], dtype)
        )
        assert values.dtype == found.dtype == dtype
        assert np.isfinite(values).all()
        assert np.isfinite(found).all()
        assert unbounded or (np.abs(found) <= 2.0).all()
        ends = np.array([np.inf, -np.inf, np.nan, np.inf, -np.inf, np.nan], dtype)
        values, found = compiled(config)(jnp.asarray(ends))
    np.testing.assert_array_equal(np.isnan(values), np.isnan(ends))
    assert values[1] == np.inf
    if unbounded:
        np.testing.assert_array_equal(found, ends)
    else:
        assert np.isfinite(found[:2]).all()


@every_loss
def test_transformations_and_dtypes(config):
    loss = losses.pairwise_loss(config)
    margins = jnp.float32(MARGINS)
    wanted = loss(margins)
    for name, array in wanted.extras.items():
        assert name in {"r3m": "delta", "adaptive_scaling": "tau"}[config.name]
        assert array.shape == margins.shape
        assert array.dtype == "float32"

    def same(found, shape=margins.shape):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a.reshape(margins.shape), b, rtol=1e-6, atol=1e-6
            ),
            found,
            wanted,
        )
        assert found.values.shape == shape

    jitted = jax.jit(loss)
    same(jitted(margins))
    same(jitted(margins + 0.0))
    assert jitted._cache_size() == 1
    same(jax.vmap(loss)(margins))
    same(loss(margins.reshape(3, 3)), (3, 3))
    low = jnp.asarray(MARGINS, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, loss(low), loss(low.astype("float32")))
    assert loss(low).values.dtype == "float32"


def test_what_is_known_of_a_pair_has_no_gradient():
    for config in CONFIGS[5:]:
        found = slopes(
            lambda m, c=config: sum(losses.pairwise_loss(c)(m).extras.values()),
            jnp.float32(MARGINS),
        )
        np.testing.assert_array_equal(found, 0.0)


# --- by name ---


def test_a_config_calls_the_function_it_names():
    margins = jnp.float32(MARGINS)
    for config in CONFIGS:
        direct = getattr(losses, config.name)(margins, **config.settings())
        direct = direct if isinstance(direct, tuple) else (direct,)
        values, extras = losses.pairwise_loss(config)(margins)
        for found, wanted in zip((values, *extras.values()), direct, strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert losses.PairwiseConfig() == CONFIGS[0]
    assert hash(CONFIGS[3]) == hash(losses.PairwiseConfig("hinge"))


def test_settings_are_those_of_the_functions():
    """The check of each loss takes the loss's own settings, names and defaults."""
    from jaxpost.losses._pairwise_config import _LOSSES

    for name, (function, check) in _LOSSES.items():
        assert function is getattr(losses, name)
        settings = list(inspect.signature(function).parameters.values())[1:]
        assert settings == list(inspect.signature(check).parameters.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dpo"}, "name must be one of bradley_terry, .*, got 'dpo'"),
        ({"name": "r3m"}, "r3m needs lam"),
        ({"name": "adaptive_scaling", "tau_max": 1.0}, "needs rho0, tau_min"),
        (
            {"name": "r3m", "lam": 0.5, "label_smoothing": 0.1},
            "r3m does not read label_smoothing; it reads lam",
        ),
        ({"name": "hinge", "tau": 0.5}, "hinge does not read tau; .* no settings"),
        ({"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\), got 0.5"),
        (
            {"label_smoothing": -0.1},
            r"label_smoothing must lie in \[0, 0.5\), got -0.1",
        ),
        ({"name": "robust_dpo", "flip_rate": 0.5}, r"flip_rate must lie in \[0, 0.5\)"),
        (
            {"name": "robust_dpo", "flip_rate": -0.1},
            r"flip_rate must lie in \[0, 0.5\)",
        ),
        ({"name": "ipo", "tau": 0.0}, "tau must be positive and finite, got 0.0"),
        ({"name": "ipo", "tau": float("inf")}, "tau must be positive and finite"),
    ],
)
def test_config_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        losses.PairwiseConfig(**settings)


def test_function_errors():
    one = jnp.zeros(1)
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        losses.bradley_terry(one, label_smoothing=0.5)
    with pytest.raises(ValueError, match="flip_rate must lie in"):
        losses.robust_dpo(one, flip_rate=0.6)
    with pytest.raises(ValueError, match="tau must be positive"):
        losses.ipo(one, tau=-1.0)


# --- reward models ---


def test_centering():
    chosen, rejected = jnp.float32([1.0, -2.0]), jnp.float32([3.0, 0.5])
    found = losses.reward_centering(chosen, rejected)
    np.testing.assert_array_equal(found, [16.0, 2.25])
    low = losses.reward_centering(chosen.astype("bfloat16"), rejected)
    assert low.dtype == "float32"
    gradient = jax.grad(lambda x: jnp.sum(losses.reward_centering(x, rejected)))(chosen)
    np.testing.assert_array_equal(gradient, [8.0, -3.0])
    with pytest.raises(ValueError, match="one shape"):
        losses.reward_centering(chosen, rejected[:1])
