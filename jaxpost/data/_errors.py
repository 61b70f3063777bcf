"""What can be wrong with data, said in one line, and the count of it.

Knows no file format and no tokenizer.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

OnBadRow = Literal["stop", "skip"]


class DataError(ValueError):
    """A source cannot be used as a whole: missing, empty, cut off, unknown."""


class BadRow(DataError):
    """One row cannot be used; `str()` is one line: where, what, and what to do.

    Fields:
        reason: a short name to count by, such as `not_json` or `too_long`.
        source: the file, hub name or built-in it came from.
        number: the row's number in its source, from 1.
        what: what was wrong.
        advice: what to do.
    """

    def __init__(self, reason: str, source: str, number: int, what: str, advice: str):
        super().__init__(f"{source}, row {number}: {what}; {advice}.")
        self.reason = reason
        self.source = source
        self.number = number
        self.what = what
        self.advice = advice


@dataclasses.dataclass
class BadRows:
    """Collects rows that were skipped: counts by reason and the first few lines.

    Fields:
        keep: how many lines to keep (and emit); counts go on beyond.
        emit: called with each kept line, such as a console's print.
        counts: rows skipped, by reason.
        lines: the first `keep` messages.
        samples: the first three problems of each reason.
        rows: rows read so far, good ones included.
    """

    keep: int = 10
    emit: Callable[[str], None] | None = None
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    lines: list[str] = dataclasses.field(default_factory=list)
    samples: dict[str, list[BadRow]] = dataclasses.field(default_factory=dict)
    rows: int = 0

    @property
    def total(self) -> int:
        """Rows skipped so far."""
        return sum(self.counts.values())

    def add(self, problem: BadRow) -> None:
        """Counts one skipped row."""
        self.counts[problem.reason] += 1
        samples = self.samples.setdefault(problem.reason, [])
        if len(samples) < 3:
            samples.append(problem)
        if len(self.lines) < self.keep:
            self.lines.append(str(problem))
            if self.emit is not None:
                self.emit(str(problem))

    def metrics(self) -> dict[str, float]:
        """Counts as numbers to log: `data/bad_rows` and `data/bad_rows/<reason>`."""
        by_reason = {f"data/bad_rows/{k}": float(v) for k, v in self.counts.items()}
        return {"data/bad_rows": float(self.total), **by_reason}

    def summary(self) -> str:
        """One line: how many rows of how many were skipped, and why."""
        if not self.total:
            return f"{self.rows} rows read, none skipped"
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common())
        return f"{self.rows} rows read, {self.total} skipped ({reasons})"


def handle(problem: BadRow, on_bad_row: OnBadRow, report: BadRows | None) -> None:
    """Raises `problem`, or counts it, as `on_bad_row` says.

    Args:
        problem: the row's problem.
        on_bad_row: `"stop"` raises, `"skip"` counts.
        report: where to count; None counts nowhere.

    Raises:
        BadRow: `problem`, if `on_bad_row` is `"stop"`.
        ValueError: `on_bad_row` is neither.
    """
    check_on_bad_row(on_bad_row)
    if on_bad_row == "stop":
        raise problem
    if report is not None:
        report.add(problem)


def check_on_bad_row(on_bad_row: Any) -> None:
    """Refuses any setting but the two known ones."""
    if on_bad_row not in ("stop", "skip"):
        raise ValueError(f"on_bad_row must be 'stop' or 'skip', got {on_bad_row!r}.")
