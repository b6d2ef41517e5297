"""Rewards: a completion and its example in, a number out; stacked, weighted, each part kept. See docs/rewards.md."""

from posttrain.config.rewards import RewardConfig, RewardsConfig
from posttrain.rewards.answer import Answer, find
from posttrain.rewards.base import GroupReward, LabelError, Reward, RewardError, Scorer
from posttrain.rewards.stack import Excluded, RewardStack, Scored
from posttrain.rewards.watch import watch

__all__ = [
    "Answer",
    "Excluded",
    "GroupReward",
    "LabelError",
    "Reward",
    "RewardConfig",
    "RewardError",
    "RewardStack",
    "RewardsConfig",
    "Scored",
    "Scorer",
    "find",
    "watch",
]
