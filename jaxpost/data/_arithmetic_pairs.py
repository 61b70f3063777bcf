"""Right worked answers beside wrong ones: `builtin:arithmetic_pairs`, one of each, and
`builtin:arithmetic_negatives`, several wrong ones.

The problems of `builtin:arithmetic`, with its split. A wrong answer has one slip:

- `copy`: the number behind `####` is not the last line's result;
- `calculation`: the last calculation has a wrong result, which `####` repeats;
- `skip`: the last line of the work is left out, and `####` gives the result before it
  (a wrong calculation instead where there is one line, or both results are the same).

Some labels can be turned round on purpose, and say so in the column `flipped`. Knows
nothing of tokens, models or files.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from jaxpost.data._arithmetic import GRADES, LIMIT, Split, arithmetic_rows

SLIPS = ("copy", "calculation", "skip")


def arithmetic_pair_rows(
    split: Split,
    *,
    count: int = 10_000,
    seed: int = 0,
    grades: int | Sequence[int] = GRADES,
    slips: str | Sequence[str] = SLIPS,
    flip: int = 0,
) -> Iterator[dict[str, Any]]:
    """Pairs of worked answers as rows, in TRL's columns.

    Args:
        split: "train" or "test"; disjoint in numbers and operations, for all seeds.
        count: how many rows.
        seed: other seeds give other rows of the same split.
        grades: which grades, in the order in which they take turns.
        slips: what may be wrong in an answer, drawn anew for each row.
        flip: percentage of labels turned round, each row by itself; which rows does not
            depend on `count`, and a higher percentage turns more of the same rows.

    Returns:
        An iterator of rows: `prompt`, `chosen`, `rejected` (as `arithmetic_rows`'s
        prompt and completion), `flipped` (True where `chosen` is the wrong answer),
        `slip`, `answer` and `grade`.

    Raises:
        ValueError: an unknown slip, a percentage outside 0 to 100, or as
            `arithmetic_rows`.
    """
    chosen = _chosen(slips)
    if not 0 <= flip <= 100:
        raise ValueError(f"flip must be a percentage from 0 to 100, got {flip}.")
    rows = arithmetic_rows(split, count=count, seed=seed, grades=grades)
    return _pairs(rows, random.Random(f"jaxpost pairs {seed} {split}"), chosen, flip)


def arithmetic_negative_rows(
    split: Split,
    *,
    count: int = 10_000,
    seed: int = 0,
    grades: int | Sequence[int] = GRADES,
    slips: str | Sequence[str] = SLIPS,
    negatives: int = 4,
) -> Iterator[dict[str, Any]]:
    """Right worked answers with wrong ones drawn at random, as `jaxpost negatives`
    would sample them, but of a known distribution.

    A slip and its size, from -9 to 9, are drawn evenly; so a wrong answer may come
    twice, and the right one never.

    Args:
        split: "train" or "test"; disjoint in numbers and operations, for all seeds.
        count: how many rows.
        seed: other seeds give other rows of the same split.
        grades: which grades, in the order in which they take turns.
        slips: what may be wrong in an answer.
        negatives: wrong answers per row; fewer are the first ones of more.

    Returns:
        An iterator of rows: `prompt`, `completion`, `answer` and `grade` as in
        `arithmetic_rows`, `negatives` (as the completion) and `negative_logps`, the
        logarithm of the probability that each was drawn with, nats.

    Raises:
        ValueError: an unknown slip, `negatives` below 1, or as `arithmetic_rows`.
    """
    chosen = _chosen(slips)
    if negatives < 1:
        raise ValueError(f"negatives must be at least 1, got {negatives}.")
    rows = arithmetic_rows(split, count=count, seed=seed, grades=grades)
    return (
        _with_negatives(row, f"{seed} {split} {number}", chosen, negatives)
        for number, row in enumerate(rows)
    )


def _with_negatives(
    row: dict[str, Any], seed: str, slips: Sequence[str], count: int
) -> dict[str, Any]:
    rng = random.Random(f"jaxpost negatives {seed}")  # per row: more are no others
    right = row["completion"]
    skippable = _skippable(right)
    possible = [
        _slip(right, slip if skippable or slip != "skip" else "calculation", step)
        for slip in slips
        for step in (*range(-9, 0), *range(1, 10))
    ]
    drawn = [rng.choice(possible) for _ in range(count)]
    logps = [math.log(possible.count(x) / len(possible)) for x in drawn]
    return row | {"negatives": drawn, "negative_logps": logps}


def _chosen(slips: str | Sequence[str]) -> tuple[str, ...]:
    chosen = (slips,) if isinstance(slips, str) else tuple(slips)
    if not chosen or not set(chosen) <= set(SLIPS):
        raise ValueError(f"slips must be some of {SLIPS}, got {chosen!r}.")
    return chosen


def _pairs(
    rows: Iterator[dict[str, Any]],
    rng: random.Random,
    slips: Sequence[str],
    flip: int,
) -> Iterator[dict[str, Any]]:
    for row in rows:
        # As many draws for every row, so that no option moves the others' choices.
        slip, step = rng.choice(slips), rng.choice((-1, 1)) * rng.randint(1, 9)
        turn = rng.random()
        right = row.pop("completion")
        if slip == "skip" and not _skippable(right):
            slip = "calculation"
        wrong = _slip(right, slip, step)
        flipped = 100.0 * turn < flip
        first, second = (wrong, right) if flipped else (right, wrong)
        yield {
            "prompt": row["prompt"],
            "chosen": first,
            "rejected": second,
            "flipped": flipped,
            "slip": slip,
            "answer": row["answer"],
            "grade": row["grade"],
        }


def _slip(right: str, slip: str, step: int) -> str:
    """A worked answer with a mistake; its numbers stay within 2..`LIMIT`."""
    *lines, last = right.splitlines()
    answer = int(last.removeprefix("#### "))
    wrong = answer + step
    if not 2 <= wrong <= LIMIT:
        wrong = answer - step
    if slip == "skip":
        lines = lines[:-1]
        wrong = int(_result(lines[-1])[1])
    elif slip == "calculation":
        head, _, tail = _result(lines[-1])
        lines[-1] = f"{head}{wrong}{tail}"
    return "\n".join([*lines, f"#### {wrong}"])


def _skippable(right: str) -> bool:
    """Whether the answer is wrong without its last line of work."""
    lines = right.splitlines()[:-1]
    return len(lines) > 1 and _result(lines[-1])[1] != _result(lines[-2])[1]


def _result(line: str) -> tuple[str, str, str]:
    """A worked line before, at and behind its result."""
    head, _, rest = line.rpartition(" = ")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return f"{head} = ", digits, rest[len(digits) :]
