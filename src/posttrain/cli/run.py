"""posttrain run: carry a recipe through, or resume a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.arguments import DryRun, Overrides, print_plan, recipe_names
from posttrain.core.errors import RecipeError


def run_command(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|FOLDER", help="A recipe, or the folder of a run to resume.", autocompletion=recipe_names
        ),
    ],
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/NAME]")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Set an earlier run in the folder aside, start over.")] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="Resume although files or packages have changed.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Evaluate, train, evaluate again, and write a report. Resumes a run that was interrupted."""
    from posttrain.recipe.machine_checks import check_machine
    from posttrain.recipe.parsing import load_recipe

    path = Path(recipe)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        if overrides or (folder is not None and folder.resolve() != path.resolve()):
            raise RecipeError(
                f"{path} is a run, which resumes with its own settings in its own folder. For other settings: "
                f"posttrain run {path / 'recipe.yaml'} name=NEW_NAME {' '.join(overrides or [])}".rstrip()
            )
        folder = path
    checked = load_recipe(recipe, overrides or ())
    check_machine(checked)  # before torch is imported, which takes seconds
    if dry_run:
        from posttrain.runs.dry_run import planned_run

        print_plan(planned_run(checked, folder, fresh))
        return
    from posttrain.runs.runner import run

    run(checked, folder=folder, fresh=fresh, accept_changed_data=accept_changed_data)
