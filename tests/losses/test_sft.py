import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import losses, ops

pytestmark = pytest.mark.usefixtures("strict_dtypes")

RNG = np.random.default_rng(0)
LOGPS = -RNG.exponential(size=(3, 5))
MASK = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool)


def mean_loss(logps, mask):
    values, weights = losses.sft(logps, mask)
    return ops.ratio(jnp.sum(values), jnp.sum(weights))


def test_equals_loop():
    total, count = 0.0, 0
    for b in range(3):
        for t in range(5):
            if MASK[b, t]:
                total, count = total - LOGPS[b, t], count + 1
    found = jax.jit(mean_loss)(jnp.float32(LOGPS), jnp.asarray(MASK))
    np.testing.assert_allclose(found, total / count, rtol=1e-5)


def test_gradient_is_minus_weight_and_masked_nan_changes_nothing():
    dirty = jnp.float32(np.where(MASK, LOGPS, np.nan))
    values, weights = losses.sft(dirty, jnp.asarray(MASK))
    np.testing.assert_array_equal(values[~MASK], 0.0)
    np.testing.assert_array_equal(weights, MASK)
    gradient = jax.grad(mean_loss)(dirty, jnp.asarray(MASK))
    np.testing.assert_allclose(gradient, -MASK.astype(float) / MASK.sum(), rtol=1e-6)


def test_whole_batch_equals_microbatches():
    whole = losses.sft(jnp.float32(LOGPS), jnp.asarray(MASK))
    parts = [
        losses.sft(jnp.float32(LOGPS[b : b + 1]), jnp.asarray(MASK[b : b + 1]))
        for b in range(3)
    ]
    for i in range(2):
        np.testing.assert_array_equal(whole[i], jnp.concatenate([p[i] for p in parts]))


def test_dtypes_are_float32_at_least():
    for given, wanted in (("bfloat16", "float32"), ("float32", "float32")):
        values, weights = losses.sft(jnp.asarray(LOGPS, given), jnp.asarray(MASK))
        assert values.dtype == weights.dtype == wanted
    with jax.enable_x64(True):
        values, weights = losses.sft(jnp.asarray(LOGPS), jnp.asarray(MASK))
        assert values.dtype == weights.dtype == "float64"


def test_loss_and_accuracy_from_hidden_states():
    """The whole chain: shift, chunked log-probs, loss; against its plain form."""
    hidden = jnp.float32(RNG.normal(size=(3, 5, 4)))
    weight = jnp.float32(RNG.normal(size=(4, 7)))
    tokens = jnp.asarray(RNG.integers(0, 7, (3, 5)), jnp.int32)

    def chunked(hidden, weight):
        targets, mask = ops.shift_targets(tokens, jnp.asarray(MASK))
        stats = ops.linear_token_logps(
            hidden, weight, targets, grad_weights=mask, chunk_size=4, with_top1=True
        )
        assert stats.top1 is not None
        return mean_loss(stats.logps, mask), ops.masked_mean(stats.top1, mask)

    def plain(hidden, weight):
        scores = hidden[:, :-1] @ weight
        mask = MASK[:, 1:].astype(np.float32)
        logps = jax.nn.log_softmax(scores)
        chosen = jnp.take_along_axis(logps, tokens[:, 1:, None], -1)[..., 0]
        hits = (jnp.argmax(scores, -1) == tokens[:, 1:]).astype(np.float32)
        return -jnp.sum(chosen * mask) / mask.sum(), jnp.sum(hits * mask) / mask.sum()

    found, wanted = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, weight)
        for f in (chunked, plain)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found,
        wanted,
    )


def test_errors():
    with pytest.raises(AssertionError, match="shape"):
        losses.sft(jnp.ones((2, 3)), jnp.ones((2, 2), bool))
    with pytest.raises(AssertionError, match="type"):
        losses.sft(jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(AssertionError, match="rank"):
        losses.sft(jnp.ones(3), jnp.ones(3, bool))
