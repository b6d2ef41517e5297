"""The folder of a run: opened by one process at a time, for one recipe.

recipe.yaml    the resolved recipe           stages/<i>-<name>/   method, metrics, timings, checkpoints, model
manifest.json  versions, data, lineage       evaluations/         before, after, comparison.json
report.html    the page of the run           model/               the final model
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from posttrain.config import Recipe
from posttrain.core import distributed
from posttrain.core.errors import CheckpointError, RecipeError
from posttrain.core.files import write_json, write_text
from posttrain.recipe.parsing import differences, dump_recipe, load_recipe

OF_A_RUN = ("stages", "evaluations", "bad_rows", "tensorboard", "manifest.json", "report.html")


class Manifest:
    """manifest.json, rewritten as a whole at every change; only rank 0 writes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "manifest.json"
        self.values: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def update(self, **values: Any) -> None:
        """Set values and write the file."""
        self.values.update(values)
        if distributed.is_main():
            write_json(self.path, self.values)


@contextmanager
def open_run(path: Path, recipe: Recipe, fresh: bool) -> Iterator[Manifest]:
    """Make or open the folder of a run, and keep other processes out of it; use with `with`.

    A folder in which no step was made and nothing was written by a stage is taken over by another recipe: its first
    command was wrong, and this one is the correction.

    Args:
        path: The folder.
        recipe: The recipe, which is written into a new folder.
        fresh: Rename an earlier run in the folder and start over.

    Raises:
        CheckpointError: The folder holds a run of another recipe, or another process works on it.
    """
    with ExitStack() as stack:
        if distributed.is_main():
            if fresh and path.exists():
                with _locked(path):
                    number = next(n for n in range(1, 10_000) if not path.with_name(f"{path.name}.{n}").exists())
                    path.rename(path.with_name(f"{path.name}.{number}"))
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(path))
            _claim(path, recipe)
        distributed.barrier()
        yield Manifest(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; the system releases it when the process ends, however it ends."""
    with (path / ".lock").open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"another process is working on {path}; wait for it, or stop it first") from error
        yield


def _claim(path: Path, recipe: Recipe) -> None:
    """Write the recipe into a new folder, or make sure that the folder's run is of this recipe."""
    stored = path / "recipe.yaml"
    if stored.exists():
        earlier: Recipe | None = None
        try:
            earlier = load_recipe(str(stored))
            different = differences(earlier, recipe)
        except RecipeError as error:
            different = [str(error)]
        if not different:
            return
        if not (path / "manifest.json").is_file() or _has_results(path):
            raise CheckpointError(
                f"{path} holds a run of another recipe ({'; '.join(different[:5])}). Resume that one with "
                f"`posttrain run {path}`, give this one another name (name=...), or set the old one aside with --fresh"
            )
        evaluated = ("model", "evaluate", "seed")
        same = earlier is not None and all(getattr(earlier, name) == getattr(recipe, name) for name in evaluated)
        for name in OF_A_RUN:
            if name == "evaluations" and same:
                continue
            shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink(missing_ok=True)
    write_text(stored, dump_recipe(recipe))


def _has_results(path: Path) -> bool:
    """Return True if a stage has written anything: a step, a rollout, a checkpoint, labels."""
    files = (file for file in (path / "stages").rglob("*") if file.is_file() and file.name != "method.json")
    return any(file.stat().st_size for file in files)
