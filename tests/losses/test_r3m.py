"""R³M: worked values, the oracle, and what its derivation promises."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import pairwise as oracle

from jaxpost import losses

pytestmark = pytest.mark.usefixtures("strict_dtypes")

vectors = st.lists(st.floats(-40.0, 40.0), min_size=6, max_size=6).map(np.array)
lambdas = st.floats(0.01, 0.99)


def slopes(margins, lam):
    return jax.grad(lambda m: jnp.sum(losses.r3m(m, lam=lam).values))(margins)


@pytest.mark.parametrize(
    ("lam", "margins", "delta", "values", "slope"),
    [
        (
            0.25,
            (-5.0, 0.0, 1.0, 3.0),
            (6.0986, 1.0986, 0.0986, 0.0),
            (1.81234, 0.56234, 0.31234, 0.04859),
            (-0.25, -0.25, -0.25, -0.047426),
        ),
        (
            0.5,
            (-2.0, 0.0, 1.0),
            (2.0, 0.0, 0.0),
            (1.69315, 0.69315, 0.31326),
            (-0.5, -0.5, -0.268941),
        ),
        (
            0.75,
            (-5.0, -2.0, -1.0, 3.0),
            (3.9014, 0.9014, 0.0, 0.0),
            (4.31234, 2.06234, 1.31326, 0.04859),
            (-0.75, -0.75, -0.731059, -0.047426),
        ),
        (0.85, (-5.0, -2.0), (3.2654, 0.2654), (4.67271, 2.12271), (-0.85, -0.85)),
    ],
)
def test_worked_values(lam, margins, delta, values, slope):
    with jax.enable_x64(True):
        found = losses.r3m(jnp.asarray(margins), lam=lam)
        assert found.values.dtype == found.delta.dtype == "float64"
        found_slope = slopes(jnp.asarray(margins), lam)
        outliers = np.asarray(found.delta) > 0.0
    np.testing.assert_allclose(found.delta, delta, rtol=0, atol=0.51e-4)
    np.testing.assert_allclose(found.values, values, rtol=0, atol=0.51e-5)
    np.testing.assert_allclose(found_slope, slope, rtol=0, atol=0.51e-6)
    np.testing.assert_array_equal(outliers, np.greater(delta, 0.0))


@pytest.mark.parametrize(
    ("lam", "threshold"),
    [(0.25, 1.098612), (0.5, 0.0), (0.75, -1.098612), (0.85, -1.734601)],
)
def test_threshold(lam, threshold):
    """Outliers are the pairs whose margin is below `c = log(1 / lam - 1)`."""
    with jax.enable_x64(True):
        margins = jnp.asarray([threshold - 1e-5, threshold + 1e-5])
        delta = losses.r3m(margins, lam=lam).delta
    np.testing.assert_allclose(delta, [1e-5, 0.0], atol=0.51e-6)


def test_the_penalty_is_per_pair_whatever_the_batch():
    """Read literally, eq. 3.2 would multiply it by the number of pairs."""
    margins = np.array([2.0, -3.0, 0.5, -0.2])
    with jax.enable_x64(True):
        found = losses.r3m(jnp.asarray(margins), lam=0.3).delta
    np.testing.assert_allclose(found, [0.0, 3.847298, 0.347298, 1.047298], atol=0.51e-6)
    literal = [oracle.r3m(m, lam=4 * 0.3)[1] for m in margins]
    np.testing.assert_array_equal(literal, 0.0)


@pytest.mark.parametrize("lam", [0.01, 0.25, 0.5, 0.8, 0.99])
def test_equals_the_oracle(lam):
    margins = np.concatenate([np.linspace(-9.0, 9.0, 37), [-300.0, 300.0]])
    wanted = np.array([oracle.r3m(m, lam) for m in margins]).T
    with jax.enable_x64(True):
        found = losses.r3m(jnp.asarray(margins), lam=lam)
    np.testing.assert_allclose(found.values, wanted[0], rtol=1e-12)
    np.testing.assert_allclose(found.delta, wanted[1], rtol=1e-12, atol=1e-12)
    found = losses.r3m(jnp.float32(margins), lam=lam)
    smallest = np.finfo(np.float32).tiny  # exp(-300) is below it
    np.testing.assert_allclose(found.values, wanted[0], rtol=1e-5, atol=smallest)
    np.testing.assert_allclose(found.delta, wanted[1], rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(margins=vectors, lam=lambdas)
def test_is_bradley_terry_with_the_gradient_clipped(margins, lam):
    with jax.enable_x64(True):
        margins = jnp.asarray(np.sort(margins))
        plain = losses.bradley_terry(margins)
        values, delta = losses.r3m(margins, lam=lam)
        found = slopes(margins, lam)
        wanted = -jnp.minimum(jax.nn.sigmoid(-margins), lam)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
        assert (values <= plain + 1e-12).all()
        assert (np.diff(delta) <= 0.0).all()
        assert (delta >= 0.0).all()
        # The loss at the bias is the value, so the bias is what it claims to be.
        biased = losses.bradley_terry(margins + delta) + lam * delta
        np.testing.assert_allclose(values, biased, rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(lam=lambdas)
def test_smooth_at_the_threshold(lam):
    threshold, step = math.log(1.0 / lam - 1.0), 1e-9
    with jax.enable_x64(True):
        around = jnp.asarray([threshold - step, threshold + step])
        values, found = losses.r3m(around, lam=lam).values, slopes(around, lam)
        np.testing.assert_allclose(values[0] - values[1], 2 * step * lam, atol=1e-14)
        np.testing.assert_allclose(found, -lam, atol=1e-8)


def test_limits():
    margins = jnp.float32([-8.0, -1.0, 0.0, 2.0])
    near_one = losses.r3m(margins, lam=1.0 - 1e-6)
    np.testing.assert_allclose(
        near_one.values, losses.bradley_terry(margins), rtol=1e-5
    )
    np.testing.assert_array_equal(near_one.delta, 0.0)
    near_zero = losses.r3m(margins, lam=1e-6)
    assert (near_zero.delta > 0.0).all()
    np.testing.assert_allclose(slopes(margins, 1e-6), -1e-6, rtol=1e-6)


def test_infinite_margins():
    values, delta = losses.r3m(jnp.float32([jnp.inf, -jnp.inf]), lam=0.3)
    np.testing.assert_array_equal(values, [0.0, jnp.inf])
    np.testing.assert_array_equal(delta, [0.0, jnp.inf])
    found = slopes(jnp.float32([jnp.inf, -jnp.inf]), 0.3)
    np.testing.assert_allclose(found, [0.0, -0.3], rtol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_errors(lam):
    with pytest.raises(ValueError, match=r"lam must lie in \(0, 1\), got"):
        losses.r3m(jnp.zeros(1), lam=lam)
    with pytest.raises(ValueError, match=r"lam must lie in \(0, 1\), got"):
        losses.PairwiseConfig("r3m", lam=lam)
