"""Reinforcement learning with policy gradients: completions are sampled, scored, and made more or less likely."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.config.rl import RLConfig
from posttrain.config.settings import ModelConfig
from posttrain.core.types import Metric
from posttrain.trainer.stage import Stage, StageContext

if TYPE_CHECKING:
    from pathlib import Path

    from posttrain.data.prompts import RenderedPrompt
    from posttrain.trainer.loop import OnStep

TITLES = {
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "dapo": "DAPO",
    "gspo": "GSPO",
    "cispo": "CISPO",
    "rloo": "RLOO",
    "reinforce": "REINFORCE",
    "reinforce_pp": "REINFORCE++",
    "reinforce_pp_baseline": "REINFORCE++ with a baseline",
    "remax": "ReMax",
    "ppo": "PPO",
}


ROLLOUT_METRICS = (
    Metric("reward", "Reward", "mean over rollouts", "Reward", "higher"),
    Metric("reward/*", "Reward: *", "mean over rollouts", "Reward", "higher"),
    Metric("failed/*", "Failures: *", "rollouts/step", "Reward", "lower"),
    Metric("greedy_failed", "Greedy baseline failures", "answers/step", "Reward", "lower"),
    Metric("no_signal", "Groups without signal", "share", "Reward", "lower"),
    Metric("held_out", "Reward", "greedy answers", "Held out", "higher"),
    Metric("held_out/*", "Reward: *", "greedy answers", "Held out", "higher"),
    Metric("held_out_length", "Length", "tokens/answer", "Held out"),
    Metric("held_out_failed", "Answers without a reward", "excluded from the means", "Held out", "lower"),
    Metric("proxy", "Trained reward", "samples", "Held out", "higher"),
    Metric("gold", "Gold reward", "same samples; not trained on", "Held out", "higher"),
    Metric("kl_sequence", "KL from the first model", "nats/completion", "Held out"),
    Metric("proxy_gold", "Trained reward and gold", "correlation", "Held out", "higher"),
    Metric("gold_failed", "Samples without a reward or gold", "excluded from the means", "Held out", "lower"),
    Metric("length", "Length", "tokens/completion", "Completions"),
    Metric("cut", "Truncated", "share at the length or turn limit", "Completions", "lower"),
    Metric("replies", "Replies of the environment", "per completion", "Completions"),
    Metric("samples", "Sampled completions", "per step", "Completions"),
    Metric("drawn", "Sampled prompts", "per step, redraws included", "Completions"),
    Metric("carried", "Continued completions", "resume in the next step", "Completions"),
    Metric("carry_dropped", "Dropped partial completions", "too old to continue", "Completions", "lower"),
    Metric("staleness_mean", "Mean staleness", "steps since the first token", "Completions", "lower"),
    Metric("staleness_max", "Largest staleness", "steps since the first token", "Completions", "lower"),
    Metric("entropy", "Entropy", "nats/token, sampled", "Exploration"),
    Metric("temperature", "Temperature", "controlled", "Exploration"),
    Metric("entropy_coefficient", "Entropy coefficient", "controlled", "Exploration"),
    Metric("kl", "KL to the reference", "nats/token", "Exploration"),
    Metric("kl_coefficient", "KL coefficient", "controlled", "Exploration"),
    Metric("expected_success", "Expected success", "share, sampled problems", "Exploration"),
    Metric("problems_asked", "Problems used so far", "", "Exploration"),
    Metric("hard", "Hard prompts", "per step, no success at first", "Exploration"),
    Metric("largest_group", "Largest group", "completions of one prompt", "Exploration"),
    Metric("replayed", "Replayed successes", "per step", "Exploration"),
    Metric("replay_kept", "Stored successes", "", "Exploration"),
    Metric("replay_dropped", "Expired successes", "per step", "Exploration"),
)


DETAILS = (
    Metric("reward_std", "Spread of the reward", "standard deviation", "Details"),
    Metric("proxy_std", "Spread of the trained reward", "standard deviation, held out", "Details"),
    Metric("gold_std", "Spread of the gold reward", "standard deviation, held out", "Details"),
)


METRICS = (
    *ROLLOUT_METRICS,
    Metric("loss", "Loss", "", "Training"),
    Metric("clip_fraction", "Clipped", "share of tokens", "Training"),
    Metric("approx_kl", "KL of the update", "nats/token", "Training"),
    Metric("mismatch", "Sampler and trainer", "mean |difference| of log-probabilities", "Training", "lower"),
    Metric("value_loss", "Critic loss", "", "Training", "lower"),
    Metric("explained_variance", "Explained variance of the critic", "1: all, 0: none", "Training", "higher"),
    *DETAILS,
    Metric("mismatch_max", "Sampler and trainer, largest", "|difference| of log-probabilities", "Details", "lower"),
    Metric("mismatch_kl", "Sampler and trainer, KL", "nats/token", "Details", "lower"),
    Metric("clip_low", "Clipped below", "share of tokens", "Details"),
    Metric("clip_high", "Clipped above", "share of tokens", "Details"),
    Metric("clip_dual", "Clipped at the dual bound", "share of tokens", "Details"),
    Metric("ratio", "Importance ratio", "mean", "Details"),
    Metric("ratio_squared", "Importance ratio squared", "mean", "Details"),
    Metric("ratio_max", "Importance ratio, largest", "", "Details"),
    Metric("importance", "Importance weight", "mean", "Details"),
    Metric("importance_truncated", "Truncated importance weights", "share of tokens", "Details"),
    Metric("value_clip", "Clipped values", "share of tokens", "Details"),
)


def read_prompts(
    config: Any, setting: StageContext
) -> tuple[list[tuple[str, Any]], list[RenderedPrompt], list[RenderedPrompt]]:
    """(what was read, by title; problems to train on; held-out ones, without those that are trained on too).

    Raises RewardError for a reward that can't be built, before an earlier stage has trained for hours.
    """
    from posttrain.data.prompts import load_prompts
    from posttrain.data.rows import drop_training_overlap
    from posttrain.rewards.stack import RewardStack

    if setting.functions is not None:
        RewardStack(config.rewards, setting.functions, setting.tokenizer).close()
        if config.held_out is not None and config.held_out.gold is not None:
            RewardStack([config.held_out.gold], setting.functions, setting.tokenizer).close()
    asked = load_prompts(config.problems, setting.tokenizer, context=setting.context)
    if config.held_out is None:
        return [(config.name, asked)], asked.items, []
    held = load_prompts(config.held_out.problems, setting.tokenizer, context=setting.context)
    held = drop_training_overlap(held, asked, f"stage {config.name}")
    return [(config.name, asked), (f"{config.name} held out", held)], asked.items, held.items


class PolicyGradient(Stage):
    """Carry out GRPO, PPO and the other policy-gradient methods."""

    Config = RLConfig
    metrics = METRICS

    def __init__(self, config: Any, context: StageContext) -> None:
        super().__init__(config, context)
        self.title = TITLES[config.method]

    def prepare(self) -> list[tuple[str, Any]]:
        data, self.prompts, self.held_out = read_prompts(self.config, self.context)
        if self.config.environment is not None:
            from posttrain.sampling.environments import environment
            from posttrain.sampling.multi_turn import check

            environment(self.config.environment, self.context.functions)
            check(self.config.environment, self.context.tokenizer)
        return data

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        from posttrain.methods.rl.policy_gradient import run_rl

        functions = self.context.functions
        return run_rl(
            self.config, model, self.prompts, self.held_out, folder, seed=seed, on_step=on_step, functions=functions
        )
