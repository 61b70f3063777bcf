"""A finished round of PPO: read once by all models, then advantages of its tokens.

Arrays `[R, W]` have a token's number at the token's own column, 0 elsewhere; R rows
hold A answers each.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import advantages, models, ops
from jaxpost.recipes import _policy, _ppo_terms, _round_rows
from jaxpost.recipes._answers import TokenLogps
from jaxpost.recipes._policy import KLSection
from jaxpost.recipes._round_rows import Played
from jaxpost.recipes._rounds import Finish, Finished, ScoreFn
from jaxpost.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class AdvantageSection:
    """From rewards and values to advantages.

    Attributes:
        gamma: Discount per token.
        gae_lambda: 1 gives the whole return minus the value, 0 the one-step error.
        whiten: Bring a round's advantages to mean 0 and variance 1.
        bootstrap_truncated: What an answer cut off at `rollout.max_new_tokens` would
            have earned, the critic says; if false, it is rewarded as if it had ended.
        missing_eos_penalty: Taken off the reward of such an answer.
    """

    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten: bool = True
    bootstrap_truncated: bool = False
    missing_eos_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"{name} must lie in [0, 1], got {getattr(self, name)}."
                )
        if not 0.0 <= self.missing_eos_penalty < float("inf"):
            raise ValueError(
                "missing_eos_penalty must be at least 0 and finite, got "
                f"{self.missing_eos_penalty}."
            )
        if self.bootstrap_truncated and self.missing_eos_penalty:
            raise ValueError(
                f"missing_eos_penalty is {self.missing_eos_penalty}, but with "
                "bootstrap_truncated no answer is treated as if it ended: choose one."
            )


def score_round(
    model: models.Model,
    critic: models.Model,
    frozen: Mapping[str, models.Model],
    *,
    temperature: float = 1.0,
    dtype: jnp.dtype | None = None,
    token_logps: TokenLogps = ops.linear_token_logps,
) -> ScoreFn:
    """What all models say of a round's tokens before its first step.

    Args:
        model: the policy.
        critic: its parameters are those under `critic`.
        frozen: models by the names that their parameters have.
        temperature: the sampler's; also of the log-probs that a KL compares.
        dtype, token_logps: as of `ppo_loss`.

    Returns:
        A function of all parameters and a batch of joined rows to arrays `[R, W]`:
        `old_logps`, `old_values`, `next_values` (after the token); and of each frozen
        model `NAME_logps` and, should the temperature not be 1, `NAME_raw_logps`
        without it (else the former are those as well).
    """
    names = tuple(model.params)

    def score(params: Params, batch: Batch) -> dict[str, jax.Array]:
        read = functools.partial(
            _policy.token_stats, batch=batch, dtype=dtype, token_logps=token_logps
        )
        policy = {name: params[name] for name in names}
        values = _ppo_terms.token_values(
            critic, params[_ppo_terms.CRITIC], batch, dtype=dtype
        )
        found = {
            "old_logps": read(model, policy, temperature=temperature).logps,
            "old_values": values[0],
            "next_values": values[1],
        }
        for name, other in frozen.items():
            logps = read(other, params[name], temperature=temperature).logps
            found[f"{name}_logps"] = logps
            if temperature != 1.0:
                found[f"{name}_raw_logps"] = read(other, params[name]).logps
        mask = batch["loss_mask"]
        return {name: jnp.where(mask, x, 0.0) for name, x in found.items()}

    return score


def raw_logps(batch: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A frozen model's log-probs without temperature, `[R, W]`; see `score_round`."""
    return batch.get(f"{name}_raw_logps", batch[f"{name}_logps"])


class Targets(NamedTuple):
    """What the loss of a round aims at, and what went into it; float32.

    Fields:
        advantages, returns: `[R, W]`.
        rewards: that were to be earned per token, KL included, `[R, W]`.
        kl: estimates of the divergence from the reference, `[R, W]`, zero without.
    """

    advantages: jax.Array
    returns: jax.Array
    rewards: jax.Array
    kl: jax.Array


def last_tokens(ids: jax.Array) -> jax.Array:
    """True at each answer's last trained token.

    Args:
        ids: which answer a token belongs to, -1 for none, int `[R, W]`.
    """
    following = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return (ids >= 0) & (following != ids)


@functools.partial(jax.jit, static_argnames=("section", "kl", "at_end"))
def targets_of(
    batch: Batch,
    rewards: jax.Array,
    truncated: jax.Array,
    *,
    section: AdvantageSection,
    kl: KLSection,
    at_end: bool,
) -> Targets:
    """Advantages and returns of a round's tokens; nothing outside answers counts.

    A token earns `r - in_reward * kl_estimate(old, ref)`. A reward of a whole answer is
    earned at its last token. Answers end there: of a truncated one with
    `bootstrap_truncated`, the critic's value after it takes the place of its reward if
    that is for the whole (which the value estimates), and is added to those per token.

    Args:
        batch: `segment_ids`, `loss_mask`, `old_logps`, `old_values`, `next_values` and,
            for a KL in the reward, `ref_logps`, each `[R, W]`.
        rewards: float, of whole answers, `[R, A]`, if `at_end`; else of tokens, `[R,
            W]`.
        truncated: True where an answer was cut off, bool `[R, A]`.
        section, kl: settings.
        at_end: see `rewards`.
    """
    mask = batch["loss_mask"]
    ids = jnp.where(mask, ops.branch_numbers(batch["segment_ids"]) - 1, -1)
    last = last_tokens(ids)
    cut = last & (ops.per_answer(truncated.astype(jnp.float32), ids) > 0.0)
    if at_end:
        earned = jnp.where(last, ops.per_answer(rewards, ids), 0.0)
    else:
        earned = jnp.where(mask, rewards, 0.0)
    if section.missing_eos_penalty:
        earned = jnp.where(cut, earned - section.missing_eos_penalty, earned)
    if section.bootstrap_truncated:
        # The reward that makes this last step's error what it is with a bootstrap.
        more = section.gamma * batch["next_values"]
        earned = jnp.where(cut, more if at_end else earned + more, earned)
    estimates = jnp.zeros_like(earned)
    if "ref_logps" in batch:
        estimates = ops.kl_estimate(
            batch["old_logps"], batch["ref_logps"], kind=kl.kind
        )
        estimates = jnp.where(mask, estimates, 0.0)
        earned = earned - kl.in_reward * estimates
    gains, returns = advantages.gae(
        earned,
        batch["old_values"],
        mask,
        terminals=last,
        gamma=section.gamma,
        gae_lambda=section.gae_lambda,
    )
    if section.whiten:
        gains = advantages.whiten(gains, mask)
    return Targets(gains, returns, earned, estimates)


class Earned(NamedTuple):
    """What the answers of a round have earned, before any KL.

    Fields:
        rewards: of each, `[B, G]`.
        token_rewards: of each token, `[R, W]`, if they are to be placed there; None
            places each answer's reward at its last token.
        numbers: to log.
    """

    rewards: np.ndarray
    token_rewards: np.ndarray | None
    numbers: dict[str, float]


EarnFn = Callable[[Played, Mapping[str, np.ndarray]], Earned]
"""Of a round and its arrays, `score_round`'s among them."""


def judged(played: Played, batch: Mapping[str, np.ndarray]) -> Earned:
    """The judge's rewards, as they are."""
    del batch
    return Earned(played.rewards, None, {})


def finish_round(
    earn: EarnFn,
    *,
    reference: str | None,
    advantage: AdvantageSection,
    kl: KLSection,
    divide_by: str,
    max_tokens: int,
) -> Finish:
    """From a round and its scores to what the loss of PPO reads, and what to log.

    Args:
        earn: gives the rewards.
        reference: the frozen model that a KL is measured from; None for no KL.
        advantage, kl: settings.
        divide_by, max_tokens: see `_round_rows.loss_weights`.
    """

    def finish(played: Played, batch: dict[str, np.ndarray]) -> Finished:
        earned = earn(played, batch)
        if reference is not None:
            batch["ref_logps"] = batch[f"{reference}_logps"]
        rows = batch["answer_lengths"].shape
        at_end = earned.token_rewards is None
        rewards = earned.rewards.reshape(rows) if at_end else earned.token_rewards
        names = ("segment_ids", "loss_mask", "old_logps", "old_values", "next_values")
        read = {name: batch[name] for name in (*names, "ref_logps") if name in batch}
        targets = jax.device_get(
            targets_of(
                read,
                np.asarray(rewards, np.float32),
                played.truncated.reshape(rows),
                section=advantage,
                kl=kl,
                at_end=at_end,
            )
        )
        batch |= {"advantages": targets.advantages, "returns": targets.returns}
        batch |= _round_rows.loss_weights(
            batch, len(played.prompts), divide_by=divide_by, max_tokens=max_tokens
        )
        numbers = objective_numbers(played, batch, earned, targets, advantage, kl)
        kept = {name: batch[name] for name in LOSS_READS if name in batch}
        return Finished(kept, earned.numbers | numbers, earned.rewards)

    return finish


LOSS_READS = (
    *("tokens", "positions", "segment_ids", "loss_mask", "answer_lengths"),
    *("loss_weights", "loss_counts", "sampling_logps", "old_logps", "ref_logps"),
    *("advantages", "old_values", "returns"),
)


def objective_numbers(
    played: Played,
    batch: Mapping[str, np.ndarray],
    earned: Earned,
    targets: Targets,
    advantage: AdvantageSection,
    kl: KLSection,
) -> dict[str, float]:
    """TRL's numbers of a round, means over the answers that are trained on; and how
    much of the returns' variance the critic foresaw, `val/explained_variance`."""
    shape, mask = played.lengths.shape, batch["loss_mask"]
    kept = batch["answer_lengths"].reshape(shape) > 0

    def sums(values: np.ndarray) -> np.ndarray:
        return _round_rows.per_sequence(values, batch).reshape(shape)[kept]

    rewards = earned.rewards - advantage.missing_eos_penalty * played.truncated
    scores, divergence = rewards[kept], sums(np.asarray(targets.kl))
    non_score = -kl.in_reward * divergence
    returns = targets.returns[mask]
    missed = float(np.var(returns - batch["old_values"][mask])) if mask.any() else 0.0
    spread = float(np.var(returns)) if mask.any() else 0.0
    return {
        "objective/kl": _mean(divergence),
        "objective/entropy": _mean(sums(-batch["old_logps"])),
        "objective/scores": _mean(scores),
        "objective/non_score_reward": _mean(non_score),
        "objective/rlhf_reward": _mean(scores + non_score),
        "reward_std": float(np.std(scores)) if scores.size else 0.0,
        "val/num_eos_tokens": float(np.sum(~played.truncated)),
        "val/explained_variance": 1.0 - missed / spread if spread > 0.0 else 0.0,
    }


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64)) if values.size else 0.0
