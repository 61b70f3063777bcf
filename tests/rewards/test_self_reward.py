"""The implicit reward: by hand, in float64, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import advantages, rewards

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SFT, BASE = np.log([0.5, 0.4, 0.8]), np.log([0.25, 0.5, 0.4])
POLICY_SFT, POLICY_BASE = (
    np.array([0.2, 0.5, 0.2, 0.1]),
    np.array([0.5, 0.3, 0.15, 0.05]),
)


def reward(sft, base, mask):
    with jax.enable_x64(True):
        found = rewards.self_reward(*map(jnp.asarray, (sft, base, mask)))
    assert found.rewards.dtype == found.token_rewards.dtype == "float64"
    return jax.tree.map(np.asarray, found)


def test_three_tokens_by_hand_and_the_end_token_counts():
    mask = np.array([True, True, True])
    total, tokens = reward(SFT, BASE, mask)
    np.testing.assert_allclose(tokens, np.log([2.0, 0.8, 2.0]), rtol=1e-12)
    np.testing.assert_allclose(tokens, [0.693147, -0.223144, 0.693147], atol=5e-7)
    assert float(total) == pytest.approx(1.1631508, abs=5e-8)
    # Without the end token it is another number: this is how the slip would show.
    without, _ = reward(SFT, BASE, np.array([True, True, False]))
    assert float(without) == pytest.approx(0.4700036, abs=5e-8)


def test_four_answers_of_one_token():
    sft, base = (np.log(p)[:, None] for p in (POLICY_SFT, POLICY_BASE))
    total, _ = reward(sft, base, np.ones((4, 1), bool))
    wanted = [-0.916291, 0.510826, 0.287682, 0.693147]
    np.testing.assert_allclose(total, wanted, atol=5e-7)
    # KL(sft, base), never negative, and minus KL(base, sft), never positive.
    assert POLICY_SFT @ total == pytest.approx(0.1990058, abs=5e-8)
    assert POLICY_BASE @ total == pytest.approx(-0.2270880, abs=5e-8)


def test_equal_models_reward_nothing():
    logps = np.log(np.random.default_rng(0).uniform(0.1, 1.0, (3, 5)))
    total, tokens = reward(logps, logps.copy(), np.ones((3, 5), bool))
    np.testing.assert_array_equal(total, 0.0)
    np.testing.assert_array_equal(tokens, 0.0)


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
def test_masked_tokens_change_nothing(rubbish):
    """Prompt on the left, padding on the right, in one model or in both."""
    draw = np.random.default_rng(1)
    sft, base = np.log(draw.uniform(0.1, 1.0, (2, 2, 4)))
    alone = reward(sft, base, np.ones((2, 4), bool))
    mask = np.zeros((2, 9), bool)
    mask[0, 1:5], mask[1, 5:] = True, True
    wide = [np.full((2, 9), rubbish) for _ in range(2)]
    for array, values in zip(wide, (sft, base), strict=True):
        array[mask] = values.ravel()
    found = reward(wide[0], wide[1], mask)
    np.testing.assert_allclose(found.rewards, alone.rewards, rtol=1e-14)
    np.testing.assert_array_equal(
        found.token_rewards[mask], alone.token_rewards.ravel()
    )
    np.testing.assert_array_equal(found.token_rewards[~mask], 0.0)


def test_half_precision_is_subtracted_in_float32_and_no_gradient_flows():
    sft, base = (jnp.asarray(x, jnp.bfloat16) for x in (SFT, BASE))
    found = rewards.self_reward(sft, base, jnp.ones(3, bool))
    assert found.rewards.dtype == "float32"
    gradient = jax.grad(
        lambda x: jnp.sum(jax.jit(rewards.self_reward)(x, x / 2.0, x < 0.0).rewards)
    )(jnp.asarray(SFT, jnp.float32))
    np.testing.assert_array_equal(gradient, 0.0)


def test_at_the_end_or_token_by_token():
    """The same return from the first token on, other credit later."""
    tokens = np.array([0.3, -0.1, 0.4, 0.6])
    at_end = np.array([0.0, 0.0, 0.0, tokens.sum()])
    with jax.enable_x64(True):
        found, _ = advantages.gae(
            jnp.asarray(np.stack([tokens, at_end])),
            jnp.zeros((2, 4)),
            jnp.ones((2, 4), bool),
            gamma=1.0,
            gae_lambda=1.0,
        )
    np.testing.assert_allclose(found[0], [1.2, 0.9, 1.0, 0.6], atol=1e-12)
    np.testing.assert_allclose(found[1], [1.2] * 4, atol=1e-12)


@pytest.mark.parametrize(
    ("found", "lengths", "words"),
    [
        ([0.1, 0.2], [3, 0], "answer 1 has no token that counts"),
        ([np.nan, 0.2], [3, 3], "answer 0 has a self-reward that is not finite"),
        ([-np.inf] * 7, [3] * 7, "answers 0, 1, 2, 3, 4 and 2 more have a self-reward"),
        ([0.1], [3, 3], r"one shape, got \(1,\) and \(2,\)"),
    ],
)
def test_rewards_that_cannot_be_trained_on_are_refused(found, lengths, words):
    with pytest.raises(ValueError, match=words):
        rewards.check_self_rewards(np.array(found), np.array(lengths))
    rewards.check_self_rewards(np.array([0.1, -0.2]), np.array([3, 1]))


@pytest.mark.parametrize(
    ("base", "mask", "words"),
    [(np.zeros(4), np.ones(3, bool), "shape"), (np.zeros(3), np.ones(3), "bool")],
)
def test_wrong_arrays_are_refused(base, mask, words):
    with pytest.raises(AssertionError, match=words):
        rewards.self_reward(jnp.zeros(3), jnp.asarray(base), jnp.asarray(mask))
