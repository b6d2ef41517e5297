"""Prepare figures of evaluations of behaviour for the page and the terminal: before, after, and the change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.report.formatting import plain_text
from posttrain.report.load import JsonDict, Run


@dataclass(frozen=True)
class FigureLine:
    """Hold a figure.

    Attributes:
        name: Its name.
        before: value, low, high and n before training; None: not measured.
        after: The same after it.
        change: difference, low, high, p_value and n, on the items that have the figure on both sides.
    """

    name: str
    before: JsonDict | None
    after: JsonDict | None
    change: JsonDict | None


@dataclass(frozen=True)
class BehaviourView:
    """Hold the figures of an evaluation; `metric` names the number that the table of results compares."""

    task: str
    metric: str
    lines: list[FigureLine]


def behaviours(run: Run) -> list[BehaviourView]:
    """Return the view of every evaluation of behaviour that was measured."""
    out = []
    for row in run.rows():
        sides = {name: evaluation.summary for name, evaluation in run.sides(row.task)}
        lines = figure_lines(sides.get("before"), sides.get("after"), row.comparison)
        if row.kind == "behaviour" and lines:
            out.append(BehaviourView(row.task, row.metric, lines))
    return out


def figure_lines(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, comparison: Mapping[str, Any] | None
) -> list[FigureLine]:
    """Return the figures of two summaries side by side.

    Args:
        before: Summary of an evaluation; None: not measured.
        after: Summary of the same evaluation of another model.
        comparison: Their comparison.
    """
    old, new, change = (_by_name(side) for side in (before, after, comparison))
    return [FigureLine(name, old.get(name), new.get(name), change.get(name)) for name in {**old, **new}]


def _by_name(side: Mapping[str, Any] | None) -> dict[str, JsonDict]:
    figures = (side or {}).get("figures")
    known: Sequence[Any] = figures if isinstance(figures, list) else []
    return {plain_text(f["name"]): f for f in known if isinstance(f, dict) and "name" in f}
