"""Distillation divergences: worked values, the f-divergence form, limits and zeros."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import divergence as oracle

from jaxpost import losses

pytestmark = pytest.mark.usefixtures("strict_dtypes")

STUDENT, TEACHER = (0.5, 0.3, 0.15, 0.05), (0.2, 0.5, 0.2, 0.1)
ALPHAS = (0.0, 0.01, 0.3, 0.5, 0.9, 1.0)
distributions = st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5).map(
    lambda weights: np.array(weights) / np.sum(weights)
)


def of_probabilities(student, teacher, alpha):
    with jax.enable_x64(True):
        logps = [jnp.log(jnp.asarray(p, "float64")) for p in (student, teacher)]
        found = losses.divergence(*logps, alpha=alpha)
        assert found.dtype == "float64"
        return np.asarray(found)


def slopes(student, teacher, alpha):
    return jax.grad(lambda x: jnp.sum(losses.divergence(x, teacher, alpha=alpha)))(
        student
    )


@pytest.mark.parametrize(
    ("student", "teacher", "alpha", "value", "digits"),
    [
        (STUDENT, TEACHER, 0.0, 0.1990058, 7),
        (STUDENT, TEACHER, 1.0, 0.2270880, 7),
        (STUDENT, TEACHER, 0.5, 0.0518800, 7),
        (STUDENT, TEACHER, 0.01, 0.00197, 5),  # not near the 0.199 of alpha = 0
        ((0.5, 0.3, 0.2), (0.2, 0.5, 0.3), 1.0, 0.2238047, 7),  # two and the rest
        ((0.625, 0.375), (2 / 7, 5 / 7), 1.0, 0.247591, 6),  # two, normalised
        ((0.97, 0.03), (0.01, 0.99), 1.0, 4.3325744, 7),
    ],
)
def test_worked_values(student, teacher, alpha, value, digits):
    found = of_probabilities(student, teacher, alpha)
    np.testing.assert_allclose(found, value, rtol=0, atol=0.51 * 10.0**-digits)


def test_gradient_of_the_forward_divergence_in_the_logits():
    logits, teacher = [1.0, 0.2, -0.5], [0.02, 0.08, 0.90]
    with jax.enable_x64(True):
        target = jnp.log(jnp.asarray(teacher))

        def loss(z):
            return losses.divergence(jax.nn.log_softmax(z), target, alpha=0.0)

        found = jax.grad(loss)(jnp.asarray(logits))
    wanted = [0.5779219, 0.1886636, -0.7665856]  # student - teacher
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.51e-7)


@settings(max_examples=30, deadline=None)
@given(student=distributions, teacher=distributions, alpha=st.sampled_from(ALPHAS))
def test_equals_the_oracle_and_its_mirror_image(student, teacher, alpha):
    found = of_probabilities(student, teacher, alpha)
    wanted = oracle.divergence(student, teacher, alpha)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-14)
    mirrored = of_probabilities(teacher, student, 1.0 - alpha)
    np.testing.assert_allclose(found, mirrored, rtol=1e-10, atol=1e-14)
    assert found >= -1e-15
    assert alpha in (0.0, 1.0) or found <= math.log(2.0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_distributions_are_a_stationary_zero(alpha):
    with jax.enable_x64(True):
        logits = jnp.asarray([[0.3, -1.0, 2.0], [5.0, 0.0, -3.0]])
        target = jax.nn.log_softmax(logits)

        def loss(z):
            return losses.divergence(jax.nn.log_softmax(z), target, alpha=alpha)

        np.testing.assert_allclose(loss(logits), [0.0, 0.0], atol=1e-15)
        found = jax.grad(lambda z: jnp.sum(loss(z)))(logits)
        np.testing.assert_allclose(found, 0.0, atol=1e-15)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_equals_finite_differences(alpha):
    with jax.enable_x64(True):
        logits = jnp.asarray([0.3, -1.0, 2.0, 0.4])
        target = jnp.log(jnp.asarray(TEACHER))

        def loss(z):
            return losses.divergence(jax.nn.log_softmax(z), target, alpha=alpha)

        found = jax.grad(loss)(logits)
        for i, unit in enumerate(jnp.eye(4)):
            slope = (loss(logits + 1e-5 * unit) - loss(logits - 1e-5 * unit)) / 2e-5
            np.testing.assert_allclose(found[i], slope, atol=1e-9)
        constant = jax.grad(lambda t: losses.divergence(target, t, alpha=alpha))(
            jax.nn.log_softmax(logits)
        )
        np.testing.assert_array_equal(constant, 0.0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_impossible_tokens(alpha):
    """Tokens that neither knows change nothing; a token that one lacks may cost inf."""
    never = -jnp.inf
    student = jnp.append(jnp.log(jnp.float32(STUDENT)), never)
    teacher = jnp.append(jnp.log(jnp.float32(TEACHER)), never)
    found = losses.divergence(student, teacher, alpha=alpha)
    wanted = losses.divergence(student[:4], teacher[:4], alpha=alpha)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    padded, plain = (
        slopes(student, teacher, alpha),
        slopes(student[:4], teacher[:4], alpha),
    )
    np.testing.assert_allclose(padded[:4], plain, rtol=1e-6)
    assert padded[4] == 0.0
    sure = jnp.float32([0.0, never, never, never])
    lacking = losses.divergence(sure, teacher[:4], alpha=alpha)
    assert np.isinf(lacking) == (alpha == 0.0)
    assert np.isfinite(slopes(sure, teacher[:4], alpha)[0])
    lacked = losses.divergence(student[:4], sure, alpha=alpha)
    assert np.isinf(lacked) == (alpha == 1.0)
    disjoint = jnp.float32([never, 0.0, never, never])
    if alpha == 0.5:
        found = losses.divergence(sure, disjoint, alpha=alpha)
        np.testing.assert_allclose(found, math.log(2.0), rtol=1e-6)


def test_transformations_and_dtypes():
    draw = np.random.default_rng(0)
    student, teacher = (
        jax.nn.log_softmax(jnp.float32(draw.normal(size=(2, 3, 7)))) for _ in range(2)
    )
    for alpha in (0.0, 0.4, 1.0):
        wanted = losses.divergence(student, teacher, alpha=alpha)
        assert wanted.shape == (2, 3)
        jitted = jax.jit(lambda s, t, a=alpha: losses.divergence(s, t, alpha=a))
        np.testing.assert_allclose(jitted(student, teacher), wanted, rtol=1e-5)
        mapped = jax.vmap(lambda s, t, a=alpha: losses.divergence(s, t, alpha=a))
        np.testing.assert_allclose(mapped(student, teacher), wanted, rtol=1e-5)
        low = [x.astype("bfloat16") for x in (student, teacher)]
        found = losses.divergence(*low, alpha=alpha)
        assert found.dtype == "float32"
        wide = losses.divergence(*(x.astype("float32") for x in low), alpha=alpha)
        np.testing.assert_array_equal(found, wide)


def test_errors():
    one = jnp.zeros((2, 3))
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got"):
            losses.divergence(one, one, alpha=alpha)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\).* vocabulary"):
        losses.divergence(one, jnp.zeros((2, 4)), alpha=0.5)
