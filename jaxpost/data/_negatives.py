"""An answer and several sampled ones in one row: columns `completion`, `negatives`.

A row is `[1 + columns, T]`, the right answer first. Each epoch of training takes
columns of its own, or all take the same. Knows no loss.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpost.data._batches import Batches
from jaxpost.data._columns import Format, check_message
from jaxpost.data._encode import (
    Example,
    OnTooLong,
    check_settings,
    encode_answer,
    example_id,
    finish_example,
)
from jaxpost.data._errors import BadRow, BadRows, OnBadRow
from jaxpost.data._load import load_encoded
from jaxpost.data._packing import TokenRow
from jaxpost.data._pairs import join_ids, pad_together
from jaxpost.data._records import LINE_LIMIT_BYTES, Row
from jaxpost.data._tokenizer import Tokenizer

POSITIVE = 0
"""Place of the right answer along the axis of `1 + columns`."""

ANSWER_ARRAYS = ("tokens", "positions", "segment_ids", "loss_mask", "ref_logps")
"""Arrays of a row with the axis of `1 + columns`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """A prompt in tokens with its right answer and sampled ones.

    Fields:
        positive: prompt and right answer, the answer in `loss_mask`.
        negatives: prompt and each sampled answer, in the order of their columns.
        id: the row's column `id`, or a hash of prompt and right answer; not of the
            negatives, so that new ones make no new example.
        negative_logps: log-probability of each negative under its sampler, nats,
            float32 `[columns]`, or None if the row has none.
    """

    positive: Example
    negatives: tuple[Example, ...]
    id: int
    negative_logps: np.ndarray | None = None

    @property
    def texts(self) -> tuple[Example, ...]:
        """The right answer, then the others."""
        return (self.positive, *self.negatives)


def encode_answers(
    row: Row,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    on_too_long: OnTooLong = "refuse",
    append_eos: bool = True,
    columns: int | None = None,
) -> Answers:
    """A row with negatives in tokens; arguments and errors as `encode_row`.

    Args:
        row: with `prompt`, `completion`, `negatives` (a list, each as the completion:
            text or messages), and perhaps `negative_logps` (as many numbers) and `id`
            (text, or an integer that is not negative).
        columns: negatives to read at most; None reads all.

    Raises:
        BadRow: also `wrong_column` without those columns, and `wrong_type` where their
            contents are no such lists, or of other lengths.
    """
    check_settings("auto", on_too_long)
    for name in ("prompt", "completion", "negatives"):
        if row.columns.get(name) is None:
            raise row.bad(
                "wrong_column",
                f"has no column {name!r} where an answer and sampled ones are expected",
                "sample them with `jaxpost negatives`, or map it with `columns`",
            )
    answers = _answers(row)
    logps = _logps(row, len(answers))
    encoded = []
    for place, answer in enumerate([row.columns["completion"], *answers[:columns]]):
        try:
            example = encode_answer(
                row, tokenizer, row.columns["prompt"], answer, "completion", append_eos
            )
            encoded.append(
                finish_example(row, example, tokenizer, max_length, on_too_long)
            )
        except BadRow as problem:
            if place == POSITIVE:
                raise
            where = f"negatives[{place - 1}]: {problem.what}"
            raise row.bad(problem.reason, where, problem.advice) from problem
    positive, *negatives = encoded
    if logps is not None:
        logps = logps[: len(negatives)]
    return Answers(positive, tuple(negatives), _identity(row, positive), logps)


def _answers(row: Row) -> list[Any]:
    found = row.columns["negatives"]
    kinds = str if isinstance(row.columns["completion"], str) else (str, list)
    if not isinstance(found, list) or not all(isinstance(x, kinds) for x in found):
        raise row.bad(
            "wrong_type",
            "'negatives' is no list of answers like the completion",
            "write a list of texts, or of lists of messages",
        )
    if not found:
        raise row.bad("wrong_type", "'negatives' is an empty list", "sample some")
    for place, answer in enumerate(found):
        for message in answer if isinstance(answer, list) else ():
            check_message(row, f"negatives[{place}]", message)
    return found


def _logps(row: Row, count: int) -> np.ndarray | None:
    found = row.columns.get("negative_logps")
    if found is None:
        return None
    numbers = isinstance(found, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) for x in found
    )
    if not numbers or len(found) != count:
        held = f"{len(found)} entries" if isinstance(found, list) else repr(found)[:40]
        raise row.bad(
            "wrong_type",
            f"'negative_logps' must hold one number for each of {count} negatives, "
            f"but holds {held}" + (" that are no numbers" * (not numbers)),
            "sample the negatives anew, or leave the column out",
        )
    logps = np.asarray(found, np.float32)
    if not np.isfinite(logps).all():
        raise row.bad(
            "not_finite",
            "'negative_logps' has a number that is not finite in float32",
            "sample the negatives anew",
        )
    return logps


def _identity(row: Row, positive: Example) -> int:
    given = row.columns.get("id")
    if given is None:
        return positive.id
    if isinstance(given, str):
        return example_id({"id": given})
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < 2**63:
        raise row.bad(
            "wrong_type",
            f"'id' is {given!r:.40} where a text or an integer from 0 is expected",
            "correct it, or leave the column out",
        )
    return given


def load_answers(
    path_or_name: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    format: Format = "trl",
    prompt_suffix: str = "",
    on_too_long: OnTooLong = "refuse",
    append_eos: bool = True,
    on_bad_row: OnBadRow = "stop",
    report: BadRows | None = None,
    limit: int | None = None,
    line_limit_bytes: int = LINE_LIMIT_BYTES,
    negative_columns: int | None = None,
) -> list[Answers]:
    """All rows with negatives of a source; arguments and errors as `load_examples`.

    Args:
        negative_columns: negatives to read at most of each row; None reads all.

    Raises:
        BadRow: also `duplicate_id`, where an earlier row has the id: each id has one
            place in what a method remembers of its examples.
    """
    numbers: dict[int, int] = {}

    def encode(row: Row) -> Answers:
        found = encode_answers(
            row,
            tokenizer,
            max_length=max_length,
            on_too_long=on_too_long,
            append_eos=append_eos,
            columns=negative_columns,
        )
        if found.id in numbers:
            raise row.bad(
                "duplicate_id",
                f"has the id {found.id} of row {numbers[found.id]}",
                "remove the copy, or tell the rows apart by a column `id`",
            )
        numbers[found.id] = row.number
        return found

    return load_encoded(
        path_or_name,
        encode,
        split=split,
        columns=columns,
        format=format,
        prompt_suffix=prompt_suffix,
        on_bad_row=on_bad_row,
        report=report,
        limit=limit,
        line_limit_bytes=line_limit_bytes,
    )


def pad_answers(
    items: Sequence[Answers],
    length: int | Sequence[int],
    *,
    pad_id: int = 0,
    columns: int | None = None,
) -> list[TokenRow]:
    """Puts each item into a row, every answer filled up at the right; see `pad_pairs`.

    Args:
        items: no answer, with its prompt, longer than the greatest length.
        length: tokens per answer, or several lengths.
        pad_id: token put where nothing is.
        columns: negatives per row, the first ones; None takes as many as all have.

    Returns:
        Rows as those of `pad_pairs`, but `[1 + columns, T]`, the right answer first.

    Raises:
        ValueError: an item has fewer negatives; or as `pad_pairs`.
    """
    if columns is None:
        columns = min((len(item.negatives) for item in items), default=0)
    for item in items:
        if len(item.negatives) < columns:
            raise ValueError(
                f"{item.positive.source}, row {item.positive.number} has "
                f"{len(item.negatives)} negatives where {columns} are needed."
            )
    texts = [item.texts[: 1 + columns] for item in items]
    return pad_together(texts, [item.id for item in items], length, pad_id)


def repeated_answers(item: Answers, *, group: int) -> np.ndarray:
    """Negatives with the tokens of an earlier one of the same group.

    Args:
        item: the answers.
        group: negatives that one training step takes together.

    Returns:
        bool `[columns]`.
    """
    found = np.zeros(len(item.negatives), bool)
    seen: set[bytes] = set()
    for place, example in enumerate(item.negatives):
        if place % group == 0:
            seen = set()
        words = example.tokens.tobytes()
        found[place] = words in seen
        seen.add(words)
    return found


def equal_answers(item: Answers) -> np.ndarray:
    """Negatives with the tokens of the right answer, bool `[columns]`."""
    tokens = item.positive.tokens
    return np.array([np.array_equal(tokens, x.tokens) for x in item.negatives], bool)


def drop_answers(rows: Sequence[TokenRow], dropped: np.ndarray) -> list[TokenRow]:
    """The rows without some negatives: their places hold padding, and are not scored.

    Args:
        rows: `n` rows of `pad_answers`.
        dropped: True where a negative goes, bool `[n, columns]`.
    """
    found = []
    for row, gone in zip(rows, dropped, strict=True):
        kept = ~np.concatenate([[False], gone])[:, None]  # the right answer stays
        masked = {
            name: np.where(kept, row[name], np.zeros((), row[name].dtype))
            for name in ("positions", "segment_ids", "loss_mask")
        }
        found.append(row | masked)
    return found


class AnswerBatches(Batches):
    """Batches of rows with negatives, each epoch with columns of its own.

    Args:
        rows: of `pad_answers`, perhaps with columns; `ref_logps` `[1 + columns]` is
            taken apart like the answers.
        batch_size: rows per global batch.
        negatives: columns that a batch takes, the method's `B`.
        sample: epoch `e` takes columns `e B` to `(e + 1) B - 1`; if False, every epoch
            takes the first `B`.
        options: of `Batches`.

    Raises:
        ValueError: two rows have the same id; there are fewer columns than `negatives`;
            or as `Batches`. While iterating: an epoch beyond the columns.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, np.ndarray]],
        batch_size: int,
        *,
        negatives: int,
        sample: bool = True,
        **options: Any,
    ):
        super().__init__(rows, batch_size, **options)
        self._negatives = negatives
        self._sample = sample
        self._columns = len(rows[0]["tokens"]) - 1
        self._check_columns(1)
        check_distinct(join_ids(np.stack([row["example_id"] for row in rows])))

    def _stacked(self, step: int) -> dict[str, np.ndarray]:
        batch = super()._stacked(step)
        epoch = step // self.batches_per_epoch if self._sample else 0
        self._check_columns(epoch + 1)
        first = 1 + epoch * self._negatives
        taken = [POSITIVE, *range(first, first + self._negatives)]
        for name in ANSWER_ARRAYS:
            if name in batch:
                batch[name] = batch[name][:, taken]
        return batch

    def _check_columns(self, epochs: int) -> None:
        needed = epochs * self._negatives
        if not 0 < needed <= self._columns:
            raise ValueError(
                f"{self._negatives} negatives in each of {epochs} epochs are {needed} "
                f"columns, but the rows have {self._columns}."
            )

    def _identity(self) -> dict[str, Any]:
        own = {"negatives": self._negatives, "sample": self._sample}
        return super()._identity() | own


def check_distinct(ids: np.ndarray) -> None:
    """Refuses ids that occur twice: both would write to one place of a table.

    Args:
        ids: of a batch, or of all rows, int64 `[n]`.

    Raises:
        ValueError: names the first few.
    """
    twice = sorted(id for id, count in Counter(ids.tolist()).items() if count > 1)
    if twice:
        shown = ", ".join(map(str, twice[:5])) + ", ..." * (len(twice) > 5)
        raise ValueError(
            f"example ids {shown} occur more than once; each may only once, as it has "
            "one place in what is remembered of the examples."
        )
