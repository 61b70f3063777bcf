"""How the recipes of preference pairs end: train, list the pairs, export."""

from jaxpost import training
from jaxpost.recipes import _answers, _export, _pair_report
from jaxpost.recipes._run import Run
from jaxpost.typing import LossFn, Params


def train_on_pairs(
    run: Run,
    score: _answers.ScoreFn,
    loss_fn: LossFn,
    *,
    frozen: Params | None = None,
    method: str,
) -> training.TrainState:
    """Trains, writes the report of the pairs, and exports, as the run's config says.

    Args:
        run: opened, not trained yet; its config has the sections of a pair recipe.
        score: what is known of each pair, with `margins` and `rewards`.
        loss_fn: of the same scores.
        frozen: see `Run.train`.
        method: in words, for the exported model's card.

    Returns:
        The last state.
    """
    config = run.config
    step = training.make_train_step(
        loss_fn,
        run.tx,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema_decay,
    )
    with _answers.naming_rows(run, score, "margins", "Margins"):
        state = run.train(step, loss_fn, frozen=frozen)
    _pair_report.write(run, state, score, config.loss)
    if config.export.enabled:
        _export.export(run, state, method=method)
    return state
