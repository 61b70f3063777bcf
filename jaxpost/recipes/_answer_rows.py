"""Rows with negatives of a run: how many columns, which of them count, P0, their order.

Rows are those of `data.pad_answers`; see `data.AnswerBatches`.
"""

import dataclasses
import functools
import logging
import math
from typing import Any, Literal

import numpy as np

from jaxpost import data
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._run import Run
from jaxpost.recipes._setup import RowKind

log = logging.getLogger("jaxpost")


@dataclasses.dataclass(frozen=True)
class NegativesSection:
    """Which sampled answers are taken when, and what to do with odd ones.

    Attributes:
        per_prompt: Negatives per prompt and step, B.
        sample: Epoch e takes columns e B to (e + 1) B - 1, so that the data needs
            B x epochs; if false, every epoch takes the first B.
        repeated: Negatives that equal another one of the same step: `keep` them, as
            draws are independent; or `drop` all but the first.
        equal: Negatives that equal the right answer: `keep` them, as the sum that is
            estimated has it too; `drop` them; or `refuse` the data.
    """

    per_prompt: int = 2
    sample: bool = True
    repeated: Literal["keep", "drop"] = "keep"
    equal: Literal["keep", "drop", "refuse"] = "keep"

    def __post_init__(self) -> None:
        if self.per_prompt < 1:
            raise ValueError(f"per_prompt must be at least 1, got {self.per_prompt}.")


def row_kind(config: Any) -> RowKind:
    """How the rows of a config are read: no more columns than may be needed.

    Args:
        config: with the sections `negatives` and `train`.
    """
    load = functools.partial(data.load_answers, negative_columns=columns_wanted(config))
    return RowKind("prompt", load, data.pad_answers, joined=True)


def columns_wanted(config: Any) -> int | None:
    """Columns of negatives that training takes; None where that hangs on the number of
    rows."""
    section, train = config.negatives, config.train
    if not section.sample:
        return section.per_prompt
    if train.steps is not None:
        return None
    return section.per_prompt * math.ceil(train.epochs)


def prepare(run: Run) -> Run:
    """The run with as many columns as it needs, odd negatives treated, and the place of
    each training row, `example_index`.

    Raises:
        ConfigError: there are too few columns; or a negative equals the right answer
            and is to be refused.
    """
    section = run.config.negatives
    columns = _columns_needed(run)
    dropped = _dropped(run.examples.train, columns, section, "training")
    rows = data.drop_answers([_fitted(row, columns) for row in run.rows], dropped)
    places = np.arange(len(rows), dtype=np.int32)
    held_out = [_fitted(row, columns) for row in run.eval_rows]
    if held_out:
        dropped = _dropped(run.examples.eval, columns, section, "held-out")
        held_out = data.drop_answers(held_out, dropped)
    return run.with_rows(data.with_columns(rows, {"example_index": places}), held_out)


def _columns_needed(run: Run) -> int:
    section, held = run.config.negatives, len(run.rows[0]["tokens"]) - 1
    epochs = math.ceil(run.total_steps / run.batches.batches_per_epoch)
    epochs = epochs if section.sample else 1
    needed = section.per_prompt * epochs
    if needed > held:
        least = min(run.examples.train, key=lambda item: len(item.negatives)).positive
        raise ConfigError(
            f"negatives.per_prompt {section.per_prompt} x {epochs} epochs are {needed} "
            f"columns of negatives, but {least.source}, row {least.number} has {held}; "
            "sample more (`jaxpost negatives`), train for fewer epochs, or set "
            "negatives.sample to false."
        )
    return needed


def _fitted(row: data.TokenRow, columns: int) -> data.TokenRow:
    """The row with so many negatives: the first ones, or empty ones behind them."""
    fitted = dict(row)
    for name in data.ANSWER_ARRAYS:
        if name in row:
            array = row[name][: 1 + columns]
            missing = 1 + columns - len(array)
            fitted[name] = np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)])
    return fitted


def _dropped(
    items: list[data.Answers], columns: int, section: NegativesSection, part: str
) -> np.ndarray:
    """Which negatives go, bool `[n, columns]`; warns of those that stay."""

    def found(look: Any) -> np.ndarray:
        rows = np.zeros((len(items), columns), bool)
        for place, item in enumerate(items):
            flags = look(item)[:columns]
            rows[place, : len(flags)] = flags
        return rows

    kinds = {
        "equal": ("equal the right answer", found(data.equal_answers)),
        "repeated": (
            "repeat another one of their step",
            found(functools.partial(data.repeated_answers, group=section.per_prompt)),
        ),
    }
    dropped = np.zeros((len(items), columns), bool)
    total = sum(min(len(item.negatives), columns) for item in items)
    for name, (words, flags) in kinds.items():
        if not flags.any():
            continue
        choice = getattr(section, name)
        first = items[int(np.argmax(flags.any(axis=1)))].positive
        message = (
            f"{int(flags.sum())} of {total} {part} negatives {words} (first: "
            f"{first.source}, row {first.number})"
        )
        if choice == "refuse":
            raise ConfigError(
                f"{message}; remove them, or set negatives.{name} to drop or keep."
            )
        if choice == "drop":
            dropped |= flags
        log.warning("%s: negatives.%s is %s.", message, name, choice)
    return dropped


def with_sampler_logps(run: Run) -> Run:
    """The run with `ref_logps`, float32 `[1 + columns]`, from the sampler's own.

    Raises:
        ConfigError: a row has none.
    """

    def extended(
        rows: list[data.TokenRow], items: list[data.Answers]
    ) -> list[data.TokenRow]:
        if not rows:
            return rows
        found = np.zeros((len(rows), len(rows[0]["tokens"])), np.float32)
        for place, item in enumerate(items):
            if item.negative_logps is None:
                raise ConfigError(
                    f"p0 is sampling_prompt, but {item.positive.source}, row "
                    f"{item.positive.number} has no column negative_logps: sample with "
                    "`jaxpost negatives`, or set p0 to train_prompt."
                )
            logps = item.negative_logps[: found.shape[1] - 1]
            found[place, 1 : 1 + len(logps)] = logps  # the right answer's is not used
        return data.with_columns(rows, {"ref_logps": found})

    return run.with_rows(
        extended(run.rows, run.examples.train),
        extended(run.eval_rows, run.examples.eval),
    )


def with_batches(run: Run) -> Run:
    """The run that takes each epoch's columns, and of held-out rows the first ones."""
    section = run.config.negatives
    index, count = run.layout.batch_share
    widths = data.joined_widths(run.rows, answers=1 + section.per_prompt)
    batches = data.AnswerBatches(
        run.rows,
        run.config.train.batch_size,
        negatives=section.per_prompt,
        sample=section.sample,
        seed=run.config.seed,
        process_index=index,
        process_count=count,
        finish=functools.partial(data.join_answers, width=widths),
    )
    held_out = [_fitted(row, section.per_prompt) for row in run.eval_rows]
    return dataclasses.replace(run, batches=batches, eval_rows=held_out)
