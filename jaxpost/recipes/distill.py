"""Distillation: a student learns a teacher's distributions of the next token.

`jaxpost train configs/distill/NAME.yaml`, or `run(DistillConfig(...))`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpost import losses, models, ops, training
from jaxpost.recipes import _distill_cache, _distill_teacher, _export, _on_policy, _run
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._distill_teacher import CompareFn, TeacherSection
from jaxpost.recipes._on_policy import OnPolicySection
from jaxpost.recipes._sections import (
    DataSection,
    ExportSection,
    LoraSection,
    MeshSection,
    ModelSection,
    ProcessesSection,
    TrainSection,
)
from jaxpost.recipes.sft import TokenLogps
from jaxpost.typing import Batch, LossFn, LossOutput, Metric, Params, Term


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Settings of one run.

    Attributes:
        recipe: Which recipe the config is for.
        name: Of the run folder.
        run_root: Folder of the run folders.
        seed: Of fresh weights, the order of the data, the step keys and the sampler.
        alpha: 0 is the forward divergence KL(teacher || student), 1 the reverse one,
            between them the generalised Jensen-Shannon divergence.
        temperature: Divides the logits of both in the divergence.
        squared_scale: Multiply the divergence in the loss with the temperature's
            square, by which its gradient shrinks; logged without.
        coefficient: Of the divergence in the loss.
        sft_coefficient: Of the negative log-likelihood of the data's answers.
        teacher: Which model to learn from.
        on_policy: Steps on the student's own answers.
        processes: On which hosts.
        mesh: On which devices.
        model: Which model is the student.
        lora: Adapters to train instead of the whole model.
        data: Which rows.
        optimizer: Which update.
        train: How long, and what to do on the way.
        export: What to write at the end.
    """

    recipe: Literal["distill"] = "distill"
    name: str = "distill"
    run_root: str = "runs"
    seed: int = 0
    alpha: float = 0.0
    temperature: float = 1.0
    squared_scale: bool = True
    coefficient: float = 1.0
    sft_coefficient: float = 0.0
    teacher: TeacherSection = TeacherSection()
    on_policy: OnPolicySection = OnPolicySection()
    processes: ProcessesSection = ProcessesSection()
    mesh: MeshSection = MeshSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    optimizer: training.OptimizerConfig = training.OptimizerConfig()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}.")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be positive and finite, got {self.temperature}."
            )
        if not 0.0 < self.coefficient < float("inf"):
            raise ValueError(
                f"coefficient must be positive and finite, got {self.coefficient}."
            )
        if not 0.0 <= self.sft_coefficient < float("inf"):
            raise ValueError(
                "sft_coefficient must be at least 0 and finite, got "
                f"{self.sft_coefficient}."
            )
        if self.teacher.rest == "teacher" and self.alpha == 1.0:
            raise ValueError(
                "teacher.rest is teacher, with which alpha = 1 would be infinite; "
                "choose bucket or renormalize, or a smaller alpha."
            )
        if self.on_policy.every and self.teacher.mode == "cached":
            raise ValueError(
                "on_policy.every is set, but a cached teacher never read the student's "
                "answers: set teacher.mode to live."
            )
        if self.on_policy.every and self.sft_coefficient:
            raise ValueError(
                "on_policy.every is set, so sft_coefficient would train on the "
                "student's own answers as if they were right: set it to 0."
            )


def distill_loss(
    model: models.Model,
    compare: CompareFn,
    *,
    coefficient: float = 1.0,
    sft_coefficient: float = 0.0,
    dtype: jnp.dtype | None = None,
    token_logps: TokenLogps = ops.linear_token_logps,
) -> LossFn:
    """The loss function of distillation, for `training.make_train_step`.

    Args:
        model: the student; gives `apply` and `unembed`, its own parameters are not
            used.
        compare: from `live_teacher` or `cached_teacher`.
        coefficient: of the divergence's mean over tokens, the temperature's square
            included if wanted.
        sft_coefficient: of the mean negative log-likelihood; 0 leaves it out, with the
            products it costs.
        dtype: compute dtype that the student's parameters are cast to; None casts
            nothing.
        token_logps: on a mesh, from `parallel.split_vocabulary`.

    Returns:
        A function of batches with `tokens`, `positions`, `segment_ids` and `loss_mask`,
        each `[B, T]`, and what `compare` reads.
    """

    def loss_fn(
        params: Params, method_state: None, batch: Batch, key: jax.Array
    ) -> LossOutput:
        del key  # nothing is drawn
        policy = {name: value for name, value in params.items() if name != "teacher"}
        if dtype is not None:
            policy = models.cast_params(policy, dtype)
        hidden = model.apply(
            policy, batch["tokens"], batch["positions"], batch["segment_ids"]
        ).hidden
        head = model.unembed(policy)
        targets, mask = ops.shift_targets(batch["tokens"], batch["loss_mask"])
        values, tail = compare(params, batch, hidden, head, mask)
        count = jnp.sum(mask, dtype=jnp.float32)

        def total(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(mask, x, 0.0))

        terms = {"divergence": Term(total(values), count, coefficient)}
        metrics = {}
        if tail is not None:
            metrics["teacher/tail"] = Metric(total(tail), count)
        if sft_coefficient:
            stats = token_logps(
                hidden, head, targets, grad_weights=mask, with_top1=True
            )
            nll, weights = losses.sft(stats.logps, mask)
            terms["nll"] = Term(jnp.sum(nll), jnp.sum(weights), sft_coefficient)
            assert stats.top1 is not None  # asked for above
            metrics["mean_token_accuracy"] = Metric(jnp.sum(stats.top1), count)
        return LossOutput(terms, metrics, method_state)

    return loss_fn


def run(config: DistillConfig, *, resume: bool = False) -> training.TrainState:
    """Trains, evaluates, saves and exports as `config` says.

    Args:
        config: the settings.
        resume: go on from the last complete checkpoint of the run folder.

    Returns:
        The last state.

    Raises:
        ConfigError: neither a teacher nor its cache is named, or they do not fit the
            student.
    """
    section, frozen = config.teacher, None
    if section.path is None and section.cache is None:
        raise ConfigError("teacher.path must be given: the folder or hub name of one.")
    with _run.open_run(config, resume=resume) as run:
        options = {
            "alpha": config.alpha,
            "temperature": config.temperature,
            "rest": section.rest,
            "split": _distill_teacher.split_over(run.layout),
        }
        if section.mode == "cached":
            run = _distill_cache.with_cached_teacher(
                run, section, temperature=config.temperature
            )
            compare = _distill_teacher.cached_teacher(**options)
        else:
            teacher = _distill_teacher.open_teacher(run, section)
            frozen = {"teacher": teacher.params}
            compare = _distill_teacher.live_teacher(
                teacher.with_lookup(run.layout.lookup),
                top_k=section.top_k,
                support=section.support,
                vocab_size=_distill_teacher.common_vocabulary(run, teacher),
                **options,
            )
        scale = config.temperature**2 if config.squared_scale else 1.0
        loss_fn = distill_loss(
            run.model.with_lookup(run.layout.lookup),
            compare,
            coefficient=config.coefficient * scale,
            sft_coefficient=config.sft_coefficient,
            dtype=run.compute_dtype,
            token_logps=run.layout.token_logps,
        )
        prepare = None
        if config.on_policy.every:
            prepare = _on_policy.OnPolicy(run, config.on_policy)
            # Sampled rows have the greatest length, which may be one more.
            run = dataclasses.replace(run, lengths=run.lengths + 1)
        step = training.make_train_step(
            loss_fn,
            run.tx,
            accumulate=config.train.accumulate,
            ema_decay=config.train.ema_decay,
        )
        state = run.train(step, loss_fn, frozen=frozen, prepare=prepare)
        if config.export.enabled:
            _export.export(
                run,
                state,
                method="Distillation: mean divergence from a teacher's distribution of "
                f"each trained token, alpha {config.alpha}.",
            )
    return state
