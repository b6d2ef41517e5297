"""The errors of pydantic in plain words, with the key and its place in the recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from posttrain.config.open_kinds import unknown_name
from posttrain.recipe.documents import MAX_PROBLEMS, Document
from posttrain.recipe.schema import Key, child, inside, list_field, model_for, unknown_key

EXPECTED_TYPES = {
    "float": "a number",
    "finite": "a finite number",
    "int": "an integer",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping of settings",
    "none": "null",
}
"""First part of pydantic's name of an error of type -> what was expected."""
WORDS = {
    "literal_error": "expected {expected}",
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected at most {le}",
    "multiple_of": "expected a multiple of {multiple_of}",
    "string_pattern_mismatch": "expected at most 100 letters, digits and the characters _ . -, the first no . or -",
    "string_too_short": "expected at least {min_length} characters",
    "too_short": "expected at least {min_length} items",
    "too_long": "expected at most {max_length} items",
}
"""Pydantic's name of an error -> message, with the values of its context."""


def explain(error: ValidationError, doc: Document) -> None:
    """Add the errors of pydantic to the problems of `doc`; alternatives of one value become one problem."""
    found: dict[Key, list[str]] = {}
    values: dict[Key, str] = {}
    located = [(one, *_locate(one["loc"], doc, one["type"] == "extra_forbidden")) for one in error.errors()]
    keys = {key for _, key, _ in located}
    for one, key, model in located:
        if one["type"].endswith("_type") and any(len(k) > len(key) and k[: len(key)] == key for k in keys):
            continue  # another alternative has the form of the value, and says what is wrong inside of it
        if len(found) >= MAX_PROBLEMS:
            doc.more += 1
            continue
        message, value = _message(one, key, model, doc)
        if one["type"].startswith("union_tag_"):
            key = (*key, _tag(one))
        if key in doc.refused:
            continue
        found.setdefault(key, []).append(message)
        if value:
            values[key] = f", got {short(one['input'])}"
    for key, messages in found.items():
        told = doc.place(key).startswith("override")  # the place repeats the value
        joined = " or ".join(dict.fromkeys(messages)).replace(" or expected", " or")
        doc.add_problem(key, joined + ("" if told else values.get(key, "")))


def _message(one: Any, key: Key, model: type[BaseModel] | None, doc: Document) -> tuple[str, bool]:
    """Return the message of one error, and True if the value belongs behind it."""
    kind, context = one["type"], one.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(key, model or doc.root, doc.data, doc.root), False
    if kind == "missing":
        described = model.model_fields[str(key[-1])].description if model and key[-1] in model.model_fields else ""
        return f"required, and missing{f'. {described}' if described else ''}", False
    if kind == "value_error":
        return one["msg"].removeprefix("Value error, "), False
    if kind == "union_tag_invalid":
        names = re.findall(r"'([^']*)'", context["expected_tags"])
        return unknown_name(str(context["tag"]), names, _tag(one)), False
    if kind == "union_tag_not_found":
        return "required, and missing: it selects the other settings", False
    first = kind.split("_")[0]
    if kind in WORDS:
        numbers = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
        return WORDS[kind].format(**numbers), True
    if first in EXPECTED_TYPES:
        return f"expected {EXPECTED_TYPES[first]}", True
    message = one["msg"].replace("Input should be", "expected")
    return message[0].lower() + message[1:], True


def _tag(one: Any) -> str:
    return str(one["ctx"]["discriminator"]).strip("'")


def short(value: Any) -> str:
    """Return the repr of a value, cut at 80 characters."""
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _locate(location: Sequence[str | int], doc: Document, unknown: bool) -> tuple[Key, type[BaseModel] | None]:
    """Return the key in the document for pydantic's location, and the settings class that its last part belongs to.

    Parts of the location that name an alternative of a union are left out. With `unknown` the last part is a key that
    the settings class does not have.
    """
    key: list[str | int] = []
    tp: Any = doc.root
    value, owner = doc.data, None
    for i, part in enumerate(location):
        model = model_for(tp, value)
        inner = child(tp, part, value)
        if isinstance(value, list) and part == list_field(model):  # the list stands for this field
            tp = inner
            continue
        present = isinstance(value, Mapping) and part in value
        if inner is None and not (model is not None and ((unknown and i == len(location) - 1) or present)):
            continue
        key.append(part)
        owner, tp, value = model, inner, inside(value, part)
        if inner is None:
            break
    return tuple(key), owner
