"""Settings that every evaluation has. An evaluation's own settings are the nested class `Config` of the evaluation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from posttrain.config.names import EVALUATIONS
from posttrain.config.open_kinds import OpenKind
from posttrain.config.settings import NAME, Config


class EvaluationBase(Config):
    """Settings that every evaluation has.

    Attributes:
        measures: What its items have, and so how they are summarized and compared: `choice` or `generate` (`correct`),
            `perplexity` (`nll`, `tokens`), `sample` (`value`, from 0 to 1), `score` (`value`, any number) or `speed`
            (`value`, tokens a second).
        compares_items: Its items are the same questions for every model, so that two models are compared item by item.
    """

    measures: ClassVar[Literal["choice", "generate", "perplexity", "sample", "score", "speed"]] = "score"
    compares_items: ClassVar[bool] = True

    kind: str = Field(description="Name of the evaluation, or package.module:Class of yours.")
    name: str = Field(pattern=NAME, description="Name in tables and files.")
    show: int = Field(8, ge=0, description="Items whose answers are shown side by side in the report. 0: none.")

    @property
    def source(self) -> Any:
        """Return the settings of the data that it reads."""
        return self


EvaluationConfig = Annotated[EvaluationBase, OpenKind(EVALUATIONS, "evaluation", base=EvaluationBase)]
