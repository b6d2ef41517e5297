"""Report what stages measured on held-out rows as evaluations, before and after, compared like any other task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.config import Recipe, RolloutConfig
from posttrain.core.files import read_object, write_json, write_lines
from posttrain.core.item_statistics import summarize
from posttrain.methods.sft_measurement import FOLDER, measurements
from posttrain.sampling.rollout_store import read_rollouts, rollout_steps, rollouts_path
from posttrain.trainer.best_step import CHOSEN_STEP


def write_held_out_tasks(recipe: Recipe, path: Path) -> list[tuple[str, str]]:
    """Write what each stage measured before its first step and at the step of its model as items of an evaluation.

    Returns:
        (name of the task, kind) of each.
    """
    tasks: list[tuple[str, str]] = []
    taken = {task.name for task in recipe.evaluate}
    for folder_name, stage in recipe.in_order():
        folder, name = path / "stages" / folder_name / FOLDER, folder_name.split("-", 1)[1]
        if isinstance(stage, RolloutConfig):
            tasks += _rollout_task(stage, folder, name, path)
        else:
            task = f"{name}-held_out"
            tasks += _loss_task(folder, f"{task}-rows" if task in taken else task, path)
    return tasks


def _loss_task(folder: Path, task: str, path: Path) -> list[tuple[str, str]]:
    """Write the loss of every held-out row of a stage of supervised fine-tuning, and the answers to a few of them."""
    found, chosen = measurements(folder), folder.parent / CHOSEN_STEP
    if not found or not chosen.is_file():
        return []
    step_of_model = read_object(chosen)["model_step"]
    if not {0, step_of_model} <= found.keys():
        return []
    for moment, step in (("before", 0), ("after", step_of_model)):
        measured = read_object(found[step])
        target = path / "evaluations" / moment
        target.mkdir(parents=True, exist_ok=True)
        items = [{name: row[name] for name in ("id", "source", "nll", "tokens")} for row in measured["rows"]]
        write_lines(target / f"{task}.jsonl", items)
        write_json(target / f"{task}.samples.json", measured["answers"])
        summary = {"task": task, "kind": "perplexity", **summarize(items, "perplexity"), "seconds": 0, "step": step}
        write_json(target / f"{task}.json", summary)
    return [(task, "perplexity")]


def _rollout_task(stage: RolloutConfig, folder: Path, name: str, path: Path) -> list[tuple[str, str]]:
    """Write the first and the last answers to the held-out problems of a stage of RL.

    An answer is correct if the first reward that says right or wrong is 1. Such a reward is 0, 1 or its partial credit
    for every answer. A stage without one has only its curve of rewards. An answer that this reward failed on counts as
    wrong, and as failed.
    """
    steps = rollout_steps(folder)
    if len(steps) < 2:
        return []
    sides = [list(read_rollouts(rollouts_path(folder, s))) for s in (steps[0], steps[-1])]
    both = {r["problem"] for r in sides[0]} & {r["problem"] for r in sides[1]}
    for config in stage.rewards.terms if both else []:
        part, credit = config.title, getattr(config, "partial", 0.0)
        given = {r["parts"].get(part) for side in sides for r in side} - {None}
        if config.is_correctness and given and given <= {0.0, credit, 1.0}:
            task = f"{name}-{part}"
            for moment, side in zip(("before", "after"), sides, strict=True):
                _write_items(path / "evaluations" / moment, task, part, [r for r in side if r["problem"] in both])
            return [(task, "generate")]
    return []


def _write_items(folder: Path, name: str, part: str, rows: list[dict[str, Any]]) -> None:
    columns = {"id": "problem", "prompt": "prompt", "expected": "answer", "output": "completion"}
    items = []
    for r in rows:
        given = r["parts"].get(part)
        item = {**{ours: r[key] for ours, key in columns.items()}, "correct": given == 1.0}
        items.append(item if given is not None else {**item, "failed": True})
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / f"{name}.jsonl", items)
    summary = {"task": name, "kind": "generate", **summarize(items, "generate"), "seconds": 0}
    write_json(folder / f"{name}.json", summary)
