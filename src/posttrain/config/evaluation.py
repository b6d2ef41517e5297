"""Settings that every evaluation has. An evaluation's own settings are the nested class `Config` of the evaluation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.names import EVALUATIONS
from posttrain.config.open_kinds import OpenKind
from posttrain.config.settings import NAME, Config


class EvaluationBase(Config):
    """Settings that every evaluation has.

    Attributes:
        measures: What its items have, and so how they are summarized and compared: `choice` or `generate` (`correct`),
            `perplexity` (`nll`, `tokens`), `sample` (`value`, from 0 to 1), `score` (`value`, any number), `behaviour`
            (`value`, any number, more of which is not better, and `figures`, other numbers by name) or `speed`
            (`value`, tokens a second).
        compares_items: Its items are the same questions for every model, so that two models are compared item by item.
    """

    measures: ClassVar[Literal["choice", "generate", "perplexity", "sample", "score", "behaviour", "speed"]] = "score"
    compares_items: ClassVar[bool] = True

    kind: str = Field(description="Name of the evaluation, or package.module:Class of yours.")
    name: str = Field(pattern=NAME, description="Name in tables and files.")
    show: int = Field(8, ge=0, description="Items whose answers are shown side by side in the report. 0: none.")

    validation: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the items by which something is chosen (a merge's search) and which are never reported, by a hash of their prompts. 0: all are reported.",
    )

    @model_validator(mode="after")
    def _has_parts(self) -> EvaluationBase:
        if self.validation and not self.compares_items:
            raise ValueError(f"validation divides items, and {self.kind} has none that are the same for every model")
        return self

    @property
    def source(self) -> Any:
        """Return the settings of the data that it reads."""
        return self


EvaluationConfig = Annotated[EvaluationBase, OpenKind(EVALUATIONS, "evaluation", base=EvaluationBase)]
