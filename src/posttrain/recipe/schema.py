"""Walk the settings of a recipe: for the reference, for overrides, and to find the right key (imports no torch)."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from posttrain.config import Recipe
from posttrain.config.names import NO_SUCH_SETTING, RENAMED
from posttrain.config.open_kinds import OpenKind
from posttrain.core.errors import RecipeError
from posttrain.core.imports import is_import_path

Key = tuple[str | int, ...]
TAGS = ("method", "kind")
"""Settings whose value selects one of several classes for the other settings beside it."""
MAX_ITEMS = 100
"""Most items of a list that have names; a recipe has fewer stages and evaluations."""
_REQUIRED = object()


@dataclass(frozen=True)
class SettingInfo:
    """One setting of a recipe.

    Attributes:
        key: Where it is in the recipe, such as ("stages", 0, "optimizer", "lr").
        type: Its type or its choices, as text.
        default: Its default as text; empty for a block of settings.
        value: Its value in the recipe as text, if it is not the default; else empty.
        description: From the settings class.
        block: True if it is a mapping of other settings.
    """

    key: Key
    type: str
    default: str
    value: str
    description: str
    block: bool


def settings(
    value: Any = None,
    model: type[BaseModel] = Recipe,
    key: Key = (),
    default: Any = None,
    kinds: OpenKind | None = None,
) -> Iterator[SettingInfo]:
    """Yield the settings that a recipe can have, at any depth, in the order of their classes.

    Args:
        value: The recipe as plain data. Its stages, kinds and lists decide which settings there are.
        model: Settings class of `value`.
        key: Key of `value`.
        default: Settings from which defaults are read, in place of the ones of the class.
        kinds: The open kind that `model` is of. None: it is of none.
    """
    for name, info in model.model_fields.items():
        annotation, inner, at = info.rebuild_annotation(), inside(value, name), (*key, name)
        standard = info.get_default(call_default_factory=True) if not info.is_required() else _REQUIRED
        standard = getattr(default, name, standard)
        found = model_for(annotation, inner)
        known = found is not None and _is_block(annotation, inner)
        text = "" if isinstance(standard, BaseModel) else _value_text(standard)
        changed = _value_text(inner) if isinstance(value, dict) and name in value and not known else text
        here = "" if changed == text else changed
        type_ = " | ".join(kinds.names) if kinds is not None and name == kinds.tag else type_text(annotation)
        yield SettingInfo(at, type_, text, here, info.description or "", known)
        if found is not None and known:
            default_ = standard if isinstance(standard, found) else None
            yield from settings(inner, found, at, default_, open_kind_of(annotation))
        for i, item in enumerate(inner if isinstance(inner, list) else []):
            of_item = child(annotation, i, inner)
            item_model = model_for(of_item, item)
            if item_model is not None:
                yield from settings(item, item_model, (*at, i), None, open_kind_of(of_item))


def _value_text(value: Any) -> str:
    words: list[tuple[Any, str]] = [(_REQUIRED, "required"), (None, "none"), (True, "true"), (False, "false")]
    word = next((word for special, word in words if value is special), None)
    text = str(list(value) if isinstance(value, tuple) else value).replace("\n", "\\n")
    return word or (text if len(text) <= 60 else f"{text[:59]}…")


def type_text(tp: Any) -> str:
    """Return an annotation in words: "integer", "number | none", "a | b" for choices, "settings" for a block."""
    origin, args = get_origin(tp), get_args(tp)
    if origin is Annotated:
        return "settings" if open_kind_of(tp) else type_text(args[0])
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_text(a) for a in args))
    if origin in (list, tuple, dict):
        parts = ", ".join(type_text(a) for a in args)
        return f"{{{parts.replace(', ', ': ', 1)}}}" if origin is dict else f"[{parts}{', …' * (origin is list)}]"
    if isinstance(tp, type) and issubclass(tp, BaseModel):
        return "settings"
    words: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "true | false", Any: "any value"}
    return "none" if tp is type(None) else words.get(tp, str(tp))


def options(tp: Any) -> list[Any]:
    """Return the alternatives of an annotation, without Annotated; those of an open kind are the built-in ones."""
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


def _is_block(tp: Any, value: Any) -> bool:
    """Return True if a value is a block of settings; of null, if a block is all that may stand there otherwise."""
    if value is None:
        return len(_models(tp)) == 1 and not {float, int, str, bool} & {o for o in options(tp) if isinstance(o, type)}
    return not isinstance(value, float | int | str)


def _models(tp: Any) -> list[type[BaseModel]]:
    return [o for o in options(tp) if isinstance(o, type) and issubclass(o, BaseModel)]


def model_for(tp: Any, value: Any) -> type[BaseModel] | None:
    """Return the settings class that checks `value`: of several, the one whose method or kind it names, or the first.

    Returns None for an annotation without settings classes.
    """
    kinds = open_kind_of(tp)
    kind = str(value.get(kinds.tag, kinds.default)) if kinds is not None and isinstance(value, Mapping) else ""
    if kinds is not None and (kind in kinds.names or is_import_path(kind)):
        try:
            return kinds.settings_class(kind)
        except RecipeError:  # reported where the recipe is checked
            pass
    found = _models(tp)
    for tag in TAGS:
        name = value.get(tag) if isinstance(value, Mapping) else None
        for model in found:
            if name is not None and tag in model.model_fields and name in get_args(model.model_fields[tag].annotation):
                return model
    return next(iter(found), None)


def child(tp: Any, name: str | int, value: Any) -> Any:
    """Return the annotation of one key or item; None if there is no such key.

    Args:
        tp: Annotation of the block or list.
        name: The key or index in it.
        value: The block or list as plain data.
    """
    model = model_for(tp, value)
    if model is not None and name in model.model_fields:
        return model.model_fields[str(name)].rebuild_annotation()
    if isinstance(name, int) and list_field(model):
        return child(child(tp, list_field(model), None), name, value)
    for option in options(tp):
        if get_origin(option) in (list, tuple) and isinstance(name, int):
            return get_args(option)[0]
        if get_origin(option) is dict and isinstance(name, str):
            return get_args(option)[1]
    return None


def list_field(model: type[BaseModel] | None) -> str:
    """Return the field of a settings class for which a plain list stands; empty if there is none."""
    return str(getattr(model, "list_field", ""))


def takes_list(tp: Any) -> bool:
    """Return True if a setting with this annotation may be a list."""
    return any(
        option in (list, tuple, Any)
        or get_origin(option) in (list, tuple)
        or (isinstance(option, type) and issubclass(option, BaseModel) and bool(list_field(option)))
        for option in options(tp)
    )


def inside(value: Any, name: str | int) -> Any:
    """Return value[name], or None if missing."""
    if isinstance(value, dict):
        return value.get(name)
    return value[name] if isinstance(value, list) and isinstance(name, int) and -1 < name < len(value) else None


def item_names(tp: Any, items: Sequence[Any]) -> list[str]:
    """Return the names of the stages or tasks in a list: as given, or else the default of their class.

    A default that an earlier item has already becomes NAME-2, NAME-3 and so on. "" stands for an item without a name.
    """
    names: list[str] = []
    for i, item in enumerate(items):
        model = model_for(child(tp, i, items), item) if isinstance(item, Mapping) and i < MAX_ITEMS else None
        default = model.model_fields["name"].default if model and "name" in model.model_fields else None
        name = str(item.get("name") or (default if isinstance(default, str) else "")) if model else ""
        unique, number = name, 2
        while model and "name" not in item and name and unique in names:
            unique, number = f"{name}-{number}", number + 1
        names.append(unique)
    return names


def unknown_key(key: Key, model: type[BaseModel], data: Any, root: type[BaseModel] = Recipe) -> str:
    """Return the message for a key that `model` does not have: the right key here, or where it is, or what there is.

    Args:
        key: The unknown key.
        model: Settings class of the block that holds it.
        data: The whole recipe as plain data.
        root: Settings class of the whole.
    """
    name, here = str(key[-1]), list(model.model_fields)
    if name in NO_SUCH_SETTING:
        return f"no such setting; {NO_SUCH_SETTING[name]}"
    close = difflib.get_close_matches(name, [*here, *(old for old, ours in RENAMED.items() if ours in here)], n=1)
    for meant in [RENAMED.get(n, n) for n in (name, *close)]:
        if meant in here:
            return f"no such setting. Did you mean {meant}?"
        if found := _elsewhere(meant, key, data, root):
            return f"no such setting here. Did you mean {found}?"
    anywhere = {str(s.key[-1]) for s in settings(data, root)}
    close = difflib.get_close_matches(name, [*anywhere, *RENAMED], n=1)
    found = _elsewhere(RENAMED.get(close[0], close[0]), key, data, root) if close else ""
    return f"no such setting here. Did you mean {found}?" if found else f"no such setting; there are: {', '.join(here)}"


def _elsewhere(name: str, key: Key, data: Any, root: type[BaseModel]) -> str:
    """Return the full key of the setting called `name` (which may be dotted) that shares most with `key`, or ""."""
    tail: Key = tuple(name.split("."))
    places = [s.key for s in settings(data, root) if s.key[-len(tail) :] == tail]

    def shared(place: Key) -> int:
        return next((i for i, (a, b) in enumerate(zip(place, key, strict=False)) if a != b), min(len(place), len(key)))

    if not places:
        return ""
    best: Key = max(places, key=lambda place: (shared(place), -len(place)))
    return dotted(best, data, root)


def dotted(key: Sequence[str | int], data: Any, root: type[BaseModel] = Recipe) -> str:
    """Return ``stages.sft.lr`` for ("stages", 0, "lr"): items of a list go by their name if they have one.

    Args:
        key: A key of the recipe, complete or not.
        data: The recipe as plain data.
        root: Settings class of the whole.
    """
    parts: list[str] = []
    tp: Any = root
    for part in key:
        names = item_names(tp, data) if isinstance(data, list) else []
        name = names[part] if isinstance(part, int) and part < len(names) else ""
        parts.append(name or str(part))
        tp, data = child(tp, part, data), inside(data, part)
    return ".".join(parts) or "recipe"
