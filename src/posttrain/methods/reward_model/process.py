"""Process reward models: at the end of each step of a chain, how likely it is to end right (arXiv 2312.08935)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.problems import ProblemsConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.config.settings import NAME, Config, DataConfig, ModelConfig, SamplerConfig
from posttrain.core.types import Metric
from posttrain.methods.reward_model.pairwise import ScorerConfig
from posttrain.trainer.stage import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from posttrain.trainer.loop import OnStep


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


class ProcessRewardStage(Stage):
    """Train a process reward model on labelled chains, or on chains that the policy labels by Monte Carlo."""

    Config = ProcessRewardConfig
    title = "Process reward model training"
    metrics = (
        Metric("loss", "Loss", "nats/step", "Training", "lower"),
        Metric("accuracy", "Accuracy", "share of steps on the right side of 1/2", "Training", "higher"),
        Metric("score", "Mean score", "of the steps", "Training"),
        Metric("held_out_accuracy", "Accuracy", "share of steps on the right side of 1/2", "Held out", "higher"),
        Metric("held_out_auc", "AUC", "", "Held out", "higher"),
    )

    def prepare(self) -> list[tuple[str, Any]]:
        """Render the problems or read the labelled rows; held-out ones that are trained on too are left out."""
        from posttrain.data.process_rows import PreparedChains, read_step_chains
        from posttrain.data.prompts import load_prompts, uses_chat_template
        from posttrain.data.rows import drop_training_overlap

        config, tokenizer, context = self.config, self.context.tokenizer, self.context.context
        labels = config.labels
        self.index: dict[str, Any] = {"kind": "process_reward", "separator": config.separator}
        train: Any
        held: Any = None
        if isinstance(labels, RolloutLabelsConfig):
            train = load_prompts(labels.problems, tokenizer, context=context)
            if labels.held_out is not None:
                held = load_prompts(labels.held_out, tokenizer, context=context)
                held = drop_training_overlap(held, train, f"stage {config.name}")
            self.index |= {"chat": uses_chat_template(labels.problems, tokenizer), "template": labels.problems.template}
        else:
            train = read_step_chains(labels.data, tokenizer, config.separator, context=context)
            if labels.held_out is not None:
                held = read_step_chains(labels.held_out, tokenizer, config.separator, context=context)
                held = drop_training_overlap(held, train, f"stage {config.name}")
            self.index |= {"chat": labels.data.chat, "system": labels.data.system}
        self.train, self.held_out = train, held if held is not None else PreparedChains([])
        return [(config.name, train), *([(f"{config.name} held out", held)] if held is not None else [])]

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        from posttrain.methods.reward_model.process_trainer import label, run_process_reward

        parts = self.train, self.held_out
        if isinstance(self.config.labels, RolloutLabelsConfig):
            prompts: tuple[Any, Any] = self.train.items, self.held_out.items
            parts = label(self.config, model, *prompts, folder, seed, self.context.functions)
        return run_process_reward(self.config, model, *parts, folder, seed=seed, on_step=on_step, index=self.index)
