"""Online DPO: the policy's own completions, judged by rewards; the best of each prompt is preferred to the worst."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from posttrain.config.problems import ProblemsConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.config.rl import HeldOutConfig, RLConfig, RLOptimizerConfig
from posttrain.config.settings import NAME, ModelConfig, SamplerConfig, TrainConfig
from posttrain.core.types import Metric
from posttrain.methods.preference.offline import BETA, GAMMA, NLL, SMOOTHING, PairLoss, Preference, check_loss
from posttrain.methods.rl.policy_gradient_stage import DETAILS, ROLLOUT_METRICS, read_prompts
from posttrain.trainer.stage import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from posttrain.trainer.loop import OnStep


class OnlineDPOConfig(TrainConfig):
    """Completions are sampled and judged by rewards; the best of each prompt is preferred to the worst."""

    method: str = "online_dpo"
    name: str = Field("online", pattern=NAME, description="Name of the stage's folder in the run.")
    problems: ProblemsConfig
    rewards: RewardsConfig
    held_out: HeldOutConfig | None = None
    sampler: SamplerConfig = SamplerConfig()
    prompts_per_step: int = Field(8, ge=1, description="Prompts a step, of which each gives one pair at most.")
    group_size: int = Field(8, ge=2, description="Completions of each prompt (G), best and worst of which make a pair.")
    steps: int = Field(100, ge=1, description="Optimizer steps, each on fresh completions.")
    loss: PairLoss = Field("dpo", description="What is made of a pair: as the methods of the same names.")
    beta: float | None = BETA
    label_smoothing: float | None = SMOOTHING
    gamma: float | None = GAMMA
    nll_weight: float | None = NLL
    optimizer: RLOptimizerConfig = RLOptimizerConfig()
    checkpoint_every: int = Field(10, ge=1, description="Steps between checkpoints.")

    @model_validator(mode="after")
    def _fits(self) -> OnlineDPOConfig:
        check_loss(self.loss, self.label_smoothing, self.gamma)
        self.collecting()
        return self

    @property
    def preset(self) -> str:
        """The method whose loss is applied to a pair."""
        return self.loss

    def collecting(self) -> RLConfig:
        """The settings by which reinforcement learning collects its rollouts, which are the same here."""
        shared = ("name", "problems", "rewards", "held_out", "sampler", "prompts_per_step", "group_size", "steps")
        more = (
            "adapter",
            "systems",
            "checkpoint_every",
            "keep_checkpoints",
            "start",
            "merge",
        )
        return RLConfig(method="rloo", **{k: getattr(self, k) for k in (*shared, *more)})


class OnlineDPO(Stage):
    """Sample, judge and train on a pair of each prompt."""

    Config = OnlineDPOConfig
    title = "Online DPO"
    metrics = (
        *ROLLOUT_METRICS,
        Metric("ties", "Ties", "prompts without a pair", "Reward", "lower"),
        Metric("reward_gap", "Reward gap", "chosen − rejected", "Reward"),
        *Preference.metrics,
        *DETAILS,
    )

    def prepare(self) -> list[tuple[str, Any]]:
        data, self.prompts, self.held_out = read_prompts(self.config, self.context)
        return data

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        from posttrain.methods.preference.online_trainer import run_online

        functions = self.context.functions
        return run_online(
            self.config, model, self.prompts, self.held_out, folder, seed=seed, on_step=on_step, functions=functions
        )
