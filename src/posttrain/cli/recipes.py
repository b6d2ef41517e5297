"""posttrain recipes: list, show and copy the recipes of the package, and print the settings of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.arguments import RecipeName, make_console
from posttrain.core.errors import RecipeError

if TYPE_CHECKING:
    from posttrain.recipe.schema import SettingInfo

recipes_app = typer.Typer(help="List, show and copy the recipes of posttrain.", no_args_is_help=True)


@recipes_app.command("list")
def list_recipes() -> None:
    """Print names and descriptions, by task."""
    import yaml
    from rich.table import Table
    from rich.text import Text

    from posttrain.recipe.parsing import shipped

    recipes = {name: yaml.safe_load(file.read_text(encoding="utf-8")) for name, file in shipped().items()}
    console = make_console()
    for title, names in recipes_by_task(recipes).items():
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(min_width=2 + max(map(len, recipes)))
        for name in names:
            table.add_row(f"  {name}", recipes[name].get("description", ""))
        console.print(Text(title, style="bold"), table, sep="\n")
        console.print()


RECIPE_TASKS = {
    "sft": "Fine-tuning",
    "pretrain": "Domains",
    "distill": "Distillation",
    "data": "Data that a model makes",
    "reward_model": "Reward models",
    "preference": "Preferences",
    "rl": "Reinforcement learning",
    "compress": "Smaller models",
    "merge": "Merging",
}
"""Part of `posttrain.methods` -> task. A recipe with stages of several is listed with the last of these."""
OF_A_FAMILY, MEASURES = "Your conversations, by family of models", "Measuring"


def recipes_by_task(recipes: Mapping[str, Any]) -> dict[str, list[str]]:
    """Sort recipes by what they are for.

    Args:
        recipes: Recipes as their files have them, by name.

    Returns:
        Names by task, tasks in the order of reading.
    """
    tasks: dict[str, list[str]] = {}
    for name in recipes:
        tasks.setdefault(_task(name, recipes), []).append(name)
    first, *others = RECIPE_TASKS.values()
    return {title: tasks[title] for title in (first, OF_A_FAMILY, *others, MEASURES) if title in tasks}


def _task(name: str, recipes: Mapping[str, Any]) -> str:
    """Return the task of a recipe: by the methods of its stages, or of those of the recipe that it extends."""
    from posttrain.config.names import METHODS

    own = recipes[name]
    parts = {METHODS[stage["method"]].split(":")[0].split(".")[2] for stage in own.get("stages") or ()}
    if not parts and "extends" in own:
        of_base = _task(own["extends"], recipes)
        return OF_A_FAMILY if of_base == RECIPE_TASKS["sft"] and "source" in own.get("model", {}) else of_base
    return next((title for part, title in reversed(RECIPE_TASKS.items()) if part in parts), MEASURES)


@recipes_app.command("show")
def show_recipe(
    name: RecipeName,
    part: Annotated[
        str | None, typer.Argument(metavar="PART", help="With --fields: only this block, as stages.sft.optimizer.")
    ] = None,
    fields: Annotated[bool, typer.Option("--fields", help="Print the settings that the recipe can have.")] = False,
) -> None:
    """Print a recipe, or the settings of its stages (else evaluations) with defaults, types and choices."""
    if fields or part:
        _print_settings(name, part)
    else:
        typer.echo(_recipe_text(name), nl=False)


@recipes_app.command("copy")
def copy_recipe(
    name: RecipeName,
    to: Annotated[Path | None, typer.Argument(metavar="DEST", help="File or folder. [default: NAME.yaml]")] = None,
) -> None:
    """Write a recipe to a file that you can change."""
    text = _recipe_text(name)
    target = to or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    try:
        with target.open("x", encoding="utf-8") as f:
            f.write(text)
    except FileExistsError:
        raise RecipeError(f"{target} exists already; name another file") from None
    except OSError as error:
        raise RecipeError(f"can't write {target}: {error.strerror}") from error
    from posttrain.runs.machine import program_name

    typer.echo(f"wrote {target}; run it with: {program_name()} run {target}")


def _recipe_text(name: str) -> str:
    from posttrain.recipe.parsing import in_columns, shipped

    have = shipped()
    if name not in have:
        import difflib

        near = difflib.get_close_matches(name, have, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(f"posttrain has no recipe {name!r}.{hint} There are:\n{in_columns(have)}")
    return have[name].read_text(encoding="utf-8")


def _print_settings(name: str, part: str | None) -> None:
    """Print one line for each setting of the stages (or of `part`), grouped by block."""
    from rich.text import Text

    from posttrain.recipe.parsing import load_recipe
    from posttrain.recipe.schema import dotted, settings

    data = load_recipe(name).model_dump(mode="json")
    prefix = (part or ("stages" if data["stages"] else "evaluate")).rstrip(".")
    groups: dict[str, list[SettingInfo]] = {}
    for setting in settings(data):
        key = dotted(setting.key, data)
        if not setting.block and (key == prefix or key.startswith(f"{prefix}.")) and setting.type != "[settings, …]":
            groups.setdefault(dotted(setting.key[:-1], data), []).append(setting)
    if not groups:
        there = ", ".join(["stages", *(f"stages.{s['name']}" for s in data["stages"]), "model", "evaluate", "track"])
        raise RecipeError(f"{name} has no setting {prefix!r}. There are: {there}, and what is inside them")
    console = make_console()
    seen: dict[tuple[str, ...], str] = {}
    for block, found in groups.items():
        names = tuple(str(s.key[-1]) for s in found)
        first = seen.setdefault(names, block)
        repeated = part is None and len(names) > 2 and first != block
        console.print()
        console.print(
            Text.assemble((block, "bold"), f": the same settings as {first}" if repeated else ""), soft_wrap=True
        )
        for s in found if not repeated else []:
            default = f" = {s.default}" + (f", here {s.value}" if s.value else "") if s.default else ""
            line = f"  {s.key[-1]}{default}  ({s.type})  {s.description}".rstrip()
            if part is None and len(line) > 120:  # whole descriptions are for one block
                line = f"{line[:119].rstrip()}…"
            console.print(line, soft_wrap=True)
    if part is None:
        console.print(
            f"\nWhole descriptions: posttrain recipes show {name} --fields {next(iter(groups))}", soft_wrap=True
        )
