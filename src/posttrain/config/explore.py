"""Settings of adaptive exploration and of trajectory management: how much is tried, on what, and what is kept of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.config.settings import Config


class SteerConfig(Config):
    """Holds the entropy of what is sampled near a target."""

    by: Literal["temperature", "bonus"] = Field(
        "temperature",
        description="What is steered: the sampling temperature, from sampler.temperature, or the coefficient of the entropy bonus, from entropy.",
    )
    target: float = Field(gt=0, description="Nats a token, as the metric `entropy` counts them.")
    gain: float = Field(
        0.2, gt=0, le=5, description="K: the value is multiplied by 1 + K e a step, e the relative error within ±0.2."
    )
    low: float | None = Field(
        None,
        gt=0,
        description="Never below this. None: sampler.temperature, so that sampling gets no cooler than it began; 0.001 for the bonus.",
    )
    high: float | None = Field(None, gt=0, description="Never above this. None: 1.5 (temperature), 0.1 (bonus).")

    def bounds(self, temperature: float) -> tuple[float, float]:
        """(low, high), defaults filled in. temperature: that of the sampling, as the stage begins."""
        low, high = (temperature, 1.5) if self.by == "temperature" else (0.001, 0.1)
        return self.low or low, self.high or high


class AllocateConfig(Config):
    """More completions where a prompt is hard, at the same cost: a step still samples prompts_per_step x group_size."""

    first: int = Field(
        4, ge=1, description="Completions that every prompt gets; the rest goes to those without success."
    )
    most: int | None = Field(None, ge=1, description="Completions of one prompt, at most. None: four times group_size.")


class CurriculumConfig(Config):
    """Problems are drawn by measured success: those about as hard as the target more often than others."""

    target: float = Field(0.5, gt=0, lt=1, description="Share of successes that is drawn most; 0.5: weight p (1 - p).")
    floor: float = Field(
        0.2, ge=0, le=1, description="Share of the draws that goes evenly to problems never asked (none left: to all)."
    )
    memory: float = Field(
        0.5, ge=0, lt=1, description="What a problem's earlier answers count beside those of its newest group."
    )


class ReplayConfig(Config):
    """Rare successes are kept, and stand in for a success in later groups of the same problem that have none."""

    size: int = Field(512, ge=1, description="Problems of which one is kept; the oldest leave first.")
    rare: float = Field(0.25, gt=0, lt=1, description="Kept where at most this share of the group succeeded.")
    share: float = Field(0.25, ge=0, le=1, description="Prompts of a step, at most, that are kept ones asked again.")
