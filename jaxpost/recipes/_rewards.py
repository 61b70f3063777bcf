"""From the rewards of a config to a judge of answers."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from jaxpost import rewards
from jaxpost.rewards import RewardSection
from jaxpost.typing import RewardFn


@contextlib.contextmanager
def open_judge(
    sections: Sequence[RewardSection],
    functions: Mapping[str, RewardFn] | None = None,
) -> Iterator[rewards.Scorer]:
    """The judge; its processes end with the context.

    Args:
        sections: of the config.
        functions: by name, instead of those of the config, each of weight 1.
    """
    with rewards.combine(functions) if functions else rewards.Scorer(sections) as judge:
        yield judge
