"""Sources of feedback on an answer: the record that they return, their base class, and how one is made and called.

A source is called with (answer, example) and returns a `FeedbackNote`, a text, or None if it has nothing to say. It may
be a function, also from outside the package, or a class; a class that is faster on many answers together has a method
``many(answers, examples)`` as well. The same answer must get the same feedback: a resumed run asks again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

from posttrain.config.feedback_sources import FeedbackSourceConfig
from posttrain.config.names import FEEDBACK
from posttrain.config.open_functions import OwnFunctionConfig
from posttrain.config.open_kinds import own_settings
from posttrain.core.errors import PosttrainError, RewardError
from posttrain.core.imports import load_object

FeedbackFunctions = Mapping[str, Callable[..., Any]]
SIGNATURE = "a source of feedback gets (answer, example): the text of an answer, and its row as a dict"


@dataclass(frozen=True, slots=True)
class FeedbackNote:
    """Hold what a source says about an answer.

    Attributes:
        text: The feedback in words, as the model reads it.
        right: True if nothing is wrong as far as the source knows, False if something is. None: it does not know.
        tokens: Number of tokens that another model read and wrote for it.
        informs: True if it names no mistakes (a program's output, a passage): the request then says that there may be
            one, not "without these mistakes".
    """

    text: str
    right: bool | None = None
    tokens: int = 0
    informs: bool = field(default=False, compare=False)


class FeedbackSource:
    """Base of the package's sources, made from settings; a subclass has a nested class `Config` and `__call__`."""

    Config: ClassVar[type[FeedbackSourceConfig]] = FeedbackSourceConfig

    def __init__(self, config: Any, functions: FeedbackFunctions | None = None) -> None:
        self.config = config
        self.open(functions or {})

    def open(self, functions: FeedbackFunctions) -> None:
        """Check and import what the source needs; models are loaded when they are first used.

        Raises:
            PosttrainError: Something is missing.
        """

    def close(self) -> None:
        """Release what the source has opened."""


class FunctionFeedback(FeedbackSource):
    """Return what a function of yours says: (answer, example, **options) -> FeedbackNote, text or None."""

    class Config(FeedbackSourceConfig, OwnFunctionConfig):
        """A function of yours: (answer, example, **options) → what it says, or None."""

        kind: Literal["function"] = "function"

    config: Config

    def open(self, functions: FeedbackFunctions) -> None:
        """Import the function and check that it can be called."""
        self.function = self.config.bound(functions, check_source)

    def __call__(self, answer: str, example: Mapping[str, Any]) -> Any:
        """Call the function."""
        return self.function(answer, example)


class OpenedFeedback:
    """A source ready to be called on several answers; what it returns is checked."""

    def __init__(self, config: FeedbackSourceConfig, source: Callable[..., Any]) -> None:
        self.config, self.source = config, source
        many = getattr(source, "many", None)
        self.many = many if callable(many) else None

    def close(self) -> None:
        """Release what the source has opened, if it has a method for that."""
        getattr(self.source, "close", lambda: None)()

    def notes(self, answers: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> list[FeedbackNote | None]:
        """Return what the source says about each answer; None: nothing.

        Raises:
            PosttrainError: It raised an error, or returned something else.
        """
        if not answers:
            return []
        if self.many is not None:
            where = f"{len(answers)} answers, the first for {_place(examples[0])}" if len(answers) > 1 else ""
            said = self._call(where or _place(examples[0]), self.many, answers, examples)
            if not isinstance(said, Sequence) or isinstance(said, str) or len(said) != len(answers):
                raise PosttrainError(
                    f"feedback {self.config.title}: many() got {len(answers)} answers and returned {str(said)[:80]!r}: "
                    "expected a list with one item for each answer"
                )
        else:
            said = [self._call(_place(e), self.source, a, e) for a, e in zip(answers, examples, strict=True)]
        return [self._note(s, e) for s, e in zip(said, examples, strict=True)]

    def _call(self, where: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except PosttrainError as error:  # says what is wrong itself
            raise PosttrainError(f"feedback {self.config.title}: failed for {where}: {error}") from error
        except Exception as error:
            raise PosttrainError(
                f"feedback {self.config.title}: failed for {where}: {type(error).__name__}: {error}. A model's text "
                "can be anything: return an error in words, or None, instead"
            ) from error

    def _note(self, said: Any, example: Mapping[str, Any]) -> FeedbackNote | None:
        note = FeedbackNote(said) if isinstance(said, str) else said
        if note is None:
            return None
        expected = "a FeedbackNote(text, right), a text, or None"
        if isinstance(note, FeedbackNote) and isinstance(note.text, str):
            right, tokens = plain_value(note.right), plain_value(note.tokens)
            if right is not None and not isinstance(right, bool):
                expected = "right to be True, False, or None"
            elif isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
                expected = "tokens to be a number of tokens"
            else:
                made = FeedbackNote(readable(note.text), right, tokens, note.informs)
                return made if made.text.strip() or right is not None or tokens else None
        raise PosttrainError(
            f"feedback {self.config.title}: for {_place(example)} it returned {repr(said)[:80]} "
            f"({type(said).__name__}): expected {expected}"
        )


def open_feedback(config: FeedbackSourceConfig, functions: FeedbackFunctions | None = None) -> OpenedFeedback:
    """Return the source of settings, with what it needs imported.

    Args:
        config: The settings.
        functions: Callables given from Python, by name.

    Raises:
        RewardError: It can't be imported or made, or can't be called as a source is.
    """
    made: Any = load_object(FEEDBACK.get(config.kind, config.kind), None, RewardError)
    options = own_settings(config, FeedbackSourceConfig)
    if not isinstance(made, type):
        check_source(made, options, config.kind)
        return OpenedFeedback(config, partial(made, **options))
    make: Any = made
    if issubclass(made, FeedbackSource):
        return OpenedFeedback(config, make(config, functions))
    source: Any = make(config) if hasattr(made, "Config") else make(**options)
    if not callable(source) and callable(getattr(source, "many", None)):
        return OpenedFeedback(config, source)
    check_source(source, {}, config.kind)
    return OpenedFeedback(config, source)


def check_source(function: Any, options: Mapping[str, Any], name: str) -> None:
    """Check that a source can be called with (answer, example). Raises RewardError.

    Args:
        function: The source.
        options: Its keyword arguments.
        name: Its name in messages.
    """
    if not callable(function):
        raise RewardError(f"feedback {name!r} makes a {type(function).__name__}, not a function: {SIGNATURE}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in function may have none
        return
    try:
        signature.bind(None, None, **options)
    except TypeError as error:
        raise RewardError(f"feedback {name!r} takes {signature}: {error}. Expected: {SIGNATURE}") from error


def plain_value(value: Any) -> Any:
    """Return a number or truth value of NumPy or torch as Python's own, and anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def readable(text: str) -> str:
    """Return a text that can be encoded: half of a surrogate pair becomes the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _place(example: Mapping[str, Any]) -> str:
    return str(example.get("source", "an example"))
