"""Settings of preference optimisation: from rows of pairs or labelled answers, and on the policy's own completions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.config.prompts import ProblemsConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.config.rl import HeldOutConfig, RLConfig, RLOptimizerConfig
from posttrain.config.settings import (
    NAME,
    Config,
    DataConfig,
    EpochsConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainConfig,
)

PairLoss = Literal["dpo", "ipo", "cdpo", "robust_dpo", "dpo_norm", "orpo", "simpo", "cpo"]
"""Losses of a pair of answers."""

BETA: Any = Field(
    None,
    gt=0,
    description="How strongly a log ratio counts (ORPO: weight of the odds ratio). None: the method's own, 0.1; dpo_norm 5, simpo 2.",
)
SMOOTHING: Any = Field(
    None, ge=0, lt=0.5, description="Share of labels that are wrong (cdpo, robust_dpo). None: 0.1 for these."
)
GAMMA: Any = Field(None, ge=0, description="Target margin of the rewards (simpo). None: 1.")
NLL: Any = Field(
    None,
    ge=0,
    description="Weight of the better answer's negative log-likelihood a token, added to the loss. None: 1 for orpo and cpo, else 0.",
)


def check_loss(loss: str, label_smoothing: float | None, gamma: float | None) -> None:
    """Settings that belong to another loss are errors."""
    if label_smoothing is not None and loss not in ("cdpo", "robust_dpo"):
        raise ValueError(f"label_smoothing belongs to cdpo and robust_dpo, and this is {loss}")
    if gamma is not None and loss != "simpo":
        raise ValueError(f"gamma belongs to simpo, and this is {loss}")


class PreferenceOptimizerConfig(OptimizerConfig):
    """AdamW as for other stages, at a twentieth of the rate."""

    lr: float = Field(
        1e-6, gt=0, description="Peak learning rate; adapters take about ten times that of full fine-tuning."
    )
    warmup: float = Field(
        0.1, ge=0, description="Steps of linear warm-up; below 1: that fraction of all steps. 0: none."
    )


class HeldOutPairsConfig(Config):
    """Preferences that are never trained on: how often, and by how much, the model prefers the better answer."""

    data: DataConfig
    every: int = Field(50, ge=1, description="Steps between; also before the first and after the last.")


class PreferenceConfig(EpochsConfig):
    """Direct preference optimisation: better answers made likelier than worse ones, without a reward model."""

    method: Literal["dpo", "ipo", "cdpo", "robust_dpo", "dpo_norm", "kto", "orpo", "simpo", "cpo"]
    name: str = Field("preference", pattern=NAME, description="Name of the stage's folder in the run.")
    data: DataConfig
    held_out: HeldOutPairsConfig | None = None
    beta: float | None = BETA
    label_smoothing: float | None = SMOOTHING
    gamma: float | None = GAMMA
    nll_weight: float | None = NLL
    desirable_weight: float | None = Field(None, gt=0, description="Weight of good answers (kto). None: 1.")
    undesirable_weight: float | None = Field(None, gt=0, description="Weight of bad answers (kto). None: 1.")
    batch_size: int = Field(16, ge=1, description="Pairs (kto: answers) a step, over all ranks.")
    optimizer: PreferenceOptimizerConfig = PreferenceOptimizerConfig()

    @model_validator(mode="after")
    def _belong(self) -> PreferenceConfig:
        check_loss(self.method, self.label_smoothing, self.gamma)
        if self.method == "kto":
            if self.nll_weight is not None:
                raise ValueError("nll_weight belongs to the losses of pairs, and kto's answers come singly")
        elif self.desirable_weight is not None or self.undesirable_weight is not None:
            raise ValueError(f"desirable_weight and undesirable_weight belong to kto, and this is {self.method}")
        return self


class OnlineDPOConfig(TrainConfig):
    """Completions are sampled and judged by rewards; the best of each prompt is preferred to the worst."""

    method: Literal["online_dpo"] = "online_dpo"
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
