"""What the recipes of policy optimisation share: log-probs of joined rows, loss terms.

Every array `[R, W]` has a token's number at the token's own column, 0 elsewhere.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpost import losses, models, ops
from jaxpost.recipes._answers import TokenLogps
from jaxpost.typing import Batch, Metric, Params, Term, TokenStats

Estimator = Literal["auto", "k1", "k2", "k3"]


@dataclasses.dataclass(frozen=True)
class PolicySection:
    """The clipped policy loss.

    Attributes:
        clip_low: How far the ratio may fall below 1.
        clip_high: How far it may rise above 1; larger than `clip_low` in DAPO.
        dual_clip: Bound on the loss of unwanted tokens whose ratio has grown, in units
            of the advantage; none bounds nothing.
        ratio: Of each token's probabilities, or of a whole answer's (GSPO): their
            geometric mean over its tokens.
        divide_by: What the sum over tokens is divided by: all tokens, each answer's
            own, each group's own, or `rollout.max_new_tokens` times the answers.
        entropy_coefficient: Of the entropy bonus; 0 computes no entropy.
        importance_cap: Largest weight that corrects for a sampler whose distribution is
            not the trainer's; none corrects nothing. The difference is logged anyway.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio: Literal["token", "sequence"] = "token"
    divide_by: Literal["token", "sequence", "group", "constant"] = "token"
    entropy_coefficient: float = 0.0
    importance_cap: float | None = 2.0

    def __post_init__(self) -> None:
        losses.check_clips(self.clip_low, self.clip_high, self.dual_clip)
        if self.ratio == "sequence" and self.divide_by != "sequence":
            raise ValueError(
                "ratio is sequence, one number per answer: set divide_by to sequence, "
                f"not {self.divide_by}."
            )
        if not 0.0 <= self.entropy_coefficient < math.inf:
            raise ValueError(
                "entropy_coefficient must be at least 0 and finite, got "
                f"{self.entropy_coefficient}."
            )
        if self.importance_cap is not None and not self.importance_cap >= 1.0:
            raise ValueError(
                f"importance_cap must be at least 1, got {self.importance_cap}."
            )


@dataclasses.dataclass(frozen=True)
class KLSection:
    """How the policy is held near its reference; see docs/policy_optimisation.md.

    Attributes:
        in_loss: Coefficient of the KL estimate as a term of the loss.
        in_reward: Coefficient of the log-ratio taken off the rewards.
        estimator: Which estimate; `auto` is k3 in the loss, k1 in the reward.
    """

    in_loss: float = 0.0
    in_reward: float = 0.0
    estimator: Estimator = "auto"

    def __post_init__(self) -> None:
        for name in ("in_loss", "in_reward"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be at least 0 and finite, got {getattr(self, name)}."
                )
        if self.in_loss and self.in_reward:
            raise ValueError(
                f"in_loss is {self.in_loss} and in_reward is {self.in_reward}, which "
                "would count the KL twice: choose one place."
            )
        if self.in_loss and self.estimator == "k1":
            raise ValueError(
                "estimator is k1 in the loss, where its expected gradient is zero, so "
                "it would hold nothing back: choose k2 or k3, or in_reward."
            )

    @property
    def used(self) -> bool:
        """Whether a reference is needed."""
        return bool(self.in_loss or self.in_reward)

    @property
    def kind(self) -> Literal["k1", "k2", "k3"]:
        """The estimator chosen."""
        if self.estimator == "auto":
            return "k1" if self.in_reward else "k3"
        return self.estimator


def token_stats(
    model: models.Model,
    params: Params,
    batch: Batch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    dtype: jnp.dtype | None = None,
    token_logps: TokenLogps = ops.linear_token_logps,
    slopes: ops.TokenSlopes | None = None,
) -> TokenStats:
    """Log-probs of the trained tokens of joined rows, the prompt read once for all.

    Args:
        model: gives `apply` and `unembed`.
        params: its parameters.
        batch: `tokens`, `positions`, `segment_ids` and `loss_mask`, each `[R, W]`.
        temperature: the sampler's.
        with_entropy: also the entropy of each token's distribution.
        dtype: compute dtype that the parameters are cast to; None casts nothing.
        token_logps: on a mesh, from `parallel.split_vocabulary`.
        slopes: of the loss, from `token_slopes`, where gradients are wanted.

    Returns:
        float32 or wider `[R, W]`, each at the token's own column; anything where
        `loss_mask` is False.
    """
    if dtype is not None:
        params = models.cast_params(params, dtype)
    segments = batch["segment_ids"]
    hidden = model.apply(params, batch["tokens"], batch["positions"], segments).hidden
    # What predicts each token: the place before it, or the prompt's last.
    places = jnp.maximum(ops.predictors(segments), 0)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    return token_logps(
        hidden,
        model.unembed(params),
        batch["tokens"],
        mask=batch["loss_mask"],
        grad_weights=slopes,
        temperature=temperature,
        with_entropy=with_entropy,
    )


def token_slopes(
    batch: Batch, section: PolicySection, kl: KLSection
) -> ops.TokenSlopes | None:
    """What the terms of `policy_terms` will ask of each token's log-prob, so that the
    products with the head are three and not four; None where that depends on others.

    Args:
        batch, section, kl: as of `policy_terms`.
    """
    if section.ratio == "sequence" or section.entropy_coefficient:
        return None
    names = tuple(
        name
        for name in ("advantages", "sampling_logps", "old_logps", "ref_logps")
        if name in batch
    )
    names = ("loss_mask", "loss_weights", *names)

    def slope(logps: jax.Array, *columns: jax.Array) -> jax.Array:
        part = dict(zip(names, (column[None] for column in columns), strict=True))
        part["loss_mask"] = part["loss_mask"] != 0
        part["loss_counts"] = jnp.ones((1,), logps.dtype)  # common to all tokens

        def total(logps: jax.Array) -> jax.Array:
            stats = TokenStats(logps[None], None, None)
            terms, _ = policy_terms(stats, part, section, kl)
            return sum(
                (term.coefficient * term.total for term in terms.values()),
                start=jnp.zeros((), logps.dtype),
            )

        return jax.grad(total)(logps)

    return ops.TokenSlopes(tuple(batch[name] for name in names), slope)


def policy_terms(
    stats: TokenStats, batch: Batch, section: PolicySection, kl: KLSection
) -> tuple[dict[str, Term], dict[str, Metric]]:
    """The terms of the loss that move the policy, and what to log of them.

    Args:
        stats: of the batch under the parameters that are trained, from `token_stats`.
        batch: joined rows with `advantages`, `sampling_logps` and `loss_weights` `[R,
            W]`, `answer_lengths` `[R, A]` and `loss_counts` `[R]`; with `old_logps`
            `[R, W]` if the policy has moved since the round was drawn, and `ref_logps`
            for a KL.
        section, kl: settings.

    Returns:
        `policy`, `kl` (if in the loss) and `entropy` (if it has a coefficient), each a
        sum with what it is divided by; metrics under TRL's names.
    """
    mask, weights = batch["loss_mask"], batch["loss_weights"]
    count = jnp.sum(batch["loss_counts"])
    old = batch.get("old_logps", jax.lax.stop_gradient(stats.logps))
    corrections, metrics = losses.importance_weights(
        old, batch["sampling_logps"], mask, cap=section.importance_cap or math.inf
    )
    if section.importance_cap is None:
        corrections = mask.astype(corrections.dtype)
    ratio_of = _token_ratios if section.ratio == "token" else _sequence_ratios
    values, logged = ratio_of(stats.logps, old, corrections, batch, section)
    terms = {"policy": Term(jnp.sum(values * weights), count)}
    metrics |= logged
    if "ref_logps" in batch:
        estimates = ops.kl_estimate(
            jnp.where(mask, stats.logps, 0.0), batch["ref_logps"], kind=kl.kind
        )
        estimates = jnp.where(mask, estimates, 0.0)
        trained = jnp.sum(mask, dtype=jnp.float32)
        metrics["kl"] = Metric(jax.lax.stop_gradient(jnp.sum(estimates)), trained)
        if kl.in_loss:
            terms["kl"] = Term(jnp.sum(estimates * weights), count, kl.in_loss)
    if section.entropy_coefficient:
        assert stats.entropy is not None  # asked for with the coefficient
        entropy = jnp.sum(jnp.where(mask, stats.entropy, 0.0) * weights)
        terms["entropy"] = Term(entropy, count, -section.entropy_coefficient)
    return terms, metrics


def _token_ratios(
    logps: jax.Array,
    old: jax.Array,
    corrections: jax.Array,
    batch: Batch,
    section: PolicySection,
) -> tuple[jax.Array, dict[str, Metric]]:
    found = losses.clipped_policy(
        logps,
        old,
        batch["advantages"],
        batch["loss_mask"],
        clip_low=section.clip_low,
        clip_high=section.clip_high,
        dual_clip=section.dual_clip,
    )
    return found.values * corrections, _clip_metrics(found.metrics, found.weights)


def _sequence_ratios(
    logps: jax.Array,
    old: jax.Array,
    corrections: jax.Array,
    batch: Batch,
    section: PolicySection,
) -> tuple[jax.Array, dict[str, Metric]]:
    """GSPO: Zheng et al. (2025), arXiv 2507.18071, eqs. 5-7; per token again, so that
    each answer's mean over its tokens is its value."""
    mask = batch["loss_mask"]
    ids = jnp.where(mask, ops.branch_numbers(batch["segment_ids"]) - 1, -1)
    lengths = batch["answer_lengths"]
    answers = lengths.shape[1]

    def mean(values: jax.Array) -> jax.Array:
        return ops.ratio(ops.answer_sums(values, ids, answers), lengths)

    found = losses.clipped_policy(
        mean(logps),
        mean(old),
        mean(batch["advantages"]),
        lengths > 0.0,
        clip_low=section.clip_low,
        clip_high=section.clip_high,
        dual_clip=section.dual_clip,
    )
    values = ops.per_answer(found.values * mean(corrections), ids)
    return values, _clip_metrics(found.metrics, found.weights)


def _clip_metrics(
    values: Mapping[str, jax.Array], weights: jax.Array
) -> dict[str, Metric]:
    """TRL's names for the means of `losses.clipped_policy`'s numbers."""
    count = jnp.sum(weights)
    names = {
        "clip_ratio/low": "clip_ratio/low_mean",
        "clip_ratio/high": "clip_ratio/high_mean",
        "clip_ratio/region": "clip_ratio/region_mean",
        "clip_ratio/dual": "clip_ratio/dual_mean",
        "policy/approxkl": "policy/approxkl_avg",
    }
    return {
        names.get(name, name): Metric(jnp.sum(value), count)
        for name, value in values.items()
    }
