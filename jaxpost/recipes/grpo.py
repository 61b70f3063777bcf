"""Group-relative policy optimisation: GRPO, and RLOO, DAPO, Dr. GRPO, GSPO by settings.

`jaxpost train configs/grpo/NAME.yaml`, or `run(GRPOConfig(...))`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import advantages, models, ops, training
from jaxpost.recipes import (
    _export,
    _policy,
    _reference,
    _rewards,
    _round_rows,
    _rounds,
    _run,
    _setup,
)
from jaxpost.recipes._answers import TokenLogps
from jaxpost.recipes._policy import KLSection, PolicySection
from jaxpost.recipes._reference import ReferenceName
from jaxpost.recipes._round_rows import Played
from jaxpost.recipes._rounds import Finish, Finished, RolloutSection, ScoreFn
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
from jaxpost.typing import Batch, LossFn, LossOutput, Params, RewardFn


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Settings of one run.

    Attributes:
        recipe: Which recipe the config is for.
        name: Of the run folder.
        run_root: Folder of the run folders.
        seed: Of fresh weights, the order of the prompts and the sampler.
        advantage: Rewards relative to their group's mean, divided by its deviation
            (GRPO) or not (RLOO: the mean of the others).
        reference: What the KL is measured from: a live copy of the first model, or the
            base under adapters; `auto` chooses. Not used without a KL.
        rewards: What answers are judged by, by default their final number; see
            docs/rewards.md.
        rollout: How they are drawn.
        policy: The loss.
        kl: The pull to the reference.
        processes: On which hosts.
        mesh: On which devices.
        model: Which model.
        lora: Adapters to train instead of the whole model.
        data: Which prompts; their other columns reach the rewards by name.
        optimizer: Which update.
        train: How long, `batch_size` being prompts and `steps` optimizer steps.
        export: What to write at the end.
    """

    recipe: Literal["grpo"] = "grpo"
    name: str = "grpo"
    run_root: str = "runs"
    seed: int = 0
    advantage: Literal["group_relative", "leave_one_out"] = "group_relative"
    reference: ReferenceName = "auto"
    rewards: tuple[RewardSection, ...] = (RewardSection(),)
    rollout: RolloutSection = RolloutSection()
    policy: PolicySection = PolicySection()
    kl: KLSection = KLSection()
    processes: ProcessesSection = ProcessesSection()
    mesh: MeshSection = MeshSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    optimizer: training.OptimizerConfig = training.OptimizerConfig()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()

    def __post_init__(self) -> None:
        if self.rollout.samples < 2:
            raise ValueError(
                f"rollout.samples is {self.rollout.samples}: an answer is compared "
                "with the others of its group, so there must be at least 2."
            )
        if self.reference in ("precomputed", "none"):
            raise ValueError(
                f"reference is {self.reference}, but answers are drawn anew: choose "
                "auto, live or lora_base (and kl.in_loss 0 for no reference)."
            )
        _reference.check_reference(
            self.reference, lora=self.lora.rank > 0, columns=None
        )


def grpo_loss(
    model: models.Model,
    policy: PolicySection,
    kl: KLSection,
    *,
    temperature: float = 1.0,
    dtype: jnp.dtype | None = None,
    token_logps: TokenLogps = ops.linear_token_logps,
) -> LossFn:
    """The loss function of GRPO, for `training.make_train_step`.

    Args:
        model: gives `apply` and `unembed`; its own parameters are not used.
        policy, kl: settings.
        temperature: the sampler's.
        dtype: compute dtype that the parameters are cast to; None casts nothing.
        token_logps: on a mesh, from `parallel.split_vocabulary`.

    Returns:
        A function of joined rows; see `_policy.policy_terms`.
    """

    def loss_fn(
        params: Params, method_state: None, batch: Batch, key: jax.Array
    ) -> LossOutput:
        del key  # nothing is drawn
        stats = _policy.token_stats(
            model,
            _reference.policy_params(params),
            batch,
            temperature=temperature,
            with_entropy=policy.entropy_coefficient > 0.0,
            dtype=dtype,
            token_logps=token_logps,
            slopes=_policy.token_slopes(batch, policy, kl),
        )
        terms, metrics = _policy.policy_terms(stats, batch, policy, kl)
        return LossOutput(terms, metrics, method_state)

    return loss_fn


def group_advantages(config: GRPOConfig) -> Finish:
    """From a round and its scores to what the loss reads: advantages and weights."""
    functions = {
        "group_relative": advantages.group_relative,
        "leave_one_out": advantages.leave_one_out,
    }

    def finish(played: Played, batch: dict[str, np.ndarray]) -> Finished:
        rewards, numbers = played.rewards, {}
        if config.kl.in_reward:
            ratios = _round_rows.per_sequence(
                ops.kl_estimate(
                    jnp.asarray(batch["old_logps"]),
                    jnp.asarray(batch["ref_logps"]),
                    kind=config.kl.kind,
                ),
                batch,
            )
            rewards = rewards - config.kl.in_reward * ratios.reshape(rewards.shape)
            numbers["objective/kl"] = float(ratios.mean())
        gains = functions[config.advantage](
            jnp.asarray(rewards, jnp.float32), mask=jnp.asarray(played.given)
        )
        batch["advantages"] = _round_rows.per_token(np.asarray(gains), batch)
        batch |= _round_rows.loss_weights(
            batch,
            len(played.prompts),
            divide_by=config.policy.divide_by,
            max_tokens=config.rollout.max_new_tokens,
        )
        return Finished(batch, numbers)

    return finish


def run(
    config: GRPOConfig,
    *,
    resume: bool = False,
    rewards: Mapping[str, RewardFn] | None = None,
) -> training.TrainState:
    """Trains, evaluates, saves and exports as `config` says.

    Args:
        config: the settings.
        resume: go on from the last complete checkpoint of the run folder.
        rewards: functions by name, each of weight 1, instead of `config.rewards`.

    Returns:
        The last state.
    """
    with (
        _run.open_run(
            config, resume=resume, kind=_setup.PROMPTS, updates=config.rollout.updates
        ) as run,
        _rewards.open_judge(config.rewards, rewards) as judge,
    ):
        model = run.model.with_lookup(run.layout.lookup)
        options = {
            "temperature": config.rollout.temperature,
            "dtype": run.compute_dtype,
            "token_logps": run.layout.token_logps,
        }
        reference = None
        if config.kl.used:
            reference = _reference.resolve(config.reference, lora=config.lora.rank > 0)
        frozen = None
        if reference == "live":
            frozen = {"reference": _reference.live_copy(run)}
        score = None
        if reference is not None or config.rollout.updates > 1:
            score = score_round(model, reference, **options)
        rounds = _rounds.Rounds(
            run,
            config.rollout,
            judge=judge,
            score=score,
            finish=group_advantages(config),
        )
        loss_fn = grpo_loss(model, config.policy, config.kl, **options)
        step = training.make_train_step(
            loss_fn,
            run.tx,
            accumulate=config.train.accumulate,
            ema_decay=config.train.ema_decay,
        )
        state = dataclasses.replace(run, lengths=rounds.lengths).train(
            step,
            loss_fn,
            frozen=frozen,
            batches=rounds,
            prepare=rounds.prepare,
            eval_fn=_rounds.held_out_rewards(run, config.rollout, judge),
        )
        if config.export.enabled:
            _export.export(
                run,
                state,
                method="Group-relative policy optimisation with verifiable rewards.",
            )
    return state


def score_round(
    model: models.Model,
    reference: ReferenceName | None,
    **options: Any,
) -> ScoreFn:
    """Log-probs of a round before its first step: `old_logps`, and `ref_logps` if there
    is a reference; `options` as in `_policy.token_stats`."""

    def logps_of(model: models.Model, params: Params, batch: Batch) -> jax.Array:
        logps = _policy.token_stats(model, params, batch, **options).logps
        return jnp.where(batch["loss_mask"], logps, 0.0)

    def score(params: Params, batch: Batch) -> dict[str, jax.Array]:
        found = {"old_logps": logps_of(model, _reference.policy_params(params), batch)}
        if reference is not None:
            found["ref_logps"] = _reference.under_reference(
                reference,
                model,
                params,
                lambda model, params: logps_of(model, params, batch),
            )
        return found

    return score
