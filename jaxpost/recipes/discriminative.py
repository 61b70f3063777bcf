"""Discriminative fine-tuning: an answer against sampled ones, without preferences.

`jaxpost train configs/discriminative/NAME.yaml`, or `run(DiscriminativeConfig(...))`.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpost import losses, training
from jaxpost.recipes import (
    _answer_rows,
    _answer_scores,
    _answers,
    _export,
    _reference,
    _run,
)
from jaxpost.recipes._answer_rows import NegativesSection
from jaxpost.recipes._answer_scores import Variant
from jaxpost.recipes._reference import ReferenceName
from jaxpost.recipes._sections import (
    DataSection,
    ExportSection,
    LoraSection,
    MeshSection,
    ModelSection,
    ProcessesSection,
    TrainSection,
)
from jaxpost.typing import Batch, LossFn, LossOutput, Metric, Params, Term

TABLE_ROWS = 256


@dataclasses.dataclass(frozen=True)
class LogUSection:
    """The moving averages, one per training example.

    Attributes:
        initial: Their logarithm before the first visit; 0 is the paper's u = 1.
        placement: Whole on every device, or split like the batch.
    """

    initial: float = 0.0
    placement: Literal["replicated", "sharded"] = "replicated"

    def __post_init__(self) -> None:
        # No array is made here: the processes of a run have not met yet.
        if not math.isfinite(self.initial):
            raise ValueError(f"initial must be finite, got {self.initial}.")


@dataclasses.dataclass(frozen=True)
class DiscriminativeConfig:
    """Settings of one run.

    Attributes:
        recipe: Which recipe the config is for.
        name: Of the run folder.
        run_root: Folder of the run folders.
        seed: Of fresh weights, the order of the data and the step keys.
        variant: `dft` scores an answer by its log-probability and divides by P0, the
            probability that a negative was sampled with; `dft2` by its log-probability
            per token, and needs no P0.
        tau: Temperature.
        gamma: Share of the new value in the moving averages, in (0, 1].
        log_u: The moving averages.
        p0: For `dft`: that of the reference on the training prompt, as in the published
            code; or the sampler's own, from the column `negative_logps`.
        reference: The model that gives P0 on the training prompt: a live copy of the
            first one, its log-probs precomputed once, or the base under the adapters;
            `auto` is the base under adapters, else a live copy. None for the others.
        reference_columns: File of precomputed log-probs, made if it is not there;
            `reference.npz` in the run folder if not given.
        negatives: Which sampled answers are taken when.
        processes: On which hosts.
        mesh: On which devices.
        model: Which model; it should be the one that the negatives were sampled from.
        lora: Adapters to train instead of the whole model.
        data: Which rows, with columns `prompt`, `completion` and `negatives`; `packing`
            and `loss_on` are not read.
        optimizer: Which update.
        train: How long, and what to do on the way.
        export: What to write at the end.
    """

    recipe: Literal["discriminative"] = "discriminative"
    name: str = "discriminative"
    run_root: str = "runs"
    seed: int = 0
    variant: Variant = "dft"
    tau: float = 1.0
    gamma: float = 0.85
    log_u: LogUSection = LogUSection()
    p0: Literal["train_prompt", "sampling_prompt"] = "train_prompt"
    reference: ReferenceName = "auto"
    reference_columns: str | None = None
    negatives: NegativesSection = NegativesSection()
    processes: ProcessesSection = ProcessesSection()
    mesh: MeshSection = MeshSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection(train="builtin:arithmetic_negatives")
    optimizer: training.OptimizerConfig = training.OptimizerConfig()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()

    def __post_init__(self) -> None:
        losses.check_discriminative(tau=self.tau, gamma=self.gamma)
        _answer_scores.check_reference(
            self.variant, self.p0, self.reference, self.reference_columns, self.lora
        )


def init_memory(count: int, *, initial: float = 0.0) -> dict[str, jax.Array]:
    """What the method remembers of `count` training examples before the first step.

    Returns:
        `log_u` float32 and `visits` int32, `[count]` filled up to a multiple of
        `TABLE_ROWS`: so a table that is split over devices has the same shape on any
        number of them, and a run may go on on another.
    """
    size = -(-count // TABLE_ROWS) * TABLE_ROWS
    log_u = losses.init_log_u(size, initial=initial)
    return {"log_u": log_u, "visits": jnp.zeros((size,), jnp.int32)}


def discriminative_loss(
    score: _answers.ScoreFn, *, variant: Variant, tau: float, gamma: float, count: int
) -> LossFn:
    """The loss function of training, for `training.make_train_step`.

    Its method state is `init_memory`'s: the moving averages of the batch's examples are
    read and written at the batch's `example_index`, int32 `[B]`, each once. An index
    outside `[0, count)` makes the loss NaN, so that the step is refused.

    Args:
        score: from `_answer_scores.discriminative_scores`.
        variant, tau, gamma: see `DiscriminativeConfig`.
        count: training examples.

    Returns:
        A function of batches of `data.AnswerBatches`, with `example_index`. The loss is
        the mean over examples; its value means nothing, its gradient does. The metric
        `objective` is the estimate of what falls.
    """

    def loss_fn(
        params: Params, method_state: dict[str, jax.Array], batch: Batch, key: jax.Array
    ) -> LossOutput:
        del key  # nothing is drawn
        table, visits = method_state["log_u"], method_state["visits"]
        real = _answers.real_rows(batch)
        # Rows of padding go beyond the table, where nothing is written.
        index = batch["example_index"]
        known = real & (index >= 0) & (index < count)
        index = jnp.where(known, index, table.shape[0])
        old = table.at[index].get(mode="fill", fill_value=jnp.nan)
        old = jnp.where(real, old, 0.0)
        found = _answer_scores.split(score(params, {**batch, "log_u": old}), variant)
        out = losses.discriminative(log_u=old, tau=tau, gamma=gamma, **found.inputs)
        table = table.at[index].set(out.log_u.astype(table.dtype), mode="drop")
        visits = visits.at[index].add(1, mode="drop")
        values = jnp.where(found.real, out.values, 0.0)
        total = jnp.sum(found.real, dtype=jnp.float32)
        mean, mean_negative = _answers.mean_over(found.real), found.mean_negative
        seen = jnp.sum(visits[:count] > 0, dtype=jnp.float32) / count
        return LossOutput(
            terms={"discriminative": Term(jnp.sum(values), total)},
            metrics={
                **found.metrics(),
                "objective": mean(tau * out.log_u - found.positive_scores),
                "log_u/mean": mean(out.log_u),
                "log_u/visited": Metric(seen, kind="max"),
                "weights/mean": mean_negative(out.weights),
                "weights/max": Metric(jnp.max(out.weights), kind="max"),
            },
            method_state={"log_u": table, "visits": visits},
        )

    return loss_fn


def held_out_loss(score: _answers.ScoreFn, *, variant: Variant, tau: float) -> LossFn:
    """The objective on examples without a moving average: `-s + tau log` of the mean
    over the batch's own negatives. Rows of which no negative is left do not count.

    Args:
        score, variant, tau: as for `discriminative_loss`.
    """

    def loss_fn(
        params: Params, method_state: dict[str, jax.Array], batch: Batch, key: jax.Array
    ) -> LossOutput:
        del key  # nothing is drawn
        found = _answer_scores.split(score(params, batch), variant)
        zeros = jnp.zeros(found.real.shape, jnp.float32)
        out = losses.discriminative(log_u=zeros, tau=tau, gamma=1.0, **found.inputs)
        counted = found.real & jnp.any(found.inputs["neg_mask"], axis=1)
        values = tau * out.log_u - found.positive_scores
        return LossOutput(
            terms={
                "discriminative": Term(
                    jnp.sum(jnp.where(counted, values, 0.0)),
                    jnp.sum(counted, dtype=jnp.float32),
                )
            },
            metrics=found.metrics(),
            method_state=method_state,
        )

    return loss_fn


def run(config: DiscriminativeConfig, *, resume: bool = False) -> training.TrainState:
    """Trains, evaluates, saves and exports as `config` says.

    Args:
        config: the settings.
        resume: go on from the last complete checkpoint of the run folder; refused if
            that lacks the moving averages.

    Returns:
        The last state; its `method_state` holds `log_u` and `visits`, in the order of
        the training rows.
    """
    kind = _answer_rows.row_kind(config)
    with _run.open_run(config, resume=resume, kind=kind) as run:
        name = _answer_scores.resolve(
            config.variant, config.p0, config.reference, config.lora
        )
        count = len(run.rows)

        def scores(reference: ReferenceName, negatives: int) -> _answers.ScoreFn:
            return _answer_scores.discriminative_scores(
                run.model.with_lookup(run.layout.lookup),
                reference=reference,
                answers=1 + negatives,
                foresee=_answer_scores.slopes(
                    config.variant, tau=config.tau, gamma=config.gamma
                ),
                dtype=run.compute_dtype,
                token_logps=run.layout.token_logps,
            )

        run = _answer_rows.prepare(run)
        frozen = {"reference": _reference.live_copy(run)} if name == "live" else None
        if config.variant == "dft" and config.p0 == "sampling_prompt":
            run = _answer_rows.with_sampler_logps(run)
        elif name == "precomputed":
            run = _reference.with_reference_columns(
                run,
                scores("none", len(run.rows[0]["tokens"]) - 1),
                path=config.reference_columns,
                columns=("ref_logps",),
            )
        run = _answer_rows.with_batches(run)
        score = scores(name, config.negatives.per_prompt)
        settings = {"variant": config.variant, "tau": config.tau}
        step = training.make_train_step(
            discriminative_loss(score, gamma=config.gamma, count=count, **settings),
            run.tx,
            accumulate=config.train.accumulate,
            ema_decay=config.train.ema_decay,
        )
        numbers = _answer_scores.every_number(score)
        with _answers.naming_rows(run, numbers, "logps", "Log-probs"):
            state = run.train(
                step,
                held_out_loss(score, **settings),
                method_state=init_memory(count, initial=config.log_u.initial),
                method_axes=None
                if config.log_u.placement == "replicated"
                else {"log_u": ("batch",), "visits": ("batch",)},
                frozen=frozen,
            )
        if config.export.enabled:
            _export.export(
                run,
                state,
                method=f"Discriminative fine-tuning ({config.variant}) against sampled "
                "answers.",
            )
    return state
