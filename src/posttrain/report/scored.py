"""What reward models and process reward models were measured to be worth: figures, and the reliability plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.report.load import Run, stage_folders

SIDES = ("before", "after")
PAIRS = [
    ("accuracy", "Accuracy", "pairs in which it prefers the answer that people prefer"),
    ("loss", "Loss", "nats a pair"),
    ("margin", "Mean margin", "reward of the better answer minus that of the other"),
    ("calibration.error", "Calibration error", "mean distance of what it says from what is so"),
    ("length.correlation", "Length", "correlation of reward with length, differences within pairs"),
    ("length.prefers_longer", "Prefers the longer", "share of pairs"),
    ("length.people_prefer_longer", "People prefer the longer", "share of pairs"),
    ("spread", "Spread of the members", "mean standard deviation of their rewards"),
]
STEPS = [
    ("accuracy", "Accuracy", "steps on the right side of 1/2"),
    ("auc", "AUC", "chance that a right step scores above a wrong one"),
    ("first_error", "First wrong step", "chains in which it is found, or rightly none"),
    ("calibration.error", "Calibration error", "mean distance of what it says from what is so"),
]
INTERVALS = {"accuracy": ("low", "high"), "first_error": ("first_error_low", "first_error_high")}
Figure = tuple[float, float | None, float | None]


@dataclass(frozen=True)
class Point:
    """A bin of the plot, in percent of the axes from the left and the top. size: diameter in pixels, by its items."""

    x: float
    y: float
    low: float
    high: float
    size: float
    label: str


@dataclass(frozen=True)
class View:
    """A stage's figures: rows of (name, what it is, key, before, after), and the points of the plot by side."""

    stage: str
    of: str
    members: int
    rows: list[tuple[str, str, str, Figure | None, Figure | None]]
    points: dict[str, list[Point]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    diagonal: str


def scored(run: Run) -> list[View]:
    """One view a stage that left held_out.json; a file that can't be read is named in the run's notes."""
    out = []
    for stage in run.stages:
        for folder in stage_folders(run.folder, stage.name):
            found = _read(folder / "held_out.json", run.notes)
            if found is not None:
                out.append(_view(stage.name, found))
    return out


def _read(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        notes.append(f"{path.name} of {path.parent.name} can't be read: {error}")
        return None
    usable = isinstance(found, dict) and all(isinstance(found.get(side), dict) for side in SIDES)
    return found if usable and found.get("kind") in ("reward_model", "process_reward") else None


def _view(stage: str, found: Mapping[str, Any]) -> View:
    steps = found["kind"] == "process_reward"
    rows = []
    for key, title, what in STEPS if steps else PAIRS:
        before, after = (_figure(found[side], key) for side in SIDES)
        if before is not None or after is not None:
            rows.append((title, what, key, before, after))
    last = found["after"]
    if steps:
        of = f"{last.get('steps', 0):,} steps of {last.get('chains', 0):,} held-out chains"
    else:
        of = f"{last.get('pairs', 0):,} held-out pairs"
    left = 0.0 if steps else 0.5  # of two answers it says 1/2 or more of the one it prefers
    points = {side: _points(found[side].get("calibration", {}).get("bins", []), left) for side in SIDES}
    low = min([0.5 if not steps else 0.0, *(p for s in SIDES for p in _lows(found[s]))])
    bottom = 0.0 if low < 0.4 else 0.4
    points = {side: [_within(p, bottom) for p in mine] for side, mine in points.items()}
    x_ticks = [(100 * (v - left) / (1 - left), f"{v:g}") for v in _marks(left)]
    y_ticks = [(100 * (1 - v) / (1 - bottom), f"{v:g}") for v in _marks(bottom)]
    start = 400 * (1 - left) / (1 - bottom)
    return View(stage, of, int(found.get("members", 1)), rows, points, x_ticks, y_ticks, f"M0,{start:.1f}L1000,0")


def _marks(low: float) -> list[float]:
    step = 0.2 if low < 0.4 else 0.1
    return [round(low + i * step, 6) for i in range(round((1 - low) / step) + 1)]


def _lows(side: Mapping[str, Any]) -> list[float]:
    return [float(b["low"]) for b in side.get("calibration", {}).get("bins", [])]


def _figure(side: Mapping[str, Any], key: str) -> Figure | None:
    value: Any = side
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float):
        return None
    low, high = (side.get(name) for name in INTERVALS.get(key, ("", "")))
    return float(value), low, high


def _points(bins: Sequence[Mapping[str, Any]], left: float) -> list[Point]:
    total = sum(b["n"] for b in bins)
    out = []
    for b in bins:
        size = 7 + 13 * (b["n"] / total) ** 0.5
        label = f"said {b['said']:.2f}, was {b['was']:.2f} ({b['low']:.2f} to {b['high']:.2f}), {b['n']:,} items"
        out.append(Point(100 * (b["said"] - left) / (1 - left), b["was"], b["low"], b["high"], size, label))
    return out


def _within(p: Point, bottom: float) -> Point:
    def down(share: float) -> float:
        return 100 * (1 - share) / (1 - bottom)

    return Point(p.x, down(p.y), down(p.low), down(p.high), p.size, p.label)
