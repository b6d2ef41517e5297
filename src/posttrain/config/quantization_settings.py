"""Settings of the grid of quantised weights, and of training with it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.config.base import Config


class QuantizedTrainingConfig(Config):
    """Quantisation-aware training: linear layers multiply with rounded weights, gradients pass through rounding."""

    bits: Literal[4, 8] = Field(4, description="Bits of a weight.")
    group: int | None = Field(
        32,
        ge=8,
        description="Weights of a row that share a scale; must divide the width of every layer. null: one scale a row.",
    )
    symmetric: bool = Field(True, description="Values reach equally far on both sides of 0; else groups have a zero.")
    skip: list[str] = Field(
        default_factory=list,
        description='Names of linear layers that stay in full, for example ["*.down_proj", "model.layers.0.*"]. The output head and routers always do.',
    )
