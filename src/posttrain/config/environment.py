"""Settings of environments, which answer the model within a completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.names import ENVIRONMENTS
from posttrain.config.open_kinds import OpenKind
from posttrain.config.settings import Config
from posttrain.core.types import Rollout


@dataclass(frozen=True, slots=True)
class ScoredPart:
    """Hold the part of a completion that rewards read: tokens [first, last), which decode to a text that holds `text`.

    Attributes:
        text: Its text.
        first: Place of its first token in the completion.
        last: One past the place of its last token.
    """

    text: str
    first: int
    last: int


class EnvironmentBase(Config):
    """Settings that every environment has."""

    kind: str = Field(description="Name of the environment, or package.module:Class of yours.")
    max_reply: int = Field(256, ge=1, description="Longest reply in tokens; a longer one is cut, and ends in [cut].")
    answers: Literal["inline", "turn"] = Field(
        "inline",
        description="inline: the reply follows the model's text directly, and the model continues; turn: the model's turn is closed, and the reply is a turn of the chat template.",
    )
    role: Literal["user", "tool"] = Field("user", description="Role of a reply's turn (answers: turn).")

    @property
    def stop_strings(self) -> list[str]:
        """Return the strings at which the model stops, and the environment is called."""
        return []

    @property
    def end_closes_turn(self) -> bool:
        """Return True if the environment is called at the model's end token too. False: it ends the completion."""
        return self.answers == "turn"

    @property
    def reads_special_tokens(self) -> bool:
        """Return True if special tokens in the model's text are shown to the environment: they may mark a call."""
        return True

    def scored_part(self, rollout: Rollout, tokenizer: Any) -> ScoredPart | None:
        """Return the part of a completion that rewards read. None: all of it, replies included.

        Args:
            rollout: The completion.
            tokenizer: The tokenizer that it was sampled with.
        """
        return None

    @property
    def most_calls(self) -> int:
        """Return how often the environment is called at most; one more call ends the completion."""
        raise NotImplementedError


class CalledEnvironmentConfig(EnvironmentBase):
    """Settings of environments that the model calls as often as it wants, up to a limit."""

    max_turns: int = Field(8, ge=1, description="Times that a completion is answered; one more call ends it.")

    @property
    def most_calls(self) -> int:
        """Return `max_turns`."""
        return self.max_turns


class CustomEnvironmentConfig(CalledEnvironmentConfig):
    """Settings that every environment from outside the package has, besides its own."""

    stop: list[str] = Field(
        default_factory=list,
        description="Strings at which the model stops and the environment is called. With answers: turn also at the end of its turn.",
    )

    @property
    def stop_strings(self) -> list[str]:
        """Return the strings at which the model stops, and the environment is called."""
        return list(self.stop)

    @model_validator(mode="after")
    def _stops(self) -> CustomEnvironmentConfig:
        if any(not s for s in self.stop):
            raise ValueError("environment.stop holds an empty string, which would end every turn at once")
        if not self.stop and self.answers == "inline":
            raise ValueError("environment.stop is empty: with answers: inline the environment would never be called")
        return self


OPEN_ENVIRONMENT = OpenKind(ENVIRONMENTS, "environment", base=CustomEnvironmentConfig, from_signature=True)
EnvironmentConfig = Annotated[EnvironmentBase, OPEN_ENVIRONMENT]
