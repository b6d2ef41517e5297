"""Rewards: a completion and its example in, a number out; listed, weighted, and each kept. See docs/rewards.md."""

from posttrain.config.rewards import CustomRewardConfig, RewardConfig, RewardsConfig, RewardTermConfig
from posttrain.core.errors import RewardError
from posttrain.rewards.answer_extraction import ExtractedAnswer, find
from posttrain.rewards.outcome import Explained, LabelError
from posttrain.rewards.reward import Reward
from posttrain.rewards.stack import RewardStack, ScoredGroups

__all__ = [
    "ExtractedAnswer",
    "CustomRewardConfig",
    "Explained",
    "LabelError",
    "Reward",
    "RewardConfig",
    "RewardError",
    "RewardStack",
    "RewardTermConfig",
    "RewardsConfig",
    "ScoredGroups",
    "find",
]
