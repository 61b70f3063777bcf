"""Rewards of finished answers: a number each, not differentiated."""

from jaxpost.rewards._implicit import SelfReward, check_self_rewards, self_reward
from jaxpost.rewards._names import RewardSection, by_name
from jaxpost.rewards._scorer import Scorer, Scores, check_verdicts, combine
from jaxpost.rewards._verifiers import (
    arithmetic,
    exact_match,
    format,
    length,
    regex,
    target_length,
)
from jaxpost.rewards._worker import RewardError

__all__ = [
    "RewardError",
    "RewardSection",
    "Scorer",
    "Scores",
    "SelfReward",
    "arithmetic",
    "by_name",
    "check_self_rewards",
    "check_verdicts",
    "combine",
    "exact_match",
    "format",
    "length",
    "regex",
    "self_reward",
    "target_length",
]
