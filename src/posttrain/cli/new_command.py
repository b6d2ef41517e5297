"""posttrain new: write a recipe with comments, from five answers and a look at the data."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.arguments import DryRun, named_model
from posttrain.core.errors import RecipeError
from posttrain.core.hub import DEMO_MODEL
from posttrain.core.visible_text import visible

SPANS = {"s": 1, "m": 60, "h": 3600}


def new_command(
    output: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="The recipe to write. [default: the data's name, .yaml]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub name, folder, .gguf file, or a run's folder.")] = None,
    data: Annotated[str | None, typer.Option(help="A file of rows, a folder of texts, or a Hub data set.")] = None,
    goal: Annotated[
        str | None, typer.Option(help="answer, prefer, score, reason or read. [default: what the rows are for]")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="GiB of a GPU to plan for, or here: this machine.")] = None,
    time: Annotated[str | None, typer.Option(help="Longest training: 30m, 2h; any: no limit.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Ask for model, data, goal, hardware and time, look at the data, and write a recipe that runs as it is.

    What is given by options is not asked for; without a terminal the rest takes its default.
    """
    data = data or _ask("Data (a file of rows, a folder of texts, or a Hub data set)", None)
    from posttrain.runs.data_look import look_at_data

    look = look_at_data(data)
    for note in look.notes:
        typer.echo(visible(note))
    from posttrain.runs.recipe_draft import GOALS, Wishes, draft_recipe, method_for, usual_goal

    for name, title in GOALS.items() if goal is None else ():
        typer.echo(f"  {name:<8} {title}")
    goal = goal or _ask("Goal", usual_goal(look))
    method_for(goal, look)
    model = model or _ask("Model", DEMO_MODEL)
    named_model(model, "auto", False)
    memory = _gib(gpu or _ask("Hardware: GiB of a GPU, or here", "here"))
    seconds = _seconds(time or _ask("Time: 30m, 2h, or any", "any"))
    target = output or Path(f"{re.sub('[^A-Za-z0-9_-]+', '-', Path(data).stem).strip('-') or 'recipe'}.yaml")
    if target.exists() and not dry_run:
        raise RecipeError(f"{target} exists already; name another file")
    from posttrain.cli.doctor import products_rate

    rate = 1e9 * products_rate(0.2) if memory is None else 0.0
    draft = draft_recipe(Wishes(model, data, goal, memory, seconds, rate), target.stem)
    for note in draft.notes[len(look.notes) :]:
        typer.echo(visible(note))
    if dry_run:
        typer.echo(visible(draft.text), nl=False)
        typer.echo(f"dry run: {target} was not written")
        return
    try:
        with target.open("x", encoding="utf-8") as f:
            f.write(draft.text)
    except OSError as error:
        raise RecipeError(f"can't write {target}: {error.strerror}") from error
    from posttrain.runs.machine import program_name

    typer.echo(visible(f"wrote {target}; run it with: {program_name()} run {target}"))


def _ask(question: str, default: str | None) -> str:
    """Ask, and return the answer; without anybody to ask, the default.

    Raises:
        RecipeError: There is neither an answer nor a default.
    """
    try:
        return str(typer.prompt(question, default=default))
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        if default is None:
            raise RecipeError("no data is named: give --data FILE") from None
        typer.echo()
        return default


def _gib(text: str) -> float | None:
    if text == "here":
        return None
    try:
        value = float(text.lower().removesuffix("gib").removesuffix("gb"))
    except ValueError:
        value = 0.0
    if not 0.1 <= value < 10_000:
        raise RecipeError(f"hardware {text!r}: expected GiB of a GPU, such as 24, or here")
    return value


def _seconds(text: str) -> float | None:
    if text == "any":
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh])", text)
    if found is None or not float(found[1]):
        raise RecipeError(f"time {text!r}: expected a span such as 30m or 2h, or any")
    return float(found[1]) * SPANS[found[2]]
