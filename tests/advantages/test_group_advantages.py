"""Advantages within a group of answers, and whitening over a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import policy as oracle

from jaxpost import advantages

pytestmark = pytest.mark.usefixtures("strict_dtypes")

seeds = st.integers(0, 10**6)


def some_rewards(seed, rows=5, answers=4):
    draw = np.random.default_rng(seed)
    mask = draw.random((rows, answers)) < 0.7
    mask[0], mask[1] = True, False
    mask[2] = np.arange(answers) == 1
    return draw.normal(size=(rows, answers)), mask


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([0, 1]), st.sampled_from([1e-6, 1e-2]))
def test_equal_the_oracles(seed, ddof, eps):
    rewards, mask = some_rewards(seed)
    with jax.enable_x64(True):
        arrays = jnp.asarray(rewards), jnp.asarray(mask)
        relative = advantages.group_relative(
            arrays[0], mask=arrays[1], eps=eps, ddof=ddof
        )
        left_out = advantages.leave_one_out(arrays[0], mask=arrays[1])
        whitened = advantages.whiten(*arrays, ddof=ddof, eps=eps)
    for found, wanted in (
        (relative, oracle.group_relative(rewards, mask, eps, ddof)),
        (left_out, oracle.leave_one_out(rewards, mask)),
        (whitened, oracle.whiten(rewards, mask, ddof, eps)),
    ):
        assert found.dtype == "float64"
        np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-12)


FUNCTIONS = {
    "group_relative": lambda r, mask: advantages.group_relative(r, mask=mask),
    "leave_one_out": lambda r, mask: advantages.leave_one_out(r, mask=mask),
    "whiten": advantages.whiten,
}
each = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@each
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_values_change_nothing(function, rubbish):
    rewards, mask = some_rewards(0)
    clean = function(jnp.asarray(rewards * mask), jnp.asarray(mask))
    dirty = function(jnp.asarray(np.where(mask, rewards, rubbish)), jnp.asarray(mask))
    np.testing.assert_array_equal(clean, dirty)
    np.testing.assert_array_equal(clean[~mask], 0.0)
    assert np.isfinite(clean).all()


@each
@pytest.mark.parametrize("reward", [0.1, -7.3e4, 1e-12])
@pytest.mark.parametrize("answers", [3, 7])
def test_equal_rewards_are_exactly_zero(function, reward, answers):
    """0.1 has no exact mean over 3; divided by eps, its rounding would be seen."""
    rewards = jnp.full((2, answers), reward)
    np.testing.assert_array_equal(function(rewards, jnp.ones((2, answers), bool)), 0.0)


@each
def test_nothing_left_is_zero(function):
    rewards = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    np.testing.assert_array_equal(function(rewards, jnp.zeros((2, 2), bool)), 0.0)


@each
def test_jit_equals_eager_and_no_gradient_flows(function):
    rewards, mask = map(jnp.asarray, some_rewards(1))
    eager = function(rewards, mask)
    np.testing.assert_allclose(eager, jax.jit(function)(rewards, mask), atol=1e-6)
    slopes = jax.grad(lambda r: jnp.sum(function(r, mask) ** 2))(rewards)
    np.testing.assert_array_equal(slopes, 0.0)


@each
def test_level_does_not_matter(function):
    rewards, mask = map(jnp.asarray, some_rewards(2))
    np.testing.assert_allclose(
        function(rewards, mask), function(rewards + 8.0, mask), atol=2e-5
    )


def test_whitened_moments():
    rewards, mask = map(jnp.asarray, some_rewards(3))
    found = np.asarray(advantages.whiten(rewards, mask))[np.asarray(mask)]
    np.testing.assert_allclose(found.mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(found.std(ddof=1), 1.0, rtol=1e-6)


def test_without_a_mask_every_answer_counts():
    rewards = jnp.array([[1.0, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(
        advantages.leave_one_out(rewards), [[2 / 3, -2 / 3, -2 / 3, 2 / 3]], rtol=1e-6
    )
    np.testing.assert_allclose(
        advantages.group_relative(rewards, ddof=0), [[1, -1, -1, 1]], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda r: advantages.group_relative(r[:, :1]), ValueError, "group of one"),
        (lambda r: advantages.leave_one_out(r[:, :1]), ValueError, "group of one"),
        (lambda r: advantages.group_relative(r, eps=-1.0), ValueError, "eps must not"),
        (lambda r: advantages.group_relative(r, ddof=-1), ValueError, "ddof must not"),
        (lambda r: advantages.group_relative(r[0]), AssertionError, "rank"),
        (lambda r: advantages.leave_one_out(r, mask=r), AssertionError, "bool"),
        (
            lambda r: advantages.group_relative(r, mask=r[:1] > 0),
            AssertionError,
            "shape",
        ),
        (lambda r: advantages.whiten(r, r), AssertionError, "bool"),
        (lambda r: advantages.whiten(r, r > 0, eps=0.0), ValueError, "eps must be"),
        (lambda r: advantages.whiten(r, r > 0, ddof=-1), ValueError, "ddof must not"),
    ],
)
def test_wrong_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(jnp.asarray(some_rewards(0)[0]))
