"""The data doctor: what is wrong with a data set, before a run finds out.

Encodes rows as training would and lists the problems with counts and example rows;
shows single examples token by token. Knows no training run.
"""

import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from jaxpost.data._negatives import (
    Answers,
    encode_answers,
    equal_answers,
    repeated_answers,
)
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
    "duplicate_id": "remove the copy, or tell the rows apart by a column `id`",
    "few_negatives": (
        "sample more, train for fewer epochs, or set negatives.sample to false"
    ),
    "negative_equal": (
        "draw such ones again (`jaxpost negatives --redraw empty positive`), or set "
        "negatives.equal to drop"
    ),
    "negative_repeated": (
        "none needed: draws are independent; negatives.repeated: drop leaves them out"
    ),
    "negative_cut": (
        "raise --max-new-tokens when sampling, or train with p0: train_prompt"
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
    "duplicate_id": "the id of an earlier row, whose place in the table it would share",
    "few_negatives": "fewer negatives than the epochs of training take",
    "negative_equal": "a negative is the right answer, which training then pushes down",
    "negative_repeated": "a negative is the same as an earlier one of its row",
    "negative_cut": (
        "a negative was cut when sampled: its end token, which training puts behind "
        "it, was not drawn, and negative_logps lacks it"
    ),
}
_ERRORS = frozenset(
    {"stop_token_unsupervised", "truncated", "duplicate_id", "few_negatives"}
)
_NOTES = frozenset({"token_merge", "negative_repeated"})


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
        lengths: tokens of each good example (of pairs, of each side; of rows with
            negatives, of each answer), int64 `[n]`.
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
    negative_columns: int | None = 0,
) -> DataCheck:
    """Looks through a data set as training would read it.

    Args:
        path_or_name: as in `load_examples`, and so are the other settings; preference
            rows are checked as pairs.
        tokenizer: the tokenizer.
        limit: rows to look at, at most.
        keep: good examples to keep for showing.
        negative_columns: how many of each row's `negatives` training takes; None all of
            them, 0 where rows are not trained on with negatives.

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
            if negative_columns != 0:
                answers = encode_answers(
                    row, tokenizer, columns=negative_columns, **settings
                )
                found.add_answers(row, answers, negative_columns)
            elif row_kind(row) in ("preference", "implicit_preference"):
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
        self._ids: dict[int, int] = {}
        self._counts: Counter[str] = Counter()
        self._rows: dict[str, list[str]] = {}
        self._answer_lengths: list[tuple[int, int]] = []
        spellings = sorted(map(tokenizer.token_text, tokenizer.special_ids))
        self._special = re.compile("|".join(map(re.escape, spellings)))

    def add(self, row: Row, example: Example) -> None:
        self._add_identity(row, example.id)
        self._add_words(row)
        self._add_example(row, example)

    def add_pair(self, row: Row, pair: Pair) -> None:
        self._add_identity(row, pair.id)
        self._add_words(row)
        self._add_example(row, pair.chosen)
        self._add_example(row, pair.rejected, "rejected answer")
        sides = (pair.chosen, pair.rejected)
        chosen, rejected = (int(side.loss_mask.sum()) for side in sides)
        self._answer_lengths.append((chosen, rejected))

    def add_answers(self, row: Row, answers: Answers, wanted: int | None) -> None:
        """Counts a row once per problem, and names its answers that have it."""
        where = f"row {row.number}"
        if answers.id in self._ids:
            self._note("duplicate_id", f"{where} = row {self._ids[answers.id]}")
        else:
            self._ids[answers.id] = row.number
            self._add_identity(row, answers.positive.id)
        columns = len(answers.negatives)
        self._add_words(row, row.columns["negatives"][:columns])
        if wanted is not None and columns < wanted:
            self._note("few_negatives", f"{where} ({columns} of {wanted})")
        sides = ["completion", *(f"negatives[{i}]" for i in range(columns))]
        concerned: dict[str, list[str]] = {}
        for side, example in zip(sides, answers.texts, strict=True):
            self._take(example)
            for name, _ in self._flaws(example):
                concerned.setdefault(name, []).append(side)
        finished = row.columns.get("negative_finished")
        finished = finished if isinstance(finished, list) else []
        for name, flags in (
            ("negative_equal", equal_answers(answers)),
            ("negative_repeated", repeated_answers(answers, group=columns)),
            ("negative_cut", [x is False for x in finished[:columns]]),
        ):
            if any(flags):
                concerned[name] = [sides[1 + i] for i in np.flatnonzero(flags)]
        for name, found in concerned.items():
            self._note(name, f"{where} ({', '.join(found)})")

    def _add_identity(self, row: Row, identity: int) -> None:
        if identity in self._seen:
            self._note("duplicates", f"row {row.number} = row {self._seen[identity]}")
        self._seen.setdefault(identity, row.number)

    def _add_words(self, row: Row, more: Sequence[Any] = ()) -> None:
        values = [*(row.columns.get(name) for name in _TEXTS), *more]
        texts = itertools.chain.from_iterable(map(_texts, values))
        match = next(filter(None, map(self._special.search, texts)), None)
        if match:
            self._note("special_text", f"row {row.number} ({match[0]!r})")

    def _add_example(self, row: Row, example: Example, side: str = "") -> None:
        self._take(example)
        where = f"row {row.number}" + (f" ({side})" if side else "")
        for name, detail in self._flaws(example):
            self._note(name, where + detail)

    def _take(self, example: Example) -> None:
        self.examples.append(example)
        self.lengths.append(len(example))
        self.supervised_tokens += int(example.loss_mask.sum())

    def _flaws(self, example: Example) -> Iterator[tuple[str, str]]:
        """Names of an example's problems, with what to add to its place."""
        last = int(example.tokens[np.flatnonzero(example.loss_mask)[-1]])
        if example.truncated:
            yield "truncated", ""
        if last not in self.tokenizer.eos_ids:
            yield "stop_token_unsupervised", f" ends in {last}"
        if example.merged:
            yield "token_merge", ""

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


def _texts(value: Any) -> Iterator[str]:
    """The words of a text or of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (message.get("content") or "" for message in value)
