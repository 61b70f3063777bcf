"""The reward that a fine-tuned model implies: its log-ratio to the model before it.

Pure arithmetic on log-probabilities of the same tokens; knows no model.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import ops


class SelfReward(NamedTuple):
    """What `self_reward` returns, without gradient.

    Fields:
        rewards: of each answer, the sum of its tokens', float32 or wider `[...]`, nats;
            zero where no token counts.
        token_rewards: of each token, same dtype, `[..., T]`, zero where masked.
    """

    rewards: jax.Array
    token_rewards: jax.Array


def self_reward(
    sft_logps: jax.Array, base_logps: jax.Array, mask: jax.Array
) -> SelfReward:
    """How much more likely fine-tuning has made an answer: `log p_sft - log p_base`.

    Both models read the same tokens, the end token among them, and not at the sampler's
    temperature. The reward grows with the answer's length; it is not divided by it.

    Args:
        sft_logps: log-probability of each token under the fine-tuned model, float
            `[..., T]`, nats.
        base_logps: under the model that it was fine-tuned from, same shape.
        mask: True on the answer's tokens, bool, same shape; elsewhere (the prompt,
            padding) anything, even NaN.

    Returns:
        `SelfReward(rewards [...], token_rewards [..., T])`.

    Raises:
        AssertionError: shapes differ, or `mask` is not boolean.

    Source: "Self-Rewarding PPO" (2025), arXiv 2510.21090, as its abstract and others'
    summaries give it: r(x, y) = log pi_sft(y | x) - log pi_pt(y | x).
    """
    chex.assert_equal_shape([sft_logps, base_logps, mask])
    chex.assert_type(mask, bool)
    sft, base = ops.at_least_float32(sft_logps, base_logps)
    # Each selected first: NaN - NaN under the mask is no warning either.
    sft, base = (jnp.where(mask, x, jnp.zeros((), x.dtype)) for x in (sft, base))
    token_rewards = jax.lax.stop_gradient(sft - base)
    return SelfReward(jnp.sum(token_rewards, axis=-1), token_rewards)


def check_self_rewards(rewards: np.ndarray, lengths: np.ndarray) -> None:
    """Refuses self-rewards that cannot be trained on; on the host.

    Args:
        rewards: of each answer, float `[...]`.
        lengths: tokens that counted in each, same shape.

    Raises:
        ValueError: an answer has no token that counts, or a reward that is not finite;
            names the first few.
    """
    rewards, lengths = np.asarray(rewards), np.asarray(lengths)
    if rewards.shape != lengths.shape:
        raise ValueError(
            "rewards and lengths must have one shape, got "
            f"{rewards.shape} and {lengths.shape}."
        )
    if (lengths < 1).any():
        raise ValueError(
            f"{_named(lengths < 1)} no token that counts: a mask must be True on an "
            "answer's tokens, its end token among them."
        )
    if not np.isfinite(rewards).all():
        raise ValueError(
            f"{_named(~np.isfinite(rewards))} a self-reward that is not finite: check "
            "the weights of the fine-tuned and of the base model."
        )


def _named(bad: np.ndarray, limit: int = 5) -> str:
    """`answers 3, 7 (and 2 more) have`, counted through all rows."""
    places = np.flatnonzero(bad)
    shown = ", ".join(map(str, places[:limit]))
    more = f" and {len(places) - limit} more" if len(places) > limit else ""
    one = len(places) == 1
    return f"answer{'' if one else 's'} {shown}{more} {'has' if one else 'have'}"
