"""Rewards: a completion and its example in, a number out; stacked, weighted, each part kept. See docs/rewards.md."""

from posttrain.config.rewards import RewardConfig, RewardsConfig
from posttrain.core.errors import RewardError
from posttrain.rewards.answer_extraction import Answer, find
from posttrain.rewards.outcome import GroupReward, LabelError, Reward, Scorer
from posttrain.rewards.stack import Excluded, RewardStack, Scored

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
]
