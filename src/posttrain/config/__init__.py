"""Every setting there is, checked as a whole before anything heavy loads (nothing here imports torch).

A recipe is a model, a list of stages and a list of evaluations. Field descriptions are the reference: the command
line and the documentation print them.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import (
    AdapterConfig,
    ClassesConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    SFTConfig,
    SystemsConfig,
    TaskConfig,
)
from posttrain.config.rewards import RewardConfig, RewardsConfig
from posttrain.config.rl import HeldOutConfig, KLConfig, LabConfig, ReasoningGymConfig, RLConfig, RowsConfig

StageConfig = Annotated[SFTConfig | RLConfig, Field(discriminator="method")]


class TrackConfig(Config):
    """Where metrics go besides the run's own folder."""

    tensorboard: bool = Field(False, description="Write TensorBoard events into the run (extra: track).")
    wandb: str | None = Field(None, description="Weights & Biases project (extra: track). None: off.")
    trackio: str | None = Field(None, description="trackio project (extra: track). None: off.")


class Recipe(Config):
    """A model, a list of stages, and what to measure before the first and after the last."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the run's folder.")
    description: str = Field("", description="One line for `posttrain recipes list`.")
    model: ModelConfig
    seed: int = Field(0, ge=0, description="Seeds everything random.")
    stages: list[StageConfig] = Field(default_factory=list, description="Each starts from what the one before left.")
    evaluate: list[TaskConfig] = Field(
        default_factory=list, description="Measured before the first stage and after the last, on the same items."
    )
    output: str = Field("runs", description="Folder that holds runs.")
    track: TrackConfig = TrackConfig()

    @field_validator("stages", mode="before")
    @classmethod
    def _method(cls, stages: Any) -> Any:
        """A stage that names no method is supervised fine-tuning."""
        if not isinstance(stages, list):
            return stages
        return [{"method": "sft", **s} if isinstance(s, dict) else s for s in stages]

    @model_validator(mode="after")
    def _unique(self) -> Recipe:
        for what, names in (
            ("stages", [s.name for s in self.stages]),
            ("evaluations", [t.name for t in self.evaluate]),
        ):
            double = sorted({n for n in names if names.count(n) > 1})
            if double:
                raise ValueError(f"two {what} are named {double[0]!r}; give each a name of its own")
        if not self.stages and not self.evaluate:
            raise ValueError("a recipe needs at least one stage or one evaluation")
        return self


__all__ = [
    "AdapterConfig",
    "ClassesConfig",
    "Config",
    "DataConfig",
    "HeldOutConfig",
    "KLConfig",
    "LabConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RLConfig",
    "ReasoningGymConfig",
    "Recipe",
    "RewardConfig",
    "RewardsConfig",
    "RowsConfig",
    "SFTConfig",
    "SamplingConfig",
    "StageConfig",
    "SystemsConfig",
    "TaskConfig",
    "TrackConfig",
]
