"""Put several runs beside each other: settings that differ, curves, evaluations with their intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.recipe.schema import dotted
from posttrain.report.charts import RUN_STYLES, Chart, compared_charts
from posttrain.report.evaluations import interval_axis
from posttrain.report.formatting import format_score
from posttrain.report.load import JsonDict, Run
from posttrain.ui.live_logs import StageView

MOST_RUNS = 8
"""Runs that are compared at once: the page has so many colours."""
NOT_COMPARED = ("name", "output", "description")


@dataclass(frozen=True)
class IntervalLane:
    """Hold a value with its interval; at, low, high: places along the axis in percent."""

    label: str
    side: str
    style: str
    text: str
    at: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskLanes:
    """Hold the values of one task, with the ends of their axis as text."""

    task: str
    metric: str
    lanes: list[IntervalLane]
    ends: tuple[str, str]


def short_names(keys: Sequence[str]) -> list[str]:
    """Return the names of runs without the folders that all of them are in."""
    parts = [key.split("/") for key in keys]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return ["/".join(p[shared:]) for p in parts] if len(parts) > 1 else [p[-1] for p in parts]


def different_settings(recipes: Sequence[JsonDict]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ: name, and each recipe's value as text; "–" where it has its default."""
    flat = [dict(_leaves(recipe, recipe, ())) for recipe in recipes]
    names = dict.fromkeys(name for of_run in flat for name in of_run)
    rows = [(name, [of_run.get(name, "–") for of_run in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _leaves(value: Any, recipe: JsonDict, key: tuple[str | int, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if (*key, name) not in [(n,) for n in NOT_COMPARED]:
                yield from _leaves(inner, recipe, (*key, name))
    else:
        yield dotted(key, recipe), {"None": "none", "True": "true", "False": "false"}.get(str(value), str(value))


def stage_groups(names: Sequence[str], runs: Sequence[Sequence[StageView]]) -> list[tuple[str, Any]]:
    """Return the charts of each stage, by its name; runs without it are left out.

    Args:
        names: Names of the runs.
        runs: Their stages.
    """
    out: list[tuple[str, list[tuple[str, list[Chart]]]]] = []
    for stage in dict.fromkeys(view.log.name for of_run in runs for view in of_run):
        found = [next((v.log for v in of_run if v.log.name == stage), None) for of_run in runs]
        named = [(name, log) for name, log in zip(names, found, strict=True) if log is not None]
        groups = compared_charts(named)
        out += [(stage, groups)] if groups else []
    return out


def task_lanes(names: Sequence[str], runs: Sequence[Run]) -> list[TaskLanes]:
    """Return the values of every task before and after each run's training, along one axis a task.

    Args:
        names: Names of the runs.
        runs: The runs.
    """
    rows = [(i, name, row) for i, (name, run) in enumerate(zip(names, runs, strict=True)) for row in run.rows()]
    out = []
    for task in dict.fromkeys(row.task for _, _, row in rows):
        found = [(i, name, row) for i, name, row in rows if row.task == task]
        axes = [axis for _, _, row in found if (axis := interval_axis(row)) is not None]
        if not axes:
            continue
        axis = min(a for a, _ in axes), max(b for _, b in axes)
        lanes = []
        for i, name, row in found:
            for side, value in (("before", row.before), ("after", row.after)):
                if value and isinstance(value.get("value"), int | float):
                    lanes.append(_lane(name, side, RUN_STYLES[i % 8], value, axis, row.metric))
        metric = found[0][2].metric
        out.append(TaskLanes(task, metric, lanes, (format_score(axis[0], metric), format_score(axis[1], metric))))
    return out


def _lane(name: str, side: str, style: str, value: JsonDict, axis: tuple[float, float], metric: str) -> IntervalLane:
    point = float(value["value"])
    low, high = (float(value[k]) if isinstance(value.get(k), int | float) else point for k in ("low", "high"))
    text = format_score(point, metric)
    if low < high:
        text += f" ({format_score(low, metric)} to {format_score(high, metric)})"

    def place(x: float) -> float:
        return round(100 * min(1.0, max(0.0, (x - axis[0]) / (axis[1] - axis[0] or 1.0))), 2)

    return IntervalLane(name, side, style, text, place(point), place(low), place(high))
