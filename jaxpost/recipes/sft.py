"""Supervised fine-tuning: the mean negative log-likelihood of the answers' tokens.

`jaxpost train configs/sft/NAME.yaml`, or `run(SFTConfig(...))`.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpost import losses, models, ops, training
from jaxpost.recipes import _export, _run
from jaxpost.recipes._sections import (
    DataSection,
    ExportSection,
    LoraSection,
    MeshSection,
    ModelSection,
    ProcessesSection,
    TrainSection,
)
from jaxpost.typing import Batch, LossFn, LossOutput, Metric, Params, Term, TokenStats

TokenLogps = Callable[..., TokenStats]


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Settings of one run.

    Attributes:
        recipe: Which recipe the config is for.
        name: Of the run folder.
        run_root: Folder of the run folders.
        seed: Of fresh weights, the order of the data and the step keys.
        processes: On which hosts.
        mesh: On which devices.
        model: Which model.
        lora: Adapters to train instead of the whole model.
        data: Which rows.
        optimizer: Which update.
        train: How long, and what to do on the way.
        export: What to write at the end.
    """

    recipe: Literal["sft"] = "sft"
    name: str = "sft"
    run_root: str = "runs"
    seed: int = 0
    processes: ProcessesSection = ProcessesSection()
    mesh: MeshSection = MeshSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    optimizer: training.OptimizerConfig = training.OptimizerConfig()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()


def sft_loss(
    model: models.Model,
    *,
    dtype: jnp.dtype | None = None,
    token_logps: TokenLogps = ops.linear_token_logps,
) -> LossFn:
    """The loss function of fine-tuning, for `training.make_train_step`.

    Args:
        model: gives `apply` and `unembed`; its own parameters are not used.
        dtype: compute dtype that the parameters are cast to; None casts nothing.
        token_logps: on a mesh, from `parallel.split_vocabulary`.

    Returns:
        A function of batches with `tokens`, `positions`, `segment_ids` and `loss_mask`,
        each `[B, T]`.
    """

    def loss_fn(
        params: Params, method_state: None, batch: Batch, key: jax.Array
    ) -> LossOutput:
        del key  # nothing is drawn
        if dtype is not None:
            params = models.cast_params(params, dtype)
        output = model.apply(
            params, batch["tokens"], batch["positions"], batch["segment_ids"]
        )
        targets, mask = ops.shift_targets(batch["tokens"], batch["loss_mask"])
        stats = token_logps(
            output.hidden,
            model.unembed(params),
            targets,
            grad_weights=mask,
            with_top1=True,
        )
        values, weights = losses.sft(stats.logps, mask)
        count = jnp.sum(weights)
        assert stats.top1 is not None  # asked for above
        return LossOutput(
            terms={"nll": Term(jnp.sum(values), count)},
            metrics={"mean_token_accuracy": Metric(jnp.sum(stats.top1), count)},
            method_state=method_state,
        )

    return loss_fn


def run(config: SFTConfig, *, resume: bool = False) -> training.TrainState:
    """Trains, evaluates, saves and exports as `config` says.

    Args:
        config: the settings.
        resume: go on from the last complete checkpoint of the run folder.

    Returns:
        The last state.
    """
    with _run.open_run(config, resume=resume) as run:
        loss_fn = sft_loss(
            run.model.with_lookup(run.layout.lookup),
            dtype=run.compute_dtype,
            token_logps=run.layout.token_logps,
        )
        step = training.make_train_step(
            loss_fn,
            run.tx,
            accumulate=config.train.accumulate,
            ema_decay=config.train.ema_decay,
        )
        state = run.train(step, loss_fn)
        if config.export.enabled:
            _export.export(
                run,
                state,
                method="Supervised fine-tuning: mean negative log-likelihood of the "
                "trained tokens.",
            )
    return state
