"""Rewards that check an answer's text or length; each factory makes one.

They look at each answer on its own, in time linear in its length (`regex` depends on
its pattern), and give None where the row says nothing to check against.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, ParamSpec

from jaxpost import prompts as texts
from jaxpost.rewards._worker import RewardError, missing_column
from jaxpost.typing import RewardFn

P = ParamSpec("P")


def _named(factory: Callable[P, Any]) -> Callable[P, RewardFn]:
    """Keeps with each reward the name and settings that make it in another process."""

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> RewardFn:
        reward = factory(*args, **kwargs)
        names = factory.__code__.co_varnames  # type: ignore[attr-defined]
        settings = {**dict(zip(names, args, strict=False)), **kwargs}
        reward.made_by = (factory.__name__, settings)
        return reward

    return make


def text_of(completion: Any) -> str:
    """A completion's text: itself, or what its last message says."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1]["content"]) if completion else ""


def _of_texts(check: Callable[[str, str], float | None], column: str) -> RewardFn:
    """Compares each answer with what the row's column says, if it says anything."""

    def reward(
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: list[Any],
    ) -> list[float | None]:
        del prompts, completion_ids
        if column not in columns:
            raise missing_column(column, columns)
        return [
            None if wanted is None else check(text_of(completion), str(wanted))
            for completion, wanted in zip(completions, columns[column], strict=True)
        ]

    return reward


def _of_answers(check: Callable[[str, list[int]], float]) -> RewardFn:
    """Looks at each answer's text and tokens alone."""

    def reward(
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: list[Any],
    ) -> list[float | None]:
        del prompts, columns
        return [
            check(text_of(completion), ids)
            for completion, ids in zip(completions, completion_ids, strict=True)
        ]

    return reward


@_named
def arithmetic(column: str = "answer", *, check_steps: bool = False) -> RewardFn:
    """1 where the number after the last `####` is the right one, else 0.

    Args:
        column: of the rows: the right number, or a worked answer that ends in `####
            NUMBER` (GSM8K's own). No verdict where it is neither.
        check_steps: also 0 where one of the answer's calculations `a op b = c` is
            wrong, whatever it ends in.

    Source: `prompts.exact_match`, `prompts.wrong_calculations`.
    """

    def check(text: str, wanted: str) -> float | None:
        number: str | None = wanted
        if "####" in wanted:
            number = texts.extract_final_answer(wanted)
        if number is None or texts.normalize_number(number) is None:
            return None
        right = texts.exact_match(text, number)
        return float(right and not (check_steps and texts.wrong_calculations(text)))

    return _of_texts(check, column)


@_named
def exact_match(column: str = "answer", *, ignore_case: bool = False) -> RewardFn:
    """1 where the whole answer is the row's text, blanks at both ends aside, else 0.

    Args:
        column: of the rows: the right text; no verdict where it is None.
        ignore_case: compare regardless of case.
    """

    def plain(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    return _of_texts(lambda text, wanted: float(plain(text) == plain(wanted)), column)


@_named
def regex(pattern: str, *, column: str | None = None) -> RewardFn:
    """1 where a pattern is found in the answer, else 0.

    Args:
        pattern: Python's `re` syntax, flags inside it, such as `(?i)`; `^` and `$` are
            the answer's ends.
        column: of the rows: what the last place found must say besides, its first group
            if it has one; no verdict where it is None.

    Raises:
        ValueError: the pattern is not valid.
    """
    try:
        search = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not valid: {error}.") from error

    if column is None:
        return _of_answers(lambda text, _: float(search.search(text) is not None))

    def last(text: str) -> str | None:
        *_, found = [None, *search.finditer(text)]
        return None if found is None else found[1 if search.groups else 0]

    return _of_texts(lambda text, wanted: float(last(text) == wanted), column)


@_named
def format(*, mark: str = "####") -> RewardFn:
    """1 where an answer has one line that begins with the mark, its last, with a number
    after it and nothing else, else 0.

    Args:
        mark: what the line begins with; GSM8K's by default.

    Raises:
        ValueError: the mark is empty.
    """
    if not mark.strip():
        raise ValueError("mark must not be empty.")

    def well_formed(text: str) -> bool:
        lines = text.strip().splitlines()
        if sum(mark in line for line in lines) != 1 or not lines[-1].startswith(mark):
            return False
        number = lines[-1].removeprefix(mark)
        return len(number.split()) == 1 and texts.normalize_number(number) is not None

    return _of_answers(lambda text, _: float(well_formed(text)))


@_named
def length(longest: int, *, soft: int = 0) -> RewardFn:
    """0 for answers that are short enough, down to -1 for those that are too long.

    With `n` tokens, the end token among them: 0 up to `longest - soft`, then
    `(longest - soft - n) / soft`, and -1 beyond `longest`. Add it to a reward of right
    answers; instead of a cliff where answers are cut off it makes a slope before it.

    Args:
        longest: most tokens of an answer.
        soft: how many tokens before that the penalty begins.

    Raises:
        ValueError: `longest` is not positive, or `soft` not between 0 and `longest`.

    Source: Yu et al. (2025), DAPO, arXiv 2503.14476, section 3.4, eq. 13 (soft overlong
    punishment).
    """
    if longest < 1:
        raise ValueError(f"longest must be at least 1, got {longest}.")
    if not 0 <= soft <= longest:
        raise ValueError(f"soft must lie between 0 and longest {longest}, got {soft}.")

    def penalty(tokens: int) -> float:
        if tokens > longest:
            return -1.0
        return min((longest - soft - tokens) / soft, 0.0) if soft else 0.0

    return _of_answers(lambda _, ids: penalty(len(ids)))


@_named
def target_length(
    target: int | None = None, *, column: str | None = None, scale: float | None = None
) -> RewardFn:
    """Minus how far an answer's length is from its target, in units of `scale` tokens.

    With `n` tokens, the end token among them: `-|n - target| / scale`, 0 only at the
    target, without a bound. Add it to a reward of right answers, with a small weight.

    Args:
        target: tokens, the same for all rows; none takes `column`.
        column: of the rows: each prompt's own target (say it in the prompt); no verdict
            where it is None.
        scale: how many tokens off cost 1; the target itself if not given.

    Raises:
        ValueError: both of `target` and `column` or neither, a target below 1, or a
            scale that is not positive and finite.
        RewardError: when it is called, a row's target is no whole number of at least 1.

    Source: Aggarwal & Welleck (2025), L1, arXiv 2503.04697 (LCPO-Exact), whose
    `alpha` is the weight over `scale`, and whose first term is a reward of its own.
    """
    if (target is None) == (column is None):
        raise ValueError(
            f"give target or column, one of them; got {target!r}, {column!r}."
        )
    if target is not None:
        _check_target(target, "target")
    if scale is not None and not 0.0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}.")

    def off(wanted: int, ids: list[int]) -> float:
        return -abs(len(ids) - wanted) / (wanted if scale is None else scale)

    if target is not None:
        return _of_answers(lambda _, ids: off(target, ids))

    def reward(
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: list[Any],
    ) -> list[float | None]:
        del prompts, completions
        if column not in columns:
            raise missing_column(str(column), columns)
        return [
            None if own is None else off(_check_target(own, f"column {column!r}"), ids)
            for own, ids in zip(columns[column], completion_ids, strict=True)
        ]

    return reward


def _check_target(target: Any, where: str) -> int:
    """A target as a whole number, also if a row gives it as text or as 12.0."""
    try:
        whole = int(target)
        good = whole == float(target) and whole >= 1
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise RewardError(
            f"{where}: a target length must be a whole number of at least 1, got "
            f"{target!r}."
        )
    return int(target)
