"""Prepare evaluations for the page: intervals, items side by side, stages, and what many samples are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.report.charts import Chart, Series
from posttrain.report.formatting import format_fixed, plain_text
from posttrain.report.load import Evaluation, JsonDict, Run, TaskRow
from posttrain.report.measured_stages import shown_images

CARDS_SHOWN = {"gained": 3, "lost": 3, "wrong": 0, "right": 0}
"""Cards of a task, by what became of the item."""
CARDS_FOLDED = {"gained": 9, "lost": 9, "wrong": 4, "right": 4}
"""Cards up to this number are shown on demand."""
CHANGES = {
    "gained": "wrong → right",
    "lost": "right → wrong",
    "wrong": "wrong both times",
    "right": "right both times",
}
STRATEGIES = {
    "mean": ("one sample", "mean accuracy of a single completion"),
    "pass": ("pass@k", "any of k is right: the upper limit of choosing"),
    "vote": ("majority vote", "the most frequent answer of k"),
    "best": ("best of k by {}", "the one of k with the highest score"),
    "weighted": ("vote weighted by {}", "the answer of k with the largest sum of scores"),
}


@dataclass(frozen=True)
class Card:
    """Hold one item before and after.

    Attributes:
        change: What became of it (a key of CHANGES), or `greedy`, `sampled` or `measured`.
        scores: (choice, share before, share after, log-likelihood before, after).
        images: Small copies of the prompt's images, as `data:` URLs.
    """

    change: str
    item: str
    prompt: str
    expected: str
    before: str
    after: str
    scores: list[tuple[str, float, float, float, float]]
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Samples:
    """Hold the cards of a task, shown and folded; the number of items by change; answers without a judgement."""

    task: str
    counts: dict[str, int]
    cards: list[Card]
    more: list[Card]
    greedy: list[Card]


@dataclass(frozen=True)
class Panel:
    """Hold a task of many samples.

    Attributes:
        samples: Completions of each question.
        charts: All strategies of the newest model, then each strategy before and after.
        table: (strategy, k, {side: point}).
        greedy: Summary of the greedy answer by side.
        failed: Failures of judge and scores by side.
    """

    task: str
    samples: int
    sides: list[str]
    charts: list[Chart]
    table: list[tuple[str, int, dict[str, Mapping[str, Any]]]]
    greedy: dict[str, Mapping[str, Any]]
    failed: dict[str, dict[str, int]]


def interval_axis(row: TaskRow) -> tuple[float, float] | None:
    """Return the ends of the axis for a task's intervals: accuracy 0 to 1, perplexity from 0, scores around both."""
    ends = [float(s.get(k) or 0) for s in (row.before, row.after) if s for k in ("low", "high")]
    start, end = 0.0, 1.0 if row.metric == "accuracy" else max(ends, default=0) * 1.1
    if row.metric == "score" and ends:
        pad = 0.1 * (max(ends) - min(ends)) or 0.5
        start, end = min(ends) - pad, max(ends) + pad
    return (start, end) if -math.inf < start < end < math.inf else None


def samples(row: TaskRow, run: Run) -> Samples | None:
    """Return a task's items side by side; None if there are none."""
    before, after = (side.get(row.task, Evaluation()) for side in (run.before, run.after))
    old = {i.get("id"): i for i in before.items if "correct" in i}
    new = {i.get("id"): i for i in after.items if "correct" in i}
    groups: dict[str, list[Card]] = {name: [] for name in CHANGES}
    for item in [i for i in old if i in new]:
        was, now = bool(old[item]["correct"]), bool(new[item]["correct"])
        change = {(False, True): "gained", (True, False): "lost", (False, False): "wrong"}.get((was, now), "right")
        groups[change].append(_card(change, old[item], new[item]))
    cards = [c for name, group in groups.items() for c in group[: CARDS_SHOWN[name]]]
    more = [c for name, group in groups.items() for c in group[CARDS_SHOWN[name] : CARDS_FOLDED[name]]]
    shown = {"score": "sampled", "behaviour": "measured"}.get(row.kind, "greedy")
    greedy = [] if row.kind in ("generate", "sample") and old else answer_cards(shown, before.samples, after.samples)
    if not cards and not more and not greedy:
        return None
    return Samples(row.task, {name: len(group) for name, group in groups.items()}, cards, more, greedy)


def _card(change: str, old: JsonDict, new: JsonDict) -> Card:
    was, now = (plain_text(item["output"] if "output" in item else item.get("prediction")) for item in (old, new))
    a, b = old.get("scores"), new.get("scores")
    scores = []
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        scores = [(str(k), p, q, float(a[k]), float(b[k])) for k, p, q in zip(a, _shares(a), _shares(b), strict=True)]
    asked, images = plain_text(old.get("prompt")), shown_images(old.get("images"))
    return Card(change, str(old.get("id", "")), asked, plain_text(old.get("expected")), was, now, scores, images)


def _shares(scores: dict[str, Any]) -> list[float]:
    """Return the softmax of the scores: the probability of each choice, among the choices."""
    top = max(float(v) for v in scores.values())
    weights = [math.exp(float(v) - top) for v in scores.values()]
    return [w / sum(weights) for w in weights]


def answer_cards(kind: str, before: Sequence[JsonDict], after: Sequence[JsonDict]) -> list[Card]:
    """Return answers to the same prompts; a side without an answer is left empty.

    Args:
        kind: greedy, sampled or measured.
        before: Answers before training.
        after: Answers after it.
    """
    old, new = (
        {(plain_text(s.get("prompt")), shown_images(s.get("images")), plain_text(s.get("expected"))): s for s in side}
        for side in (before, after)
    )
    out = []
    for asked in {**old, **new}:
        prompt, images, expected = asked
        was, now = (plain_text(side.get(asked, {}).get("output")) for side in (old, new))
        out.append(Card(kind, "", prompt, expected, was, now, [], images))
    return out


def panels(run: Run) -> list[Panel]:
    """Return a panel for each task of kind sample; sides that are missing or damaged are left out."""
    out = []
    for row in run.rows():
        sides = {name: e.summary for name, e in run.sides(row.task) if _whole(e.summary)}
        if sides:
            out.append(_panel(row.task, sides))
    return out


def strategy(name: str) -> str:
    """Return a strategy's name in words."""
    kind, _, by = name.partition(":")
    return STRATEGIES.get(kind, (name, ""))[0].format(by)


def _whole(summary: Mapping[str, Any]) -> bool:
    strategies = summary.get("strategies")
    refined = "refine" in summary  # has a section of its own
    return (
        isinstance(strategies, list) and bool(strategies) and not refined and all(s.get("points") for s in strategies)
    )


def _panel(task: str, sides: Mapping[str, Mapping[str, Any]]) -> Panel:
    curves = {side: {s["name"]: s["points"] for s in summary["strategies"]} for side, summary in sides.items()}
    names = list(dict.fromkeys(n for of_side in curves.values() for n in of_side))
    y_range = accuracy_range([p for of_side in curves.values() for points in of_side.values() for p in points])
    newest = list(sides)[-1]

    def chart(key: str, title: str, about: str, series: list[Series]) -> Chart:
        spoken = "; ".join(
            f"{s.name}: from {s.y[0]:.3f} at {s.x[0]:.0f} tokens to {s.y[-1]:.3f} at {s.x[-1]:.0f}" for s in series
        )
        return Chart(f"{task}.{key}", title, about, series, f"{title}. {spoken}", x="tokens", x_log=True,
                     y_range=y_range, percent=True)  # fmt: skip

    charts = [
        chart("all", f"Accuracy by tokens spent, {newest} training", "all strategies",
              [strategy_curve(strategy(n), f"s{i % 8}", p) for i, (n, p) in enumerate(curves[newest].items())])
    ]  # fmt: skip
    table = []
    for name in names:
        lines = [
            strategy_curve(side, "accent" if side == "after" else "before", c[name], band=True)
            for side, c in curves.items()
            if name in c
        ]
        charts.append(chart(name, strategy(name), STRATEGIES.get(name.split(":")[0], ("", ""))[1], lines))
        for i, point in enumerate(curves[newest].get(name, [])):
            at = {s: c[name][i] for s, c in curves.items() if name in c and len(c[name]) > i}
            table.append((strategy(name), int(point["k"]), at))
    return Panel(
        task=task,
        samples=int(sides[newest].get("samples", 0)),
        sides=list(sides),
        charts=charts,
        table=table,
        greedy={s: v["greedy"] for s, v in sides.items() if isinstance(v.get("greedy"), Mapping)},
        failed={s: v["failed"] for s, v in sides.items() if v.get("failed")},
    )


def accuracy_range(points: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the ends of the axis for accuracies with their intervals, in tenths."""
    low, high = min(float(p["low"]) for p in points), max(float(p["high"]) for p in points)
    return max(0.0, math.floor(10 * low) / 10), min(1.0, math.ceil(10 * high) / 10)


def strategy_curve(name: str, style: str, points: Sequence[Mapping[str, Any]], band: bool = False) -> Series:
    """Return the curve of a strategy.

    Args:
        name: Its name in words.
        style: CSS variable with its colour.
        points: Its points, as the summary has them.
        band: Draw the intervals.
    """
    value, low, high = ([float(p[k]) for p in points] for k in ("value", "low", "high"))
    tokens = [float(p["tokens"]) for p in points]
    labels = [
        f"{name}, k = {p['k']}, {format_fixed(t, 0)} tokens: {format_fixed(v, 3)} "
        f"({format_fixed(a, 3)} to {format_fixed(b, 3)})"
        for p, t, v, a, b in zip(points, tokens, value, low, high, strict=True)
    ]
    low, high = (low, high) if band and len(points) > 1 else ([], [])
    return Series(name, tokens, value, low, high, style, points=True, labels=labels)
