"""Settings of environments: what answers the model within a completion."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.settings import Config


class EnvironmentBase(Config):
    """What every environment has."""

    max_turns: int = Field(8, ge=1, description="Times that a completion is answered; asking once more ends it.")
    max_reply: int = Field(256, ge=1, description="Longest reply in tokens; a longer one is cut, and says so.")
    answers: Literal["inline", "turn"] = Field(
        "inline",
        description="inline: the reply goes on right behind what the model wrote, which then goes on itself; turn: the model's turn is closed, and the reply is a turn of the chat template.",
    )
    role: Literal["user", "tool"] = Field("user", description="Whose turn a reply is (answers: turn).")


class CalculatorConfig(EnvironmentBase):
    """Works out what the model writes between two marks."""

    kind: Literal["calculator"] = "calculator"
    opening: str = Field("<calculate>", min_length=1, description="Before the expression.")
    closing: str = Field("</calculate>", min_length=1, description="Behind it; here the model stops and is answered.")
    reply: str = Field(
        "<result>{result}</result>",
        description="The reply; {result} is the number, or an error in words.",
    )

    @model_validator(mode="after")
    def _marks(self) -> CalculatorConfig:
        if self.opening in self.closing or self.closing in self.opening:
            raise ValueError(
                f"environment.opening ({self.opening!r}) and closing ({self.closing!r}) can't be told apart"
            )
        if self.reply.count("{result}") != 1:
            raise ValueError(f"environment.reply is {self.reply!r}: expected text with {{result}} in it, once")
        return self


class FunctionEnvironmentConfig(EnvironmentBase):
    """An environment of yours: a class with start(example) and step(state, text). See docs/environments.md."""

    kind: Literal["function"] = "function"
    function: str = Field(
        description="module:Class (or a function that makes one), or the name of one given from Python."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments that it is made with.")
    stop: list[str] = Field(
        default_factory=list,
        description="Strings at which the model stops and the environment is asked. With answers: turn also at the end of its turn.",
    )

    @model_validator(mode="after")
    def _asked(self) -> FunctionEnvironmentConfig:
        if any(not s for s in self.stop):
            raise ValueError("environment.stop holds an empty string, which would end every turn at once")
        if not self.stop and self.answers == "inline":
            raise ValueError("environment.stop is empty: with answers: inline nothing would ever ask the environment")
        return self


EnvironmentConfig = Annotated[CalculatorConfig | FunctionEnvironmentConfig, Field(discriminator="kind")]
