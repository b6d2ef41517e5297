"""Settings of reward models (pairs of answers) and process reward models (steps of chains)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.preference import HeldOutPairsConfig
from posttrain.config.prompts import ProblemsConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.config.settings import NAME, Config, DataConfig, EpochsConfig, SamplerConfig


class ScorerConfig(EpochsConfig):
    """What both kinds have: the result is a model for classification that later stages name; the policy passes by."""

    makes: ClassVar[Literal["model", "data", "reward_model"]] = "reward_model"

    @model_validator(mode="after")
    def _merged(self) -> ScorerConfig:
        if not self.merge:
            raise ValueError("merge is false, and a reward model is saved whole, its adapters merged: leave merge out")
        return self


class RewardModelConfig(ScorerConfig):
    """A reward model: -log sigma(r_chosen - r_rejected - margin) over pairs of answers."""

    method: Literal["reward_model"] = "reward_model"
    name: str = Field("reward_model", pattern=NAME, description="Name of the stage's folder in the run.")
    data: DataConfig = Field(description="Pairs: prompt, chosen, rejected; optionally probability and margin.")
    held_out: HeldOutPairsConfig | None = None
    batch_size: int = Field(16, ge=1, description="Pairs a step, over all ranks.")
    labels: Literal["soft", "hard"] = Field(
        "soft",
        description="soft: a pair counts by its probability; hard: as if that were 1, for labels that are mild by the way they are made (a judge's scores).",
    )
    margin_scale: float = Field(
        0.0, ge=0, description="Factor on the rows' margins (by how much the chosen answer is to be ahead). 0: unused."
    )
    centring: float = Field(
        0.0, ge=0, description="Coefficient of (r_chosen + r_rejected)^2, which keeps rewards around 0. 0: none."
    )
    members: int = Field(
        1,
        ge=1,
        le=64,
        description="Models of an ensemble, each with a head, adapters and an order of rows of its own seed.",
    )


class RolloutLabelsConfig(Config):
    """Labels by Monte Carlo: from the end of each step of a chain the policy goes on some times; the share that ends
    right is the step's label."""

    kind: Literal["rollouts"] = "rollouts"
    problems: ProblemsConfig
    held_out: ProblemsConfig | None = Field(None, description="Problems whose chains are measured on, labelled alike.")
    rewards: RewardsConfig = Field(description="What says whether a chain ends right.")
    right: float = Field(1.0, description="A chain is right where its reward is at least this.")
    sampler: SamplerConfig = SamplerConfig()
    chains: int = Field(4, ge=1, description="Chains sampled for each problem.")
    completions: int = Field(8, ge=1, description="Completions from the end of each step (N).")
    targets: Literal["soft", "hard"] = Field(
        "soft", description="soft: the share of completions that end right; hard: 1 where any does, else 0."
    )
    problems_per_batch: int = Field(
        16, ge=1, description="Problems labelled at a time; what a killed run had labelled is kept by whole batches."
    )

    @model_validator(mode="after")
    def _draws(self) -> RolloutLabelsConfig:
        if self.sampler.temperature == 0:
            raise ValueError("sampler.temperature is 0: completions would all be the same, and a share says nothing")
        return self


class RowLabelsConfig(Config):
    """Labels that are there: rows with prompt, steps (a list of texts; or completions) and labels (one number each)."""

    kind: Literal["rows"] = "rows"
    data: DataConfig
    held_out: DataConfig | None = Field(None, description="Rows that are measured on and not trained on.")


LabelsConfig = Annotated[RolloutLabelsConfig | RowLabelsConfig, Field(discriminator="kind")]


class ProcessRewardConfig(ScorerConfig):
    """A process reward model: how likely a chain is still right, at the end of each of its steps."""

    method: Literal["process_reward"] = "process_reward"
    name: str = Field("process_reward", pattern=NAME, description="Name of the stage's folder in the run.")
    labels: LabelsConfig
    separator: str = Field("\n", min_length=1, description="Text that ends a step.")
    measure_every: int = Field(
        50, ge=1, description="Steps between measurements on held-out chains; also before the first and after the last."
    )
    batch_size: int = Field(16, ge=1, description="Chains a step, over all ranks.")
