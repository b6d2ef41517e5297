"""Settings of exploration: how much is sampled of which prompt, and what is kept of it from step to step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.settings import Config


class EntropyTargetConfig(Config):
    """Hold the entropy of the sampled tokens near a target."""

    target: float = Field(gt=0, description="Nats per token, as the metric `entropy`.")
    control: Literal["temperature", "bonus"] = Field(
        "temperature",
        description="What is adjusted: the sampling temperature, starting at sampler.temperature, or the coefficient of the entropy bonus, starting at entropy_coef.",
    )
    gain: float = Field(
        0.2,
        gt=0,
        le=5,
        description="K: each step multiplies the value by 1 + K e, with the relative error e held within ±0.2.",
    )
    low: float | None = Field(
        None, gt=0, description="Lower limit. None: sampler.temperature (temperature), 0.001 (bonus)."
    )
    high: float | None = Field(None, gt=0, description="Upper limit. None: 1.5 (temperature), 0.1 (bonus).")

    def bounds(self, temperature: float) -> tuple[float, float]:
        """Return (low, high) with the defaults filled in; `temperature` is that of the settings."""
        low, high = (temperature, 1.5) if self.control == "temperature" else (0.001, 0.1)
        return self.low or low, self.high or high


class AdaptiveGroupSizeConfig(Config):
    """Sample more completions of hard prompts, at the same cost: a step samples prompts_per_step x group_size."""

    first: int = Field(4, ge=1, description="Completions of every prompt; the rest goes to prompts without a success.")
    max_per_prompt: int | None = Field(
        None, ge=1, description="Most completions of one prompt. None: four times group_size."
    )


class CurriculumConfig(Config):
    """Draw problems by measured success: those about as hard as the target more often than others."""

    target: float = Field(
        0.5, gt=0, lt=1, description="Success rate that is drawn most often; 0.5: the weight is p (1 - p)."
    )
    floor: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of the draws spread evenly over unused problems (if all are used: over all).",
    )
    memory: float = Field(
        0.5, ge=0, lt=1, description="Factor on a problem's earlier answers when a new group is counted."
    )


class ReplayConfig(Config):
    """Keep rare successes; each replaces a missing success in later groups of the same problem."""

    size: int = Field(512, ge=1, description="Problems with a stored success; the oldest are dropped first.")
    rare: float = Field(0.25, gt=0, lt=1, description="Largest success rate of a group whose success is stored.")
    share: float = Field(0.25, ge=0, le=1, description="Largest share of a step's prompts that come from the store.")


class ExplorationConfig(Config):
    """Optional features of sampling. All are off by default."""

    dynamic_sampling: int = Field(
        0, ge=0, description="Times that prompts whose rewards are all equal are replaced by others (DAPO). 0: never."
    )
    adaptive_group_size: AdaptiveGroupSizeConfig | None = Field(
        None, description="More completions of hard prompts. None: group_size of each."
    )
    curriculum: CurriculumConfig | None = Field(None, description="Draw problems by success. None: all, in turn.")
    entropy_target: EntropyTargetConfig | None = Field(None, description="Control the entropy. None: off.")
    replay: ReplayConfig | None = Field(None, description="Store rare successes and reuse them. None: off.")
    partial_rollouts: int | None = Field(
        None,
        ge=1,
        description="Tokens that a completion grows by per step; longer ones continue in the next step with their group. None: every completion ends in its step.",
    )
    success: float = Field(
        1.0,
        allow_inf_nan=False,
        description="Lowest reward of a success (adaptive_group_size, curriculum, replay).",
    )
    max_staleness: int = Field(
        8,
        ge=1,
        description="Largest age of a token in steps when it is trained on (replay, partial_rollouts); older ones are dropped.",
    )

    @property
    def off_policy(self) -> bool:
        """Return True if a batch may contain tokens that an earlier policy sampled."""
        return self.replay is not None or self.partial_rollouts is not None

    @model_validator(mode="after")
    def _takes_effect(self) -> ExplorationConfig:
        fields = type(self).model_fields
        if self.success != fields["success"].default:
            if not (self.adaptive_group_size or self.curriculum or self.replay):
                raise ValueError(
                    "success is for adaptive_group_size, curriculum and replay: leave it out, or turn one of them on"
                )
        if self.max_staleness != fields["max_staleness"].default and not self.off_policy:
            raise ValueError("max_staleness is for replay and partial_rollouts: leave it out, or turn one of them on")
        return self
