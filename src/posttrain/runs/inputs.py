"""Note what a run reads besides its recipe: files, models, modules and packages, each with a hash or version.

They are noted when the run begins and compared when it is resumed: with other data the weights would be those of no
recipe, and nothing would tell.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import posttrain
from posttrain.config import Recipe
from posttrain.core.errors import DataError, ModelError
from posttrain.core.files import input_hash
from posttrain.core.hub import hub_commit
from posttrain.core.imports import import_folders, is_import_path
from posttrain.data.passages import document_files
from posttrain.data.readers import packaged_or_own
from posttrain.data.text_files import folder_hash, text_files
from posttrain.models.loading import lab_folder
from posttrain.recipe.machine_checks import blocks, packages_needed
from posttrain.recipe.model_sources import find_model
from posttrain.runs.machine import PACKAGES

NO_INPUTS = ("name", "description", "output", "store", "method", "kind", "device", "dtype")
"""Settings whose text names no file that is read; a judge's store grows during a run."""
MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py", ".gguf")
"""Endings of the files of a model's folder."""
WITH_THE_REST = (*PACKAGES, "jinja2")
"""Packages that every run uses."""

Inputs = dict[str, str]
"""Name in messages -> "sha256 …", "version …" or "commit …"."""


def find_inputs(recipe: Recipe, functions: Mapping[str, Callable[..., Any]]) -> Inputs:
    """Return the inputs of a recipe as they are now; what is missing has no entry.

    Args:
        recipe: The recipe.
        functions: Rewards and environments given from Python, by name.
    """
    found: Inputs = {}
    packages = set(WITH_THE_REST)
    for _, block in blocks(recipe, files=True):
        for name, text in _texts(block):
            found |= _modules(text) if is_import_path(text) and name not in ("source", "start") else {}
            if name not in NO_INPUTS:
                found |= _read_by(text, name, getattr(block, "revision", None))
        packages |= set(packages_needed(block))
        found |= {str(p): f"sha256 {input_hash(p)}" for p in getattr(block, "named_files", list)()}
    for name, function in functions.items():
        try:
            source = _source_of(function)
        except (OSError, TypeError):  # made at run time: it has no source
            continue
        found[f"function {name}"] = f"sha256 {hashlib.sha256(source.encode()).hexdigest()}"
    versions = {"posttrain": posttrain.__version__, "python": ".".join(platform.python_version_tuple()[:2])}
    for package in sorted(packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {f"package {name}": f"version {version}" for name, version in versions.items()}


def _source_of(function: Any) -> str:
    """Return the source of a function, or of an object's class; of a `functools.partial`, with its arguments."""
    if isinstance(function, functools.partial):
        given = json.dumps([function.args, function.keywords], default=lambda value: type(value).__name__)
        return _source_of(function.func) + given
    return inspect.getsource(function if inspect.isroutine(function) or inspect.isclass(function) else type(function))


def _texts(block: BaseModel) -> Iterator[tuple[str, str]]:
    """Yield (setting, text) of each text in a block's own settings, those in plain lists and mappings included."""

    def walk(name: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, str):
            yield name, value
        elif isinstance(value, list | tuple | set):
            for item in value:
                yield from walk(name, item)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(str(key), item)

    for name in type(block).model_fields:
        yield from walk(name, getattr(block, name))


def _read_by(text: str, name: str, revision: str | None) -> Inputs:
    """Return the file, or the files of the model, that a setting names."""
    if not text or len(text) > 1000 or "\n" in text or text.startswith("stage:"):
        return {}
    try:
        path = packaged_or_own(text)
        if path.is_file():
            return {text: f"sha256 {input_hash(path)}"}
        if name == "documents":
            return {str(p): f"sha256 {input_hash(p)}" for p in document_files(text)}
        if name not in ("source", "start") or (name, text) == ("start", "base"):
            return {}
        if path.is_dir() and not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
            if text_files(path):
                return {text: f"sha256 {folder_hash(path)}"}
        model = find_model(text)
        if model.kind == "hub":
            commits = {kind: hub_commit(kind, text, revision) for kind in ("models", "datasets")}
            return {f"{text} (Hub, {kind})": f"commit {commit}" for kind, commit in commits.items() if commit}
        folder = Path(model.location)
        if model.kind == "lab":
            kind, seed = model.location.split(":")
            folder = lab_folder(int(seed), kind)
        if model.kind == "gguf":
            return {text: f"sha256 {input_hash(folder)}"}
        files = [p for p in sorted(folder.glob("*")) if p.suffix in MODEL_FILES and p.is_file()]
        return {f"{text}/{p.name}": f"sha256 {input_hash(p)}" for p in files}
    except (OSError, ValueError, DataError, ModelError):  # no file, no model: whoever reads it says so
        return {}


def _modules(path: str) -> Inputs:
    """Return the source files of the module of ``module:name`` and of what it imports from the user's folders."""
    found: Inputs = {}
    named = path.partition(":")[0]
    todo = [named]
    seen = set[str]()
    while todo:
        name = todo.pop()
        if name in seen or name.partition(".")[0] in (*sys.stdlib_module_names, "posttrain"):
            continue
        seen.add(name)
        file = _file_of(name, installed=name.partition(".")[0] == named.partition(".")[0])
        if file is None:
            continue
        found[f"module {name}"] = f"sha256 {input_hash(file)}"
        todo += _imports_of(file, name)
        if "." in name:
            todo.append(name.rpartition(".")[0])
    return found


def _file_of(module: str, installed: bool) -> Path | None:
    """Return the source of a module in the user's folders, or among the installed ones too."""
    for folder in [*import_folders(), *(p or os.getcwd() for p in sys.path)]:
        if "site-packages" in Path(folder).parts and not installed:
            continue
        stem = Path(folder).joinpath(*module.split("."))
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                return file
    return None


def _imports_of(file: Path, module: str) -> list[str]:
    """Return the names of the modules that a file may import, relative names resolved."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    names: list[str] = []
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)] if base else []
    return names


def changed_inputs(noted: Mapping[str, Any], found: Inputs) -> dict[str, str]:
    """Return what differs from what was noted last: name -> what was, and what is."""
    changed: dict[str, str] = {}
    for name, history in noted.items():
        was, now = history[-1]["value"], found.get(name)
        if now != was:
            kind, _, value = was.partition(" ")
            shown = "it is gone" if now is None else f"{kind} {value[:16]}, now {now.partition(' ')[2][:16]}"
            changed[name] = shown
    return changed


def note_inputs(noted: Mapping[str, Any], found: Inputs, time: str, **remarks: Any) -> dict[str, Any]:
    """Return the manifest's histories of inputs with those of now; what was noted before stays in them.

    Args:
        noted: Histories so far.
        found: Inputs as they are now.
        time: The time, for new entries.
        remarks: Further fields of entries that follow another one.
    """
    out = {name: list(history) for name, history in noted.items()}
    for name, value in found.items():
        history = out.setdefault(name, [])
        if not history or history[-1]["value"] != value:
            history.append({"value": value, "since": time, **(remarks if history else {})})
    return out
