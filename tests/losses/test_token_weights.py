"""What a policy loss is divided by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import policy as oracle

from jaxpost import losses

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, W, A, MOST = 4, 12, 3, 7
DIVISIONS = ("token", "sequence", "group", "constant")
seeds = st.integers(0, 10**6)


def some(seed):
    draw = np.random.default_rng(seed)
    ids = draw.integers(-1, A, (B, W))
    ids[0][ids[0] == 1] = -1  # an answer without tokens
    ids[1] = -1  # a row without any
    return draw.normal(size=(B, W)), ids


def eager_weigh(ids, divide_by, dtype=jnp.float32):
    most = MOST if divide_by == "constant" else None
    return losses.token_weights(
        ids, A, divide_by=divide_by, max_tokens=most, dtype=dtype
    )


jitted_weigh = jax.jit(eager_weigh, static_argnames=("divide_by", "dtype"))


def weigh(ids, divide_by, dtype=jnp.float32):
    return jax.tree.map(np.asarray, jitted_weigh(ids, divide_by, dtype))


def loss_of(values, ids, divide_by):
    weights, count = weigh(ids, divide_by, jnp.float64)
    return np.sum(values * weights) / count


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from(DIVISIONS))
def test_loss_equals_the_oracle(seed, divide_by):
    values, ids = some(seed)
    with jax.enable_x64(True):
        found = loss_of(values, ids, divide_by)
    assert found.dtype == "float64"
    wanted = oracle.divided_loss(values, ids, A, divide_by, MOST)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("divide_by", DIVISIONS)
def test_by_hand(divide_by):
    """Two rows: answers of 1 and 3 tokens, and one of 2 tokens."""
    ids = np.array([[-1, 0, 1, 1, 1, -1], [-1, -1, 0, 0, -1, -1]])
    weights, count = weigh(ids, divide_by)
    own, wanted_count = {
        "token": ([[1, 1, 1, 1], [1, 1]], 6),
        "sequence": ([[1, 1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 2]], 3),
        "group": ([[1 / 4] * 4, [1 / 2] * 2], 2),
        "constant": ([[1 / 7] * 4, [1 / 7] * 2], 3),
    }[divide_by]
    wanted = np.zeros(ids.shape)
    wanted[ids >= 0] = np.concatenate(own)
    np.testing.assert_allclose(weights, wanted, rtol=1e-6)
    assert count == wanted_count
    assert weights.dtype == count.dtype == "float32"


@settings(max_examples=8, deadline=None)
@given(seeds, st.sampled_from([1, 3]))
def test_with_equal_lengths_they_agree_up_to_scale(seed, length):
    values = np.random.default_rng(seed).normal(size=(B, A * length + 1))
    ids = np.broadcast_to(np.r_[-1, np.repeat(np.arange(A), length)], values.shape)
    with jax.enable_x64(True):
        found = {kind: float(loss_of(values, ids, kind)) for kind in DIVISIONS}
    np.testing.assert_allclose(found["sequence"], found["token"], rtol=1e-10)
    np.testing.assert_allclose(found["group"], found["token"], rtol=1e-10)
    np.testing.assert_allclose(
        found["constant"], found["token"] * length / MOST, rtol=1e-10
    )


@settings(max_examples=10, deadline=None)
@given(seeds, st.sampled_from(DIVISIONS))
def test_sums_of_microbatches_are_those_of_the_whole(seed, divide_by):
    values, ids = some(seed)

    def sums(rows):
        weights, count = weigh(ids[rows], divide_by)
        return np.array([np.sum(values[rows] * weights), count])

    parts = sums(slice(2)) + sums(slice(2, None))
    np.testing.assert_allclose(parts, sums(slice(None)), rtol=1e-5, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_what_each_makes_equal(seed):
    """Sums of weights: 1 per token, answer or row; in proportion to the length."""
    _, ids = some(seed)
    lengths = oracle.answer_sums(np.ones((B, W)), ids, A)

    def sums(kind):
        return oracle.answer_sums(weigh(ids, kind)[0], ids, A)

    np.testing.assert_allclose(sums("token"), lengths)
    np.testing.assert_allclose(sums("sequence"), lengths > 0, rtol=1e-6)
    np.testing.assert_allclose(sums("constant"), lengths / MOST, rtol=1e-6)
    rows = lengths.sum(axis=1) > 0
    np.testing.assert_allclose(sums("group").sum(axis=1), rows, rtol=1e-6)


@pytest.mark.parametrize("divide_by", DIVISIONS)
def test_nothing_to_train_on_weighs_nothing(divide_by):
    weights, count = weigh(np.full((B, W), -1), divide_by)
    np.testing.assert_array_equal(weights, 0.0)
    assert count == 0.0


@pytest.mark.parametrize("divide_by", ["group", "constant"])
def test_jit_equals_eager(divide_by):
    ids = jnp.asarray(some(2)[1])
    found = eager_weigh(ids, divide_by)
    for one, other in zip(found, weigh(ids, divide_by), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"divide_by": "mean"}, "one of token, sequence, group, constant, got 'mean'"),
        ({"divide_by": "constant"}, "needs max_tokens.*got None"),
        ({"divide_by": "constant", "max_tokens": 0}, "at least 1; got 0"),
        ({"divide_by": "token", "max_tokens": 9}, "nothing is divided by it"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        losses.token_weights(jnp.zeros((1, 2), jnp.int32), A, **settings)


def test_ids_must_be_integers():
    with pytest.raises(AssertionError, match="int"):
        losses.token_weights(jnp.zeros((1, 2)), A, divide_by="token")
