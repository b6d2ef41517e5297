"""What answers the model within a completion: the protocol, and a calculator as its example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from posttrain.config.environment import CalculatorConfig, EnvironmentConfig
from posttrain.core.arithmetic import NotArithmetic, evaluate, written
from posttrain.core.errors import RecipeError, RewardError
from posttrain.core.imports import load_object


class Environment(Protocol):
    """Answers what a model writes. The same texts must be answered alike: a run that goes on asks again."""

    def start(self, example: Mapping[str, Any]) -> Any:
        """The state of one completion of this example, before the model has written anything."""

    def step(self, state: Any, text: str) -> tuple[str | None, bool]:
        """(reply, done) to what the model wrote in this turn, the stop string included.

        reply: None is no answer, and the model goes on (or, where it had closed its turn, is done). done: the
        completion ends here, with the reply where there is one. `state` may be changed in place.
        """


class Calculator:
    """Answers <calculate>…</calculate> with the exact value of what stands between, or with what is wrong with it."""

    def __init__(self, config: CalculatorConfig) -> None:
        self.config = config

    def start(self, example: Mapping[str, Any]) -> None:
        """Nothing is kept from one question to the next."""

    def step(self, state: None, text: str) -> tuple[str | None, bool]:
        """The last call of the text is answered; a text without one is not."""
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


def environment(config: EnvironmentConfig, given: Mapping[str, Callable[..., Any]] | None = None) -> Environment:
    """The environment of a setting. given: callables by name, made in this program.

    Raises RewardError where a function can't be found, RecipeError where what it makes is no environment.
    """
    if isinstance(config, CalculatorConfig):
        return Calculator(config)
    made: Environment = partial(load_object(config.function, given, RewardError), **config.options)()
    missing = [name for name in ("start", "step") if not callable(getattr(made, name, None))]
    if missing:
        raise RecipeError(
            f"environment {config.function!r} makes a {type(made).__name__}, which has no {' and no '.join(missing)}: "
            "expected start(example) -> state and step(state, text) -> (reply or None, done)"
        )
    return made


def stops(config: EnvironmentConfig) -> list[str]:
    """The strings at which the model stops, and the environment is asked."""
    return [config.closing] if isinstance(config, CalculatorConfig) else list(config.stop)
