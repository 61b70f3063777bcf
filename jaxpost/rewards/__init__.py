"""Rewards of finished answers: a number each, not differentiated."""

from jaxpost.rewards._implicit import SelfReward, check_self_rewards, self_reward

__all__ = ["SelfReward", "check_self_rewards", "self_reward"]
