"""Settings whose ``kind:`` is a name of the package or the import path of a class from outside (imports no torch).

    ProblemsConfig = Annotated[Any, open_kind(PROMPT_SOURCES, "source of prompts")]

A field of this type reads a mapping with the key ``kind`` and checks it with the settings class of that kind: the class
itself if it is a pydantic model, or else its nested class ``Config``, or the keyword-only parameters of a function. The
module of a kind is imported when a recipe names it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from posttrain.config.names import RENAMED_KINDS
from posttrain.core.errors import RecipeError
from posttrain.core.imports import is_import_path, load_object, signature_settings


class OpenKind:
    """Check a value by the settings class that its ``kind`` names.

    Attributes:
        names: Import path of the object of each built-in kind.
        noun: The kind of thing in words, for messages, such as "source of prompts".
        tag: Key that holds the name.
        default: Name that a mapping without the key gets. None: the key is required.
        base: Settings that every kind has; a class from outside gets them in addition to its own.
        from_signature: True if the settings of a function, or of a class without `Config`, are its keyword-only
            parameters.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        noun: str,
        tag: str = "kind",
        default: str | None = None,
        base: type[BaseModel] = BaseModel,
        from_signature: bool = False,
    ) -> None:
        self.names, self.noun, self.tag, self.default, self.base = names, noun, tag, default, base
        self.from_signature = from_signature

    @cached_property
    def settings_classes(self) -> list[type[BaseModel]]:
        """Return the settings class of each built-in kind, for the reference and for the nearest right key."""
        return [self.settings_class(name) for name in self.names]

    def settings_class(self, name: str) -> type[BaseModel]:
        """Return the settings class of a kind; the field `tag` of its instances is `name`.

        Raises:
            RecipeError: The name is unknown, can't be imported, or is no class with settings.
        """
        base = BaseModel if name in self.names else self.base
        return _settings_class(self.load(name), name, self.tag, base, self.from_signature)

    def load(self, name: str) -> Any:
        """Return the object of a kind.

        Raises:
            RecipeError: The name is unknown, with the nearest ones, or it can't be imported.
        """
        if name in self.names:
            return load_object(self.names[name])
        if not is_import_path(name):
            raise RecipeError(unknown_name(name, self.names, self.noun))
        return load_object(name)

    def own_settings(self, config: BaseModel) -> dict[str, Any]:
        """Return the settings of a kind that is a function, as its keyword arguments."""
        return {name: value for name, value in config if name not in {self.tag, *self.base.model_fields}}

    def validate(self, value: Any) -> Any:
        """Return the checked settings of `value`, a mapping or settings that were checked before."""
        if isinstance(value, BaseModel) and self.tag in type(value).model_fields:
            if isinstance(value, self.settings_class(getattr(value, self.tag))):
                return value
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a mapping with the key {self.tag}, and this is {value!r}")
        name = value.get(self.tag, self.default)
        if name is None:
            raise self._error(f"required: the name of a {self.noun} ({', '.join(self.names)})", value)
        try:
            model = self.settings_class(str(name))
        except RecipeError as error:
            raise self._error(str(error), name) from error
        return model.model_validate({**value, self.tag: name})

    def _error(self, message: str, value: Any) -> ValidationError:
        # A ValidationError keeps its location: the message is then about the key `tag`, with its line in the recipe.
        custom = PydanticCustomError("value_error", "{message}", {"message": message})
        return ValidationError.from_exception_data(
            self.noun, [InitErrorDetails(type=custom, loc=(self.tag,), input=value)]
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validate)


def open_kind(
    names: Mapping[str, str],
    noun: str,
    tag: str = "kind",
    default: str | None = None,
    base: type[BaseModel] = BaseModel,
) -> OpenKind:
    """Return the metadata that makes ``Annotated[Any, open_kind(...)]`` a field with an open ``kind``.

    Args:
        names: Import path of the object of each built-in kind.
        noun: The kind of thing in words, for messages, such as "source of prompts".
        tag: Key that holds the name.
        default: Name that a mapping without the key gets. None: the key is required.
        base: Settings that every kind has; a class from outside gets them in addition to its own.
    """
    return OpenKind(names, noun, tag, default, base)


def own_settings(config: BaseModel, base: type[BaseModel]) -> dict[str, Any]:
    """Return the settings of a part from outside by name, without those of `base`."""
    return {name: getattr(config, name) for name in type(config).model_fields if name not in base.model_fields}


def unknown_name(name: str, names: Iterable[str], noun: str) -> str:
    """Return the message for an unknown name, with the nearest ones.

    Args:
        name: The name.
        names: Known names.
        noun: The kind of thing in words.
    """
    names = list(names)
    folded = {n.lower().replace("-", "_"): n for n in names}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=3)
    near = [RENAMED_KINDS[name]] if RENAMED_KINDS.get(name) in names else [folded[n] for n in near]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"no {noun} is called {name!r}.{hint} There are {', '.join(names)}, and package.module:name for one of yours"


@cache
def _settings_class(part: Any, name: str, tag: str, base: type[BaseModel], from_signature: bool) -> type[BaseModel]:
    model = part if isinstance(part, type) and issubclass(part, BaseModel) else getattr(part, "Config", None)
    has_settings = isinstance(model, type) and issubclass(model, BaseModel)
    if inspect.isfunction(part) or (from_signature and not has_settings):
        model = signature_settings(part)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise RecipeError(
            f"{name} has no settings: expected a function, or a class with a nested class Config (a subclass of "
            "posttrain's config.Config, or another pydantic model)"
        )
    if tag in model.model_fields and model.model_config.get("extra") == "forbid" and issubclass(model, base):
        return model
    shared = [c for c in model.__mro__ if c in base.__mro__ and issubclass(c, BaseModel)]
    taken = [f for f in model.model_fields if f in base.model_fields and not any(f in c.model_fields for c in shared)]
    if taken:
        raise RecipeError(f"{name}: the setting {taken[0]!r} is one that all of its kind have; give it another name")
    # A class from outside knows nothing of `tag` and `base`, and may let misspelt settings pass.
    body = {
        "__module__": model.__module__,
        "__qualname__": model.__qualname__,
        "__doc__": model.__doc__,
        "__annotations__": {tag: Literal[name]},
        tag: name,
        "model_config": ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False),
    }
    return type(model.__name__, (model,) if issubclass(model, base) else (model, base), body)
