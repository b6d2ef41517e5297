"""Settings of sources of feedback: what tells a model, in words, what is right or wrong about its answer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from posttrain.config.names import FEEDBACK
from posttrain.config.open_kinds import OpenKind
from posttrain.config.settings import Config


class FeedbackSourceConfig(Config):
    """Settings that every source of feedback has."""

    kind: str = Field(description="Name of the source, or package.module:name of your own function or class.")
    name: str = Field("", description="Name in messages. Empty: the kind.")

    @property
    def title(self) -> str:
        """Return the name in messages."""
        return self.name or self.kind.rpartition(":")[2]


class OpenFeedback(OpenKind):
    """Check the settings of a source; its name alone stands for the source with its defaults."""

    def validate(self, value: Any) -> BaseModel:
        return super().validate({"kind": value} if isinstance(value, str) else value)  # type: ignore[no-any-return]


OPEN_FEEDBACK = OpenFeedback(FEEDBACK, "source of feedback", base=FeedbackSourceConfig, from_signature=True)
AnyFeedbackConfig = Annotated[FeedbackSourceConfig, OPEN_FEEDBACK]
