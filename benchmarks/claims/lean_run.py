"""Carry out a recipe's stages, evaluate the last model alone, and delete weights.

The first model is the same for many runs; it has an arm of its own, a recipe without stages.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path


def lean_run(file: str, folder: Path) -> None:
    """Run a recipe in `folder`; what is finished there is not done again."""
    from rich.console import Console

    import posttrain
    from posttrain.eval.tasks import evaluate_model
    from posttrain.recipe.parsing import load_recipe

    logging.disable(logging.INFO)
    recipe = load_recipe(file)
    after = folder / "evaluations" / "after"
    if after.exists() and all((after / f"{task.name}.json").exists() for task in recipe.evaluate):
        return
    model = recipe.model
    if recipe.stages:
        stages_alone = recipe.model_copy(update={"evaluate": []})
        made = posttrain.run(stages_alone, folder, console=Console(quiet=True)).model
        model = model.model_copy(update={"source": str(made), "revision": None})
    evaluate_model(model, recipe.evaluate, after, recipe.seed)
    for path in [*folder.glob("stages/*/*"), folder / "model"]:
        if path.name in ("model", "adapter", "checkpoints"):
            shutil.rmtree(path, ignore_errors=True)
