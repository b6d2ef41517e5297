"""What settings there are: walked for the reference, for overrides, and for the nearest right key (no torch)."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from posttrain.config import Recipe
from posttrain.config.names import NO_SUCH_SETTING, RENAMED
from posttrain.config.open_kinds import OpenKind
from posttrain.core.errors import RecipeError


@dataclass(frozen=True)
class Setting:
    """One line of the reference: dotted key, type and default as text, description."""

    key: str
    type: str
    default: str
    description: str


def settings(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[Setting]:
    """Every setting at any depth, in the order of config.py. N stands for the index or name of a list's item."""
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        annotation = info.rebuild_annotation()
        yield Setting(key, _type_text(annotation), _default_text(info), info.description or "")
        told: set[str] = set()  # alternatives have settings in common: told once, as the first has them
        for inner, many in _inner_models(annotation):
            for setting in settings(inner, f"{key}.N." if many else f"{key}."):
                if setting.key not in told:
                    told.add(setting.key)
                    yield setting


def _default_text(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return ""
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _type_text(tp: Any) -> str:
    origin, args = get_origin(tp), get_args(tp)
    if origin is Annotated:
        return "settings" if open_kind_of(tp) else _type_text(args[0])
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(a) for a in args)
    if origin in (list, tuple, dict):
        inside = ", ".join(_type_text(a) for a in args)
        return f"{{{inside.replace(', ', ': ', 1)}}}" if origin is dict else f"[{inside}{', …' * (origin is list)}]"
    if isinstance(tp, type) and issubclass(tp, BaseModel):
        return "settings"
    return {str: "text", int: "integer", float: "number", bool: "true | false", type(None): "none"}.get(tp, str(tp))


def options(tp: Any) -> list[Any]:
    """The alternatives of an annotation, unions and Annotated taken apart; an open kind's are the built-in ones."""
    origin, args = get_origin(tp), get_args(tp)
    if origin is Annotated:
        kinds = open_kind_of(tp)
        return list(kinds.settings_classes) if kinds else options(args[0])
    if origin in (Union, types.UnionType):
        return [o for a in args for o in options(a)]
    return [tp]


def open_kind_of(tp: Any) -> OpenKind | None:
    """Return the metadata by which an annotation (or one alternative of it) has an open kind; None if it has none."""
    if get_origin(tp) is Annotated:
        return next((m for m in get_args(tp)[1:] if isinstance(m, OpenKind)), None) or open_kind_of(get_args(tp)[0])
    alternatives = get_args(tp) if get_origin(tp) in (Union, types.UnionType) else ()
    return next((found for a in alternatives if (found := open_kind_of(a))), None)


def _inner_models(tp: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    for option in options(tp):
        if isinstance(option, type) and issubclass(option, BaseModel):
            yield option, False
        elif get_origin(option) is list:
            for inner in options(get_args(option)[0]):
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    yield inner, True


TAGS = ("method", "kind")
"""Settings that say which of several classes the rest belongs to."""


def model_for(tp: Any, value: Any) -> type[BaseModel] | None:
    """The settings class that a value is checked by; of several, the one whose method or kind it names."""
    kinds = open_kind_of(tp)
    if kinds is not None and isinstance(value, Mapping):
        try:
            return kinds.settings_class(str(value.get(kinds.tag, kinds.default)))
        except RecipeError:  # reported where the recipe is checked
            pass
    found = [o for o in options(tp) if isinstance(o, type) and issubclass(o, BaseModel)]
    for tag in TAGS:
        name = value.get(tag) if isinstance(value, Mapping) else None
        for model in found:
            if name is not None and tag in model.model_fields and name in get_args(model.model_fields[tag].annotation):
                return model
    return next(iter(found), None)


def child(tp: Any, name: str | int, value: Any) -> Any:
    """The annotation one key further down; None where the schema has no such key."""
    model = model_for(tp, value)
    if model is not None and name in model.model_fields:
        return model.model_fields[str(name)].rebuild_annotation()
    for option in options(tp):
        if get_origin(option) in (list, tuple) and isinstance(name, int):
            return get_args(option)[0]
        if get_origin(option) is dict and isinstance(name, str):
            return get_args(option)[1]
    return None


def inside(value: Any, name: str | int) -> Any:
    """value[name], or None."""
    if isinstance(value, dict):
        return value.get(name)
    return value[name] if isinstance(value, list) and isinstance(name, int) and -1 < name < len(value) else None


def unknown_key(key: tuple[str | int, ...], model: type[BaseModel]) -> str:
    """What to say of a key that `model` does not have: the note, the right key here, or where it lives."""
    name, here = str(key[-1]), list(model.model_fields)
    if name in NO_SUCH_SETTING:
        return f"no such setting; {NO_SUCH_SETTING[name]}"
    near = difflib.get_close_matches(name, [*here, *(a for a in RENAMED if RENAMED[a] in here)], n=1)
    for meant in (RENAMED.get(name, name), *(RENAMED.get(n, n) for n in near)):
        if meant in here:
            return f"no such setting. Did you mean {meant}?"
        found = _elsewhere(meant, key, model)
        if found:
            return f"no such setting here. Did you mean {found}?"
    anywhere = {s.key.rsplit(".", 1)[-1] for s in settings()}
    close = difflib.get_close_matches(name, [*anywhere, *RENAMED], n=1)
    found = _elsewhere(RENAMED.get(close[0], close[0]), key, model) if close else ""
    return f"no such setting here. Did you mean {found}?" if found else f"no such setting; there are: {', '.join(here)}"


def _elsewhere(name: str, key: tuple[str | int, ...], model: type[BaseModel]) -> str:
    """The full key of a setting called `name`: inside the same settings, else the one that shares most with `key`."""
    prefix = "".join(f"{k}." for k in key[:-1])
    below = [s.key for s in settings(model, prefix) if s.key.rsplit(".", 1)[-1] == name]
    if below:
        return min(below, key=lambda k: k.count(".")).replace(".N.", ".0.")
    given = [str(k) for k in key]

    def shared(candidate: str) -> int:
        pairs = zip(candidate.split("."), given, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a not in (b, "N")), len(given))

    places = [s.key for s in settings() if s.key.rsplit(".", 1)[-1] == name]
    if not places:
        return ""
    best = max(places, key=lambda k: (shared(k), -k.count(".")))
    same = shared(best)
    return ".".join([*given[:same], *best.split(".")[same:]]).replace(".N.", ".0.")
