"""Exact match: how many generated answers are right, by group.

Takes functions from prompts to completions and from a completion to right or wrong;
knows no model, tokenizer or data set.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from jaxpost.prompts import exact_match


@dataclasses.dataclass(frozen=True)
class Judged:
    """One answer.

    Fields:
        prompt, completion: texts.
        answer: what was asked for.
        group: which group it counts in.
        correct: the checker's verdict.
    """

    prompt: str
    completion: str
    answer: Any
    group: Hashable
    correct: bool


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """Verdicts of a held-out set.

    Fields:
        judged: every answer, in the order of the rows.
    """

    judged: tuple[Judged, ...]

    def groups(self) -> tuple[Hashable, ...]:
        """The groups, in order of appearance."""
        return tuple(dict.fromkeys(item.group for item in self.judged))

    def count(self, group: Hashable) -> int:
        """How many rows a group has."""
        return sum(item.group == group for item in self.judged)

    def accuracy(self, group: Hashable) -> float:
        """Share of right answers of a group, in [0, 1]; NaN for an empty one."""
        verdicts = [item.correct for item in self.judged if item.group == group]
        return sum(verdicts) / len(verdicts) if verdicts else math.nan

    def standard_error(self, group: Hashable) -> float:
        """Of `accuracy(group)`, as of a binomial share; NaN for an empty group."""
        share, count = self.accuracy(group), self.count(group)
        return math.sqrt(share * (1.0 - share) / count) if count else math.nan

    def mean_accuracy(self) -> float:
        """Accuracy averaged over the groups, each weighing the same; NaN if none."""
        shares = [self.accuracy(group) for group in self.groups()]
        return sum(shares) / len(shares) if shares else math.nan

    def metrics(self, prefix: str = "exact_match") -> dict[str, float]:
        """`{prefix}` (the mean) and `{prefix}/{group}` of each group."""
        by_group = {f"{prefix}/{g}": self.accuracy(g) for g in self.groups()}
        return {prefix: self.mean_accuracy(), **by_group}


def evaluate_exact_match(
    generate: Callable[[Sequence[str]], Sequence[str]],
    rows: Iterable[Mapping[str, Any]],
    *,
    check: Callable[[str, Any], bool] = exact_match,
    prompt: str = "prompt",
    answer: str = "answer",
    group: str | None = None,
) -> ExactMatch:
    """Generates an answer to each row and judges it.

    Args:
        generate: from prompts to completions of the same number and order; called once.
        rows: held-out rows.
        check: from a completion and the row's answer to whether it is right.
        prompt: column of the prompt.
        answer: column of the right answer.
        group: column to group by, such as `grade`; None makes one group, `"all"`.

    Returns:
        The verdicts.

    Raises:
        KeyError: a row lacks one of the columns.
        ValueError: there are no rows, or `generate` returned another number of texts.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("exact match needs at least one held-out row.")
    prompts = [row[prompt] for row in rows]
    completions = list(generate(prompts))
    if len(completions) != len(prompts):
        raise ValueError(
            f"generate returned {len(completions)} completions for {len(prompts)} "
            "prompts; it must return one each, in order."
        )
    return ExactMatch(
        tuple(
            Judged(
                prompt=row[prompt],
                completion=completion,
                answer=row[answer],
                group="all" if group is None else row[group],
                correct=bool(check(completion, row[answer])),
            )
            for row, completion in zip(rows, completions, strict=True)
        )
    )
