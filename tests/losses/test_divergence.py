"""Distillation divergences: worked values, the f-divergence form, limits and zeros."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import divergence as oracle
from oracles import support as support_oracle

from jaxpost import losses, ops

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


# What follows is of supports: some tokens and the rest.

TEACHER_LOGITS, STUDENT_LOGITS = [4.0, 3, 2, 1, 0, -1], [3.0, 3, 1, 1, 0, 0]


def support_of(logps, ids):
    """Of log-probabilities `[V]`."""
    ids = jnp.asarray(ids)
    rest = jnp.delete(logps, ids, assume_unique_indices=True)
    return ops.Support(ids, logps[ids], jax.nn.logsumexp(rest))


@pytest.mark.parametrize(
    ("rest", "value"),
    [
        ("bucket", None),
        ("renormalize", 0.1062892402),
        ("teacher", 0.2106587646),
    ],
)
def test_worked_values_of_the_three_most_likely(rest, value):
    with jax.enable_x64(True):
        teacher, student = (
            jax.nn.log_softmax(jnp.asarray(z)) for z in (TEACHER_LOGITS, STUDENT_LOGITS)
        )
        whole = losses.divergence(student, teacher, alpha=0.0)
        np.testing.assert_allclose(whole, 0.1219822228, rtol=0, atol=0.51e-10)
        three = (support_of(x, [0, 1, 2]) for x in (student, teacher))
        found = losses.support_divergence(*three, alpha=0.0, rest=rest)
    if value is None:
        assert 0.0 < float(found) < float(whole)
    else:
        np.testing.assert_allclose(found, value, rtol=0, atol=0.51e-10)


def test_worked_values_of_the_two_most_likely_and_a_tail():
    with jax.enable_x64(True):
        logps = [jnp.log(jnp.asarray(p)) for p in (STUDENT, TEACHER)]
        two = [support_of(x, [0, 1]) for x in logps]
        np.testing.assert_allclose(np.exp([x.tail for x in two]), [0.2, 0.3])
        bucket = losses.support_divergence(*two, alpha=1.0)
        normal = losses.support_divergence(*two, alpha=1.0, rest="renormalize")
    np.testing.assert_allclose(bucket, 0.2238047, rtol=0, atol=0.51e-7)
    np.testing.assert_allclose(normal, 0.2475906, rtol=0, atol=0.51e-6)


@pytest.mark.parametrize("rest", ["bucket", "renormalize", "teacher"])
def test_gradient_where_student_and_teacher_are_the_same(rest):
    """Zero, but where only the teacher is normalised on the support."""
    with jax.enable_x64(True):
        logits = jnp.asarray(TEACHER_LOGITS)
        teacher = support_of(jax.nn.log_softmax(logits), [0, 1, 2])

        def loss(z):
            student = support_of(jax.nn.log_softmax(z), [0, 1, 2])
            return losses.support_divergence(student, teacher, alpha=0.0, rest=rest)

        value, slope = jax.value_and_grad(loss)(logits)
    if rest == "teacher":
        np.testing.assert_allclose(value, 0.0485873516, rtol=0, atol=0.51e-10)
        wanted = [-0.03154963, -0.01160646, -0.00426978]
        wanted += [0.03154963, 0.01160646, 0.00426978]
        np.testing.assert_allclose(slope, wanted, rtol=0, atol=0.51e-8)
    else:
        np.testing.assert_allclose([value, *slope], 0.0, atol=1e-15)


@settings(max_examples=6, deadline=None)
@given(
    student=distributions,
    teacher=distributions,
    alpha=st.sampled_from((0.0, 0.3, 1.0)),
    k=st.sampled_from((2, 5)),
)
def test_supports_equal_the_oracle(student, teacher, alpha, k):
    """A bucket for the rest never adds to the divergence; the whole has none."""
    ids = np.argsort(-teacher)[:k]
    with jax.enable_x64(True):
        pair = [support_of(jnp.log(jnp.asarray(p)), ids) for p in (student, teacher)]
        for rest in ("bucket", "renormalize", "teacher"):
            if rest == "teacher" and alpha == 1.0:
                continue
            found = losses.support_divergence(*pair, alpha=alpha, rest=rest)
            plain = [support_oracle.support(np.log(p), ids) for p in (student, teacher)]
            wanted = support_oracle.support_divergence(*plain, alpha, rest)
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-13)
        bucket = float(losses.support_divergence(*pair, alpha=alpha))
    whole = oracle.divergence(student, teacher, alpha)
    assert bucket <= whole + 1e-12
    if k == 5:
        np.testing.assert_allclose(bucket, whole, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_temperature_is_that_of_the_logits(alpha):
    rng = np.random.default_rng(3)
    logits = [jnp.float32(rng.normal(size=(2, 6))) for _ in range(2)]
    logps = [jax.nn.log_softmax(z) for z in logits]
    found = losses.divergence(*logps, alpha=alpha, temperature=2.5)
    wanted = losses.divergence(
        *(jax.nn.log_softmax(z / 2.5) for z in logits), alpha=alpha
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert not np.allclose(found, losses.divergence(*logps, alpha=alpha), rtol=0.1)


def test_a_floored_teacher_is_a_teacher_too():
    """Ratios are clipped before, with the student taken as a constant (RESD)."""

    def loss(student, teacher):
        floor = jax.lax.stop_gradient(student) + math.log(0.2)
        clipped = jnp.maximum(teacher, floor)
        return losses.divergence(student, clipped, alpha=1.0)

    with jax.enable_x64(True):
        pair = [jnp.log(jnp.asarray(p)) for p in ([0.97, 0.03], [0.01, 0.99])]
        np.testing.assert_allclose(loss(*pair), 1.4562595, rtol=0, atol=0.51e-7)
        teacher = jnp.log(jnp.asarray([0.02, 0.08, 0.90]))
        value, slope = jax.value_and_grad(
            lambda z: loss(jax.nn.log_softmax(z), teacher)
        )(jnp.asarray([1.0, 0.2, -0.5]))
    np.testing.assert_allclose(value, 1.0331070, rtol=0, atol=0.51e-7)
    wanted = [0.3446009, 0.0479099, -0.3925108]
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=0.51e-7)


def test_errors_of_supports():
    pair = [support_of(jnp.zeros(4), [0, 1])] * 2
    with pytest.raises(ValueError, match="rest must be one of bucket, renormalize, te"):
        losses.support_divergence(*pair, alpha=0.5, rest="drop")
    with pytest.raises(ValueError, match="rest is 'teacher'.* choose a smaller alpha"):
        losses.support_divergence(*pair, alpha=1.0, rest="teacher")
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
        losses.support_divergence(*pair, alpha=2.0)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        losses.divergence(jnp.zeros(3), jnp.zeros(3), alpha=0.5, temperature=0.0)
