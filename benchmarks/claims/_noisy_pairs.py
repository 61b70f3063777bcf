"""Synthetic preference pairs with a known truth, and what can go wrong with labels.

Every prompt has a few answers with random features; the true reward of an answer is
linear in them and does not depend on the last one, its length. Labels compare the first
two answers. Everything follows from a seed.
"""

import dataclasses
from typing import Literal

import numpy as np

Kind = Literal["flips", "clearest", "strength", "length"]
STRENGTHS = (0.5, 2.0, 20.0)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """How labels are made.

    Fields:
        name: for tables.
        kind: `flips`: the truth, a share `rate` of labels flipped at random;
            `clearest`: flipped where the true margin is largest (R³M's irrational
            annotators); `strength`: drawn by Bradley-Terry, each pair with a strength
            of its own, one of `STRENGTHS`; `length`: for a share `rate` of pairs, the
            longer answer.
        rate: see `kind`.
        pairs_per_parameter: training pairs over the model's parameters.
    """

    name: str
    kind: Kind
    rate: float = 0.0
    pairs_per_parameter: int = 50


@dataclasses.dataclass(frozen=True)
class Truth:
    """One seed's world: `R` seeds are stacked in front by `stack`.

    Fields:
        phi: features of the answers, float32 `[N, K, D]`.
        rewards: true reward of each, float32 `[N, K]`; the margin of two answers has
            variance one.
        noise: uniform in [0, 1), float64 `[N, 3]`: one column per random decision, so
            that scenarios differ in nothing else.
    """

    phi: np.ndarray
    rewards: np.ndarray
    noise: np.ndarray


def make_truth(seed: int, part: int, pairs: int, *, answers: int, width: int) -> Truth:
    """Features and true rewards of one split.

    Args:
        seed: of the world; the true reward function depends on nothing else.
        part: which split: train, validation, test.
        pairs: prompts.
        answers: per prompt, at least 2.
        width: features per answer, the last of which is the length.
    """
    direction = np.random.default_rng([seed]).normal(size=width)
    direction[-1] = 0.0
    direction /= np.linalg.norm(direction) * np.sqrt(2.0)
    rng = np.random.default_rng([seed, 1 + part])
    phi = rng.normal(size=(pairs, answers, width)).astype(np.float32)
    rewards = (phi @ direction).astype(np.float32)
    return Truth(phi, rewards, rng.random((pairs, 3)))


def true_signs(truth: Truth) -> np.ndarray:
    """+1 where the first answer is better, else -1, float32 `[N]`."""
    return _signs(truth.rewards[:, 0] - truth.rewards[:, 1])


def labels(truth: Truth, scenario: Scenario) -> np.ndarray:
    """What the annotators say: +1 where they prefer the first answer, float32 `[N]`."""
    margins = (truth.rewards[:, 0] - truth.rewards[:, 1]).astype(np.float64)
    right = _signs(margins)
    if scenario.kind == "flips":
        return np.where(truth.noise[:, 0] < scenario.rate, -right, right)
    if scenario.kind == "clearest":
        border = np.quantile(np.abs(margins), 1.0 - scenario.rate)
        return np.where(np.abs(margins) > border, -right, right)
    if scenario.kind == "strength":
        choice = (truth.noise[:, 1] * len(STRENGTHS)).astype(int)
        scaled = np.asarray(STRENGTHS)[choice] * margins
        return _signs(1.0 / (1.0 + np.exp(-scaled)) - truth.noise[:, 0])
    longer = _signs((truth.phi[:, 0, -1] - truth.phi[:, 1, -1]).astype(np.float64))
    return np.where(truth.noise[:, 0] < scenario.rate, longer, right)


def _signs(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, 1.0, -1.0).astype(np.float32)
