"""posttrain evaluate: run the evaluations of a recipe on any model, and compare two models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.arguments import DryRun, Overrides, make_console, print_plan, recipe_names
from posttrain.core.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from posttrain.config import ModelConfig, Recipe


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Hub name, folder, .gguf file, or a run's folder.")],
    overrides: Overrides = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", help="The recipe (or run folder) whose evaluations to run.", autocompletion=recipe_names
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of lm-eval instead, by name or YAML file, with commas between them."),
    ] = None,
    lm_eval_folder: Annotated[Path | None, typer.Option(help="Folder of your own tasks of lm-eval.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask lm-eval's tasks through the chat template.")] = False,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Demonstrations of lm-eval's tasks. [default: the task's own]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each of lm-eval's tasks. [default: all]")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where items and results go. [default: runs/evaluations/…]")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Folder of other results to compare with: RUN/evaluations/before")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe's evaluations, or tasks of lm-eval, on any model; compare two models on the same items."""
    from posttrain.recipe.machine_checks import check_machine

    shared = {"tasks_folder": lm_eval_folder and str(lm_eval_folder), "chat": chat, "shots": few_shot, "limit": limit}
    if lm_eval is None and any(shared.values()) or (recipe is None and lm_eval is None):
        raise RecipeError(
            "evaluate needs --recipe NAME (whose evaluations to run) or --lm-eval TASKS; --lm-eval-folder, --chat, "
            "--few-shot and --limit belong to --lm-eval"
        )
    checked = _recipe_of(model, recipe, overrides or (), _lm_eval_tasks(lm_eval, shared))
    if not checked.evaluate:
        raise RecipeError(f"{recipe} has no evaluations; add some under `evaluate:`")
    # The recipe's dtype, device and chat template (which a base model needs), with another model.
    of_model = checked.model
    if model != of_model.source:
        of_model = of_model.model_copy(update={"source": model, "revision": None, "quantization": None})
    check_machine(checked.model_copy(update={"stages": [], "model": of_model}))
    if against is not None:
        missing = [t.name for t in checked.evaluate if not (against / f"{t.name}.jsonl").is_file()]
        if missing:
            raise RecipeError(f"--against {against}: no {missing[0]}.jsonl there; name RUN/evaluations/before")
    folder = folder or evaluation_folder(checked, model)
    whole = _with_results_of(Path(recipe), checked) if recipe is not None else checked
    if dry_run:
        from posttrain.runs.dry_run import model_line, planned_evaluations

        tasks = whole.evaluate
        done = [task.name for task in tasks if (folder / f"{task.name}.json").is_file()]
        there = f" (finished: {', '.join(done)})" if done else ""
        print_plan([model_line(of_model), *planned_evaluations(tasks, of_model), ("writes", f"{folder}{there}")])
        return
    print_evaluation(whole, of_model, folder, against, make_console())


def _lm_eval_tasks(names: str | None, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of an evaluation for each of lm-eval's tasks; the settings that are given are `shared`."""
    tasks = []
    for task in (part.strip() for part in (names or "").split(",")):
        if task:
            stem = Path(task).stem if task.endswith((".yaml", ".yml")) else task
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.")
            given = {key: value for key, value in shared.items() if value not in (None, False)}
            tasks.append({"kind": "lm_eval", "name": name, "task": task, **given})
    return tasks


def _recipe_of(model: str, recipe: str | None, overrides: Sequence[str], tasks: list[dict[str, Any]]) -> Recipe:
    """Return the recipe whose evaluations are run; `tasks` take the place of those of a recipe that is named."""
    from posttrain.recipe.parsing import load_recipe

    if recipe is None:
        return load_recipe({"name": "lm-eval", "model": {"source": model}, "evaluate": tasks}, overrides)
    checked = load_recipe(recipe, overrides)
    if not tasks:
        return checked
    other = load_recipe({"name": checked.name, "model": {"source": model}, "evaluate": tasks})
    return checked.model_copy(update={"stages": [], "evaluate": other.evaluate})


def _with_results_of(run: Path, recipe: Recipe) -> Recipe:
    """Return the recipe with stage:NAME in its evaluations replaced by what that stage of the run made."""
    from posttrain.config import references

    names = {name for task in recipe.evaluate for name in references(task)}
    if not names:
        return recipe
    from posttrain.runs.registry import made_in, resolved

    made = made_in(run, recipe)
    missing = sorted(names - made.keys())
    if missing:
        raise RecipeError(
            f"the evaluations use what stage {missing[0]!r} makes, and {run} has none: name the folder of a run that "
            "has finished that stage, as in -r runs/NAME"
        )
    return recipe.model_copy(update={"evaluate": [resolved(task, made) for task in recipe.evaluate]})


def evaluation_folder(recipe: Recipe, model: str) -> Path:
    """Return the default folder: one for each model and set of tasks, so that results are never mixed up."""
    import hashlib

    identity = "".join(t.model_dump_json() for t in recipe.evaluate) + recipe.model.model_dump_json() + str(recipe.seed)
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", model).strip("-.")[-60:] or "model"
    path = Path(model)
    if path.exists():  # the content of a folder may change under the same name
        newest = max((f.stat().st_mtime_ns for f in path.rglob("*.safetensors")), default=0)
        identity += f"{path.resolve()}{newest}"
    digest = hashlib.sha256(f"{model}{identity}".encode()).hexdigest()[:8]
    return Path(recipe.output) / "evaluations" / f"{recipe.name}-{slug}-{digest}"


def print_evaluation(recipe: Recipe, model: ModelConfig, folder: Path, against: Path | None, out: Console) -> None:
    """Run the recipe's tasks on a model and print their scores.

    Args:
        recipe: Recipe with the tasks and the seed.
        model: Model to evaluate.
        folder: Folder for items and results.
        against: Folder of other results on the same items, to compare with. None: no comparison.
        out: Console to print to.
    """
    from rich.table import Table

    from posttrain.eval.tasks import evaluate_model
    from posttrain.report.behaviour import BehaviourView, figure_lines
    from posttrain.report.terminal import evaluation_tables, figure_table

    summaries = evaluate_model(model, recipe.evaluate, folder, recipe.seed)
    table = Table(title=f"{model.source}, with 95% intervals")
    for column in ("task", "metric", "n", "value"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for s in summaries:
        table.add_row(s["task"], s["metric"], f"{s['n']:,}", _interval(s, s["metric"]))
    out.print(table)
    for further in evaluation_tables(folder):
        out.print(further)
    for s in summaries:
        if lines := figure_lines(s, None, None):
            out.print(figure_table(BehaviourView(s["task"], s["metric"], lines)))
    if against is not None:
        out.print(comparison_table(recipe, against, folder, [s["metric"] for s in summaries]))
    out.print(f"items and answers  {folder}", soft_wrap=True)


def comparison_table(recipe: Recipe, other: Path, folder: Path, metrics: Sequence[str]) -> Table:
    """Return the paired comparison of two models on the same items: scores, difference with its interval, p.

    Args:
        recipe: Recipe with the tasks and the seed.
        other: Folder with the results of the other model.
        folder: Folder with the results of this model.
        metrics: Metric of each task.

    Raises:
        DataError: The items are not the same.
    """
    from rich.table import Table

    from posttrain.core.files import read_lines
    from posttrain.core.item_statistics import compare
    from posttrain.report.formatting import format_p, format_score

    table = Table(title=f"Against {other}, item by item, with 95% intervals")
    for column in ("task", "", "value", "p"):
        table.add_column(column, justify="right" if column == "value" else "left", no_wrap=column == "value")
    for task, metric in zip(recipe.evaluate, metrics, strict=True):
        if not task.compares_items:
            continue
        old, new = (read_lines(side / f"{task.name}.jsonl") for side in (other, folder))
        c = compare(old, new, str(task.measures), task=task.name, seed=recipe.seed)
        table.add_row(task.name, "other", _interval(c["before"], metric))
        table.add_row(f"n = {c['n']:,}", "this", _interval(c["after"], metric))
        table.add_row("", "difference", _interval(c, metric, "difference"), f"{format_p(c['p_value'])} ({c['test']})")
        if "wins" in c:
            table.add_row("", "this beats other", _interval(c["wins"], "accuracy"))
        moved = "higher, lower" if task.measures == "behaviour" else "better, worse"
        table.add_row("", moved, f"{c['gained']:,}, {c['lost']:,}")
        for f in c.get("figures", ()):
            shown = f"{format_score(f['before'], metric)} → {format_score(f['after'], metric)}"
            change = f"{shown}   {_interval(f, metric, 'difference')}"
            table.add_row("", f"{f['name']}, n = {f['n']:,}", change, format_p(f["p_value"]))
        table.add_section()
    return table


def _interval(side: dict[str, Any], metric: str, key: str = "value") -> str:
    from posttrain.report.formatting import format_score

    value, low, high = (format_score(side.get(k), metric, key == "difference") for k in (key, "low", "high"))
    return f"{value} [{low}, {high}]"
