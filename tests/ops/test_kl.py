"""The estimators' values and gradients, by enumerating a tiny vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import ops

pytestmark = pytest.mark.usefixtures("strict_dtypes")

LOGITS = jnp.array([0.3, -1.2, 2.0, 0.1])
REF_LOGITS = jnp.array([-0.4, 0.9, 1.0, 0.2])


def divergence(logits, ref_logits):
    policy, ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
    return jnp.sum(jnp.exp(policy) * (policy - ref))


def expected(kind, logits, sampling_logits):
    """Mean of the estimator over tokens drawn from `sampling_logits`."""
    values = ops.kl_estimate(
        jax.nn.log_softmax(logits), jax.nn.log_softmax(REF_LOGITS), kind=kind
    )
    return jnp.sum(jax.nn.softmax(sampling_logits) * values)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind):
    found = expected(kind, LOGITS, LOGITS)
    np.testing.assert_allclose(found, divergence(LOGITS, REF_LOGITS), rtol=1e-5)


def test_sign_is_policy_against_reference():
    logps, ref_logps = jnp.array([-1.0]), jnp.array([-3.0])
    assert ops.kl_estimate(logps, ref_logps, kind="k1")[0] == 2.0
    assert ops.kl_estimate(logps, ref_logps, kind="k2")[0] == 2.0
    np.testing.assert_allclose(
        ops.kl_estimate(logps, ref_logps, kind="k3")[0], np.exp(-2.0) - 1.0 + 2.0
    )


def test_expected_gradients_on_policy():
    def gradient(kind):
        return jax.grad(lambda x: expected(kind, x, jax.lax.stop_gradient(LOGITS)))(
            LOGITS
        )

    forward = jax.grad(divergence)(LOGITS, REF_LOGITS)
    backward = jax.grad(divergence, argnums=1)(REF_LOGITS, LOGITS)
    np.testing.assert_allclose(gradient("k1"), 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient("k2"), forward, atol=1e-6)
    np.testing.assert_allclose(gradient("k3"), backward, atol=1e-6)
    assert float(jnp.max(jnp.abs(forward - backward))) > 0.05  # the test can tell


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_zero_for_equal_policies_and_bounds(kind):
    same = jnp.array([-0.5, -2.0], jnp.bfloat16)
    value = ops.kl_estimate(same, same, kind=kind)
    np.testing.assert_array_equal(value, 0.0)
    assert value.dtype == jnp.float32
    if kind != "k1":
        logps = jnp.linspace(-9.0, -0.1, 50)
        assert bool(jnp.all(ops.kl_estimate(logps, logps[::-1], kind=kind) >= 0.0))


def test_k3_keeps_precision_for_close_policies():
    close = ops.kl_estimate(jnp.array([1e-4]), jnp.array([0.0]), kind="k3")
    # exp(-d) - 1 + d in float32 would be off by 10 times the value.
    np.testing.assert_allclose(close, 0.5e-8, rtol=5e-3)


def test_errors():
    with pytest.raises(ValueError, match="kind must be one of k1, k2, k3, got 'k4'"):
        ops.kl_estimate(LOGITS, REF_LOGITS, kind="k4")
    with pytest.raises(ValueError, match="must have one shape"):
        ops.kl_estimate(LOGITS, REF_LOGITS[:2], kind="k1")
