"""A reward model from preference pairs: a score of each text, with any pairwise loss.

`jaxpost train configs/reward/NAME.yaml`, or `run(RewardConfig(...))`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpost import data, losses, models, ops, training
from jaxpost.recipes import _answers, _pair_run, _pairs, _run, _setup
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
from jaxpost.typing import Batch, LossFn, LossOutput, Params, Term


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Settings of one run.

    Attributes:
        recipe: Which recipe the config is for.
        name: Of the run folder.
        run_root: Folder of the run folders.
        seed: Of fresh weights, the order of the data and the step keys.
        loss: Which loss of the margin, the difference of two scores, and its settings.
        centering: Coefficient of the penalty (chosen + rejected)^2, which keeps scores
            near zero; 0 leaves it out.
        processes: On which hosts.
        mesh: On which devices.
        model: Which model; a score head takes the place of its output over the
            vocabulary, unless it has one.
        lora: Adapters to train, beside the whole head, instead of the whole model.
        data: Which pairs; `packing` and `loss_on` are not read.
        optimizer: Which update.
        train: How long, and what to do on the way; `sample_prompts` is not read.
        report: Which pairs to list at the end.
        export: What to write at the end.
    """

    recipe: Literal["reward"] = "reward"
    name: str = "reward"
    run_root: str = "runs"
    seed: int = 0
    loss: losses.PairwiseConfig = losses.PairwiseConfig()
    centering: float = 0.0
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
        if not 0.0 <= self.centering < float("inf"):
            raise ValueError(
                f"centering must be finite and not negative, got {self.centering}."
            )


def reward_scores(
    model: models.Model, *, pad_id: int, dtype: jnp.dtype | None = None
) -> _answers.ScoreFn:
    """The score of both answers of each pair, in one forward pass.

    It is read at the last token that is neither padding nor `pad_id`, as transformers
    reads that of the export; so also where a tokenizer pads with its end token.

    Args:
        model: gives `apply`; its own parameters are not used.
        pad_id: the tokenizer's.
        dtype: compute dtype that the parameters are cast to; None casts nothing. The
            head is not cast.

    Returns:
        A function `(params, batch) -> {"rewards": [B, 2], "margins": [B]}`, chosen
        first; zeros for rows of padding.
    """

    def score(params: Params, batch: Batch) -> Mapping[str, jax.Array]:
        cast = params if dtype is None else models.cast_params(params, dtype)
        joined = batch["tokens"].ndim == 2
        flat = batch if joined else _answers.flatten(batch)
        tokens, segments = flat["tokens"], flat["segment_ids"]
        hidden = model.apply(cast, tokens, flat["positions"], segments).hidden
        seen = (segments != 0) & (tokens != pad_id)
        if joined:  # of each answer, or else of its prompt
            branch = ops.branch_numbers(segments)
            sides = [seen & ((branch == 0) | (branch == side)) for side in (1, 2)]
            last = jnp.stack([ops.last_token(hidden, side) for side in sides], axis=1)
        else:
            last = ops.last_token(hidden, seen).reshape(-1, 2, hidden.shape[-1])
        rewards = models.scores(params, last)
        margins = rewards[:, data.CHOSEN] - rewards[:, data.REJECTED]
        return {"rewards": rewards, "margins": margins}

    return score


def reward_loss(
    score: _answers.ScoreFn, config: losses.PairwiseConfig, *, centering: float = 0.0
) -> LossFn:
    """The loss function of a reward model, for `training.make_train_step`.

    Args:
        score: from `reward_scores`.
        config: which loss of the margins.
        centering: coefficient of `losses.reward_centering`.

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
        rewards, margins = scores["rewards"], scores["margins"]
        values, extras = _pairs.pairwise_values(pairwise, margins, real)
        count = jnp.sum(real, dtype=jnp.float32)
        terms = {config.name: Term(jnp.sum(values), count)}
        if centering:
            squares = losses.reward_centering(
                rewards[:, data.CHOSEN], rewards[:, data.REJECTED]
            )
            total = jnp.sum(jnp.where(real, squares, 0.0))
            terms["centering"] = Term(total, count, centering)
        return LossOutput(
            terms=terms,
            metrics={
                **_pairs.margin_metrics(rewards, margins, real),
                **_pairs.extras_metrics(config, extras, real),
            },
            method_state=method_state,
        )

    return loss_fn


def run(config: RewardConfig, *, resume: bool = False) -> training.TrainState:
    """Trains, evaluates, saves, reports and exports as `config` says.

    Args:
        config: the settings.
        resume: go on from the last complete checkpoint of the run folder.

    Returns:
        The last state.
    """
    with _run.open_run(config, resume=resume, kind=_setup.PAIRS, head="score") as run:
        score = reward_scores(
            run.model.with_lookup(run.layout.lookup),
            pad_id=run.tokenizer.pad_id,
            dtype=run.compute_dtype,
        )
        return _pair_run.train_on_pairs(
            run,
            score,
            reward_loss(score, config.loss, centering=config.centering),
            method=f"Reward model on preference pairs, loss {config.loss.name}; the "
            "score is the one logit of the last token.",
        )
