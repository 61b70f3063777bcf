"""Weights between the sampler and the trainer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import policy as oracle

from jaxpost import losses

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SHAPE = (3, 6)
seeds = st.integers(0, 10**6)
weigh = jax.jit(losses.importance_weights, static_argnames="cap")


def some(seed):
    draw = np.random.default_rng(seed)
    sampling = -3.0 * draw.random(SHAPE)
    mask = draw.random(SHAPE) < 0.7
    mask[0, 0] = True
    return sampling + draw.uniform(-1.6, 1.6, SHAPE), sampling, mask


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([1.0, 2.0, math.inf]))
def test_weights_and_metrics_equal_the_oracle(seed, cap):
    logps, sampling, mask = some(seed)
    with jax.enable_x64(True):
        weights, metrics = weigh(logps, sampling, mask, cap=cap)
    assert weights.dtype == "float64"
    wanted = np.zeros(SHAPE)
    for place in zip(*np.nonzero(mask), strict=True):
        wanted[place] = oracle.importance_weight(logps[place], sampling[place], cap)
    np.testing.assert_allclose(weights, wanted, rtol=1e-12)
    difference, ratios = np.abs(logps - sampling)[mask], wanted[mask]
    expected = {
        "sampling_logp_difference/mean": ("mean", difference.mean()),
        "sampling_logp_difference/max": ("max", difference.max()),
        "importance_sampling_ratio/min": ("min", ratios.min()),
        "importance_sampling_ratio/mean": ("mean", ratios.mean()),
        "importance_sampling_ratio/max": ("max", ratios.max()),
    }
    assert set(metrics) == {f"sampling/{name}" for name in expected}
    for name, (kind, value) in expected.items():
        metric = metrics[f"sampling/{name}"]
        assert metric.kind == kind
        found = metric.value / metric.weight if kind == "mean" else metric.value
        np.testing.assert_allclose(found, value, rtol=1e-12)


def test_equal_log_probs_weigh_one():
    logps = jnp.full((2, 3), -1.5, jnp.bfloat16)
    weights, metrics = losses.importance_weights(logps, logps, logps < 0.0, cap=1.0)
    np.testing.assert_array_equal(weights, 1.0)
    assert weights.dtype == "float32"
    assert metrics["sampling/sampling_logp_difference/max"].value == 0.0


def test_weighted_samples_have_the_trained_policys_mean():
    """On an enumerable vocabulary; the cap is what makes it biased."""
    draw = np.random.default_rng(0)
    with jax.enable_x64(True):
        logps, sampling = np.asarray(jax.nn.log_softmax(draw.normal(size=(2, 7))))
        values, real = draw.normal(size=7), np.ones(7, bool)

        def mean(cap):
            weights, _ = weigh(logps, sampling, real, cap=cap)
            return np.sum(np.exp(sampling) * np.asarray(weights) * values)

        wanted = np.sum(np.exp(logps) * values)
        np.testing.assert_allclose(mean(math.inf), wanted, rtol=1e-12)
        assert abs(mean(1.0) - wanted) > 0.01


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
def test_masked_tokens_change_nothing(rubbish):
    logps, sampling, mask = some(2)

    def both(fill):
        logps_, sampling_ = (
            jnp.asarray(np.where(mask, x, fill), jnp.float32) for x in (logps, sampling)
        )
        return weigh(logps_, sampling_, mask, cap=2.0)

    for one, other in zip(
        jax.tree.leaves(both(0.0)), jax.tree.leaves(both(rubbish)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_no_gradient_flows_and_far_ratios_stay_finite():
    mask = jnp.ones((1, 3), bool)
    logps, sampling = jnp.array([[-1.0, -900.0, -1.0]]), jnp.array([[-1.5, -1, -900.0]])

    def total(logps, sampling):
        return jnp.sum(
            losses.importance_weights(logps, sampling, mask, cap=math.inf)[0]
        )

    assert np.isfinite(total(logps, sampling))
    for slopes in jax.grad(total, (0, 1))(logps, sampling):
        np.testing.assert_array_equal(slopes, 0.0)


def test_a_microbatch_without_tokens_does_not_count():
    zeros = jnp.zeros((2, 2))
    weights, metrics = weigh(zeros, zeros, zeros > 0.0, cap=2.0)
    np.testing.assert_array_equal(weights, 0.0)
    found = {name.split("/", 1)[1]: float(m.value) for name, m in metrics.items()}
    assert found == {
        "sampling_logp_difference/mean": 0.0,
        "sampling_logp_difference/max": 0.0,
        "importance_sampling_ratio/min": 2.0,  # the least over microbatches is right
        "importance_sampling_ratio/mean": 0.0,
        "importance_sampling_ratio/max": 0.0,
    }


def test_jit_equals_eager():
    steps = tuple(map(jnp.asarray, some(4)))

    eager = losses.importance_weights(*steps, cap=2.0)
    for one, other in zip(
        jax.tree.leaves(eager), jax.tree.leaves(weigh(*steps, cap=2.0)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("cap", [0.5, 0.0, math.nan])
def test_a_cap_below_one_is_refused(cap):
    with pytest.raises(ValueError, match="cap must be at least 1"):
        losses.importance_weights(*map(jnp.asarray, some(0)), cap=cap)


def test_wrong_arrays_are_refused():
    logps, sampling, mask = map(jnp.asarray, some(0))
    with pytest.raises(AssertionError, match="bool"):
        losses.importance_weights(logps, sampling, logps, cap=2.0)
    with pytest.raises(AssertionError, match="shape"):
        losses.importance_weights(logps, sampling[:1], mask, cap=2.0)
