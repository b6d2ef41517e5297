"""Functions in recipes: a name, or ``module:function`` from outside, with values for its settings (imports no torch).

    AdvantagesConfig = Annotated[Any, open_function(ADVANTAGES, "advantage")]

A field of this type reads ``grpo``, ``my_module:my_function``, or a mapping with the key ``name``; the other keys are
the function's settings: its keyword-only parameters, checked by their annotations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Literal

from pydantic import BaseModel, Field, create_model

from posttrain.config.open_kinds import OpenKind
from posttrain.config.settings import Config
from posttrain.core.errors import RewardError
from posttrain.core.imports import load_object, signature_settings


class FunctionConfig(Config):
    """Name a function; a subclass made for the function has its settings."""

    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """Return the values by the name of their parameter."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "name"}

    def load(self, names: Mapping[str, str]) -> Callable[..., Any]:
        """Return the function with its settings applied; `names` are the import paths of built-in ones."""
        function = load_object(names.get(self.name, self.name))
        return partial(function, **self.settings) if self.settings else function


class OwnFunctionConfig(Config):
    """Name a function of yours, and the keyword arguments of its calls."""

    function: str = Field(description="module:function, or the name of one given from Python.")
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of every call.")

    def bound(
        self, functions: Mapping[str, Callable[..., Any]], check: Callable[[Any, Mapping[str, Any], str], None]
    ) -> Callable[..., Any]:
        """Return the function with its keyword arguments.

        Args:
            functions: Callables given from Python, by name.
            check: Raises an error if (function, keyword arguments, name) can't be called as it will be.

        Raises:
            RewardError: It can't be imported.
        """
        function = load_object(self.function, functions, RewardError)
        check(function, self.options, self.function)
        return partial(function, **self.options)


class OpenFunction(OpenKind):
    """Check the name of a function and its settings."""

    def settings_class(self, name: str) -> type[BaseModel]:
        return _settings_class(self.load(name), name)

    def validate(self, value: Any) -> Any:
        return super().validate({"name": value} if isinstance(value, str) else value)


def open_function(names: Mapping[str, str], what: str) -> OpenFunction:
    """Return the metadata that makes ``Annotated[Any, open_function(...)]`` a field with an open function.

    Args:
        names: Import path of each built-in function.
        what: The kind of function in words, for messages, such as "advantage".
    """
    return OpenFunction(names, what, "name")


@cache
def _settings_class(function: Callable[..., Any], name: str) -> type[BaseModel]:
    fields = {k: (f.annotation, f) for k, f in signature_settings(function).model_fields.items()}
    made: Any = create_model  # its overloads know no mapping of fields
    return made(function.__name__, __base__=FunctionConfig, name=(Literal[name], name), **fields)  # type: ignore[no-any-return]
