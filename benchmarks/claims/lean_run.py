"""Carry out a recipe's stages, evaluate the last model alone, and delete weights.

The first model is the same for many runs; it has an arm of its own, a recipe without stages.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path


def finished(folder: Path, tasks: Sequence[str], kept: bool) -> bool:
    """Return True if a lean run has nothing left to do.

    Args:
        folder: Folder of the run.
        tasks: Names of its evaluations.
        kept: It keeps its last model.
    """
    measured = all((folder / "evaluations" / "after" / f"{task}.json").exists() for task in tasks)
    return measured and (folder / "model").is_dir() == kept and (kept or bool(tasks))


def lean_run(file: str, folder: Path, kept: bool = False) -> None:
    """Run a recipe in `folder`; what is finished there is not done again.

    Args:
        file: The recipe.
        folder: Folder of the run.
        kept: Keep the last model.
    """
    from rich.console import Console

    import posttrain
    from posttrain.eval.tasks import evaluate_model
    from posttrain.recipe.parsing import load_recipe
    from posttrain.runs.registry import made_in, resolved

    logging.disable(logging.INFO)
    recipe = load_recipe(file)
    after = folder / "evaluations" / "after"
    if not (after.exists() and all((after / f"{task.name}.json").exists() for task in recipe.evaluate)):
        if recipe.stages:
            posttrain.run(recipe.model_copy(update={"evaluate": []}), folder, console=Console(quiet=True))
        last = {"source": str(folder / "model"), "revision": None} if (folder / "model").is_dir() else {}
        tasks = [resolved(task, made_in(folder, recipe)) for task in recipe.evaluate]
        if tasks:
            evaluate_model(recipe.model.model_copy(update=last), tasks, after, recipe.seed)
        after.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("stages/*/*"), folder / "model"]:
        if path.name in ("model", "adapter", "checkpoints") and not (kept and path.name != "checkpoints"):
            shutil.rmtree(path, ignore_errors=True)
