"""Preferences between trajectory segments: noisy labels, and a reward learned of them.

Host side (NumPy) for the labels, which are drawn once; the fit is one compiled program.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpost import losses, ops
from jaxpost.recipes._control_pendulum import (
    EPISODE_STEPS,
    MAX_TORQUE,
    OBSERVATIONS,
)
from jaxpost.recipes._control_ppo import Steps, init_mlp, mlp

FEATURES = OBSERVATIONS + 1

NoiseName = Literal["clean", "stochastic", "myopic", "irrational"]


@dataclasses.dataclass(frozen=True)
class Noise:
    """How labels come about.

    Attributes:
        name: `clean` compares true returns. `stochastic` draws the label with
            probability `sigmoid(gap / rate)`, the gap being that of the mean reward per
            step. `myopic` compares `sum rate^(m - t) r_t`, so the last steps decide.
            `irrational` flips, in each batch of B pairs, the `B^rate` whose true gap is
            largest.
        rate: temperature, discount or exponent.
    """

    name: NoiseName
    rate: float = 0.0

    def __str__(self) -> str:
        return self.name if self.name == "clean" else f"{self.name} {self.rate:.2g}"


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Settings of the pairs and of the reward network.

    Attributes:
        rounds: Rounds of the training on the true reward whose policies play the
            segments, counted from 0: from untrained to good.
        episodes: Of each of these policies.
        segment_steps: Length of a segment; divides 200.
        train_pairs: For the fit; a multiple of `batch_pairs`.
        validation_pairs: With labels as noisy, to choose between settings of a loss.
        test_pairs: With clean labels, of other episodes.
        batch_pairs: In an update, and in the batches of the irrational noise.
        epochs: Passes over the pairs.
        learning_rate: Of Adam.
        hidden: Width of the two hidden layers.
    """

    rounds: tuple[int, ...] = (0, 6, 10, 14, 39)
    episodes: int = 20
    segment_steps: int = 25
    train_pairs: int = 1024
    validation_pairs: int = 512
    test_pairs: int = 2048
    batch_pairs: int = 64
    epochs: int = 10
    learning_rate: float = 3e-3
    hidden: int = 32

    def __post_init__(self) -> None:
        if EPISODE_STEPS % self.segment_steps:
            raise ValueError(
                f"segment_steps must divide {EPISODE_STEPS}, got {self.segment_steps}."
            )
        for name in ("train_pairs", "validation_pairs"):
            if getattr(self, name) % self.batch_pairs:
                raise ValueError(
                    f"{name} must be a multiple of batch_pairs = {self.batch_pairs}, "
                    f"got {getattr(self, name)}."
                )


class Segments(NamedTuple):
    """`features` `[S, L, 4]`: observation and torque in [-1, 1]; `rewards` `[S, L]`."""

    features: np.ndarray
    rewards: np.ndarray


class Pairs(NamedTuple):
    """Indices of segments, `[n]` each."""

    chosen: np.ndarray
    rejected: np.ndarray


def features(observations: jax.Array, torques: jax.Array) -> jax.Array:
    """What the reward network sees of steps: `[N, 3]`, `[N]` -> `[N, 4]`."""
    torques = jnp.clip(torques, -MAX_TORQUE, MAX_TORQUE) / MAX_TORQUE
    return jnp.concatenate([observations, torques[:, None]], axis=1)


def cut(steps: Steps, length: int) -> Segments:
    """Episodes `[N, 200]` in segments, one after the other."""
    flat = features(
        steps.observations.reshape(-1, OBSERVATIONS), steps.torques.reshape(-1)
    )
    return Segments(
        np.asarray(flat).reshape(-1, length, FEATURES),
        np.asarray(steps.rewards).reshape(-1, length),
    )


def draw_pairs(
    segments: Segments,
    noise: Noise,
    count: int,
    *,
    batch: int,
    draw: np.random.Generator,
) -> tuple[Pairs, float]:
    """Pairs of different segments, and the share of labels that are not the true ones.

    Segments are drawn from `draw` before the labels: from the same state, every noise
    labels the same pairs.
    """
    first = draw.integers(0, len(segments.rewards), count)
    second = draw.integers(0, len(segments.rewards) - 1, count)
    second = second + (second >= first)
    rewards = segments.rewards.astype(np.float64)
    gaps = rewards[first].mean(axis=1) - rewards[second].mean(axis=1)
    labels = label(noise, gaps, rewards[first], rewards[second], batch, draw)
    pairs = Pairs(np.where(labels, first, second), np.where(labels, second, first))
    return pairs, float(np.mean(labels != (gaps > 0.0)))


def label(
    noise: Noise,
    gaps: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    batch: int,
    draw: np.random.Generator,
) -> np.ndarray:
    """True where the first segment is preferred, bool `[n]`.

    Args:
        noise: see `Noise`.
        gaps: true mean reward per step, first minus second, `[n]`.
        first, second: rewards of the segments' steps, `[n, L]`.
        batch: size of the batches of `irrational`; divides `n`.
        draw: of `stochastic`.

    Source: section 5.1 of arXiv 2406.15568. What a gap is measured in is ours: the
    paper compares returns, whose scale is another in each task.
    """
    if noise.name == "stochastic":
        chances = 1.0 / (1.0 + np.exp(np.clip(-gaps / noise.rate, -500.0, 500.0)))
        return draw.random(len(gaps)) < chances
    if noise.name == "myopic":
        weights = noise.rate ** np.arange(first.shape[1] - 1, -1, -1.0)
        return first @ weights > second @ weights
    labels = gaps > 0.0
    if noise.name == "irrational":
        count = math.floor(batch**noise.rate + 1e-9)
        for start in range(0, len(gaps), batch):
            part = np.abs(gaps[start : start + batch])
            worst = start + np.argsort(-part, kind="stable")[:count]
            labels[worst] = ~labels[worst]
    return labels


def make_fit(
    loss: losses.PairwiseConfig, config: PreferenceConfig
) -> Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], Any]:
    """A function that fits a reward network by one pairwise loss.

    Returns:
        `(params, features [S, L, 4], chosen [n], rejected [n], key) -> params`, from
        those of `init_reward`: the margin of a pair is the difference of the sums of
        the steps' rewards.
    """
    pairwise = losses.pairwise_loss(loss)
    tx = optax.adam(config.learning_rate)

    def fit(params, features, chosen, rejected, key):
        def step(carry, rows):
            params, opt_state = carry
            sides = jnp.stack([chosen[rows], rejected[rows]])

            def mean_loss(params):
                totals = segment_returns(params, features[sides.reshape(-1)])
                margins = totals[: len(rows)] - totals[len(rows) :]
                values = pairwise(margins).values
                return ops.masked_mean(values, jnp.ones(values.shape, bool))

            changes, opt_state = tx.update(jax.grad(mean_loss)(params), opt_state)
            return (optax.apply_updates(params, changes), opt_state), None

        orders = jax.vmap(lambda key: jax.random.permutation(key, chosen.shape[0]))(
            jax.random.split(key, config.epochs)
        )
        start = (params, tx.init(params))
        (params, _), _ = jax.lax.scan(
            step, start, orders.reshape(-1, config.batch_pairs)
        )
        return params

    return fit


def init_reward(key: jax.Array, hidden: int) -> Any:
    """A fresh reward network of a step's features, two hidden layers."""
    return init_mlp(key, (FEATURES, hidden, hidden, 1), last=0.1)


def segment_returns(params: Any, features: jax.Array) -> jax.Array:
    """Learned return of segments: `[S, L, 4]` -> `[S]`."""
    rewards = mlp(params, features.reshape(-1, FEATURES))
    return jnp.sum(rewards.reshape(features.shape[:2]), axis=1)


def accuracy(returns: np.ndarray, pairs: Pairs) -> float:
    """Share of pairs whose chosen segment has the larger return; ties count half."""
    margins = returns[pairs.chosen] - returns[pairs.rejected]
    return float(np.mean(np.where(margins == 0.0, 0.5, margins > 0.0)))
