"""Several rewards as one: weighted totals, each part, and counts of what went wrong."""

import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost.rewards._calls import Caller, Failure, Here, InProcess, InThread
from jaxpost.rewards._names import CAN_HANG, RewardSection, by_name
from jaxpost.rewards._worker import Batch, RewardError


class Scores(NamedTuple):
    """What a `Scorer` says of n answers.

    Fields:
        rewards: weighted totals, float64 `[n]`, NaN where there is none.
        given: True where there is one, bool `[n]`; the mask of the advantages.
        numbers: to log: of each reward `rewards/LABEL/mean` and `std` (TRL's names;
            over its verdicts, unweighted, and absent if it has none), and
            `rewards/LABEL/errors`, `timeouts` (calls) and `no_verdict` (answers).
        parts: each reward by label, float64 `[n]`, NaN without verdict.
    """

    rewards: np.ndarray
    given: np.ndarray
    numbers: dict[str, float]
    parts: dict[str, np.ndarray]


class Scorer:
    """Judges answers by several rewards.

    A reward may say None: no verdict, which is no loss and no zero. An answer has a
    total if it has a verdict from every reward that judges its prompt, that is, gives a
    verdict on any of the answers to it (side by side, as samples of a prompt are). So
    rewards may each judge prompts of one kind, and an answer that one could not judge
    is left out rather than counted as worse than the others. Where a call fails, no
    answer has a total: the rest of the rewards alone would teach something else.

    All that may take time run at once. Use it as a context, or call `close`: processes
    are ended by it.

    Args:
        sections: which rewards.
        functions: rewards by the names that sections give them, before the built-in
            ones; such a one runs in a thread, unless `isolate` says none.

    Raises:
        ValueError: there is no reward, or none with a weight; two have one label; a
            name, setting or `isolate` does not fit.
        RewardError: a reward's module or function is not found.
    """

    def __init__(
        self,
        sections: Sequence[RewardSection],
        functions: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        if not any(section.weight for section in sections):
            raise ValueError(
                "there must be at least one reward whose weight is not 0, or nothing "
                f"is learnt; got {[section.name for section in sections]}."
            )
        labels = [section.shown_as for section in sections]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"two rewards are called {label!r}: give one of them a label."
                )
        self._sections = tuple(sections)
        self._callers = [_caller(section, functions or {}) for section in sections]
        self._failed = [0] * len(self._callers)  # calls in a row

    def __enter__(self) -> "Scorer":
        try:
            for caller in self._callers:
                caller.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes of rewards; a later call starts them again."""
        for caller in self._callers:
            caller.close()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> Scores:
        """Judges n answers, those to one prompt side by side.

        Args:
            prompts: of each answer, text or messages.
            completions: text or messages.
            completion_ids: tokens.
            columns: what the rows say besides, one value per answer.

        Raises:
            RewardError: a reward returned anything but a list of n finite numbers or
                None; needs a column that the rows lack; or has failed `stop_after`
                times in a row.
            ValueError: the arguments are not all n long.
        """
        batch = Batch(
            list(prompts),
            list(completions),
            [list(ids) for ids in completion_ids],
            {name: list(values) for name, values in columns.items()},
        )
        _check_lengths(batch)
        count = len(batch.prompts)
        try:
            for caller in self._callers:
                caller.begin(batch)
            outcomes = [self._finish(n, count) for n in range(len(self._callers))]
        except BaseException:
            self.close()  # what still runs must not answer the next call
            raise
        parts = np.array([part for part, _ in outcomes]).reshape(len(outcomes), count)
        logged = {}
        for section, part, (_, failure) in zip(
            self._sections, parts, outcomes, strict=True
        ):
            logged |= _describe(section.shown_as, part, failure)
        failed = np.array([failure is not None for _, failure in outcomes])
        rewards = self._total(parts, failed, _groups(batch.prompts))
        labels = [section.shown_as for section in self._sections]
        return Scores(
            rewards,
            np.isfinite(rewards),
            logged,
            dict(zip(labels, parts, strict=True)),
        )

    def _finish(self, place: int, count: int) -> tuple[np.ndarray, Failure | None]:
        section = self._sections[place]
        label = section.shown_as
        try:
            result = self._callers[place].finish()
        except RewardError as error:
            raise RewardError(f"reward {label!r}: {error}") from error
        if not isinstance(result, Failure):
            self._failed[place] = 0
            return check_verdicts(label, result, count), None
        self._failed[place] += 1
        times = self._failed[place]
        if section.stop_after is not None and times >= section.stop_after:
            often = "once" if times == 1 else f"{times} times in a row"
            raise RewardError(
                f"reward {label!r} has failed {often}, the last time with: "
                f"{result.text}. Mend it; or give it more time (deadline_s), or set "
                "stop_after to none to train on the other answers."
            )
        warnings.warn(
            f"reward {label!r} gave no verdict on {count} answers: {result.text}.",
            RuntimeWarning,
            stacklevel=3,
        )
        return np.full(count, np.nan), result

    def _total(
        self, parts: np.ndarray, failed: np.ndarray, groups: np.ndarray
    ) -> np.ndarray:
        """Weighted sums, NaN where a reward that judges the prompt says nothing."""
        weights = np.array([section.weight for section in self._sections])
        counted = weights != 0.0
        parts, weights, failed = parts[counted], weights[counted], failed[counted]
        said = np.isfinite(parts)
        totals = np.where(said, parts, 0.0).T @ weights
        judges = np.zeros_like(said)
        for group in np.unique(groups):
            here = groups == group
            some = said[:, here].any(axis=1) | failed
            judges[:, here] = some[:, None]
        complete = (said | ~judges).all(axis=0) & said.any(axis=0)
        return np.where(complete, totals, np.nan)


def combine(
    functions: Mapping[str, Callable[..., Any]],
    *,
    weights: Mapping[str, float] | None = None,
    deadline_s: float | None = 60.0,
    stop_after: int | None = 3,
) -> Scorer:
    """Several reward functions as one `Scorer`.

    Args:
        functions: by the names that metrics are to have; of the contract of
            `typing.RewardFn`, but they may leave out arguments that they do not need.
        weights: of the functions; 1 for those that it does not name.
        deadline_s, stop_after: as in `RewardSection`, of each.

    Raises:
        ValueError: `weights` names what is no function; and as `Scorer`.
    """
    weights = weights or {}
    for name in weights:
        if name not in functions:
            raise ValueError(
                f"weights names {name!r}, which is none of the rewards: "
                f"{', '.join(functions)}."
            )
    return Scorer(
        [
            RewardSection(
                name,
                weight=weights.get(name, 1.0),
                label=name,
                deadline_s=deadline_s,
                stop_after=stop_after,
            )
            for name in functions
        ],
        functions,
    )


def check_verdicts(name: str, result: Any, count: int) -> np.ndarray:
    """What a reward returned as float64 `[count]`, NaN for None.

    Raises:
        RewardError: it is not a list, tuple or array of `count` finite numbers or None.
    """
    if isinstance(result, (str, bytes, Mapping)) or not (
        isinstance(result, Sequence) or hasattr(result, "__array__")
    ):
        raise RewardError(
            f"reward {name!r} must return a list with a number or None for each of the "
            f"{count} answers, got {type(result).__name__}."
        )
    values = list(np.asarray(result)) if hasattr(result, "__array__") else list(result)
    if len(values) != count:
        raise RewardError(
            f"reward {name!r} returned {len(values)} values for {count} answers: "
            "return one for each, in order, None where there is no verdict."
        )
    return np.array([_number(name, place, v) for place, v in enumerate(values)])


def _number(name: str, place: int, value: Any) -> float:
    if value is None:
        return math.nan
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        value = value.item()  # of NumPy, JAX or another library
    if not isinstance(value, numbers.Real):
        raise RewardError(
            f"reward {name!r} returned {value!r:.40} ({type(value).__name__}) for "
            f"answer {place}: return a number, or None where there is no verdict."
        )
    if not math.isfinite(value):
        raise RewardError(
            f"reward {name!r} returned {float(value)} for answer {place}: return a "
            "finite number, or None where there is no verdict."
        )
    return float(value)


def _caller(
    section: RewardSection, functions: Mapping[str, Callable[..., Any]]
) -> Caller:
    """Where and how a section's reward is called."""
    name, settings = section.name, section.settings
    function = functions.get(name)
    if function is not None:
        if settings:
            raise ValueError(
                f"reward {name!r} is a function given to the program, which has no "
                f"settings; got {settings}."
            )
        made_by = getattr(function, "made_by", None)
        if made_by is None:
            if section.isolate == "process":
                raise ValueError(
                    f"reward {name!r} is a function given to the program, which has no "
                    "name to find it by in another process: name it "
                    "package.module:function, or set isolate to thread."
                )
            if section.isolate == "none":
                return Here(function)
            return InThread(function, section.deadline_s)
        name, settings = made_by
    own = ":" in name
    place = section.isolate
    if place == "auto":
        place = "process" if own or name in CAN_HANG else "none"
    if place == "process":
        if not own:
            by_name(name, **settings)  # refuse what does not fit before it starts
        return InProcess(name, settings, section.deadline_s)
    function = by_name(name, **settings)
    return Here(function) if place == "none" else InThread(function, section.deadline_s)


def _check_lengths(batch: Batch) -> None:
    count = len(batch.prompts)
    arrays = {
        "completions": batch.completions,
        "completion_ids": batch.completion_ids,
        **batch.columns,
    }
    for name, values in arrays.items():
        if len(values) != count:
            raise ValueError(
                f"{name} has {len(values)} values where there are {count} prompts; "
                "there must be one for each answer."
            )


def _groups(prompts: list[Any]) -> np.ndarray:
    """Which group each answer is in: those to equal prompts side by side."""
    new = [place > 0 and p != prompts[place - 1] for place, p in enumerate(prompts)]
    return np.cumsum(new, dtype=np.int64)


def _describe(
    label: str, part: np.ndarray, failure: Failure | None
) -> dict[str, float]:
    said = part[np.isfinite(part)]
    found = {}
    if len(said):
        found["mean"] = float(said.mean())
        found["std"] = float(said.std(ddof=1)) if len(said) > 1 else 0.0
    for kind in ("errors", "timeouts"):
        found[kind] = float(failure is not None and failure.kind == kind)
    found["no_verdict"] = float(len(part) - len(said))
    return {f"rewards/{label}/{name}": value for name, value in found.items()}
