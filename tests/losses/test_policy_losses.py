"""The clipped policy loss and the clipped value loss."""

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


def some_steps(seed):
    """`logps`, `old_logps`, `advantages` and a mask; ratios from 0.2 to 5."""
    draw = np.random.default_rng(seed)
    old = -3.0 * draw.random(SHAPE)
    logps = old + draw.uniform(-1.6, 1.6, SHAPE)
    mask = draw.random(SHAPE) < 0.7
    mask[0, 0] = True
    return logps, old, draw.normal(size=SHAPE), mask


def some_values(seed):
    draw = np.random.default_rng(seed)
    values, old, returns = draw.normal(size=(3, *SHAPE))
    mask = draw.random(SHAPE) < 0.7
    mask[0, 0] = True
    return values, old, returns, mask


def policy(*steps, clip_low=0.2, clip_high=0.3, dual_clip=None):
    return losses.clipped_policy(
        *steps, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )


def value(*steps, clip=0.4):
    return losses.clipped_value(*steps, clip=clip)


@settings(max_examples=20, deadline=None)
@given(
    seeds,
    st.sampled_from([0.1, 0.2, 1.0]),
    st.sampled_from([0.1, 0.3]),
    st.sampled_from([None, 2.0, 4.0]),
)
def test_policy_loss_equals_the_oracle(seed, clip_low, clip_high, dual_clip):
    logps, old, gains, mask = steps = some_steps(seed)
    with jax.enable_x64(True):
        found = policy(
            *map(jnp.asarray, steps),
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
        )
    assert found.values.dtype == "float64"
    found = jax.tree.map(np.asarray, found)
    for place in np.ndindex(SHAPE):
        if not mask[place]:
            assert found.values[place] == 0.0
            assert found.weights[place] == 0.0
            continue
        wanted = oracle.clipped_policy(
            logps[place], old[place], gains[place], clip_low, clip_high, dual_clip
        )
        np.testing.assert_allclose(found.values[place], wanted, rtol=1e-12)
        assert found.weights[place] == 1.0


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([None, 0.1, 1.0]))
def test_value_loss_equals_the_oracle(seed, clip):
    steps = some_values(seed)
    with jax.enable_x64(True):
        found, weights = value(*map(jnp.asarray, steps), clip=clip)
    assert found.dtype == "float64"
    np.testing.assert_array_equal(weights, steps[-1])
    for place in np.ndindex(SHAPE):
        wanted = oracle.clipped_value(*(x[place] for x in steps[:3]), clip)
        wanted = wanted if steps[-1][place] else 0.0
        np.testing.assert_allclose(found[place], wanted, rtol=1e-12, atol=1e-15)


def test_where_the_policy_gradient_is_and_where_it_is_not():
    """Slope `-ratio * advantage`, unless clipping holds the step back."""
    ratios = np.array([[0.5, 0.5, 0.9, 1.1, 1.5, 1.5, 9.0, 9.0]])
    gains = np.array([[1.0, -1.0, 2.0, -2.0, 1.0, -1.0, 1.0, -1.0]])
    held = np.array([[0, 1, 0, 0, 1, 0, 1, 1]], bool)  # the last by the dual clip

    def total(logps):
        values = policy(
            logps,
            jnp.zeros(ratios.shape),
            jnp.asarray(gains),
            jnp.ones(ratios.shape, bool),
            dual_clip=3.0,
        ).values
        return jnp.sum(values)

    with jax.enable_x64(True):
        slopes = jax.grad(total)(jnp.log(jnp.asarray(ratios)))
    np.testing.assert_allclose(slopes, np.where(held, 0.0, -ratios * gains), rtol=1e-12)


def test_on_policy_the_gradient_is_that_of_reinforce():
    logps, _, gains, mask = map(jnp.asarray, some_steps(0))
    slopes = jax.grad(lambda x: jnp.sum(policy(x, logps, gains, mask).values))(logps)
    np.testing.assert_allclose(slopes, jnp.where(mask, -gains, 0.0), rtol=1e-6)


def test_where_the_value_gradient_stops():
    """Old value 0, return 1, clip 0.4: it goes on until 0.4, and back from anywhere."""
    values = jnp.array([[-1.0, 0.2, 0.39, 0.41, 0.9, 3.0]])
    zeros = jnp.zeros(values.shape)

    def total(values):
        return jnp.sum(value(values, zeros, zeros + 1.0, zeros == 0.0)[0])

    wanted = [[-2.0, -0.8, -0.61, 0.0, 0.0, 2.0]]
    np.testing.assert_allclose(jax.grad(total)(values), wanted, atol=1e-6)


def test_only_what_is_trained_gets_gradients():
    steps = tuple(map(jnp.asarray, some_steps(1)))
    found = jax.grad(lambda *s: jnp.sum(policy(*s, steps[-1]).values), (0, 1, 2))(
        *steps[:3]
    )
    assert np.any(found[0] != 0.0)
    np.testing.assert_array_equal(found[1], 0.0)
    np.testing.assert_array_equal(found[2], 0.0)
    steps = tuple(map(jnp.asarray, some_values(1)))
    found = jax.grad(lambda *s: jnp.sum(value(*s, steps[-1])[0]), (0, 1, 2))(*steps[:3])
    assert np.any(found[0] != 0.0)
    np.testing.assert_array_equal(found[1], 0.0)
    np.testing.assert_array_equal(found[2], 0.0)


@pytest.mark.parametrize("make", [some_steps, some_values])
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
def test_masked_steps_change_nothing(make, rubbish):
    *arrays, mask = make(2)
    function = (lambda *s: policy(*s, dual_clip=3.0)) if make is some_steps else value

    def both(arrays):
        arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
        output = function(*arrays, jnp.asarray(mask))
        slopes = jax.grad(
            lambda x: jnp.sum(function(x, *arrays[1:], jnp.asarray(mask))[0])
        )(arrays[0])
        return jax.tree.leaves((output, slopes))

    clean = both([np.where(mask, x, 0.0) for x in arrays])
    dirty = both([np.where(mask, x, rubbish) for x in arrays])
    for one, other in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one[~mask], 0.0)


@pytest.mark.parametrize("far", [1e4, -1e4, -np.inf])
@pytest.mark.parametrize("gain", [1.0, -1.0, 0.0])
def test_far_ratios_stay_finite(far, gain):
    old, ones = jnp.full((1, 1), -2.0), jnp.ones((1, 1))

    def total(logps):
        return jnp.sum(policy(logps, old, gain * ones, ones > 0.0).values)

    found = jax.value_and_grad(total)(far * ones)
    assert all(np.isfinite(x).all() for x in found)


def test_metrics_count_what_is_held_back():
    ratios = jnp.array([[0.5, 0.5, 1.0, 1.5, 1.5, 9.0, 0.1]])
    gains = jnp.array([[1.0, -1.0, 2.0, 1.0, -1.0, -1.0, -1.0]])
    mask = jnp.array([[True] * 6 + [False]])
    found = policy(
        jnp.log(ratios), jnp.zeros_like(ratios), gains, mask, dual_clip=3.0
    ).metrics
    assert found["clip_ratio/low"].tolist() == [[0, 1, 0, 0, 0, 0, 0]]
    assert found["clip_ratio/high"].tolist() == [[0, 0, 0, 1, 0, 0, 0]]
    assert found["clip_ratio/region"].tolist() == [[0, 1, 0, 1, 0, 0, 0]]
    assert found["clip_ratio/dual"].tolist() == [[0, 0, 0, 0, 0, 1, 0]]
    np.testing.assert_allclose(
        found["val/ratio"], jnp.where(mask, ratios, 0.0), rtol=1e-6
    )
    kl = np.asarray(ratios - 1.0 - jnp.log(ratios))
    np.testing.assert_allclose(
        found["policy/approxkl"], np.where(mask, kl, 0.0), atol=1e-6
    )


def test_jit_equals_eager():
    steps = tuple(map(jnp.asarray, some_steps(4)))
    for function in (policy, value):
        for one, other in zip(
            jax.tree.leaves(function(*steps)),
            jax.tree.leaves(jax.jit(function)(*steps)),
            strict=True,
        ):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: policy(*s, clip_low=0.0), ValueError, "clip_low must lie in"),
        (lambda s: policy(*s, clip_low=1.1), ValueError, "clip_low must lie in"),
        (lambda s: policy(*s, clip_high=0.0), ValueError, "clip_high must be positive"),
        (lambda s: policy(*s, dual_clip=1.2), ValueError, "dual_clip must be finite"),
        (lambda s: policy(*s[:3], s[0]), AssertionError, "bool"),
        (lambda s: policy(s[0][:1], *s[1:]), AssertionError, "shape"),
        (lambda s: value(*s, clip=0.0), ValueError, "clip must be positive"),
        (lambda s: value(*s[:3], s[0]), AssertionError, "bool"),
        (lambda s: value(s[0][:1], *s[1:]), AssertionError, "shape"),
    ],
)
def test_wrong_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(tuple(map(jnp.asarray, some_steps(0))))
