"""posttrain sweep: run a recipe with several settings and seeds, and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from posttrain.cli.arguments import DryRun, RecipeName, print_plan
from posttrain.core.errors import RecipeError


def sweep_command(
    recipe: RecipeName,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=[A,B]", help="Values to try: stages.sft.optimizer.lr=[1e-5,1e-4]; or KEY=VALUE."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of each combination: 0,1,2. [default: the recipe's]")] = None,
    random: Annotated[
        int | None, typer.Option(min=1, help="Draw this many combinations; KEY=log(1e-6,1e-3) draws from a range.")
    ] = None,
    halve: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help="Stop the worst early by this metric of a stage: loss, STAGE:loss."),
    ] = None,
    eta: Annotated[int, typer.Option(min=2, help="With --halve: one combination in this many continues.")] = 2,
    goal: Annotated[
        Literal["min", "max"] | None, typer.Option(help="With --halve: which end is better. [default: known]")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the sweep. [default: runs/NAME-sweep]")] = None,
    dry_run: DryRun = False,
) -> None:
    """Run every combination of the listed settings, with several seeds, and compare them. Resumes if interrupted."""
    if halve is None and (eta != 2 or goal is not None):
        raise RecipeError("--eta and --goal belong to --halve METRIC")
    from posttrain.recipe.sweep_plan import plan_sweep

    plan = plan_sweep(recipe, settings or (), _seeds(seeds), random, folder)
    from posttrain.runs.run_sweep import choose_halving, run_sweep

    halving = choose_halving(plan, halve, eta, goal) if halve is not None else None
    if dry_run:
        from posttrain.runs.dry_run import planned_sweep

        print_plan([*planned_sweep(plan), *([("halving", str(halving))] if halving else [])])
        return
    if run_sweep(plan, halving):
        raise typer.Exit(1)


def _seeds(text: str | None) -> list[int] | None:
    """Return the seeds of `0,1,2`, each once."""
    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise RecipeError(f"--seeds {text}: expected different integers, as in --seeds 0,1,2")
    return seeds
