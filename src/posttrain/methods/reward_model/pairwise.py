"""Reward models from pairs of answers: Bradley-Terry over the pairs of the global batch, alone or as an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from posttrain.config.settings import NAME, DataConfig, MeasuredConfig, ModelConfig
from posttrain.core.types import Metric
from posttrain.methods.reward_model.scorer_stage import ScorerConfig
from posttrain.trainer.stage import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from posttrain.data.preference_rows import Pair
    from posttrain.trainer.loop import OnStep


class RewardModelConfig(ScorerConfig, MeasuredConfig):
    """A reward model: -log sigma(r_chosen - r_rejected - margin) over pairs of answers."""

    soft_prompts = True

    method: Literal["reward_model"] = "reward_model"
    name: str = Field("reward_model", pattern=NAME, description="Name of the stage's folder in the run.")
    data: DataConfig = Field(description="Pairs: prompt, chosen, rejected; optionally probability and margin.")
    batch_size: int = Field(16, ge=1, description="Pairs a step, over all ranks.")
    labels: Literal["soft", "hard"] = Field(
        "soft",
        description="soft: a pair counts by its probability; hard: as if that were 1, for labels whose probabilities are not calibrated (a judge's scores).",
    )
    margin_scale: float = Field(
        0.0, ge=0, description="Factor on the rows' margins (the least difference of the two rewards). 0: unused."
    )
    centring: float = Field(
        0.0, ge=0, description="Coefficient of (r_chosen + r_rejected)^2, which keeps rewards around 0. 0: none."
    )
    members: int = Field(
        1,
        ge=1,
        le=64,
        description="Models of an ensemble, each with a head, adapters and an order of rows from a different seed.",
    )


class RewardModelStage(Stage):
    """Train a reward model, or an ensemble of them, on pairs."""

    Config = RewardModelConfig
    title = "Reward model training"
    metrics = (
        Metric("loss", "Loss", "nats/pair", "Training", "lower"),
        Metric("held_out/loss", "Held out", "nats/pair", "Training", "lower", over="loss"),
        Metric("accuracy", "Accuracy", "share of pairs ranked correctly", "Training", "higher"),
        Metric("held_out/accuracy", "Held out", "share of pairs", "Training", "higher", over="accuracy"),
        Metric("margin", "Margin", "reward, chosen − rejected", "Training", "higher"),
        Metric("held_out/margin", "Held out", "reward", "Training", "higher", over="margin"),
        Metric("score", "Mean reward", "", "Training"),
        Metric("held_out/calibration_error", "Calibration error", "", "Held out", "lower"),
    )

    held_out: Sequence[Pair] = ()

    def prepare(self) -> list[tuple[str, Any]]:
        from posttrain.data.preference_rows import prepare_pairs

        def load(data: DataConfig) -> Any:
            margins = self.config.margin_scale != 0
            return prepare_pairs(data, self.context.tokenizer, context=self.context.context, margins=margins)

        trained, held_out = self.read_held_out(load, self.config.data, self.config.held_out)
        self.rows, self.held_out = trained.items, held_out.items if held_out else ()
        return self.data

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        from posttrain.methods.reward_model.pairwise_trainer import train_members

        return train_members(self, model, folder, seed, on_step)
