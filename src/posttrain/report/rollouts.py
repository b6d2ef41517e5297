"""Rollouts that a reader of the report wants to see: the best, the worst, and those that look too good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.report.load import Run
from posttrain.rewards.watch import repetition, watch
from posttrain.rollout.store import groups_of, path_of, read_rollouts, rollout_steps

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
    answer: str
    reward: float | None
    advantage: float | None
    parts: dict[str, float]
    failures: dict[str, str]
    tokens: int
    finish: str
    repetition: float


@dataclass(frozen=True)
class View:
    """What a stage's rollouts come to. drift: (name, change from first to last third, correlation with the reward)."""

    stage: str
    steps: int
    rollouts: int
    warnings: list[str]
    drift: list[tuple[str, float, float | None]]
    seen: list[Seen]


def views(run: Run) -> list[View]:
    """One view a stage that kept rollouts; files that can't be read are named in the run's notes."""
    out = []
    for stage in run.stages:
        for folder in sorted((run.folder / "stages").glob(f"*-{stage.name}")):
            steps = rollout_steps(folder / "rollouts")
            if steps:
                out.append(_view(stage.name, folder / "rollouts", steps, run.notes))
    return [v for v in out if v.rollouts]


def _view(name: str, folder: Path, steps: Sequence[int], notes: list[str]) -> View:
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
    drift = []
    for series in ("length", "repetition"):
        if found[series]["change"] is not None:
            drift.append((series, found[series]["change"], found[series]["correlation"]))
    seen = []
    if there:
        last = [r for r in rows[there[-1]] if r["reward"] is not None]
        ordered = sorted(last, key=lambda r: (-r["reward"], r["group"], r["rollout"]))
        seen += [_seen("best of the last step", r) for r in _one_a_group(ordered)[:SHOWN]]
        seen += [_seen("worst of the last step", r) for r in _one_a_group(ordered[::-1])[:SHOWN]]
    for s in found["suspects"]:
        at = [r for r in rows[there[s["step"]]] if (r["group"], r["rollout"]) == (s["group"], s["rollout"])]
        seen += [_seen("suspicious: well rewarded, and repetitive or of unusual length", r) for r in at]
    failed = [r for of_step in rows.values() for r in of_step if r["failures"]]
    seen += [_seen("got no reward", r) for r in failed[:SHOWN]]
    return View(name, len(steps), found["rollouts"], found["warnings"], drift, seen)


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
        str(row["answer"]),
        reward if reward is not None and math.isfinite(reward) else None,
        advantage,
        row["parts"],
        row["failures"],
        len(row["tokens"]),
        row["finish"],
        repetition(row["tokens"]),
    )
