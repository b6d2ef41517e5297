"""Settings of the stage that quantises a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.settings import NAME
from posttrain.methods.compress.compress_stage import CompressConfig


class QuantizeConfig(CompressConfig):
    """Quantisation: weights in 4 or 8 bits."""

    method: str = "quantize"
    name: str = Field("quantize", pattern=NAME, description="Name of the stage's folder in the run.")
    algorithm: Literal["rtn", "gptq", "awq"] = Field(
        "gptq",
        description="How values are chosen. rtn: each is rounded to the nearest (no calibration). gptq: column by column, later columns make up for errors. awq: columns with large inputs are scaled up before rounding.",
    )
    bits: Literal[4, 8] | None = Field(
        None, description="Bits of a weight. None: 4, or those that the model was trained for (qat)."
    )
    group: int | None = Field(
        None,
        ge=0,
        description="Weights of a row that share a scale; must divide the width of every layer. 0: one scale a row. None: 32 for 4 bits and 0 for 8, or what the model was trained for (qat).",
    )
    symmetric: bool | None = Field(
        None,
        description="true: values reach equally far on both sides of 0. false: each group has a zero. None: true, or what the model was trained for (qat).",
    )
    skip: list[str] | None = Field(
        None,
        description='Names of linear layers that stay in full, for example ["*.down_proj", "model.layers.0.*"]. Routers of experts always do. None: none, or those that training (qat) left in full.',
    )
    embeddings: Literal[4, 8] | None = Field(
        None,
        description="Bits of the embeddings, rounded to nearest, and of an output head that shares them. None: in full.",
    )
    head: Literal[4, 8] | None = Field(
        None, description="Bits of an output head that shares nothing with the embeddings. None: in full."
    )
    activation_bits: Literal[8] | None = Field(
        None,
        description="8: the inputs of quantised layers are rounded to int8 too, one scale a token, when the model runs (W8A8, with bits: 8 and one scale a row). None: in full.",
    )
    search_scales: bool = Field(
        False,
        description="Try smaller scales for each group, which clip its largest values, and keep the one with the least squared error (of outputs, with calibration).",
    )
    act_order: bool = Field(
        True, description="gptq: begin with the columns whose inputs are largest. Groups in the file stay as they are."
    )
    damping: float = Field(
        0.01, gt=0, le=1, description="gptq: part of the mean of the Hessian's diagonal that is added to it."
    )

    format: Literal["compressed-tensors", "gguf"] = Field(
        "compressed-tensors",
        description="gguf: write model.gguf beside the model's folder too, which keeps the integers (docs/quantization.md). Its scales are float16, and the model's are then as well.",
    )

    @model_validator(mode="after")
    def _fits(self) -> QuantizeConfig:
        if self.calibration is None and self.algorithm != "rtn":
            raise ValueError(
                f"{self.algorithm} looks at what the layers multiply: set calibration, for example to rows that the "
                "model was trained on, or algorithm: rtn"
            )
        if self.calibration is not None and self.algorithm == "rtn" and not self.search_scales:
            raise ValueError("rtn looks at no rows: leave calibration out, or set search_scales or algorithm: gptq")
        defaults = {name: type(self).model_fields[name].default for name in ("act_order", "damping")}
        if self.algorithm != "gptq" and any(getattr(self, name) != value for name, value in defaults.items()):
            raise ValueError(f"act_order and damping are settings of gptq, and algorithm is {self.algorithm}")
        if self.activation_bits is not None and (self.bits != 8 or self.group):
            raise ValueError(
                "activation_bits: 8 goes with bits: 8 and one scale a row (group: 0): programs have no kernels for others"
            )
        if self.group is not None and 0 < self.group < 8:
            raise ValueError(f"group is {self.group}: expected 0 (one scale a row) or at least 8")
        if self.format == "gguf":
            if self.group is not None and self.group % 32:
                raise ValueError(f"format: gguf goes with groups of a multiple of 32, and group is {self.group}")
            if self.activation_bits is not None or (self.bits == 8 and self.symmetric is False):
                raise ValueError("format: gguf has no inputs in int8 (activation_bits) and no zeros beside bits: 8")
        return self
