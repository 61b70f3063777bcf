"""Pairs of answers under a model: metrics of margins, and of what a loss adds.

What the recipes of preference pairs share. Batches are those of `data.pad_pairs`; their
log-probabilities are in `_answers`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpost import data, losses
from jaxpost.recipes._answers import mean_over
from jaxpost.typing import Metric


def pairwise_values(
    loss: Callable[[jax.Array], losses.PairwiseOutput],
    margins: jax.Array,
    real: jax.Array,
) -> losses.PairwiseOutput:
    """The loss of each margin, zero where there is no pair.

    An infinite margin makes its loss NaN, so that the training step refuses it: many
    losses are finite there, and would hide it.
    """
    values, extras = loss(jnp.where(real, margins, 0.0))
    values = jnp.where(jnp.isfinite(margins), values, jnp.nan)
    return losses.PairwiseOutput(jnp.where(real, values, 0.0), extras)


def slopes(
    loss: Callable[[jax.Array], losses.PairwiseOutput],
    margins_of: Callable[..., jax.Array],
) -> Callable[..., jax.Array]:
    """A function `[B, 2] -> [B, 2]`: slopes of the sum of losses by log-probabilities.

    Args:
        loss: of margins `[B]`.
        margins_of: from log-probabilities `[B, 2]`, and perhaps more, to margins.
    """

    def total(logps: jax.Array, *rest: Any) -> jax.Array:
        return jnp.sum(loss(margins_of(logps, *rest)).values)

    return jax.grad(total)


def margin_metrics(
    rewards: jax.Array, margins: jax.Array, real: jax.Array
) -> dict[str, Metric]:
    """TRL's `rewards/...`: means over pairs.

    Args:
        rewards: of both answers, float `[B, 2]`.
        margins: float `[B]`; a pair counts as right where it is above 0.
        real: from `_answers.real_rows`.
    """
    mean = mean_over(real)
    return {
        "rewards/chosen": mean(rewards[:, data.CHOSEN]),
        "rewards/rejected": mean(rewards[:, data.REJECTED]),
        "rewards/accuracies": mean((margins > 0.0).astype(jnp.float32)),
        "rewards/margins": mean(margins),
    }


def extras_metrics(
    config: losses.PairwiseConfig, extras: Mapping[str, jax.Array], real: jax.Array
) -> dict[str, Metric]:
    """Statistics of what a loss knows of each pair: R³M's delta, adaptive tau."""
    mean = mean_over(real)
    found = {f"{name}/mean": mean(values) for name, values in extras.items()}
    if "delta" in extras:
        found["delta/share"] = mean((extras["delta"] > 0.0).astype(jnp.float32))
    if "tau" in extras:
        for name, inside in at_bounds(config, extras["tau"]).items():
            found[f"tau/share_at_{name}"] = mean(inside.astype(jnp.float32))
    return found


def at_bounds(config: losses.PairwiseConfig, tau: Any) -> dict[str, Any]:
    """Where `tau` lies at its bounds: bool arrays by `min` and, if there is one, `max`.

    Bounds are compared with a relative slack of 1e-6, as `tau` is float32.
    """
    bounds = {}
    if config.tau_min is not None:
        bounds["min"] = tau <= config.tau_min * (1.0 + 1e-6)
    if config.tau_max is not None:
        bounds["max"] = tau >= config.tau_max * (1.0 - 1e-6)
    return bounds
