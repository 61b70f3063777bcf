import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import logps as oracle

from jaxpost import ops
from jaxpost.typing import Head

pytestmark = pytest.mark.usefixtures("strict_dtypes")

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 3, 4))
WEIGHT = RNG.normal(size=(4, 7))
BIAS = RNG.normal(size=7)
TARGETS = RNG.integers(0, 7, (2, 3)).astype(np.int32)


def test_logits_of_a_full_head_equal_the_oracle():
    head = Head(jnp.float32(WEIGHT), jnp.float32(BIAS), softcap=2.0, scale=1.5)
    found = ops.logits(jnp.float32(HIDDEN), head)
    for b in range(2):
        for t in range(3):
            wanted = oracle.head_logits(HIDDEN[b, t], WEIGHT, BIAS, 2.0, 1.5)
            np.testing.assert_allclose(found[b, t], wanted, rtol=1e-5, atol=1e-5)


def test_token_logps_and_entropy_equal_the_oracle():
    scores = ops.logits(jnp.float32(HIDDEN), jnp.float32(WEIGHT))
    logps, entropy, _ = oracle.token_stats(HIDDEN, WEIGHT, TARGETS)
    found = ops.token_logps(scores, jnp.asarray(TARGETS))
    np.testing.assert_allclose(found, logps, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ops.entropy(scores), entropy, rtol=1e-5, atol=1e-5)


def test_gradients_are_right():
    scores = ops.logits(jnp.float32(HIDDEN), jnp.float32(WEIGHT))
    chex.assert_numerical_grads(ops.entropy, (scores,), order=1, atol=1e-2, rtol=1e-2)
    one_hot = jax.nn.one_hot(TARGETS, 7)
    found = jax.grad(lambda x: jnp.sum(ops.token_logps(x, jnp.asarray(TARGETS))))(
        scores
    )
    np.testing.assert_allclose(found, one_hot - jax.nn.softmax(scores), atol=1e-6)


def test_entropy_of_removed_tokens():
    scores = jnp.array([0.0, -jnp.inf, 0.0])
    np.testing.assert_allclose(ops.entropy(scores), np.log(2.0), rtol=1e-6)
    gradient = jax.grad(ops.entropy)(scores)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


@pytest.mark.slow
def test_bfloat16_products_are_summed_in_float32():
    hidden, weight = (
        jnp.ones((1, 4096), jnp.bfloat16),
        jnp.ones((4096, 2), jnp.bfloat16),
    )
    found = ops.logits(hidden, weight)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, 4096.0)  # a bfloat16 sum would stop at 256
    assert ops.token_logps(found.astype(jnp.bfloat16), jnp.zeros(1, int)).dtype == "f4"


def test_errors():
    with pytest.raises(ValueError, match=r"hidden must be \[..., D\]"):
        ops.logits(jnp.ones((2, 3)), jnp.ones((4, 5)))
    with pytest.raises(ValueError, match=r"bias must be \[V\]"):
        ops.logits(jnp.ones((2, 3)), Head(jnp.ones((3, 5)), jnp.ones(4)))
    with pytest.raises(AssertionError, match="shape"):
        ops.token_logps(jnp.ones((2, 3, 5)), jnp.ones((2, 2), int))
