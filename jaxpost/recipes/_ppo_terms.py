"""The loss of PPO on joined rows: the policy's terms, and a critic's beside them.

Trained parameters are the model's own and, under `critic`, those of a whole copy of it
that ends in one score per token instead of the vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxpost import losses, models, ops, training
from jaxpost.recipes import _policy
from jaxpost.recipes._answers import TokenLogps
from jaxpost.recipes._policy import KLSection, PolicySection
from jaxpost.recipes._rounds import RolloutSection
from jaxpost.typing import Batch, LossFn, LossOutput, Metric, Params, Term

CRITIC = "critic"


# A section that is given in part takes the rest from its own class, so PPO's defaults
# need classes of their own.
@dataclasses.dataclass(frozen=True)
class PPORolloutSection(RolloutSection):
    """How answers are drawn, and how often they are trained on.

    Attributes:
        samples: Answers to each prompt.
        epochs: Passes over a round.
    """

    samples: int = 1
    epochs: int = 4


@dataclasses.dataclass(frozen=True)
class PPOKLSection(KLSection):
    """How the policy is held near its reference; see docs/policy_optimisation.md.

    Attributes:
        in_reward: Coefficient of the log-ratio taken off the rewards.
    """

    in_reward: float = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOOptimizerConfig(training.OptimizerConfig):
    """Which optimizer, with which schedule.

    Attributes:
        learning_rate: peak learning rate of the policy.
    """

    learning_rate: float = 5e-7


@dataclasses.dataclass(frozen=True)
class CriticSection:
    """The value function: a copy of the policy with a head of one number per token.

    Attributes:
        learning_rate: Its own peak, on the optimizer and schedule of the policy; the
            policy's if not given.
        coefficient: Of its term in the loss. Under an optimizer that divides by the
            gradient's size it hardly matters, as the two share no parameter.
        clip: How far values may move in a round, in units of the reward; none for as
            far as they like.
    """

    learning_rate: float | None = 9e-6
    coefficient: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        if not 0.0 < self.coefficient < math.inf:
            raise ValueError(
                f"coefficient must be positive and finite, got {self.coefficient}: "
                "without its loss the critic learns nothing."
            )


def token_values(
    critic: models.Model,
    params: Params,
    batch: Batch,
    *,
    dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What the critic expects before and after each token of joined rows.

    Args:
        critic: a model with a score head; gives `apply`.
        params: its parameters.
        batch: `tokens`, `positions`, `segment_ids` and `loss_mask`, each `[R, W]`.
        dtype: compute dtype that the parameters are cast to, but for the head; None
            casts nothing.

    Returns:
        Values of what is to come when a token is chosen (read where the policy chooses
        it), and once it stands; float32 or wider `[R, W]`, at the token's own column,
        zero where `loss_mask` is False.
    """
    cast = params if dtype is None else models.cast_params(params, dtype)
    segments, mask = batch["segment_ids"], batch["loss_mask"]
    hidden = critic.apply(cast, batch["tokens"], batch["positions"], segments).hidden
    after = models.scores(params, hidden)
    places = jnp.maximum(ops.predictors(segments), 0)
    before = jnp.take_along_axis(after, places, axis=1)
    zero = jnp.zeros((), after.dtype)
    return jnp.where(mask, before, zero), jnp.where(mask, after, zero)


def ppo_loss(
    model: models.Model,
    critic: models.Model,
    *,
    policy: PolicySection,
    kl: KLSection,
    value: CriticSection,
    temperature: float = 1.0,
    dtype: jnp.dtype | None = None,
    token_logps: TokenLogps = ops.linear_token_logps,
) -> LossFn:
    """The loss function of PPO, for `training.make_train_step`.

    Args:
        model: the policy; gives `apply` and `unembed`, and the names of its parameters.
        critic: as the model, with a score head.
        policy, kl, value: settings of the terms `policy`, `kl` and `entropy`, and
            `value`.
        temperature: the sampler's.
        dtype: compute dtype that parameters are cast to; None casts nothing.
        token_logps: on a mesh, from `parallel.split_vocabulary`.

    Returns:
        A function of parameters that hold the critic's under `critic`, and of the
        batches that `_policy.policy_terms` reads, with `old_values` and `returns` `[R,
        W]`. The value's term is the mean over tokens.
    """
    names = tuple(model.params)

    def loss_fn(
        params: Params, method_state: None, batch: Batch, key: jax.Array
    ) -> LossOutput:
        del key  # nothing is drawn
        stats = _policy.token_stats(
            model,
            {name: params[name] for name in names},
            batch,
            temperature=temperature,
            with_entropy=policy.entropy_coefficient > 0.0,
            dtype=dtype,
            token_logps=token_logps,
            slopes=_policy.token_slopes(batch, policy, kl),
        )
        terms, metrics = _policy.policy_terms(stats, batch, policy, kl)
        values, _ = token_values(critic, params[CRITIC], batch, dtype=dtype)
        errors, weights = losses.clipped_value(
            values,
            batch["old_values"],
            batch["returns"],
            batch["loss_mask"],
            clip=value.clip,
        )
        count = jnp.sum(weights)
        terms["value"] = Term(jnp.sum(errors), count, value.coefficient)
        metrics["policy/clipfrac_avg"] = metrics["clip_ratio/region_mean"]
        if value.clip is not None:
            moved = jnp.abs(values - batch["old_values"]) > value.clip
            moved = jax.lax.stop_gradient(jnp.where(moved, weights, 0.0))
            metrics["val/clipfrac_avg"] = Metric(jnp.sum(moved), count)
        return LossOutput(terms, metrics, method_state)

    return loss_fn
