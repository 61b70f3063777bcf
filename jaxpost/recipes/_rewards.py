"""From the rewards of a config to a judge of answers."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxpost import prompts
from jaxpost.recipes._round_rows import Judge, Verdicts
from jaxpost.typing import RewardFn


@dataclasses.dataclass(frozen=True)
class RewardsSection:
    """What answers are judged by: so far, whether they end in the row's `answer`."""


@contextlib.contextmanager
def open_judge(
    section: RewardsSection, functions: Mapping[str, RewardFn] | None = None
) -> Iterator[Judge]:
    """The judge, closed at the end."""
    del section, functions

    def judge(asked: Any, completions: list, ids: Any, *, answer: list, **_: Any):
        del asked, ids
        hits = zip(completions, answer, strict=True)
        rewards = np.array([float(prompts.exact_match(c, a)) for c, a in hits])
        return Verdicts(
            rewards, np.ones(len(rewards), bool), {}, {"arithmetic": rewards}
        )

    yield judge
