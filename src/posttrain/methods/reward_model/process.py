"""Process reward models: at the end of each step of a chain, how likely it is to end right (arXiv 2312.08935)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.problems import ProblemsConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.config.settings import NAME, Config, DataConfig, ModelConfig, SamplerConfig
from posttrain.core.types import Metric
from posttrain.methods.reward_model.scorer_stage import ScorerConfig, ScorerStage
from posttrain.trainer.stage import StageRun

if TYPE_CHECKING:
    from pathlib import Path

    from posttrain.trainer.loop import BatchTrainer, OnStep
    from posttrain.trainer.policy import LoadedPolicy


class RolloutLabelsConfig(Config):
    """Labels by Monte Carlo: the policy continues several times from the end of each step of a chain; the share of
    continuations that end right is the step's label."""

    one_process = ("kind",)
    kind: Literal["rollouts"] = "rollouts"
    problems: ProblemsConfig
    held_out: ProblemsConfig | None = Field(
        None, description="Problems whose chains are measured on, labelled in the same way."
    )
    rewards: RewardsConfig = Field(description="Rewards that decide if a chain ends right.")
    right: float = Field(1.0, description="A chain is right where its reward is at least this.")
    sampler: SamplerConfig = SamplerConfig()
    chains: int = Field(4, ge=1, description="Chains sampled for each problem.")
    completions: int = Field(8, ge=1, description="Completions from the end of each step (N).")
    targets: Literal["soft", "hard"] = Field(
        "soft", description="soft: the share of completions that end right; hard: 1 where any does, else 0."
    )
    problems_per_batch: int = Field(
        16, ge=1, description="Problems labelled at a time; an interrupted run keeps whole batches."
    )

    @model_validator(mode="after")
    def _draws(self) -> RolloutLabelsConfig:
        if self.sampler.temperature == 0:
            raise ValueError("sampler.temperature is 0: completions would all be the same, and a share says nothing")
        return self


class RowLabelsConfig(Config):
    """Labels from rows with prompt, steps (a list of texts; or completions) and labels (one number each)."""

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


class ProcessRewardStage(ScorerStage):
    """Train a process reward model on labelled chains, or on chains that the policy labels by Monte Carlo."""

    Config = ProcessRewardConfig
    title = "Process reward model training"
    metrics = (
        Metric("loss", "Loss", "nats/step", "Training", "lower"),
        Metric("accuracy", "Accuracy", "share of steps on the right side of 1/2", "Training", "higher"),
        Metric("score", "Mean score", "of the steps", "Training"),
        Metric("held_out/accuracy", "Accuracy", "share of steps on the right side of 1/2", "Held out", "higher"),
        Metric("held_out/auc", "AUC", "", "Held out", "higher"),
    )

    layout = "token"

    def prepare(self) -> list[tuple[str, Any]]:
        """Render the prompts, or read the labelled rows."""
        from posttrain.data.process_rows import PreparedChains, read_step_chains
        from posttrain.data.prompts import load_prompts, uses_chat_template

        labels, tokenizer, context = self.config.labels, self.context.tokenizer, self.context.context
        self.index = {"kind": "process_reward", "members": [{"folder": "."}]}
        separator = self.config.separator
        if isinstance(labels, RolloutLabelsConfig):
            self.prompts = self.read_held_out(
                lambda data: load_prompts(data, tokenizer, context=context), labels.problems, labels.held_out
            )
            chat = {"chat": uses_chat_template(labels.problems, tokenizer), "separator": separator}
            self.index |= {**chat, "template": labels.problems.template}
        else:
            self.chains, held_out = self.read_held_out(
                lambda data: read_step_chains(data, tokenizer, separator, context=context), labels.data, labels.held_out
            )
            self.held_out = held_out or PreparedChains([])
            self.index |= {"chat": labels.data.chat, "separator": separator, "system": labels.data.system}
        return self.data

    def trainer(self, policy: LoadedPolicy, run: StageRun) -> BatchTrainer:
        from posttrain.methods.reward_model.process_trainer import process_trainer

        return process_trainer(self.config, policy, self.rows, self.held_out.samples, run)

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        from posttrain.methods.reward_model.process_trainer import label_prompts, save_held_out

        if isinstance(self.config.labels, RolloutLabelsConfig):
            self.chains, self.held_out = label_prompts(
                self.config, model, *self.prompts, folder, seed, self.context.functions
            )
        self.rows = self.chains.samples
        entry = super().run(model, folder, seed, on_step) | {"labels": self.chains.stats}
        return entry | ({"held_out": save_held_out(folder)} if self.held_out.samples else {})
