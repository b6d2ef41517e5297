"""posttrain inspect: print the data of a recipe, or the rollouts, chains and labels of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.cli.arguments import Overrides, make_console, recipe_names
from posttrain.core.errors import RecipeError
from posttrain.core.files import changed_artifacts


def inspect_command(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE|RUN", help="A recipe, or the folder of a run.", autocompletion=recipe_names),
    ],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Samples, prompts or groups to show.")] = 3,
    stage: Annotated[str | None, typer.Option(help="Name of one stage or evaluation. [default: all]")] = None,
    step: Annotated[int | None, typer.Option(help="Of a run: rollouts of this step. [default: the last]")] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="Of a run: answers to held-out prompts.")] = False,
    sort: Annotated[str, typer.Option(help="Of a run: order, best, worst, suspicious.")] = "order",
    problem: Annotated[int | None, typer.Option(help="Of a run: only the prompt with this number.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Of a run: how the rewards drifted, instead of rollouts.")
    ] = False,
) -> None:
    """Show what the model trains on: tokens, which carry loss, what was dropped. Of a run: its rollouts or chains."""
    path = Path(recipe)
    only_of_a_run = {"step": step, "held_out": held_out, "sort": sort, "problem": problem}
    if path.is_dir() and not overrides and _show_run(path, rows, stage, watch, only_of_a_run):
        return
    if step is not None or held_out or problem is not None or watch or sort != "order":
        raise RecipeError(
            f"{recipe} is no run with rollouts: --step, --held-out, --sort, --problem and --watch have no meaning"
        )
    from posttrain.recipe.machine_checks import check_machine
    from posttrain.recipe.parsing import load_recipe

    checked = load_recipe(recipe, overrides or ())
    names = [*(stage.name for stage in checked.stages), *(task.name for task in checked.evaluate)]
    if stage is not None and stage not in names:
        raise RecipeError(f"no stage or evaluation {stage!r}; there are: {', '.join(names)}")
    check_machine(checked)
    from posttrain.cli.inspect_rows import print_data

    print_data(checked, stage, rows, make_console())


def _show_run(path: Path, rows: int, stage: str | None, watch: bool, options: dict[str, Any]) -> bool:
    """Print what a run has kept; False if it has nothing of what was asked for, so that its data is shown instead."""
    from posttrain.cli import inspect_rollouts as of_run

    console = make_console()
    for name in changed_artifacts(path, "stages/", weights=False):
        console.print(f"! {path / name} was changed after the run wrote it, or is missing", markup=False)
    problem = options["problem"]
    labelled = of_run.print_feedback(path, console, rows)
    plain = not watch and {**options, "problem": None} == {**dict.fromkeys(options), "held_out": False, "sort": "order"}
    measured = plain and problem is None and _show_quality(path, rows, stage, console)
    if measured and stage is not None:
        return True
    if plain and of_run.print_chains(path, console, stage=stage, groups=rows, problem=problem):
        return True
    if of_run.stages_with_rollouts(path):
        if watch:
            of_run.print_drift(path, console, stage=stage)
        else:
            of_run.print_rollouts(path, console, stage=stage, groups=rows, **options)
        return True
    return measured or (labelled and plain and stage is None and problem is None)


def _show_quality(path: Path, rows: int, stage: str | None, console: Any) -> bool:
    """Print the quality of the instruction rows of a run's stages; False if it has none."""
    from posttrain.cli.inspect_rows import print_quality
    from posttrain.report.row_quality_view import instruction_qualities

    notes: list[str] = []
    views = [view for view in instruction_qualities(path, notes) if stage in (None, view.stage)]
    for note in notes if views else ():
        console.print(f"! {note}", markup=False)
    for view in views:
        console.rule(f"{view.stage} (instructions)")
        print_quality(view, view.first_rows(rows), console)
    return bool(views)
