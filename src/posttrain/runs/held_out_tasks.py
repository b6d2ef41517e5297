"""Held-out answers of RL stages as evaluations: the first and the last, compared like those of any other task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.config import Recipe, RolloutConfig
from posttrain.core.files import write_json, write_text
from posttrain.core.statistics import summarize
from posttrain.sampling.rollout_store import read_rollouts, rollout_steps, rollouts_path


def write_held_out_tasks(recipe: Recipe, path: Path) -> list[str]:
    """Write the held-out answers before and after each RL stage as items of an evaluation, and return their names.

    An answer is correct if the first reward that says right or wrong is 1. Such a reward is 0, 1 or its partial credit
    for every answer. A stage without one has only its curve of rewards.
    """
    names = []
    for folder_name, stage in recipe.in_order():
        folder = path / "stages" / folder_name / "held_out"
        steps = rollout_steps(folder)
        if not isinstance(stage, RolloutConfig) or len(steps) < 2:
            continue
        sides = [
            [r for r in read_rollouts(rollouts_path(folder, s)) if not r["failures"]] for s in (steps[0], steps[-1])
        ]
        both = {r["problem"] for r in sides[0]} & {r["problem"] for r in sides[1]}
        for config in stage.rewards.terms if both else []:
            part, credit = config.title, getattr(config, "partial", 0.0)
            if config.is_correctness and {r["parts"].get(part) for side in sides for r in side} <= {0.0, credit, 1.0}:
                name = f"{folder_name.split('-', 1)[1]}-{part}"
                names.append(name)
                for moment, side in zip(("before", "after"), sides, strict=True):
                    _write_items(path / "evaluations" / moment, name, part, [r for r in side if r["problem"] in both])
                break
    return names


def _write_items(folder: Path, name: str, part: str, rows: list[dict[str, Any]]) -> None:
    columns = {"id": "problem", "prompt": "prompt", "expected": "answer", "output": "completion"}
    items = [{**{ours: r[key] for ours, key in columns.items()}, "correct": r["parts"][part] == 1.0} for r in rows]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.jsonl", "".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items))
    summary = {"task": name, "kind": "generate", **summarize(items, "generate"), "seconds": 0}
    write_json(folder / f"{name}.json", summary)
