"""Expected gradients of policy losses, by enumerating every answer of a tiny policy.

The policy is a table: one row of logits for each prefix. An answer ends with token 0 or
after three tokens, so there are fifteen. Each expectation below is a sum over them,
in float64, and is compared with the gradient of the expected reward itself.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import advantages, losses, ops

pytestmark = pytest.mark.usefixtures("strict_dtypes")

VOCAB, LONGEST = 3, 3
PREFIXES = [p for n in range(LONGEST) for p in itertools.product((1, 2), repeat=n)]
ANSWERS = [
    (*p, token)
    for p in PREFIXES
    for token in range(VOCAB)
    if token == 0 or len(p) + 1 == LONGEST
]
COUNT = len(ANSWERS)


def table(fill):
    """`[answers, LONGEST]`: of each token `fill(prefix, token)`, -1 where none is."""
    rows = np.full((COUNT, LONGEST), -1)
    for row, answer in enumerate(ANSWERS):
        for t, token in enumerate(answer):
            rows[row, t] = fill(answer[:t], token)
    return rows


STATES = table(lambda prefix, _: PREFIXES.index(prefix))
TOKENS = table(lambda _, token: token)
MASK = TOKENS >= 0
LAST = MASK & ~np.pad(MASK[:, 1:], ((0, 0), (0, 1)))
IDS = np.where(MASK, 0, -1)  # one answer a row

DRAW = np.random.default_rng(0)
LOGITS, REF_LOGITS, OTHER_LOGITS = DRAW.normal(size=(3, len(PREFIXES), VOCAB))
REWARDS = DRAW.normal(size=COUNT) + 2.0
WRONG_VALUES = DRAW.normal(size=len(PREFIXES))  # of a value function of the prefix


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@jax.jit
def token_logps(logits):
    """`[answers, LONGEST]`, zero where there is no token."""
    table = jax.nn.log_softmax(jnp.asarray(logits), axis=-1)
    return jnp.where(MASK, table[STATES, TOKENS], 0.0)


@jax.jit
def chances(logits):
    """Probability of each answer."""
    return jnp.exp(jnp.sum(token_logps(logits), axis=1))


@jax.jit
def expected_reward(logits, rewards=REWARDS):
    return jnp.sum(chances(logits) * rewards)


gradient_of_expected_reward = jax.jit(jax.grad(expected_reward))


def exact_gradient(rewards=REWARDS):
    return np.asarray(gradient_of_expected_reward(LOGITS, rewards))


def state_values(logits, rewards=REWARDS):
    """Expected reward from each prefix on, a value function that is right."""
    chance = np.asarray(chances(logits))
    through = np.zeros((len(PREFIXES), COUNT))
    for row, states in enumerate(STATES):
        through[states[states >= 0], row] = 1.0
    return (through @ (chance * rewards)) / (through @ chance)


@jax.jit
@jax.grad
def loss_gradient(logits, old, gains, weights):
    values = losses.clipped_policy(
        token_logps(logits), old, gains, jnp.asarray(MASK), clip_low=0.2, clip_high=0.2
    ).values
    return jnp.sum(values * weights)


def expected_loss_gradient(
    gains, weights: jax.typing.ArrayLike = 1.0, sampling_logits=LOGITS
):
    """Of `clipped_policy` at ratio 1.

    Args:
        gains: advantages of the tokens, `[answers, LONGEST]`.
        weights: factors of the tokens' values, same shape.
        sampling_logits: of the policy that answers.
    """
    chance = np.asarray(chances(sampling_logits))[:, None]
    weights = np.broadcast_to(chance * np.asarray(weights), MASK.shape)
    found = loss_gradient(LOGITS, token_logps(LOGITS), np.asarray(gains), weights)
    return np.asarray(found)


def over_tokens(per_row):
    return np.broadcast_to(np.asarray(per_row)[:, None], MASK.shape)


def test_there_is_something_to_enumerate():
    assert COUNT == 15
    np.testing.assert_allclose(jnp.sum(chances(LOGITS)), 1.0, rtol=1e-12)


def test_the_exact_gradient_is_that_of_finite_differences():
    step, found, value = 1e-5, exact_gradient(), expected_reward
    for place in np.ndindex(LOGITS.shape):
        nudge = np.zeros_like(LOGITS)
        nudge[place] = step
        slope = value(LOGITS + nudge) - value(LOGITS - nudge)
        np.testing.assert_allclose(found[place], slope / (2 * step), atol=1e-9)


@functools.partial(jax.jit, static_argnums=2)
def estimate(rewards, values, gae_lambda):
    return advantages.gae(
        rewards,
        values,
        jnp.asarray(MASK),
        terminals=jnp.asarray(LAST),
        gamma=1.0,
        gae_lambda=gae_lambda,
    )[0]


def gae(values, *, gae_lambda, rewards=None):
    """Of the answers' rewards at their last tokens, with values by prefix."""
    if rewards is None:
        rewards = np.where(LAST, REWARDS[:, None], 0.0)
    return estimate(rewards, np.asarray(values)[STATES], gae_lambda)


def exact_advantages():
    """`Q(prefix, token) - V(prefix)`: the value of the next prefix, or the reward."""
    values = np.asarray(state_values(LOGITS))
    following = np.pad(values[STATES[:, 1:]], ((0, 0), (0, 1)))
    return np.where(LAST, REWARDS[:, None], following) - values[STATES]


@pytest.mark.parametrize(
    "gains",
    [
        pytest.param(lambda: over_tokens(REWARDS), id="rewards"),
        pytest.param(exact_advantages, id="exact"),
        pytest.param(lambda: gae(WRONG_VALUES, gae_lambda=1.0), id="gae-1"),
        pytest.param(lambda: gae(state_values(LOGITS), gae_lambda=0.6), id="gae-0.6"),
    ],
)
def test_expected_gradient_is_the_policy_gradient(gains):
    """GAE with lambda 1 whatever the values are; with less if they are right."""
    found = expected_loss_gradient(gains())
    np.testing.assert_allclose(found, -exact_gradient(), rtol=1e-10, atol=1e-12)


def test_gae_below_one_trusts_the_values():
    off = expected_loss_gradient(gae(WRONG_VALUES, gae_lambda=0.6)) + exact_gradient()
    assert np.max(np.abs(off)) > 0.05


def group_gradient(compare):
    """Expected gradient over all groups of two independent answers."""
    pairs = np.array(list(itertools.product(range(COUNT), repeat=2)))
    chance = np.asarray(chances(LOGITS))
    gains = np.asarray(jax.jit(compare)(REWARDS[pairs]))
    # Of each answer, what it gains on average over the answers beside it.
    mean = np.zeros(COUNT)
    np.add.at(mean, pairs, np.prod(chance[pairs], axis=1)[:, None] * gains / 2.0)
    return expected_loss_gradient(over_tokens(mean / chance))


def test_leave_one_out_is_the_policy_gradient_and_group_relative_is_not():
    found = group_gradient(advantages.leave_one_out)
    np.testing.assert_allclose(found, -exact_gradient(), rtol=1e-10, atol=1e-12)
    other = np.ravel(group_gradient(advantages.group_relative))
    exact = np.ravel(-exact_gradient())
    cosine = other @ exact / np.linalg.norm(other) / np.linalg.norm(exact)
    assert 0.2 < cosine < 0.99  # nor a multiple of it


@pytest.mark.parametrize("divide_by", ["constant", "sequence"])
def test_only_dividing_by_a_constant_keeps_the_direction(divide_by):
    """Each answer by its own length is the gradient of another expectation."""
    weights, _ = losses.token_weights(
        jnp.asarray(IDS),
        1,
        divide_by=divide_by,
        max_tokens=LONGEST if divide_by == "constant" else None,
        dtype=jnp.float64,
    )
    found = expected_loss_gradient(over_tokens(REWARDS), weights) * LONGEST
    if divide_by == "constant":
        np.testing.assert_allclose(found, -exact_gradient(), rtol=1e-10, atol=1e-12)
    else:
        lengths = MASK.sum(axis=1)

        # The same as if rewards had been divided by the lengths.
        wanted = -exact_gradient(REWARDS / lengths) * LONGEST
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
        assert np.max(np.abs(wanted + exact_gradient())) > 0.1


def sums(values):
    return ops.answer_sums(values, jnp.asarray(IDS), 1)


@jax.jit
def sequence_loss(logits, old_logits):
    """GSPO: one ratio for each answer, that of its mean log-probability."""
    lengths = sums(jnp.ones(MASK.shape))
    return losses.clipped_policy(
        ops.ratio(sums(token_logps(logits)), lengths),
        ops.ratio(sums(token_logps(old_logits)), lengths),
        jnp.asarray(REWARDS)[:, None],
        lengths > 0.0,
        clip_low=0.2,
        clip_high=0.2,
    )


def test_sequence_ratio_is_the_geometric_mean_of_the_tokens():
    found = sequence_loss(LOGITS, OTHER_LOGITS).metrics["val/ratio"][:, 0]
    for row, answer in enumerate(ANSWERS):
        now, old = (np.asarray(token_logps(x))[row] for x in (LOGITS, OTHER_LOGITS))
        ratios = np.exp(now - old)[: len(answer)]
        wanted = np.prod(ratios) ** (1.0 / len(answer))
        np.testing.assert_allclose(found[row], wanted, rtol=1e-12)


def test_sequence_ratio_at_one_is_the_mean_over_each_answers_tokens():
    chance = chances(LOGITS)[:, None]

    def loss(logits):
        return jnp.sum(chance * sequence_loss(logits, LOGITS).values)

    found = jax.jit(jax.grad(loss))(jnp.asarray(LOGITS))
    wanted = -exact_gradient(REWARDS / MASK.sum(axis=1))
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_whole_answers_weights_correct_for_another_sampler():
    """One weight per answer is exact; one per token leaves out the prefix's part."""

    def corrected(weights):
        return expected_loss_gradient(
            over_tokens(REWARDS), weights, sampling_logits=OTHER_LOGITS
        )

    logps, sampling = token_logps(LOGITS), token_logps(OTHER_LOGITS)
    whole, _ = losses.importance_weights(
        sums(logps), sums(sampling), jnp.ones((COUNT, 1), bool), cap=jnp.inf
    )
    found = corrected(over_tokens(whole[:, 0]))
    np.testing.assert_allclose(found, -exact_gradient(), rtol=1e-10, atol=1e-12)
    tokens, _ = losses.importance_weights(
        logps, sampling, jnp.asarray(MASK), cap=jnp.inf
    )
    for other in (tokens, jnp.ones(MASK.shape)):
        assert np.max(np.abs(corrected(other) + exact_gradient())) > 0.05


def divergence(logits, ref_logits):
    """`KL(policy || ref)` of whole answers."""
    now, ref = (jnp.sum(token_logps(x), axis=1) for x in (logits, ref_logits))
    return jnp.sum(jnp.exp(now) * (now - ref))


forward_gradient = jax.jit(jax.grad(divergence))
backward_gradient = jax.jit(jax.grad(lambda x, y: divergence(y, x)))


def visits():
    """How often each prefix is met."""
    chance = np.asarray(chances(LOGITS))
    there = [np.any(n == STATES, axis=1) for n in range(len(PREFIXES))]
    return np.array([chance[rows].sum() for rows in there])


@jax.jit
@jax.grad
def token_divergence_gradient(logits, ref_logits, visited):
    """Of the tokens' divergences, each prefix met as often as `visited` says."""
    now, ref = (jax.nn.log_softmax(x, axis=-1) for x in (logits, ref_logits))
    return jnp.sum(visited[:, None] * jnp.exp(now) * (now - ref))


def kl_gradient(kind, whole):
    """Expected gradient of an estimate in the loss, of tokens or of whole answers."""
    chance = np.asarray(chances(LOGITS))[:, None]
    ref = token_logps(REF_LOGITS)

    def loss(logits):
        logps = token_logps(logits)
        pair = (sums(logps), sums(ref)) if whole else (logps, ref)
        return jnp.sum(chance * ops.kl_estimate(*pair, kind=kind))

    return jax.jit(jax.grad(loss))(LOGITS)


def test_k1_in_the_loss_does_nothing():
    for whole in (True, False):
        np.testing.assert_allclose(kl_gradient("k1", whole), 0.0, atol=1e-12)


def test_kl_of_whole_answers_in_the_loss():
    """k2 has the gradient of the divergence, k3 that of the other direction."""
    forward = forward_gradient(LOGITS, REF_LOGITS)
    backward = backward_gradient(LOGITS, REF_LOGITS)
    np.testing.assert_allclose(kl_gradient("k2", True), forward, atol=1e-12)
    np.testing.assert_allclose(kl_gradient("k3", True), backward, atol=1e-12)
    assert np.max(np.abs(forward - backward)) > 0.05


def test_kl_of_tokens_in_the_loss_does_not_see_what_follows():
    """Each token's divergence, as if its prefix came from elsewhere."""
    forward = token_divergence_gradient(LOGITS, REF_LOGITS, visits())
    np.testing.assert_allclose(kl_gradient("k2", False), forward, atol=1e-12)
    assert np.max(np.abs(forward - forward_gradient(LOGITS, REF_LOGITS))) > 0.05
    # k3: the other direction, prefixes still those that the policy meets.
    now, ref = (np.exp(x) / np.exp(x).sum(-1)[:, None] for x in (LOGITS, REF_LOGITS))
    wanted = visits()[:, None] * (now - ref)
    np.testing.assert_allclose(kl_gradient("k3", False), wanted, atol=1e-12)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_k1_in_the_reward_is_the_whole_divergence(beta):
    """Through GAE with lambda 1, or as one reward of the whole answer."""
    difference = np.asarray(token_logps(LOGITS) - token_logps(REF_LOGITS))
    rewards = np.where(LAST, REWARDS[:, None], 0.0) - beta * difference
    wanted = beta * forward_gradient(LOGITS, REF_LOGITS) - exact_gradient()
    by_token = gae(WRONG_VALUES, gae_lambda=1.0, rewards=rewards)
    for gains in (by_token, over_tokens(rewards.sum(axis=1))):
        found = expected_loss_gradient(gains)
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
