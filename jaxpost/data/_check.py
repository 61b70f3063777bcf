"""The data doctor: what is wrong with a data set, before a run finds out.

Encodes rows as training would and lists the problems with counts and example rows;
shows single examples token by token. Knows no training run.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from jaxpost.data._columns import Format, row_kind
from jaxpost.data._encode import (
    Example,
    LossOn,
    OnTooLong,
    Pair,
    encode_pair,
    encode_row,
)
from jaxpost.data._errors import BadRow, BadRows
from jaxpost.data._load import load_rows
from jaxpost.data._records import Row
from jaxpost.data._tokenizer import Tokenizer

Severity = Literal["error", "warning", "note"]
_SHOWN_ROWS = 3
_TEXTS = ("text", "messages", "prompt", "completion", "chosen", "rejected")

_ADVICE = {
    "stop_token_unsupervised": "keep append_eos on, and do not truncate",
    "truncated": "raise --data.max-length, or refuse long rows",
    "token_merge": (
        "none needed: the two were tokenised apart, as when generating; ending prompts "
        "without a blank makes the tokens the usual ones"
    ),
    "duplicates": "remove the copies: they count twice and may leak to held-out data",
    "special_text": "remove it: it is read as the special token itself",
    "pad_is_eos": (
        "none needed here, where masks come from lengths; trainers that mask by "
        "`id != pad` would never teach the model to stop"
    ),
    "length_bias": (
        "compare with a length-normalised loss, or balance the lengths of the pairs"
    ),
}
_WHAT = {
    "stop_token_unsupervised": "the last token trained on does not end the text",
    "truncated": "the end of the answer was cut off",
    "token_merge": "prompt and answer would share a token if tokenised in one go",
    "duplicates": "the same texts as in an earlier row",
    "special_text": "the words of a row contain a special token's spelling",
}
_ERRORS = frozenset({"stop_token_unsupervised", "truncated"})
_NOTES = frozenset({"token_merge"})


@dataclasses.dataclass(frozen=True)
class DataProblem:
    """One kind of problem found in a data set.

    Fields:
        name: short name, such as `nothing_supervised` or `duplicates`.
        severity: `error` (the row is lost, or training on it does harm), `warning`, or
            `note`.
        count: rows concerned; 0 where the problem is not one of rows.
        what: what was found.
        advice: what to do.
        rows: where, for the first few.
    """

    name: str
    severity: Severity
    count: int
    what: str
    advice: str
    rows: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """What `check_data` found.

    Fields:
        source: file or name of the data.
        rows: rows looked at.
        problems: gravest first.
        examples: the first few good examples, to be shown.
        lengths: tokens of each good example (of pairs, of each side), int64 `[n]`.
        supervised: share of those tokens that is trained on, in `[0, 1]`.
    """

    source: str
    rows: int
    problems: tuple[DataProblem, ...]
    examples: tuple[Example, ...]
    lengths: np.ndarray
    supervised: float

    @property
    def ok(self) -> bool:
        """Whether there is no problem of severity `error`."""
        return all(problem.severity != "error" for problem in self.problems)


def check_data(
    path_or_name: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    format: Format = "trl",
    prompt_suffix: str = "",
    loss_on: LossOn = "auto",
    on_too_long: OnTooLong = "refuse",
    append_eos: bool = True,
    limit: int | None = None,
    keep: int = 2,
) -> DataCheck:
    """Looks through a data set as training would read it.

    Args:
        path_or_name: as in `load_examples`, and so are the other settings; preference
            rows are checked as pairs.
        tokenizer: the tokenizer.
        limit: rows to look at, at most.
        keep: good examples to keep for showing.

    Returns:
        The problems, with counts; bad rows are counted, never raised.

    Raises:
        DataError: the source is empty or damaged as a whole.
        FileNotFoundError: there is no such file.
        ValueError: a setting is unknown, or conversations meet a tokenizer without chat
            template.
    """
    bad = BadRows(keep=0)
    found = _Findings(tokenizer)
    reading = load_rows(
        path_or_name,
        split=split,
        columns=columns,
        format=format,
        prompt_suffix=prompt_suffix,
        on_bad_row="skip",
        report=bad,
        limit=limit,
    )
    settings: dict[str, Any] = {
        "max_length": max_length,
        "on_too_long": on_too_long,
        "append_eos": append_eos,
    }
    for row in reading:
        try:
            if row_kind(row) in ("preference", "implicit_preference"):
                found.add_pair(row, encode_pair(row, tokenizer, **settings))
            else:
                example = encode_row(row, tokenizer, loss_on=loss_on, **settings)
                found.add(row, example)
        except BadRow as problem:
            bad.add(problem)
    source = os.fspath(path_or_name)
    problems = [_refused(reason, bad) for reason in bad.counts]
    problems += found.problems()
    rank = {"error": 0, "warning": 1, "note": 2}
    problems.sort(key=lambda problem: (rank[problem.severity], -problem.count))
    return DataCheck(
        source=source,
        rows=bad.rows,
        problems=tuple(problems),
        examples=tuple(found.examples[:keep]),
        lengths=np.asarray(found.lengths, np.int64),
        supervised=found.supervised_tokens / max(1, sum(found.lengths)),
    )


def _refused(reason: str, bad: BadRows) -> DataProblem:
    first, count = bad.samples[reason][0], bad.counts[reason]
    return DataProblem(
        name=reason,
        severity="error",
        count=count,
        what=first.what if count == 1 else f"{first.what} (the first of {count})",
        advice=first.advice,
        rows=tuple(f"row {problem.number}" for problem in bad.samples[reason]),
    )


class _Findings:
    """Gathers what good rows show."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.examples: list[Example] = []
        self.lengths: list[int] = []
        self.supervised_tokens = 0
        self._seen: dict[int, int] = {}
        self._counts: Counter[str] = Counter()
        self._rows: dict[str, list[str]] = {}
        self._answer_lengths: list[tuple[int, int]] = []
        spellings = sorted(map(tokenizer.token_text, tokenizer.special_ids))
        self._special = re.compile("|".join(map(re.escape, spellings)))

    def add(self, row: Row, example: Example) -> None:
        self._add_row(row, example.id)
        self._add_example(row, example)

    def add_pair(self, row: Row, pair: Pair) -> None:
        self._add_row(row, pair.id)
        self._add_example(row, pair.chosen)
        self._add_example(row, pair.rejected, "rejected answer")
        sides = (pair.chosen, pair.rejected)
        chosen, rejected = (int(side.loss_mask.sum()) for side in sides)
        self._answer_lengths.append((chosen, rejected))

    def _add_row(self, row: Row, identity: int) -> None:
        if identity in self._seen:
            self._note("duplicates", f"row {row.number} = row {self._seen[identity]}")
        self._seen.setdefault(identity, row.number)
        match = next(filter(None, map(self._special.search, _texts(row))), None)
        if match:
            self._note("special_text", f"row {row.number} ({match[0]!r})")

    def _add_example(self, row: Row, example: Example, side: str = "") -> None:
        self.examples.append(example)
        self.lengths.append(len(example))
        self.supervised_tokens += int(example.loss_mask.sum())
        where = f"row {row.number}" + (f" ({side})" if side else "")
        last = int(example.tokens[np.flatnonzero(example.loss_mask)[-1]])
        if example.truncated:
            self._note("truncated", where)
        if last not in self.tokenizer.eos_ids:
            self._note("stop_token_unsupervised", f"{where} ends in {last}")
        if example.merged:
            self._note("token_merge", where)

    def _note(self, name: str, where: str) -> None:
        self._counts[name] += 1
        rows = self._rows.setdefault(name, [])
        if len(rows) < _SHOWN_ROWS:
            rows.append(where)

    def problems(self) -> Iterator[DataProblem]:
        for name, count in self._counts.items():
            severity: Severity = "warning"
            if name in _ERRORS | _NOTES:
                severity = "error" if name in _ERRORS else "note"
            rows = tuple(self._rows[name])
            yield DataProblem(name, severity, count, _WHAT[name], _ADVICE[name], rows)
        if self.tokenizer.pad_id in self.tokenizer.eos_ids:
            what = f"padding and the end of a text share the id {self.tokenizer.pad_id}"
            advice = _ADVICE["pad_is_eos"]
            yield DataProblem("pad_is_eos", "note", 0, what, advice)
        yield from self._length_bias()

    def _length_bias(self) -> Iterator[DataProblem]:
        """Chosen answers longer (or shorter) more often than a coin would have it."""
        if not self._answer_lengths:
            return
        lengths = np.asarray(self._answer_lengths)
        longer = int(np.sum(lengths[:, 0] > lengths[:, 1]))
        shorter = int(np.sum(lengths[:, 0] < lengths[:, 1]))
        untied = longer + shorter
        # Three standard deviations of a fair coin, and large enough to matter.
        if abs(longer - shorter) <= max(3 * untied**0.5, 0.1 * untied):
            return
        chosen, rejected = lengths.mean(axis=0)
        what = (
            f"the chosen answer is the longer one in {longer} of {untied} pairs of "
            f"unlike length (mean {chosen:.0f} and {rejected:.0f} tokens)"
        )
        advice = _ADVICE["length_bias"]
        yield DataProblem("length_bias", "warning", max(longer, shorter), what, advice)


def _texts(row: Row) -> Iterator[str]:
    for name in _TEXTS:
        value = row.columns.get(name)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (message.get("content") or "" for message in value)
