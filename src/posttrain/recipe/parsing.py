"""YAML and ``key=value`` overrides → a checked Recipe, with every problem reported at once (imports no torch).

Scalars are read as YAML 1.2 has them: 1e-4 is a number, and yes, no, on, off are words, as someone who writes
``choices: [yes, no]`` means them to be. A key given twice is an error. Anchors and ``<<`` merges work.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from posttrain.config import Recipe
from posttrain.core.errors import RecipeError
from posttrain.recipe.schema import child, inside, model_for, options, unknown_key

Key = tuple[str | int, ...]


# ---------------------------------------------------------------------------------------------- YAML in and out


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars in place of 1.1's."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text.lstrip("+-")[:2] in ("0x", "0o") else int(text)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or _Loader would read as something else than a string; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _set_up_yaml() -> None:
    scalars = [
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
        ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
        ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
        ("null", r"~|null|Null|NULL|", "~nN"),
    ]
    for name, pattern, first in scalars:
        regex = re.compile(f"^(?:{pattern})$")
        letters: list[str | None] = [*first, ""] if name == "null" else [*first]
        _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", regex, letters)
        _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{name}", regex, letters)
    _Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
    _Dumper.add_representer(
        str,
        lambda d, s: d.represent_scalar("tag:yaml.org,2002:str", s, style="|" if "\n" in s.strip("\n") else None),
    )


_set_up_yaml()


@dataclass
class _Document:
    """A recipe on its way in: plain data, where each key was written, and what is wrong so far."""

    data: Any = None
    where: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """Where the key, or the nearest that holds it or is held by it, was written."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.where:
                return self.where[key[:end]]
        return next((place for k, place in self.where.items() if k[: len(key)] == key), "")

    def problem(self, key: Key, message: str) -> None:
        place = self.place(key)
        self.problems.append(f"{_dotted(key)}{f' ({place})' if place else ''}: {message}")


def _dotted(key: Sequence[str | int]) -> str:
    return ".".join(str(k) for k in key) or "recipe"


def _parse(text: str, origin: str) -> _Document:
    """YAML text → plain data with line numbers; `origin` is what messages call the file."""
    document = _Document()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document.data = _build(loader, node, (), document, origin, ()) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{origin}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {what}") from error
    return document


def _build(loader: _Loader, node: yaml.Node, key: Key, doc: _Document, origin: str, above: tuple[int, ...]) -> Any:
    if id(node) in above:
        raise RecipeError(f"{origin}:{node.start_mark.line + 1}: {_dotted(key)} holds itself through an alias")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            doc.where[(*key, i)] = f"{origin}:{child.start_mark.line + 1}"
        return [_build(loader, child, (*key, i), doc, origin, above) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    out: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for name_node, child in node.value:
        name, line = str(name_node.value), f"{origin}:{name_node.start_mark.line + 1}"
        if name == "<<":
            for part in child.value if isinstance(child, yaml.SequenceNode) else [child]:
                value = _build(loader, part, key, doc, origin, above)
                if not isinstance(value, dict):
                    raise RecipeError(f"{line}: << merges a mapping, and this is {value!r}")
                merged = {**value, **merged}
            continue
        if name in out:
            doc.problems.append(f"{_dotted((*key, name))} ({line}): this key is given twice; keep one")
        doc.where[(*key, name)] = line
        out[name] = _build(loader, child, (*key, name), doc, origin, above)
    return {**merged, **out}


def dump_recipe(recipe: Recipe) -> str:
    """YAML text with every setting written out; load_recipe on it gives an equal Recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """How two recipes differ in what they compute, as ``key: old there, new now``; [] where a run can go on.

    Where things are put and what they are called in lists (output, description, track) does not count.
    """
    out: list[str] = []

    def walk(a: Any, b: Any, key: Key) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for name in [*a, *(n for n in b if n not in a)]:
                walk(a.get(name), b.get(name), (*key, name))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                walk(x, y, (*key, i))
        elif a != b:
            out.append(f"{_dotted(key)}: {_short(a)} there, {_short(b)} now")

    ignored = {"output", "description", "track"}
    walk(old.model_dump(mode="json", exclude=ignored), new.model_dump(mode="json", exclude=ignored), ())
    return out


# ------------------------------------------------------------------------------------------------ what there is


def shipped() -> dict[str, Traversable]:
    """The recipes that come with the package, by name."""
    folder = resources.files("posttrain") / "recipes"
    files = [f for f in folder.iterdir() if f.name.endswith(".yaml")]
    return {f.name.removesuffix(".yaml"): f for f in sorted(files, key=lambda f: f.name)}


# ---------------------------------------------------------------------------------------------------- overrides


def _apply(doc: _Document, override: str) -> None:
    """Put one ``key=value`` into the document, or note why it can't be."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        doc.problems.append(f"{override!r}: expected key=value, for example stages.0.optimizer.lr=1e-4")
        return
    _put(doc, name.strip(), override, f"override {override}", lambda tp, there: _value(text, tp))


def _put(doc: _Document, name: str, said: str, place: str, value: Callable[[Any, Any], Any]) -> Key | None:
    """Set what a dotted name means to `value(its type, what is there)`; None, with a note, where it means nothing."""
    key = _find(doc, name, said)
    if key is None:
        return None
    *parents, last = key
    at: Any = doc.data
    tp: Any = Recipe
    for depth, part in enumerate(parents, 1):
        tp = child(tp, part, at)
        if inside(at, part) is None:
            at[part] = {}
            doc.where[key[:depth]] = place
        at = at[part]
        if not isinstance(at, dict | list):
            doc.problems.append(f"{said!r}: {part} is {at!r} and has no settings inside; replace it as a whole")
            return None
    there = inside(at, last)
    at[last] = value(child(tp, last, at), there)
    doc.where[key] = place
    if not (isinstance(there, dict) and isinstance(at[last], dict)):
        for old in [k for k in doc.where if k[: len(key)] == key and k != key]:
            del doc.where[old]
    return key


def _extend(base: _Document, doc: _Document) -> None:
    """Put a recipe's own keys, dotted or not, into what it extends: mappings are merged, all else is replaced."""

    def merged(there: Any, own: Any) -> Any:
        if not (isinstance(there, dict) and isinstance(own, dict)):
            return own
        return {**there, **{name: merged(there.get(name), value) for name, value in own.items()}}

    for name, own in doc.data.items():
        key = _put(base, name, name, doc.place((name,)), lambda _, there, own=own: merged(there, own))  # type: ignore[misc]
        if key is not None:
            base.where |= {(*key, *k[1:]): place for k, place in doc.where.items() if k[0] == name}
    base.problems += doc.problems


def _find(doc: _Document, name: str, override: str) -> Key | None:
    """Dotted text → the key, an item of a list being found by its index or its name (which may hold dots)."""
    parts, at = name.split("."), doc.data
    key: list[str | int] = []
    tp: Any = Recipe
    while parts:
        if not isinstance(at, list):
            part: str | int = parts.pop(0)
        else:
            called = [_name_of(item, child(tp, i, at)) for i, item in enumerate(at)]
            ends = [n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in called]
            if ends:
                part = called.index(".".join(parts[: ends[-1]]))
                del parts[: ends[-1]]
            elif parts[0].isdigit() and int(parts[0]) < len(at):
                part = int(parts.pop(0))
            else:
                there = ", ".join(f"{i} ({n})" if n else str(i) for i, n in enumerate(called)) or "empty"
                doc.problems.append(f"{override!r}: {_dotted(key)} has no {parts[0]!r}; there is: {there}")
                return None
        key.append(part)
        at, tp = inside(at, part), child(tp, part, at)
    return tuple(key)


def _name_of(item: Any, tp: Any) -> str:
    """The name a stage or task goes by: its own, or its kind's default."""
    if not isinstance(item, dict):
        return ""
    model = model_for(tp, item)
    default = model.model_fields["name"].default if model and "name" in model.model_fields else None
    return str(item.get("name", default if isinstance(default, str) else ""))


def _value(text: str, tp: Any) -> Any:
    """An override's value: YAML, except that a setting which is text takes braces and colons as they are."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError:
        return text
    allowed = options(tp)
    if str not in allowed or isinstance(value, str):
        return value
    empty = value is None and type(None) in allowed
    several = isinstance(value, list) and any(get_origin(o) is list for o in allowed)
    return value if empty or several else text


# ----------------------------------------------------------------------------------------------------- checking


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, check the whole.

    path_or_name: path of a YAML file, a run's folder (its recipe.yaml), or the name of a shipped recipe.
    A recipe with ``extends: NAME`` (or a path, beside its own file) is that recipe with its own keys put in; these may
    be dotted, ``stages.labels: {labels: judge}``. Mappings are merged, all else is replaced.
    overrides: ``key=value`` with dotted keys; items of a list by index or name:
        ``stages.0.optimizer.lr=1e-4``, ``stages.sft.batch_size=8``, ``model.source=path``. ``key=`` sets null.

    Raises RecipeError that lists every problem: the full key, file and line, and the nearest right key.
    """
    doc, origin, folder = _read(path_or_name)
    for override in overrides:
        _apply(doc, override)
    if folder is not None:
        _resolve_paths(doc.data, folder)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(doc.data)
    except ValidationError as error:
        _explain(error, doc)
    if doc.problems or recipe is None:
        count = len(doc.problems)
        lines = "".join(f"\n  {p}" for p in doc.problems)
        raise RecipeError(f"{origin} has {count} problem{'s' * (count != 1)}:{lines}")
    return recipe


def _read(path_or_name: str | Path, extending: tuple[str, ...] = ()) -> tuple[_Document, str, Path | None]:
    """A recipe with what it extends below it, unchecked; what messages call it; its folder."""
    text, origin, folder = _open(path_or_name)
    if origin in extending:
        raise RecipeError(f"{extending[0]} extends itself: {' extends '.join((*extending, origin))}")
    doc = _parse(text, origin)
    if not isinstance(doc.data, dict):
        raise RecipeError(f"{origin}: expected a mapping with name, model and stages, got {doc.data!r}")
    if "extends" not in doc.data:
        return doc, origin, folder
    named = doc.data.pop("extends")
    if not isinstance(named, str):
        raise RecipeError(f"{doc.place(('extends',))}: extends takes the name or path of one recipe, got {named!r}")
    beside = folder / named if folder is not None and named not in shipped() else None
    base, _, above = _read(str(beside) if beside is not None and beside.exists() else named, (*extending, origin))
    if above is not None:
        _resolve_paths(base.data, above)
    _extend(base, doc)
    return base, origin, folder


def _open(path_or_name: str | Path) -> tuple[str, str, Path | None]:
    """(text, what messages call it, folder that relative paths may start from)."""
    named = str(path_or_name)
    have = shipped()
    if isinstance(path_or_name, str) and named in have:
        return have[named].read_text(encoding="utf-8"), f"{named}.yaml", None
    path = Path(path_or_name).expanduser()
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(path.stem, have, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        what = "a folder without a recipe.yaml, so no run" if path.is_dir() else "no such file"
        raise RecipeError(f"no recipe {named!r}: {what}. {hint}Recipes that come along: {', '.join(have)}")
    try:
        return path.read_text(encoding="utf-8"), str(path_or_name), path.parent
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: can't be read as UTF-8 text: {error}") from error


def _resolve_paths(value: Any, folder: Path) -> None:
    """Paths that are not in the working directory but beside the recipe's file are taken from there."""

    def moved(text: Any) -> Any:
        if not isinstance(text, str) or not 0 < len(text) < 1000 or "\n" in text or Path(text).is_absolute():
            return text
        return str(folder / text) if not Path(text).exists() and (folder / text).exists() else text

    if isinstance(value, list):
        for item in value:
            _resolve_paths(item, folder)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name in ("source", "chat_template"):
                value[name] = [moved(i) for i in inner] if isinstance(inner, list) else moved(inner)
            else:
                _resolve_paths(inner, folder)


def _explain(error: ValidationError, doc: _Document) -> None:
    """Pydantic's errors, in this project's words; alternatives of one value are joined into one problem."""
    found: dict[Key, list[str]] = {}
    values: dict[Key, str] = {}
    for e in error.errors():
        key, model = _locate(e["loc"], doc.data)
        if e["type"] == "extra_forbidden":
            message = unknown_key(key, model or Recipe)
        elif e["type"] == "missing":
            described = model.model_fields[str(key[-1])].description if model and key[-1] in model.model_fields else ""
            message = f"required, and missing{f'. {described}' if described else ''}"
        elif e["type"] == "value_error":
            message = e["msg"].removeprefix("Value error, ")
        else:
            message = e["msg"].replace("Input should be", "expected")
            message = message[0].lower() + message[1:]
            values[key] = f", and this is {_short(e['input'])}"
        found.setdefault(key, []).append(message)
    for key, messages in found.items():
        doc.problem(key, "; or ".join(dict.fromkeys(messages)) + values.get(key, ""))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _locate(loc: Sequence[str | int], data: Any) -> tuple[Key, type[BaseModel] | None]:
    """Pydantic's location → (key in the recipe, settings class that the last part belongs to).

    Parts that name an alternative of a union rather than a key are left out.
    """
    key: list[str | int] = []
    tp, at, owner = Recipe, data, None
    for i, part in enumerate(loc):
        model = model_for(tp, at)
        inner = child(tp, part, at)
        if inner is None and not (model is not None and (i == len(loc) - 1 or part in (at or {}))):
            continue
        key.append(part)
        owner, tp, at = model, inner, inside(at, part)
        if inner is None:
            break
    return tuple(key), owner
