"""Environments, which answer the model within a completion: the protocol, and a calculator as an example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from posttrain.config.environment import CalledEnvironmentConfig, CustomEnvironmentConfig, EnvironmentBase
from posttrain.config.names import ENVIRONMENTS
from posttrain.config.open_kinds import own_settings
from posttrain.core.arithmetic import NotArithmetic, evaluate, written
from posttrain.core.errors import RecipeError, RewardError
from posttrain.core.imports import load_object


class QuotingReply(str):
    """A reply that quotes others: max_reply bounds each quotation, and the words around them are never cut.

    Attributes:
        pieces: (text, True for a quotation) in order; together they are the reply.
    """

    pieces: tuple[tuple[str, bool], ...]

    def __new__(cls, pieces: Iterable[tuple[str, bool]]) -> QuotingReply:
        kept = tuple(pieces)
        made = super().__new__(cls, "".join(text for text, _ in kept))
        made.pieces = kept
        return made


class Environment(Protocol):
    """Answers the text of a model. It must answer the same texts alike: a resumed run calls it again.

    An environment that answers several completions faster together may have a method ``step_many(states, texts)``,
    which returns what `step` would for each; it is then called in its place. A method ``close()``, if there is one, is
    called at the end. An attribute ``concurrent = True`` says that several threads may call its methods at once, as
    asynchronous RL then does; without it one call is made at a time.
    """

    def start(self, example: Mapping[str, Any]) -> Any:
        """Return the state of one completion of this example, before the model has written anything."""

    def step(self, state: Any, text: str) -> tuple[str | None, bool]:
        """Return (reply, done) to the text of this turn, which includes the stop string and not the end token.

        A reply of None is no answer: the model continues, or is done if it had closed its turn. done: the completion
        ends here, after the reply if there is one. `state` may be changed in place.
        """


class Calculator:
    """Answers <calculate>…</calculate> with the exact value of the expression, or with an error in words."""

    concurrent = True

    class Config(CalledEnvironmentConfig):
        """Evaluates the expression that the model writes between two marks."""

        kind: Literal["calculator"] = "calculator"
        opening: str = Field("<calculate>", min_length=1, description="Before the expression.")
        closing: str = Field(
            "</calculate>", min_length=1, description="After it; here the model stops and is answered."
        )
        reply: str = Field(
            "<result>{result}</result>", description="The reply; {result} is the number, or an error in words."
        )

        @property
        def stop_strings(self) -> list[str]:
            """Return the closing mark."""
            return [self.closing]

        @model_validator(mode="after")
        def _marks(self) -> Calculator.Config:
            if self.opening in self.closing or self.closing in self.opening:
                raise ValueError(
                    f"environment.opening ({self.opening!r}) and closing ({self.closing!r}) can't be told apart"
                )
            if self.reply.count("{result}") != 1:
                raise ValueError(f"environment.reply is {self.reply!r}: expected text with {{result}} in it, once")
            return self

    def __init__(self, config: Config, functions: Mapping[str, Callable[..., Any]] | None = None) -> None:
        self.config = config

    def start(self, example: Mapping[str, Any]) -> None:
        """Return None: nothing is kept between calls."""

    def step(self, state: None, text: str) -> tuple[str | None, bool]:
        """Answer the last call in the text; a text without one is not answered."""
        end = text.rfind(self.config.closing)
        if end < 0:
            return None, False
        start = text.rfind(self.config.opening, 0, end)
        if start < 0:
            return self._reply(f"error: no {self.config.opening} before {self.config.closing}"), False
        try:
            return self._reply(written(evaluate(text[start + len(self.config.opening) : end]))), False
        except NotArithmetic as error:
            return self._reply(f"error: {error}"), False

    def _reply(self, result: str) -> str:
        return self.config.reply.replace("{result}", result)


class FunctionEnvironment:
    """An environment made by a class or function that is named in the settings."""

    class Config(CustomEnvironmentConfig):
        """An environment of yours: a class with start(example) and step(state, text). See docs/environments.md."""

        kind: Literal["function"] = "function"
        function: str = Field(
            description="module:Class (or a function that makes one), or the name of one given from Python."
        )
        options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments that it is made with.")

    def __init__(self, config: Config, functions: Mapping[str, Callable[..., Any]] | None = None) -> None:
        made = load_object(config.function, functions, RewardError)(**config.options)
        check_environment(made, config.function)
        self.start, self.step, self.concurrent = made.start, made.step, bool(getattr(made, "concurrent", False))
        for optional in ("step_many", "close"):
            if callable(getattr(made, optional, None)):
                setattr(self, optional, getattr(made, optional))


def check_environment(made: Any, name: str) -> None:
    """Raise RecipeError if an object has not the methods of an environment."""
    missing = [method for method in ("start", "step") if not callable(getattr(made, method, None))]
    if missing:
        raise RecipeError(
            f"environment {name!r} makes a {type(made).__name__}, which has no {' and no '.join(missing)}: "
            "expected start(example) -> state and step(state, text) -> (reply or None, done)"
        )


def environment(config: EnvironmentBase, functions: Mapping[str, Callable[..., Any]] | None = None) -> Environment:
    """Return the environment of settings.

    Args:
        config: The settings.
        functions: Callables given from Python, by name.

    Raises:
        RewardError: A class can't be imported.
        RecipeError: What it makes is no environment.
    """
    if config.kind in ENVIRONMENTS:
        return load_object(ENVIRONMENTS[config.kind], None, RewardError)(config, functions)  # type: ignore[no-any-return]
    make = load_object(config.kind, None, RewardError)
    made = make(config) if hasattr(make, "Config") else make(**own_settings(config, CustomEnvironmentConfig))
    check_environment(made, config.kind)
    return made  # type: ignore[no-any-return]
