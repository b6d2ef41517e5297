"""Charts of evaluations with many samples: accuracy against tokens spent, by strategy, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.report.curves import HEIGHT, WIDTH, ticks
from posttrain.report.load import Evaluation, Run
from posttrain.report.words import number

NAMES = {
    "mean": "one sample",
    "pass": "pass@k",
    "vote": "majority vote",
}
EXPLAINED = {
    "mean": "mean accuracy of a single completion",
    "pass": "any of k is right: what choosing could reach at best",
    "vote": "the most frequent answer of k",
    "best": "the one of k that the score puts highest",
    "weighted": "the answer of k whose scores sum to most",
}


@dataclass(frozen=True)
class Line:
    """One curve: its name in words and class in the page, paths of the line and of its intervals' band, where its
    points are in percent, and what they are: (k, tokens, value, low, high)."""

    name: str
    style: str
    path: str
    band: str
    dots: list[tuple[float, float]]
    points: list[tuple[int, float, float, float, float]]

    @property
    def both(self) -> list[tuple[tuple[float, float], tuple[int, float, float, float, float]]]:
        return list(zip(self.dots, self.points, strict=True))


@dataclass(frozen=True)
class Plot:
    """Lines on axes that all plots of a task share; ticks are (percent of the axis, label)."""

    key: str
    title: str
    about: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    spoken: str


@dataclass(frozen=True)
class Panel:
    """A task: all strategies of the newest model in one plot, each before and after in one of its own, and the table.

    table: (strategy, k, {side: point}). greedy: the likeliest answer's summary by side.
    """

    task: str
    samples: int
    sides: list[str]
    together: Plot
    plots: list[Plot]
    table: list[tuple[str, int, dict[str, Mapping[str, Any]]]]
    greedy: dict[str, Mapping[str, Any]]
    failed: dict[str, dict[str, int]]


def panels(run: Run) -> list[Panel]:
    """One a task whose summary holds strategies; sides that are missing or damaged are left out."""
    out = []
    for row in run.rows():
        sides = {
            name: side[row.task].summary
            for name, side in (("before", run.before), ("after", run.after))
            if _whole(side.get(row.task, Evaluation()).summary)
        }
        if sides:
            out.append(_panel(row.task, sides))
    return out


def words(name: str) -> str:
    """A strategy's name for people."""
    kind, _, by = name.partition(":")
    return NAMES.get(name) or {"best": f"best of k by {by}", "weighted": f"vote weighted by {by}"}.get(kind, name)


def _whole(summary: Mapping[str, Any]) -> bool:
    strategies = summary.get("strategies")
    return isinstance(strategies, list) and bool(strategies) and all(s.get("points") for s in strategies)


def _panel(task: str, sides: Mapping[str, Mapping[str, Any]]) -> Panel:
    curves = {side: {s["name"]: s["points"] for s in summary["strategies"]} for side, summary in sides.items()}
    names = list(dict.fromkeys(n for of_side in curves.values() for n in of_side))
    everything = [p for of_side in curves.values() for points in of_side.values() for p in points]
    axes = _Axes(everything)
    newest = list(sides)[-1]
    together = [
        axes.line(words(n), f"s{i % 8}", curves[newest][n], band=False)
        for i, n in enumerate(names)
        if n in curves[newest]
    ]
    plots = []
    for name in names:
        lines = [axes.line(side, side, of_side[name]) for side, of_side in curves.items() if name in of_side]
        plots.append(axes.plot(f"{task}.{name}", words(name), EXPLAINED[name.split(":")[0]], lines))
    table = []
    for name in names:
        for i, point in enumerate(curves[newest].get(name, [])):
            at = {s: c[name][i] for s, c in curves.items() if name in c and len(c[name]) > i}
            table.append((words(name), int(point["k"]), at))
    return Panel(
        task=task,
        samples=int(sides[newest].get("samples", 0)),
        sides=list(sides),
        together=axes.plot(f"{task}.all", f"Accuracy by tokens spent, {newest} training", "all strategies", together),
        plots=plots,
        table=table,
        greedy={s: v["greedy"] for s, v in sides.items() if isinstance(v.get("greedy"), Mapping)},
        failed={s: v["failed"] for s, v in sides.items() if v.get("failed")},
    )


class _Axes:
    """Tokens by powers of two across, accuracy from 0 (or above, where all is high) to 1 up."""

    def __init__(self, points: Sequence[Mapping[str, Any]]) -> None:
        tokens = [max(1.0, float(p["tokens"])) for p in points]
        self.left, self.right = math.log2(min(tokens)), math.log2(max(tokens))
        if self.right - self.left < 0.5:
            self.left, self.right = self.left - 0.5, self.right + 0.5
        lowest, highest = min(float(p["low"]) for p in points), max(float(p["high"]) for p in points)
        self.low, self.high = math.floor(10 * lowest) / 10, min(1.0, math.ceil(10 * highest) / 10)
        if self.high - self.low < 0.1:
            self.low = max(0.0, self.high - 0.1)

    def across(self, tokens: float) -> float:
        return (math.log2(max(1.0, tokens)) - self.left) / (self.right - self.left)

    def up(self, value: float) -> float:
        return 1 - (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)

    def line(self, name: str, style: str, points: Sequence[Mapping[str, Any]], band: bool = True) -> Line:
        def at(p: Mapping[str, Any], key: str) -> str:
            return f"{WIDTH * self.across(p['tokens']):.1f},{HEIGHT * self.up(p[key]):.1f}"

        outline = [at(p, "high") for p in points] + [at(p, "low") for p in reversed(points)]
        return Line(
            name, style, "M" + " ".join(at(p, "value") for p in points),
            "M" + " ".join(outline) + "Z" if band and len(points) > 1 else "",
            [(100 * self.across(p["tokens"]), 100 * self.up(p["value"])) for p in points],
            [(int(p["k"]), float(p["tokens"]), float(p["value"]), float(p["low"]), float(p["high"])) for p in points],
        )  # fmt: skip

    def plot(self, key: str, title: str, about: str, lines: list[Line]) -> Plot:
        low, high = 2**self.left, 2**self.right
        round_ones = [m * 10**p for p in range(9) for m in (1, 2, 5) if low <= m * 10**p <= high]
        marks = round_ones[:: max(1, len(round_ones) // 6)]
        spoken = "; ".join(
            f"{line.name}: from {line.points[0][2]:.3f} at {line.points[0][1]:.0f} tokens to {line.points[-1][2]:.3f} "
            f"at {line.points[-1][1]:.0f}"
            for line in lines
        )
        return Plot(
            key, title, about, lines,
            [(100 * self.across(m), number(m)) for m in marks],
            [(100 * self.up(t), f"{t:.0%}") for t in ticks(self.low, self.high, 5)],
            spoken,
        )  # fmt: skip


def by_stage(run: Run) -> tuple[list[str], list[tuple[str, str, list[dict[str, Any] | None]]]]:
    """(columns, rows) of what was measured after every stage: a row is (task, metric, a summary for each column).

    No columns where the run measured before and after alone.
    """
    if not run.between:
        return [], []
    named = [str(s.get("name")) for s in run.manifest.get("stages") or []]
    stages = [name for name in named if run.makes(name) == "model"]
    sides = {"before": run.before, **{f"after {n}": side for n, side in run.between.items()}}
    last = next((n for n in reversed(stages) if n not in run.between), "")
    sides[f"after {last}" if last else "after"] = run.after
    out = []
    for row in run.rows():
        found = [side.get(row.task, Evaluation()).summary or None for side in sides.values()]
        if any(f for f in found[1:-1]):
            out.append((row.task, row.metric, found))
    return list(sides), out
