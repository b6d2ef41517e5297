"""Settings of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Config

NOT_ADAFACTOR = ("adamw", "muon", "adamw8bit", "schedule_free")


class OptimizerConfig(Config):
    """The optimizer, its schedule, clipping."""

    kind: Literal["adamw", "muon", "adafactor", "adamw8bit", "schedule_free"] = Field(
        "adamw",
        description="Update rule. muon: the matrices inside of decoder layers, and AdamW for the rest; adamw8bit: moments in 8 bits (bitsandbytes); schedule_free: AdamW on an average of its steps (schedulefree), without a schedule.",
    )
    lr: float = Field(2e-5, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "cosine",
        description="Course of the learning rate after warm-up; wsd: constant, then linear to min_lr (warmup-stable-decay).",
    )
    decay: float = Field(
        0.2, gt=0, description="wsd: steps of the decay at the end; below 1: that fraction of all steps, at least one."
    )
    warmup: float = Field(
        0.05,
        ge=0,
        description="Steps of linear warm-up; below 1: that fraction of all steps, rounded, and at least one step. 0: none.",
    )
    min_lr: float = Field(0.0, ge=0, description="Final value of the schedules but constant.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Of AdamW and schedule_free, and of the rest of muon.")
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1, description="muon: of the matrices.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled; applied to matrices, not to biases and norms. 0: none."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping by global norm. 0: none.")

    @model_validator(mode="after")
    def _decay_of_wsd(self) -> OptimizerConfig:
        if self.schedule != "wsd" and self.decay != type(self).model_fields["decay"].default:
            raise ValueError(f"decay is for schedule: wsd, and schedule is {self.schedule}: leave decay out")
        return self

    @model_validator(mode="before")
    @classmethod
    def _without_schedule(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("kind") == "schedule_free" and "schedule" not in data:
            return {**data, "schedule": "constant"}
        return data

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> OptimizerConfig:
        if self.kind == "schedule_free" and self.schedule != "constant":
            raise ValueError(
                f"kind: schedule_free replaces the schedule by an average: leave schedule out (it is {self.schedule})"
            )
        for name, kinds in (("momentum", ("muon",)), ("betas", NOT_ADAFACTOR), ("eps", NOT_ADAFACTOR)):
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with kind: {self.kind}: leave {name} out")
        return self
