"""The pairs of a finished run one by one, into the run folder; see `reports`."""

from typing import Any

import jax
import numpy as np

from jaxpost import data, losses, parallel, reports, training
from jaxpost.recipes import _answers, _pairs
from jaxpost.recipes._run import Run
from jaxpost.typing import Batch, Params


def write(
    run: Run,
    state: training.TrainState,
    score: _answers.ScoreFn,
    config: losses.PairwiseConfig,
) -> None:
    """Scores pairs with the last parameters and writes `pairs/` into the run folder.

    Args:
        run: the finished run; its config has a section `report`.
        state: its last state; the moving average is scored if there is one.
        score: gives `margins` `[B]` and `rewards` `[B, 2]`.
        config: the loss, for each pair's value, delta or tau.
    """
    limit = run.config.report.pairs
    parts = {
        "train": (run.rows[:limit], run.examples.train[:limit]),
        "held out": (run.eval_rows[:limit], run.examples.eval[:limit]),
    }
    rows = [row for part, _ in parts.values() for row in part]
    if not limit or not rows:
        return
    pairwise = losses.pairwise_loss(config)

    def everything(params: Params, batch: Batch) -> dict[str, jax.Array]:
        found = score(params, batch)
        values, extras = pairwise(found["margins"])
        return {
            "margin": found["margins"],
            "chosen_reward": found["rewards"][:, data.CHOSEN],
            "rejected_reward": found["rewards"][:, data.REJECTED],
            "loss": values,
            **extras,
        }

    params = state.joined(use_ema=state.ema is not None)
    scored = _answers.score_rows(run, rows, params, everything)
    pairs = [pair for _, items in parts.values() for pair in items]
    columns: dict[str, Any] = {
        "example_id": [pair.id for pair in pairs],
        "part": [name for name, (_, items) in parts.items() for _ in items],
        "source": [pair.chosen.source for pair in pairs],
        "row": [pair.chosen.number for pair in pairs],
        **scored,
    }
    bounds = None
    if "tau" in scored:
        bounds = _pairs.at_bounds(config, scored["tau"])

    def texts(at: int) -> dict[str, str]:
        chosen, rejected = pairs[at].chosen, pairs[at].rejected
        start = int(np.argmax(chosen.loss_mask))
        decode = run.tokenizer.decode
        return {
            "prompt": decode(chosen.tokens[:start].tolist()),
            "chosen": decode(chosen.tokens[chosen.loss_mask].tolist()),
            "rejected": decode(rejected.tokens[rejected.loss_mask].tolist()),
        }

    def write_files() -> None:
        reports.write_pairs(
            run.folder.path,
            columns,
            texts=texts,
            outliers=run.config.report.outliers,
            bounds=bounds,
        )

    parallel.on_first_process("report of pairs", write_files)
