"""Self-Rewarding PPO: the reward is how much more likely fine-tuning made an answer.

`jaxpost train configs/self_rewarding_ppo/NAME.yaml`, or
`run(SelfRewardingPPOConfig(...))`. What each choice of KL ends in:
docs/self_rewarding_ppo.md.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import models, rewards, training
from jaxpost.recipes import (
    _frozen,
    _ppo_round,
    _ppo_run,
    _reference,
    _rewards,
    _round_rows,
    _run,
    _setup,
)
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._policy import PolicySection
from jaxpost.recipes._ppo_round import AdvantageSection, Earned, EarnFn
from jaxpost.recipes._ppo_terms import (
    CriticSection,
    PPOKLSection,
    PPOOptimizerConfig,
    PPORolloutSection,
)
from jaxpost.recipes._round_rows import Played
from jaxpost.recipes._run import Run
from jaxpost.recipes._sections import (
    DataSection,
    ExportSection,
    LoraSection,
    MeshSection,
    ModelSection,
    ProcessesSection,
    TrainSection,
)
from jaxpost.rewards import RewardSection

log = logging.getLogger("jaxpost")

SFT, BASE = "sft", "base"


@dataclasses.dataclass(frozen=True)
class SelfRewardSection:
    """The reward, `log p_sft - log p_base` of an answer, its end token included.

    Attributes:
        base: Folder or hub name of the model before fine-tuning.
        sft: Of the fine-tuned model; a copy of the policy as it starts if not given.
        place: Where it is earned: all of it at the answer's last token, or each token's
            part there.
    """

    base: str | None = None
    sft: str | None = None
    place: Literal["end", "token"] = "end"


@dataclasses.dataclass(frozen=True)
class SelfRewardingPPOConfig:
    """Settings of one run.

    Attributes:
        recipe: Which recipe the config is for.
        name: Of the run folder.
        run_root: Folder of the run folders.
        seed: Of fresh weights, the order of the prompts and the sampler.
        self_reward: The models that reward, and where.
        reference: What the KL is measured from: the fine-tuned model, its base, or
            nothing. It decides what is learned.
        kl: The pull to it. The default, 0.05 in the reward, is ours: the publication's
            is not known.
        rollout: How answers are drawn, and how often they are trained on.
        advantage: From rewards and values to advantages.
        policy: The policy's loss.
        critic: The value function.
        eval_rewards: What greedy answers to held-out prompts are judged by; never
            trained on.
        processes: On which hosts.
        mesh: On which devices.
        model: Which model to start from, the fine-tuned one.
        lora: Not supported here; rank must be 0.
        data: Which prompts; answers in the rows are not read, but by `eval_rewards`.
        optimizer: Which update of the policy, and of the critic but for its rate.
        train: How long, `batch_size` being prompts and `steps` optimizer steps.
        export: What to write at the end.
    """

    recipe: Literal["self_rewarding_ppo"] = "self_rewarding_ppo"
    name: str = "self_rewarding_ppo"
    run_root: str = "runs"
    seed: int = 0
    self_reward: SelfRewardSection = SelfRewardSection()
    reference: Literal["sft", "base", "none"] = "sft"
    kl: PPOKLSection = PPOKLSection()
    rollout: PPORolloutSection = PPORolloutSection()
    advantage: AdvantageSection = AdvantageSection()
    policy: PolicySection = PolicySection()
    critic: CriticSection = CriticSection()
    eval_rewards: tuple[RewardSection, ...] = ()
    processes: ProcessesSection = ProcessesSection()
    mesh: MeshSection = MeshSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    optimizer: PPOOptimizerConfig = PPOOptimizerConfig()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()

    def __post_init__(self) -> None:
        _ppo_run.refuse_lora(self.recipe, self.lora)
        if self.reference == "none" and self.kl.used:
            raise ValueError(
                f"reference is none, but kl has the coefficient "
                f"{self.kl.in_reward or self.kl.in_loss}: set it to 0, or name sft or "
                "base."
            )


def run(config: SelfRewardingPPOConfig, *, resume: bool = False) -> training.TrainState:
    """Trains, evaluates, saves and exports as `config` says.

    Args:
        config: the settings.
        resume: go on from the last complete checkpoint of the run folder.

    Returns:
        The last state; its parameters hold the critic's under `critic`.

    Raises:
        VocabularyMismatchError: the models do not have the same tokens.
        ConfigError: settings that do not fit the models or the data.
        ValueError: a self-reward is not finite.
    """
    if config.self_reward.base is None:
        raise ConfigError(
            "self_reward.base must be given: the folder or hub name of the model "
            "before fine-tuning."
        )
    with (
        _run.open_run(
            config, resume=resume, kind=_setup.PROMPTS, updates=config.rollout.updates
        ) as run,
        (
            _rewards.open_judge(config.eval_rewards)
            if config.eval_rewards
            else contextlib.nullcontext()
        ) as judge,
    ):
        frozen = open_models(run)
        return _ppo_run.train(
            run,
            earn=earn_self_rewards(
                config.self_reward.place, watch=not resume, policy=config.model.path
            ),
            frozen=frozen,
            reference=None if config.reference == "none" else config.reference,
            judge=None,
            eval_judge=judge,
            method="Self-Rewarding PPO: the log-ratio of a fine-tuned model to its "
            f"base as reward, KL to {config.reference}.",
        )


def open_models(run: Run) -> dict[str, models.Model]:
    """The fine-tuned model and its base, `sft` and `base`, on the run's devices.

    Raises:
        VocabularyMismatchError: their tokens are not the policy's.
        ConfigError: one is no language model, or does not know texts so long.
    """
    section, found = run.config.self_reward, {}
    for name in (SFT, BASE):
        path = getattr(section, name)
        if path is None:
            found[name] = run.model.replace(params=_reference.live_copy(run))
        else:
            found[name] = _frozen.open_frozen(
                run, path, key=f"self_reward.{name}", roles=("policy", f"{name} model")
            )
        _check_positions(run, name, found[name])
    if _equal(found[SFT].params, found[BASE].params):
        log.warning(
            "SELF-REWARD IS ZERO: the sft and the base model are the same (%s), so "
            "every answer earns 0 and only the KL is left. Name the model before "
            "fine-tuning in self_reward.base.",
            section.base,
        )
    return found


def _check_positions(run: Run, name: str, model: models.Model) -> None:
    longest = max(len(p.tokens) for p in run.examples.train + run.examples.eval)
    room = run.config.rollout.max_new_tokens
    if longest + room > model.config.max_positions:
        raise ConfigError(
            f"the longest prompt has {longest} tokens, and with "
            f"rollout.max_new_tokens {room} more is over the {name} model's "
            f"{model.config.max_positions} positions; lower one of them."
        )


def _equal(one: object, two: object) -> bool:
    """Whether two parameter trees hold the same numbers."""
    if jax.tree.structure(one) != jax.tree.structure(two):
        return False
    return all(
        a.shape == b.shape and bool(jnp.array_equal(a, b))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


def earn_self_rewards(
    place: Literal["end", "token"], *, watch: bool, policy: str | None
) -> EarnFn:
    """The rewards of rounds, for `_ppo_round.finish_round`.

    Args:
        place: see `SelfRewardSection`.
        watch: warn if the first round has rewards that a policy which starts as the
            fine-tuned model cannot have: a negative mean, or none at all.
        policy: the name of that model, for the warning.
    """
    first = watch

    def earn(played: Played, batch: Mapping[str, np.ndarray]) -> Earned:
        nonlocal first
        mask, shape = batch["loss_mask"], played.lengths.shape
        sft, base = (jnp.asarray(_ppo_round.raw_logps(batch, n)) for n in (SFT, BASE))
        given = rewards.self_reward(sft, base, jnp.asarray(mask))
        tokens = np.asarray(given.token_rewards)
        found = _round_rows.per_sequence(tokens, batch).reshape(shape)
        lengths = batch["answer_lengths"].reshape(shape)
        kept = lengths > 0  # the others are not trained on
        rewards.check_self_rewards(found[kept], lengths[kept])
        if first:
            _warn_of_odd_rewards(found[kept], policy)
        first = False
        return Earned(
            found,
            tokens if place == "token" else None,
            _self_reward_numbers(found[kept], lengths[kept], batch, shape, kept),
        )

    return earn


def _warn_of_odd_rewards(found: np.ndarray, policy: str | None) -> None:
    if not found.size:
        return
    mean = float(np.mean(found))
    if not found.any():
        log.warning(
            "SELF-REWARD IS ZERO: all %d answers of the first round earn exactly 0. "
            "Are self_reward.sft and self_reward.base the same model?",
            found.size,
        )
    elif mean < 0.0:
        log.warning(
            "SELF-REWARD IS NEGATIVE: the mean over the %d answers of the first round "
            "is %.4g (standard error %.2g), but a policy that starts as the sft model "
            "earns KL(sft || base) >= 0 in expectation. Are self_reward.sft and "
            "self_reward.base swapped, or does %s start from another model?",
            found.size,
            mean,
            float(np.std(found)) / np.sqrt(found.size),
            policy or "the policy",
        )


def _self_reward_numbers(
    found: np.ndarray,
    lengths: np.ndarray,
    batch: Mapping[str, np.ndarray],
    shape: tuple[int, ...],
    kept: np.ndarray,
) -> dict[str, float]:
    """How large rewards are, in all and per token, and how far the policy has gone."""
    if not found.size:
        return {}
    numbers = {
        "self_reward/mean": float(np.mean(found)),
        "self_reward/std": float(np.std(found)),
        "self_reward/per_token": float(np.sum(found) / np.sum(lengths)),
    }
    for name in (SFT, BASE):
        ratios = batch["old_logps"] - batch[f"{name}_logps"]
        sums = _round_rows.per_sequence(ratios, batch).reshape(shape)[kept]
        numbers[f"kl/{name}"] = float(np.mean(sums))
    return numbers
