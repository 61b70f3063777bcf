"""Where Self-Rewarding PPO ends, on a policy over four answers that can be listed.

The optimum of `E[r] - beta KL(pi, ref)` is `ref (sft / base)^(1 / beta)`, normalised.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost import advantages, losses, rewards

BASE, SFT = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 0.5, 0.2, 0.1])
BEYOND = [0.057971, 0.603865, 0.193237, 0.144928]
ROUNDS, EPOCHS = 150, 4


def optimum(reference, beta):
    weights = reference * (SFT / BASE) ** (1.0 / beta)
    return weights / weights.sum()


def ppo(reference, beta, *, samples=None, rounds=ROUNDS, start=SFT):
    """The policy's probabilities after PPO on answers of one token, and the value.

    Each round weighs the four answers with their probability under the policy at its
    start, or with their share in `samples` draws; reward, advantages and both losses
    are the library's.
    """
    one = jnp.ones((4, 1), bool)
    given = rewards.self_reward(jnp.log(SFT)[:, None], jnp.log(BASE)[:, None], one)
    tx = optax.adam(optax.cosine_decay_schedule(0.05, rounds * EPOCHS, 0.01))
    params = {"logits": jnp.log(jnp.asarray(start)), "value": jnp.zeros(())}

    def round_of(carry, key):
        params, opt_state = carry
        old = jax.nn.log_softmax(params["logits"])[:, None]
        weights = jnp.exp(old[:, 0])
        if samples is not None:
            drawn = jax.random.categorical(key, old[:, 0], shape=(samples,))
            weights = jnp.bincount(drawn, length=4) / samples
        reward = given.token_rewards
        if beta:
            reward = reward - beta * (old - jnp.log(jnp.asarray(reference))[:, None])
        old_values = jnp.full((4, 1), params["value"])
        gains, returns = advantages.gae(
            reward, old_values, one, gamma=1.0, gae_lambda=0.95
        )

        def loss(params):
            logps = jax.nn.log_softmax(params["logits"])[:, None]
            policy = losses.clipped_policy(
                logps, old, gains, one, clip_low=0.2, clip_high=0.2
            )
            values = jnp.full((4, 1), params["value"])
            error, _ = losses.clipped_value(values, old_values, returns, one, clip=None)
            return jnp.sum(weights[:, None] * (policy.values + error))

        def update(carry, _):
            params, opt_state = carry
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(update, (params, opt_state), length=EPOCHS)

    keys = jax.random.split(jax.random.key(0), rounds)
    run = jax.jit(functools.partial(jax.lax.scan, round_of))
    (params, _), _ = run((params, tx.init(params)), keys)
    return np.asarray(jax.nn.softmax(params["logits"])), float(params["value"])


def distance(one, two):
    """Total variation."""
    return 0.5 * np.abs(np.asarray(one) - np.asarray(two)).sum()


def test_the_formula_gives_the_distributions_of_the_table():
    np.testing.assert_allclose(optimum(BASE, 1.0), SFT, rtol=1e-12)
    np.testing.assert_allclose(optimum(SFT, 1.0), BEYOND, atol=5e-7)


@pytest.mark.parametrize(
    ("reference", "beta", "start", "samples"),
    [
        (BASE, 1.0, BASE, None),
        pytest.param(BASE, 1.0, [0.25] * 4, 2048, marks=pytest.mark.slow),
        (SFT, 1.0, SFT, None),
        (SFT, 1.0, SFT, 2048),
        pytest.param(SFT, 2.0, SFT, None, marks=pytest.mark.slow),
    ],
    ids=["base", "base-sampled", "sft", "sft-sampled", "sft-held-tighter"],
)
def test_ppo_ends_where_the_formula_says(reference, beta, start, samples):
    wanted = optimum(reference, beta)
    assert distance(start, wanted) > 0.04  # it has some way to go
    found, value = ppo(reference, beta, samples=samples, start=start)
    assert distance(found, wanted) <= 0.02
    # The value learns the expected reward, that of the KL included: at the optimum
    # every answer has the same, beta times the logarithm of the sum of weights.
    level = beta * np.log(np.sum(reference * (SFT / BASE) ** (1.0 / beta)))
    assert value == pytest.approx(level, abs=0.03)


def test_with_the_base_as_reference_the_fine_tuned_model_does_not_move():
    found, _ = ppo(BASE, 1.0, start=SFT)
    assert distance(found, SFT) <= 0.002


def test_without_a_reference_one_answer_is_left():
    """That with the largest ratio, which the fine-tuned model gives 0.1 only."""
    found, _ = ppo(None, 0.0, rounds=2 * ROUNDS)
    assert found[3] > 0.95
    assert np.argmax(SFT) != 3
