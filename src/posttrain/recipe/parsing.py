"""YAML and ``key=value`` overrides -> a checked Recipe, with every problem reported at once (imports no torch)."""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import ValidationError

from posttrain.config import Recipe
from posttrain.core.errors import RecipeError
from posttrain.core.files import named_path, read_small_text, similar
from posttrain.core.imports import add_import_folder
from posttrain.core.secrets import hide_secrets
from posttrain.recipe.documents import (
    MAX_DEPTH,
    MAX_RECIPE,
    Document,
    dump_recipe,
    parse_document,
    parse_value,
    refused_values,
)
from posttrain.recipe.messages import explain, short
from posttrain.recipe.other_data import data_sources, leave_out_descriptions
from posttrain.recipe.schema import (
    Key,
    child,
    dotted,
    inside,
    item_names,
    list_field,
    model_for,
    options,
    takes_list,
)

MAX_EXTENDED = 20
"""Most recipes that extend one another."""


def load_recipe(path_or_name: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, and check it as a whole.

    A recipe with ``extends: NAME`` (or a path relative to its own file) is that recipe with its own keys put in. Keys
    may be dotted, as in ``stages.labels: {labels: judge}``. Mappings are merged, everything else is replaced. Settings
    that describe a table (templates, classes, rows, ...) go with it if its source is replaced. Modules in the current
    folder and beside the recipe can be imported afterwards.

    Args:
        path_or_name: Path of a YAML file, folder of a run (for its recipe.yaml), name of a shipped recipe, or what a
            YAML file would hold.
        overrides: ``key=value`` with dotted keys; items of a list go by index or name, as in
            ``stages.0.optimizer.lr=1e-4``, ``stages.sft.batch_size=8``, ``model.source=path``. ``key=`` sets null.

    Raises:
        RecipeError: All problems, each with the full key, file and line, and the nearest right key.
    """
    document, origin, folder = _read(path_or_name)
    add_import_folder(Path.cwd())
    sources = data_sources(document.data)
    for override in overrides:
        _apply_override(document, override)
    leave_out_descriptions(document, sources, lambda key: _overridden(document, key))
    if folder is not None:
        _resolve_paths(document.data, folder)
        _add_import_folders(folder)
    for key, message in refused_values(document.data):
        document.add_problem(key, message)
        document.refused.add(key)
    _name_stages(document.data)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        explain(error, document)
    if document.problems or recipe is None:
        count = len(document.problems) + document.more
        lines = "".join(f"\n  {p}" for p in document.problems)
        lines += f"\n  and {document.more:,} more" if document.more else ""
        raise RecipeError(hide_secrets(f"{origin} has {count} problem{'s' * (count != 1)}:{lines}"))
    return recipe


def shipped() -> dict[str, Traversable]:
    """Return the recipes that are part of the package, by name."""
    folder = resources.files("posttrain") / "recipes"
    files = [f for f in folder.iterdir() if f.name.endswith(".yaml")]
    return {f.name.removesuffix(".yaml"): f for f in sorted(files, key=lambda f: f.name)}


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Return the settings that make two recipes compute different things, as ``key: old there, new now``.

    Settings for where the run is carried out, where results go and what they are called (systems, output, description,
    track, sampler.address) are not compared.
    """
    ignored = {"systems", "output", "description", "track"}
    before, after = (recipe.model_dump(mode="json", exclude=ignored) for recipe in (old, new))
    out: list[str] = []

    def walk(a: Any, b: Any, key: Key) -> None:
        if key[-2:] == ("sampler", "address"):
            return
        if isinstance(a, dict) and isinstance(b, dict):
            for name in [*a, *(n for n in b if n not in a)]:
                walk(a.get(name), b.get(name), (*key, name))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                walk(x, y, (*key, i))
        elif a != b:
            out.append(f"{dotted(key, before)}: {short(a)} there, {short(b)} now")

    walk(before, after, ())
    return out


# ----------------------------------------------------------------------------------------------------------- reading


def _read(
    path_or_name: str | Path | Mapping[str, Any], extending: tuple[str, ...] = ()
) -> tuple[Document, str, Path | None]:
    """Return a recipe merged with the one that it extends, unchecked; its name in messages; its folder."""
    text, origin, folder = _open(path_or_name)
    if origin in extending or len(extending) > MAX_EXTENDED:
        told = "itself" if origin in extending else f"more than {MAX_EXTENDED} recipes one after the other"
        raise RecipeError(f"{extending[0]} extends {told}: {' extends '.join((*extending, origin))}")
    document = parse_document(text, origin)
    if not isinstance(document.data, dict):
        raise RecipeError(f"{origin}: expected a mapping with name, model and stages, got {document.data!r}")
    if "extends" not in document.data:
        return document, origin, folder
    named = document.data.pop("extends")
    if not isinstance(named, str):
        place = document.place(("extends",))
        raise RecipeError(f"{place}: extends takes the name or path of one recipe, got {named!r}")
    beside = folder / named_path(named) if folder is not None and named not in shipped() else None
    base, _, above = _read(str(beside) if beside is not None and beside.exists() else named, (*extending, origin))
    if above is not None:
        _resolve_paths(base.data, above)
        _add_import_folders(above)
    _extend(base, document)
    return base, origin, folder


def _open(path_or_name: str | Path | Mapping[str, Any]) -> tuple[str, str, Path | None]:
    """Return (text, name in messages, folder that relative paths may start from)."""
    if isinstance(path_or_name, Mapping):
        return yaml.safe_dump(dict(path_or_name), sort_keys=False, allow_unicode=True), "the recipe", None
    named = str(path_or_name)
    have = shipped()
    if isinstance(path_or_name, str) and named in have:
        return have[named].read_text(encoding="utf-8"), f"{named}.yaml", None
    path = named_path(path_or_name)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(path.stem, have, n=1)
        hint = similar(path) or (f" Did you mean {close[0]}?" if close else "")
        problem = "a folder without a recipe.yaml, so no run" if path.is_dir() else "no such file"
        listed = "" if "/" in named and similar(path) else f" Recipes of posttrain:\n{in_columns(have)}"
        raise RecipeError(f"no recipe {named!r}: {problem}.{hint}{listed}")
    try:
        size = path.stat().st_size
        if size > 4 * MAX_RECIPE:
            raise RecipeError(f"{path}: a recipe has at most {MAX_RECIPE:,} characters, and this has {size:,} bytes")
        return path.read_text(encoding="utf-8"), str(path_or_name), path.parent
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: can't be read as UTF-8 text: {error}") from error


def in_columns(names: Sequence[str] | dict[str, Any], columns: int = 4) -> str:
    """Return names as an indented table, sorted down its columns."""
    ordered, width = sorted(names), max(map(len, names), default=0) + 2
    rows = -(-len(ordered) // columns)
    lines = ("".join(f"{name:<{width}}" for name in ordered[row::rows]) for row in range(rows))
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _add_import_folders(folder: Path) -> None:
    """Let modules beside a recipe be imported; of a run, the folders that were noted when it was started."""
    try:
        manifest = json.loads(read_small_text(folder / "manifest.json"))
    except (OSError, ValueError, RecursionError):
        manifest = None
    noted = manifest.get("import_folders", []) if isinstance(manifest, dict) else [str(folder)]
    for path in noted if isinstance(noted, list) else []:
        add_import_folder(str(path))


def _resolve_paths(value: Any, folder: Path) -> None:
    """Replace paths that are not in the working directory but beside the recipe's file."""

    def moved(text: Any) -> Any:
        if not isinstance(text, str) or not 0 < len(text) < 1000 or "\n" in text or Path(text).is_absolute():
            return text
        try:
            if Path(text).exists() or not glob.has_magic(text):
                return str(folder / text) if not Path(text).exists() and (folder / text).exists() else text
            if (folder / text).exists():  # brackets in the name of a file
                return str(folder / text)
            beside = str(Path(glob.escape(str(folder))) / text)
            return beside if not glob.glob(text, recursive=True) and glob.glob(beside, recursive=True) else text
        except OSError:  # longer than a name may be: whoever opens it says so
            return text

    if isinstance(value, list):
        for item in value:
            _resolve_paths(item, folder)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name in ("source", "chat_template", "tasks", "documents"):
                value[name] = [moved(i) for i in inner] if isinstance(inner, list) else moved(inner)
            _resolve_paths(value[name], folder)


def _name_stages(data: Any) -> None:
    """Write the default names of stages into the recipe; the second stage of the same method is METHOD-2."""
    stages = data.get("stages")
    if isinstance(stages, list):
        for stage, name in zip(stages, item_names(child(Recipe, "stages", data), stages), strict=True):
            if name:
                stage["name"] = name


# ---------------------------------------------------------------------------------------------------- overrides


def _apply_override(doc: Document, override: str) -> None:
    """Put one ``key=value`` into the document, or note why it can't be."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        doc.note(f"{override!r}: expected key=value, for example stages.sft.optimizer.lr=1e-4")
        return
    _put(doc, name.strip(), override, f"override {override}", lambda tp, old: _value(text, tp))


def split_lists(path_or_name: str | Path, overrides: Sequence[str]) -> list[list[str]]:
    """Return, for each override, the overrides that a sweep tries: one a value if it lists several.

    A list is several values, except for a setting that takes a list itself: there each value is a list, as in
    ``betas=[[0.9, 0.99], [0.9, 0.999]]``, and a plain list is one value. Mistakes are left to `load_recipe`.

    Args:
        path_or_name: As for `load_recipe`.
        overrides: ``key=value`` or ``key=[a, b]``, applied in this order.
    """
    document, _, _ = _read(path_or_name)
    out: list[list[str]] = []
    for override in overrides:
        name, _, text = override.partition("=")
        several: list[str] = []

        def first(tp: Any, old: Any, text: str = text, name: str = name, several: list[str] = several) -> Any:
            try:
                value = parse_value(text)
            except yaml.YAMLError:
                return text
            of_lists = takes_list(tp)
            if not isinstance(value, list) or (of_lists and not any(isinstance(item, list) for item in value)):
                return _value(text, tp)
            several += [f"{name}={json.dumps(item, ensure_ascii=False)}" for item in value]
            return value[0] if value else value

        _put(document, name.strip(), override, f"override {override}", first)
        out.append(several or [override])
    return out


def _overridden(doc: Document, key: Key) -> bool:
    """Return True if an override gave the value of a key, or of a key above it."""
    return any(doc.places.get(key[:end], "").startswith("override ") for end in range(1, len(key) + 1))


def _put(doc: Document, name: str, source: str, place: str, value: Callable[[Any, Any], Any]) -> Key | None:
    """Set the setting with a dotted name.

    Args:
        doc: The recipe.
        name: Dotted name of the setting.
        source: What the user wrote, for messages.
        place: Where the user wrote it, for messages.
        value: Function of (annotation of the setting, old value) that returns the new value.

    Returns:
        The key; None, with a problem noted, if the name leads nowhere.
    """
    if name.count(".") > MAX_DEPTH:
        doc.note(f"{source[:80]!r}: the name of a setting has at most {MAX_DEPTH} parts")
        return None
    key = _find(doc, name, source)
    if key is None:
        return None
    *parents, last = key
    block: Any = doc.data
    tp: Any = Recipe
    for depth, part in enumerate(parents, 1):
        tp = child(tp, part, block)
        if inside(block, part) is None:
            block[part] = {}
            doc.places[key[:depth]] = place
        block = block[part]
        if not isinstance(block, dict | list):
            doc.note(f"{source!r}: {part} is {short(block)} and has no settings inside; replace it as a whole")
            return None
    old = inside(block, last)
    block[last] = value(child(tp, last, block), old)
    doc.places[key] = place
    if not (isinstance(old, dict) and isinstance(block[last], dict)):
        for replaced in [k for k in doc.places if k[: len(key)] == key and k != key]:
            del doc.places[replaced]
    return key


def _extend(base: Document, doc: Document) -> None:
    """Put a recipe's own keys, dotted or not, into the recipe that it extends."""
    sources = data_sources(base.data)

    def merged(old: Any, new: Any) -> Any:
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return new
        return {**old, **{name: merged(old.get(name), value) for name, value in new.items()}}

    for name, new in doc.data.items():
        key = _put(base, name, name, doc.place((name,)), lambda _, old, new=new: merged(old, new))  # type: ignore[misc]
        if key is not None:
            base.places |= {(*key, *k[1:]): place for k, place in doc.places.items() if k[0] == name}
    own = set(doc.places.values())
    leave_out_descriptions(base, sources, lambda key: base.places.get(key) in own)
    for problem in doc.problems:
        base.note(problem)
    base.more += doc.more


def _find(doc: Document, name: str, source: str) -> Key | None:
    """Return the key of a dotted name; items of a list go by index or by name, which may contain dots."""
    parts, value = name.split("."), doc.data
    key: list[str | int] = []
    tp: Any = Recipe
    while parts:
        if isinstance(value, list) and parts[0] in getattr(model_for(tp, value), "model_fields", ()):
            value = _unfold(doc, key, list_field(model_for(tp, value)))
        if not isinstance(value, list):
            part: str | int = parts.pop(0)
        else:
            names = item_names(tp, value)
            ends = [n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in names]
            if ends:
                part = names.index(".".join(parts[: ends[-1]]))
                del parts[: ends[-1]]
            elif parts[0].isdecimal() and len(parts[0]) < 9 and int(parts[0]) < len(value):
                part = int(parts.pop(0))
            else:
                there = ", ".join(f"{i} ({n})" if n else str(i) for i, n in enumerate(names)) or "empty"
                doc.note(f"{source!r}: {dotted(key, doc.data)} has no {parts[0]!r}; there is: {there}")
                return None
        key.append(part)
        value, tp = inside(value, part), child(tp, part, value)
    return tuple(key)


def _unfold(doc: Document, key: Sequence[str | int], field: str) -> dict[str, Any]:
    """Replace a list that stands for a field by a mapping with this field, so that others can be set beside it."""
    block = doc.data
    for part in key[:-1]:
        block = block[part]
    block[key[-1]] = {field: block[key[-1]]}
    for old in [k for k in doc.places if k[: len(key)] == tuple(key) and len(k) > len(key)]:
        doc.places[*key, field, *old[len(key) :]] = doc.places.pop(old)
    return block[key[-1]]  # type: ignore[no-any-return]


def _value(text: str, tp: Any) -> Any:
    """Return an override's value: YAML, but a setting that is text takes braces and colons as they are."""
    try:
        value = parse_value(text)
    except yaml.YAMLError:
        return text
    allowed = options(tp)
    if str not in allowed or isinstance(value, str):
        return value
    empty = value is None and type(None) in allowed
    several = isinstance(value, list) and any(get_origin(o) is list for o in allowed)
    return value if empty or several else text


__all__ = ["differences", "dump_recipe", "in_columns", "load_recipe", "shipped", "split_lists"]
