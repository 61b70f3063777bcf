"""PPO on a continuous control task, the whole training one compiled program.

Each iteration plays whole episodes, all cut off (not ended) at the same step, so the
value of the last observation is the bootstrap. The reward is a function of observation
and torque: the environment's own, or a learned one.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpost import advantages, losses
from jaxpost.recipes._control_pendulum import (
    EPISODE_STEPS,
    MAX_TORQUE,
    OBSERVATIONS,
    Environment,
)

RewardFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(observations [..., 3], torques [...], true rewards [...]) -> rewards [...]."""


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Settings of proximal policy optimization.

    Attributes:
        iterations: Rounds of playing and training.
        episodes: Played side by side in a round, 200 steps each.
        epochs: Passes over a round's steps.
        minibatches: Updates in a pass.
        learning_rate: Of Adam, falling linearly to zero.
        gamma: Discount.
        gae_lambda: Of the advantages.
        clip: How far the ratio may move from 1, either way.
        value_clip: How far values may move in a round, in units of the reward that is
            maximised; null for as far as they like.
        value_coefficient: Of the value loss.
        max_grad_norm: Gradients are clipped at this norm.
        hidden: Width of the two hidden layers of the policy, and of the value function.
    """

    iterations: int = 40
    episodes: int = 16
    epochs: int = 8
    minibatches: int = 8
    learning_rate: float = 3e-3
    gamma: float = 0.95
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_clip: float | None = None
    value_coefficient: float = 0.5
    max_grad_norm: float = 0.5
    hidden: int = 32

    def __post_init__(self) -> None:
        for name in ("iterations", "episodes", "epochs", "minibatches", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1.")
        if self.episodes * EPISODE_STEPS % self.minibatches:
            raise ValueError(
                f"episodes * {EPISODE_STEPS} steps must divide into minibatches, got "
                f"{self.episodes} and {self.minibatches}."
            )


def init_mlp(key: jax.Array, sizes: tuple[int, ...], *, last: float = 1.0) -> Any:
    """Layers `(weight [in, out], bias [out])`, orthogonal; the last one's scale."""
    keys = jax.random.split(key, len(sizes) - 1)
    layers = []
    for index, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        scale = last if index == len(sizes) - 2 else 2.0**0.5
        make = jax.nn.initializers.orthogonal(scale)
        layers.append((make(keys[index], (rows, columns)), jnp.zeros(columns)))
    return layers


def mlp(layers: Any, x: jax.Array) -> jax.Array:
    """tanh between layers: `[N, in]` -> `[N]`, the only output."""
    for weight, bias in layers[:-1]:
        x = jnp.tanh(x @ weight + bias[None])
    weight, bias = layers[-1]
    return (x @ weight + bias[None])[:, 0]


class Policy(NamedTuple):
    """Torque is `2 * Normal(mlp(actor), exp(log_std))`, value `mlp(critic)`."""

    actor: Any
    log_std: jax.Array
    critic: Any


class Steps(NamedTuple):
    """What was played, `[N, T]`, with the last observation after it.

    Fields:
        observations: `[N, T, 3]`.
        last: what follows, `[N, 3]`.
        torques: N m, as asked for; the environment clips them.
        rewards: the environment's own.
        logps: of the torques.
    """

    observations: jax.Array
    last: jax.Array
    torques: jax.Array
    rewards: jax.Array
    logps: jax.Array


def init_policy(key: jax.Array, hidden: int) -> Policy:
    """A fresh actor, its log standard deviation 0, and critic; two hidden layers."""
    key_actor, key_critic = jax.random.split(key)
    sizes = (OBSERVATIONS, hidden, hidden, 1)
    return Policy(
        init_mlp(key_actor, sizes, last=0.01),
        jnp.zeros(()),
        init_mlp(key_critic, sizes),
    )


def play(
    environment: Environment,
    policy: Policy,
    episodes: int,
    key: jax.Array,
    *,
    explore: bool = True,
) -> Steps:
    """Whole episodes side by side; without `explore`, the mean torque at each step."""
    key_start, key_noise = jax.random.split(key)
    states = jax.vmap(environment.reset)(jax.random.split(key_start, episodes))
    noise = jax.random.normal(key_noise, (EPISODE_STEPS, episodes))
    std = jnp.exp(policy.log_std) if explore else 0.0

    def step(states, noise):
        observations = jax.vmap(environment.observe)(states)
        torques = MAX_TORQUE * (mlp(policy.actor, observations) + std * noise)
        states, rewards = jax.vmap(environment.step)(states, torques)
        return states, (observations, torques, rewards)

    states, played = jax.lax.scan(step, states, noise)
    observations, torques, rewards = (jnp.swapaxes(x, 0, 1) for x in played)
    last = jax.vmap(environment.observe)(states)
    logps = -0.5 * jnp.square(noise.T) - policy.log_std
    return Steps(observations, last, torques, rewards, logps)


def train_ppo(
    environment: Environment,
    reward_fn: RewardFn,
    config: PPOConfig,
    policy: Policy,
    key: jax.Array,
) -> tuple[Policy, jax.Array]:
    """Trains a policy; to be compiled, and mapped over policies and keys.

    Args:
        environment: what is played.
        reward_fn: what is maximised, best with mean 0 and variance about 1.
        config: settings.
        policy: where to start, from `init_policy`.
        key: of the play and of the order of the updates.

    Returns:
        The policy after each round, its leaves with a leading axis `[iterations]`; and
        the mean true return of the episodes of each round, `[iterations]`.
    """
    updates = config.iterations * config.epochs * config.minibatches
    tx = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adam(optax.linear_schedule(config.learning_rate, 0.0, updates), eps=1e-5),
    )

    def one_round(carry, key):
        policy, opt_state = carry
        key_play, key_order = jax.random.split(key)
        steps = play(environment, policy, config.episodes, key_play)
        batch = _with_advantages(policy, steps, reward_fn, config)
        carry = _update(policy, opt_state, tx, batch, config, key_order)
        return carry, (carry[0], jnp.mean(jnp.sum(steps.rewards, axis=1)))

    start = (policy, tx.init(policy))
    keys = jax.random.split(key, config.iterations)
    _, (policies, returns) = jax.lax.scan(one_round, start, keys)
    return policies, returns


def _with_advantages(
    policy: Policy, steps: Steps, reward_fn: RewardFn, config: PPOConfig
) -> dict[str, jax.Array]:
    """Everything an update reads, one row per step, `[N * T, ...]`."""
    shape = steps.rewards.shape
    observations = steps.observations.reshape(-1, OBSERVATIONS)
    flat = (x.reshape(-1) for x in (steps.torques, steps.rewards))
    rewards = reward_fn(observations, *flat).reshape(shape)
    values = mlp(policy.critic, observations).reshape(shape)
    mask = jnp.ones(shape, bool)
    gains, returns = advantages.gae(
        rewards,
        values,
        mask,
        bootstrap=mlp(policy.critic, steps.last),
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
    )
    gains = advantages.whiten(gains, mask)
    named = {
        "torques": steps.torques,
        "logps": steps.logps,
        "values": values,
        "advantages": gains,
        "returns": returns,
    }
    return {k: v.reshape(-1) for k, v in named.items()} | {"observations": observations}


def _update(
    policy: Policy,
    opt_state: Any,
    tx: optax.GradientTransformation,
    batch: dict[str, jax.Array],
    config: PPOConfig,
    key: jax.Array,
) -> tuple[Policy, Any]:
    """The epochs of one round."""
    rows = batch["logps"].shape[0]

    def loss(policy: Policy, part: dict[str, jax.Array]) -> jax.Array:
        mean = mlp(policy.actor, part["observations"])
        deviations = part["torques"] / MAX_TORQUE - mean
        deviations = deviations * jnp.exp(-policy.log_std)
        logps = -0.5 * jnp.square(deviations) - policy.log_std
        mask = jnp.ones((1, logps.shape[0]), bool)
        row = {k: v[None] for k, v in part.items() if k != "observations"}
        surrogate = losses.clipped_policy(
            logps[None],
            row["logps"],
            row["advantages"],
            mask,
            clip_low=config.clip,
            clip_high=config.clip,
        )
        errors, weights = losses.clipped_value(
            mlp(policy.critic, part["observations"])[None],
            row["values"],
            row["returns"],
            mask,
            clip=config.value_clip,
        )
        policy_loss = jnp.sum(surrogate.values) / jnp.sum(surrogate.weights)
        value_loss = jnp.sum(errors) / jnp.sum(weights)
        return policy_loss + config.value_coefficient * value_loss

    def step(carry, rows):
        policy, opt_state = carry
        part = {k: v[rows] for k, v in batch.items()}
        slopes = jax.grad(loss)(policy, part)
        changes, opt_state = tx.update(slopes, opt_state, policy)
        moved: Any = optax.apply_updates(policy, changes)
        return (moved, opt_state), None

    orders = jax.vmap(lambda key: jax.random.permutation(key, rows))(
        jax.random.split(key, config.epochs)
    )
    parts = orders.reshape(config.epochs * config.minibatches, -1)
    carry, _ = jax.lax.scan(step, (policy, opt_state), parts)
    return carry
