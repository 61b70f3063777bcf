"""Direct preference optimisation, with any pairwise loss: plain, R³M, adaptive, ...

`jaxpost train configs/dpo/NAME.yaml`, or `run(DPOConfig(...))`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpost import data, losses, models, ops, training
from jaxpost.recipes import _answers, _pair_run, _pairs, _reference, _run, _setup
from jaxpost.recipes._reference import ReferenceName
from jaxpost.recipes._sections import (
    DataSection,
    ExportSection,
    LoraSection,
    MeshSection,
    ModelSection,
    PairReportSection,
    ProcessesSection,
    TrainSection,
)
from jaxpost.typing import Batch, LossFn, LossOutput, Metric, Params, Term


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Settings of one run.

    Attributes:
        recipe: Which recipe the config is for.
        name: Of the run folder.
        run_root: Folder of the run folders.
        seed: Of fresh weights, the order of the data and the step keys.
        beta: Strength of the pull to the reference; a margin is beta times the
            difference of the two answers' log-ratios.
        length_normalized: Divide each log-ratio by its answer's tokens.
        target_margin: Subtracted from every margin; with no reference and
            length-normalised, this is SimPO.
        loss: Which loss of the margin, and its settings.
        reference: What answers are compared with: a live copy of the first model, its
            log-probs precomputed once, the base under the adapters, or nothing; `auto`
            is the base under adapters, else a live copy.
        reference_columns: File of precomputed log-probs, made if it is not there;
            `reference.npz` in the run folder if not given.
        processes: On which hosts.
        mesh: On which devices.
        model: Which model.
        lora: Adapters to train instead of the whole model.
        data: Which pairs; `packing` and `loss_on` are not read.
        optimizer: Which update.
        train: How long, and what to do on the way.
        report: Which pairs to list at the end.
        export: What to write at the end.
    """

    recipe: Literal["dpo"] = "dpo"
    name: str = "dpo"
    run_root: str = "runs"
    seed: int = 0
    beta: float = 0.1
    length_normalized: bool = False
    target_margin: float = 0.0
    loss: losses.PairwiseConfig = losses.PairwiseConfig()
    reference: ReferenceName = "auto"
    reference_columns: str | None = None
    processes: ProcessesSection = ProcessesSection()
    mesh: MeshSection = MeshSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection(train="builtin:arithmetic_pairs")
    optimizer: training.OptimizerConfig = training.OptimizerConfig()
    train: TrainSection = TrainSection()
    report: PairReportSection = PairReportSection()
    export: ExportSection = ExportSection()

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < float("inf"):
            raise ValueError(f"beta must be positive and finite, got {self.beta}.")
        _reference.check_reference(
            self.reference, lora=self.lora.rank > 0, columns=self.reference_columns
        )


def dpo_scores(
    model: models.Model,
    *,
    beta: float,
    length_normalized: bool = False,
    target_margin: float = 0.0,
    reference: ReferenceName = "live",
    loss: losses.PairwiseConfig | None = None,
    dtype: jnp.dtype | None = None,
    token_logps: _answers.TokenLogps = ops.linear_token_logps,
) -> _answers.ScoreFn:
    """What DPO knows of each pair: a function of parameters and a batch.

    Args:
        model: gives `apply` and `unembed`; its own parameters are not used.
        beta, length_normalized, target_margin: see `DPOConfig`.
        reference: `live`: the parameters hold the reference's under `reference`;
            `precomputed`: the batch holds `ref_chosen_logps` and `ref_rejected_logps`
            `[B]`; `lora_base`: the parameters without adapters; or `none`.
        loss: the loss that margins will go into; a hint that makes gradients cheaper.
        dtype: compute dtype that the parameters are cast to; None casts nothing.
        token_logps: on a mesh, from `parallel.split_vocabulary`.

    Returns:
        A function `(params, batch) -> {"logps": [B, 2], "rewards": [B, 2], "margins":
        [B]}`; rewards are `beta` times log-ratios, divided by lengths if those are.
    """

    def logps_of(model: models.Model, params: Params, batch: Batch, **hint: Any):
        if dtype is not None:
            params = models.cast_params(params, dtype)
        return _answers.answer_logps(
            model, params, batch, answers=2, token_logps=token_logps, **hint
        ).logps

    def reference_logps(params: Params, batch: Batch) -> jax.Array | None:
        if reference == "none":
            return None
        if reference == "precomputed":
            columns = [batch[name] for name in _reference.COLUMNS]
            return jax.lax.stop_gradient(jnp.stack(columns, axis=1))
        return _reference.under_reference(
            reference,
            model,
            params,
            lambda model, params: logps_of(model, params, batch),
        )

    def margins_of(logps: jax.Array, ref: jax.Array | None, lengths: jax.Array):
        sides = (data.CHOSEN, data.REJECTED)
        margins = losses.dpo_margins(
            *(logps[:, side] for side in sides),
            *((None, None) if ref is None else (ref[:, side] for side in sides)),
            beta=beta,
            chosen_lengths=lengths[:, data.CHOSEN] if length_normalized else None,
            rejected_lengths=lengths[:, data.REJECTED] if length_normalized else None,
        )
        return margins - target_margin

    def score(params: Params, batch: Batch) -> Mapping[str, jax.Array]:
        policy = _reference.policy_params(params)
        ref, lengths = reference_logps(params, batch), _answers.answer_lengths(batch, 2)
        hint = {}
        if loss is not None:
            foresee = _pairs.slopes(losses.pairwise_loss(loss), margins_of)
            hint = {"foresee": foresee, "operands": (ref, lengths)}
        logps = logps_of(model, policy, batch, **hint)
        ratios = logps if ref is None else logps - ref
        if length_normalized:
            ratios = ratios / jnp.maximum(lengths, 1.0)
        return {
            "logps": logps,
            "rewards": beta * ratios,
            "margins": margins_of(logps, ref, lengths),
        }

    return score


def dpo_loss(score: _answers.ScoreFn, config: losses.PairwiseConfig) -> LossFn:
    """The loss function of DPO, for `training.make_train_step`.

    Args:
        score: from `dpo_scores`.
        config: which loss of the margins.

    Returns:
        A function of batches of pairs (`data.pad_pairs`); the loss is the mean over
        pairs.
    """
    pairwise = losses.pairwise_loss(config)

    def loss_fn(
        params: Params, method_state: None, batch: Batch, key: jax.Array
    ) -> LossOutput:
        del key  # nothing is drawn
        scores, real = score(params, batch), _answers.real_rows(batch)
        values, extras = _pairs.pairwise_values(pairwise, scores["margins"], real)
        count = jnp.sum(real, dtype=jnp.float32)
        totals = jnp.sum(scores["logps"], axis=0)
        return LossOutput(
            terms={config.name: Term(jnp.sum(values), count)},
            metrics={
                **_pairs.margin_metrics(scores["rewards"], scores["margins"], real),
                **_pairs.extras_metrics(config, extras, real),
                "logps/chosen": Metric(totals[data.CHOSEN], count),
                "logps/rejected": Metric(totals[data.REJECTED], count),
            },
            method_state=method_state,
        )

    return loss_fn


def run(config: DPOConfig, *, resume: bool = False) -> training.TrainState:
    """Trains, evaluates, saves, reports and exports as `config` says.

    Args:
        config: the settings.
        resume: go on from the last complete checkpoint of the run folder.

    Returns:
        The last state.
    """
    with _run.open_run(config, resume=resume, kind=_setup.PAIRS) as run:
        name = _reference.resolve(config.reference, lora=config.lora.rank > 0)

        def scores(reference: ReferenceName) -> _answers.ScoreFn:
            return dpo_scores(
                run.model.with_lookup(run.layout.lookup),
                beta=config.beta,
                length_normalized=config.length_normalized,
                target_margin=config.target_margin,
                reference=reference,
                loss=config.loss,
                dtype=run.compute_dtype,
                token_logps=run.layout.token_logps,
            )

        frozen = {"reference": _reference.live_copy(run)} if name == "live" else None
        if name == "precomputed":
            run = _reference.with_reference_columns(
                run, scores("none"), path=config.reference_columns
            )
        score = scores(name)
        return _pair_run.train_on_pairs(
            run,
            score,
            dpo_loss(score, config.loss),
            frozen=frozen,
            method=f"Direct preference optimisation, loss {config.loss.name}.",
        )
