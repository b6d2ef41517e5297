"""Load functions and classes from outside the package by their import path, ``package.module:name``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.core.errors import PosttrainError, RecipeError

if TYPE_CHECKING:
    from pydantic import BaseModel

_FOLDERS: list[str] = []


def add_import_folder(folder: str | Path) -> None:
    """Let modules that lie in `folder` (beside a recipe, or the current folder) be imported by name.

    The folder goes to the end of `sys.path`, so that a file named like a module of the standard library breaks nothing;
    `load_object` reports a module of the user that is hidden this way.
    """
    path = str(Path(folder).resolve())
    if path not in _FOLDERS:
        _FOLDERS.append(path)
    if path not in sys.path:
        sys.path.append(path)


def import_folders() -> list[str]:
    """Return the folders given to `add_import_folder`, in order."""
    return list(_FOLDERS)


def is_import_path(text: str) -> bool:
    """Return True for ``package.module:name``, the form of a thing from outside the package."""
    module, colon, name = text.partition(":")
    return bool(colon) and all(p.isidentifier() for p in [*module.split("."), *name.split(".")])


def load_object(
    path: str, given: Mapping[str, Callable[..., Any]] | None = None, error: type[PosttrainError] = RecipeError
) -> Callable[..., Any]:
    """Return the callable named by ``module:name`` (dots after the colon reach into classes).

    Args:
        path: Import path, or a key of `given`.
        given: Callables handed over from Python, by name; they come first.
        error: Class of the exception to raise.

    Raises:
        error: The path has another form, the module can't be imported (the message holds the reason), or it has no
            such name.
    """
    if given and path in given:
        return given[path]
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise error(
            f"function {path!r}: expected module:function, or one of those given from Python ({sorted(given or {})})"
        )
    try:
        found: Any = importlib.import_module(module)
    except Exception as failure:
        raise error(
            f"function {path!r}: module {module!r} can't be imported: {type(failure).__name__}: {failure}. It must be "
            f"installed, or lie beside the recipe or in the current folder{_hidden(module)}"
        ) from failure
    for piece in name.split("."):
        if not hasattr(found, piece):
            raise error(f"function {path!r}: there is no {piece!r} in {module}{_hidden(module)}")
        found = getattr(found, piece)
    if not callable(found):
        raise error(f"function {path!r} is {type(found).__name__}, which can't be called")
    return found  # type: ignore[no-any-return]


def _hidden(module: str) -> str:
    """Return a remark if a file in an import folder is hidden by another module of the same name."""
    top = module.partition(".")[0]
    spec = importlib.util.find_spec(top) if top in sys.modules else None
    origin = str(getattr(spec, "origin", None) or "")
    for folder in _FOLDERS:
        for file in (Path(folder, f"{top}.py"), Path(folder, top, "__init__.py")):
            if origin and file.is_file() and Path(origin) != file:
                return f". {file} is hidden by {origin}: give it another name"
    return ""


def signature_settings(function: Callable[..., Any]) -> type[BaseModel]:
    """Return a settings class whose fields are the keyword-only parameters of `function`.

    Each parameter's annotation is the field's type (Any if missing) and its default the field's default. Other settings
    are refused. Annotations of other parameters are not read: they may name what is not imported.

    Raises:
        RecipeError: The signature or an annotation can't be read.
    """
    from pydantic import ConfigDict, create_model

    name = getattr(function, "__name__", type(function).__name__)
    fields: dict[str, Any] = {}
    try:
        for p in inspect.signature(function).parameters.values():
            if p.kind is inspect.Parameter.KEYWORD_ONLY:
                kind: Any = Any if p.annotation is inspect.Parameter.empty else p.annotation
                kind = eval(kind, getattr(function, "__globals__", {})) if isinstance(kind, str) else kind
                fields[p.name] = (kind, ... if p.default is inspect.Parameter.empty else p.default)
    except (TypeError, ValueError, NameError) as error:
        raise RecipeError(f"the parameters of function {name!r} can't be read as settings: {error}") from error
    return create_model(name, __config__=ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False), **fields)
