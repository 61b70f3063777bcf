"""Rewards by name, for configs: built-in ones, and a user's own functions."""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

from jaxpost.rewards import _verifiers, _worker
from jaxpost.typing import RewardFn

BUILT_IN: dict[str, Callable[..., RewardFn]] = {
    "arithmetic": _verifiers.arithmetic,
    "exact_match": _verifiers.exact_match,
    "format": _verifiers.format,
    "length": _verifiers.length,
    "regex": _verifiers.regex,
    "target_length": _verifiers.target_length,
}
CAN_HANG = {"regex"}
"""Built-in rewards whose time depends on their settings."""


@dataclasses.dataclass(frozen=True)
class RewardSection:
    """One reward of a config; see docs/rewards.md.

    Attributes:
        name: Built-in (arithmetic, exact_match, format, length, regex, target_length),
            or package.module:function for one's own.
        weight: Factor in the total; 0 only logs it.
        label: What metrics call it; the last part of the name if not given.
        settings: Of a built-in reward, or more arguments for one's own.
        deadline_s: How long a call, that is all answers of a round, may take, seconds;
            none waits as long as it takes.
        stop_after: Stop when so many calls in a row have raised or been too slow; none
            counts them and goes on.
        isolate: Where it is called, none being right here; `auto` gives what can hang a
            process of its own, to be killed, if it has a name, else a thread.
    """

    name: str = "arithmetic"
    weight: float = 1.0
    label: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    deadline_s: float | None = 60.0
    stop_after: int | None = 3
    isolate: Literal["auto", "none", "thread", "process"] = "auto"

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be finite, got {self.weight}.")
        if self.deadline_s is not None and not self.deadline_s > 0.0:
            raise ValueError(
                f"deadline_s must be positive, or none for none, got {self.deadline_s}."
            )
        if self.stop_after is not None and self.stop_after < 1:
            raise ValueError(
                f"stop_after must be at least 1, or none to go on, got "
                f"{self.stop_after}."
            )

    @property
    def shown_as(self) -> str:
        """Its name in metrics."""
        return self.label or self.name.rpartition(":")[2].rpartition(".")[2]


def by_name(name: str, **settings: Any) -> RewardFn:
    """A reward by its name in configs.

    Args:
        name: built-in, or `package.module:function`, a function of the contract
            `f(prompts, completions, completion_ids, **columns)`; it may leave out what
            it does not need.
        settings: of the built-in reward; of one's own, arguments for every call.

    Raises:
        ValueError: there is no such name (the nearest is told) or setting, or a setting
            is out of its range.
        RewardError: there is no such module or function.
    """
    if ":" in name:
        return _worker.make_function(name, settings)
    if name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, 1, 0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no reward {name!r}: built in are {', '.join(BUILT_IN)}; your "
            f"own is 'package.module:function'.{hint}"
        )
    factory = BUILT_IN[name]
    parameters = inspect.signature(factory).parameters
    for key in settings:
        if key not in parameters:
            raise ValueError(
                f"reward {name!r} has no setting {key!r}; it has "
                f"{', '.join(parameters)}."
            )
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in settings:
            raise ValueError(f"reward {name!r} needs the setting {key!r}.")
    return factory(**settings)
