"""Rollouts that a reader of the report wants to see: the best, the worst, and those that look too good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.report.load import Run, stage_folders
from posttrain.report.phases import Phase, phases
from posttrain.report.reward_hacking import repetition, watch
from posttrain.sampling.rollout_store import groups_of, path_of, read_rollouts, rollout_steps

WATCHED = 60
"""Steps that are looked through for drift, evenly spread where there are more."""
SHOWN = 3
"""Rollouts of each kind."""


@dataclass(frozen=True)
class Seen:
    """One rollout on the page."""

    why: str
    step: int
    problem: int
    prompt: str
    completion: str
    turns: list[tuple[bool, str]]
    answer: str
    reward: float | None
    advantage: float | None
    parts: dict[str, float]
    failures: dict[str, str]
    tokens: int
    finish: str
    repetition: float


@dataclass(frozen=True)
class PartRow:
    """A part of the reward, or the sum. signal: within's share of the variance, in the first and last third.

    means, signals: SVG paths of the steps' means and shares, in a box of 100 by 24.
    """

    name: str
    early: float | None
    late: float | None
    within: float | None
    between: float | None
    signal: tuple[float | None, float | None]
    means: str
    signals: str


@dataclass(frozen=True)
class View:
    """What a stage's rollouts come to.

    drift: (name, early mean, late mean, correlation with the reward) of length, repetition, steps judged, and of the
    features of text that came or went. pairs: (part, part, correlation in the run, early, late, whether they moved
    apart).
    """

    stage: str
    steps: int
    rollouts: int
    warnings: list[str]
    parts: list[PartRow]
    drift: list[tuple[str, float | None, float | None, float | None]]
    pairs: list[tuple[str, str, float | None, float | None, float | None, bool]]
    seen: list[Seen]
    phases: list[Phase]


def own(row: dict[str, Any]) -> list[int]:
    """The tokens of a stored rollout that the model wrote."""
    tokens: list[int] = row["tokens"]
    return tokens if row["mask"] is None else [t for t, mine in zip(tokens, row["mask"], strict=True) if mine]


def views(run: Run) -> list[View]:
    """One view a stage that kept rollouts; files that can't be read are named in the run's notes."""
    out = []
    for stage in run.stages:
        for folder in stage_folders(run.folder, stage.name):
            steps = rollout_steps(folder / "rollouts")
            if steps:
                out.append(view(stage.name, folder / "rollouts", steps, run.notes, stage.timings))
    return [v for v in out if v.rollouts]


def view(
    name: str, folder: Path, steps: Sequence[int], notes: list[str], timings: Sequence[dict[str, Any]] = ()
) -> View:
    """What a stage's rollouts come to, and where its time went; files that can't be read are named in `notes`."""
    chosen = [
        steps[i * (len(steps) - 1) // max(1, min(WATCHED, len(steps)) - 1)] for i in range(min(WATCHED, len(steps)))
    ]
    rows: dict[int, list[dict[str, Any]]] = {}
    for step in dict.fromkeys(chosen):
        try:
            rows[step] = read_rollouts(path_of(folder, step))
        except DataError as error:
            notes.append(str(error))
    there = list(rows)
    found = watch([groups_of(rows[s]) for s in there], suspects=SHOWN)
    seen = []
    if there:
        last = [r for r in rows[there[-1]] if r["reward"] is not None]
        ordered = sorted(last, key=lambda r: (-r["reward"], r["group"], r["rollout"]))
        seen += [_seen("best of the last step", r) for r in _one_a_group(ordered)[:SHOWN]]
        seen += [_seen("worst of the last step", r) for r in _one_a_group(ordered[::-1])[:SHOWN]]
    for s in found["suspects"]:
        at = [r for r in rows[there[s["step"]]] if (r["group"], r["rollout"]) == (s["group"], s["rollout"])]
        seen += [_seen("suspicious: well rewarded, and repetitive or of unusual length or form", r) for r in at]
    failed = [r for of_step in rows.values() for r in of_step if r["failures"]]
    seen += [_seen("got no reward", r) for r in failed[:SHOWN]]
    told = _parts(found), _drift(found), _pairs(found)
    return View(name, len(steps), found["rollouts"], found["warnings"], *told, seen, phases(timings))


def _parts(found: dict[str, Any]) -> list[PartRow]:
    """The sum first, then its parts; only the part where it is the sum itself."""
    names = [n for n in found["parts"] if n != "reward"]
    out = []
    for name in (["reward"] if len(names) != 1 else []) + names:
        series = found["parts"][name]
        third = max(1, len(series["mean"]) // 3)
        late = slice(-third, None)
        signal = (_mean(series["signal"][:third]), _mean(series["signal"][late]))
        variances = _mean(series["within"][late]), _mean(series["between"][late])
        drawn = spark(series["mean"]), spark(series["signal"], (0.0, 1.0))
        out.append(PartRow(name, series["early"], series["late"], *variances, signal, *drawn))
    return out


def _drift(found: dict[str, Any]) -> list[tuple[str, float | None, float | None, float | None]]:
    """Shape first (steps where any are judged); of the features of text those whose share changed by 0.05 or more."""
    shape = [(n, found[n]) for n in ("length", "repetition", "judged")]
    shape = [(n, s) for n, s in shape if n != "judged" or s["early"] or s["late"]]
    markers = [(f"share: {n}", s) for n, s in found["markers"].items() if abs(s["change"] or 0.0) >= 0.05]
    there = [(n, s) for n, s in [*shape, *markers] if s["early"] is not None]
    titles = {"judged": "judged steps"}
    return [(titles.get(n, n), s["early"], s["late"], s["correlation"]) for n, s in there]


def _pairs(found: dict[str, Any]) -> list[tuple[str, str, float | None, float | None, float | None, bool]]:
    apart = {(p["a"], p["b"]) for p in found["apart"]}
    return [(p["a"], p["b"], p["all"], p["early"], p["late"], (p["a"], p["b"]) in apart) for p in found["correlations"]]


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def spark(values: Sequence[float | None], domain: tuple[float, float] | None = None) -> str:
    """An SVG path of values by step in a box of 100 by 24, lowest at the bottom; gaps where there is none."""
    there = [v for v in values if v is not None]
    if not there:
        return ""
    low, high = domain or (min(there), max(there))
    path, pen = [], "M"
    for i, v in enumerate(values):
        if v is None:
            pen = "M"
            continue
        x = 100 * i / max(1, len(values) - 1)
        y = 22 - 20 * ((v - low) / (high - low) if high > low else 0.5)
        path.append(f"{pen}{x:.1f},{y:.1f}")
        pen = "L"
    return "".join(path)


def _one_a_group(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of every group, in the order given."""
    first: dict[int, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["group"], row)
    return list(first.values())


def _seen(why: str, row: dict[str, Any]) -> Seen:
    reward, advantage = row["reward"], row["advantage"]
    return Seen(
        why,
        row["step"],
        row["problem"],
        row["prompt"],
        row["completion"],
        row["turns"],
        str(row["answer"]),
        reward if reward is not None and math.isfinite(reward) else None,
        advantage,
        row["parts"],
        row["failures"],
        len(own(row)),
        row["finish"],
        repetition(own(row)),
    )
