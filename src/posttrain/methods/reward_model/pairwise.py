"""Reward models from pairs of answers: Bradley-Terry over the pairs of the global batch, alone or as an ensemble."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.settings import NAME, DataConfig, EpochsConfig, ModelConfig
from posttrain.core.types import Metric
from posttrain.methods.preference.offline import HeldOutPairsConfig
from posttrain.trainer.stage import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from posttrain.trainer.loop import OnStep


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


class RewardModelStage(Stage):
    """Train a reward model, or an ensemble of them, on pairs."""

    Config = RewardModelConfig
    title = "Reward model training"
    metrics = (
        Metric("loss", "Loss", "nats/pair", "Training", "lower"),
        Metric("accuracy", "Accuracy", "share of pairs ranked correctly", "Training", "higher"),
        Metric("margin", "Margin", "reward, chosen − rejected", "Training", "higher"),
        Metric("score", "Mean reward", "", "Training"),
        Metric("held_out_accuracy", "Accuracy", "share of pairs ranked correctly", "Held out", "higher"),
        Metric("held_out_loss", "Loss", "nats/pair", "Held out", "lower"),
        Metric("held_out_margin", "Margin", "reward, chosen − rejected", "Held out", "higher"),
        Metric("held_out_calibration_error", "Calibration error", "", "Held out", "lower"),
    )

    def prepare(self) -> list[tuple[str, Any]]:
        """Read the pairs; held-out ones that are also trained on are left out of the held-out ones."""
        from posttrain.data.preference_rows import prepare_pairs
        from posttrain.data.rows import drop_training_overlap

        config, context = self.config, self.context
        prepared = prepare_pairs(config.data, context.tokenizer, context=context.context)
        self.pairs, self.held_out = prepared.items, list[Any]()
        data = [(config.name, prepared)]
        if config.held_out is not None:
            held = prepare_pairs(config.held_out.data, context.tokenizer, context=context.context)
            held = drop_training_overlap(held, prepared, f"stage {config.name}")
            data.append((f"{config.name} held out", held))
            self.held_out = held.items
        return data

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        from posttrain.methods.reward_model.pairwise_trainer import run_reward_model

        return run_reward_model(self.config, model, self.pairs, self.held_out, folder, seed=seed, on_step=on_step)
