"""Choose the rollouts that a reader wants to see: the best, the worst, and those that look too good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.report.load import JsonDict, Run
from posttrain.report.measured_stages import shown_images
from posttrain.report.reward_hacking import follow_rewards, repetition
from posttrain.sampling.rollout_store import groups_of, read_rollouts, rollout_steps, rollouts_path

WATCHED = 60
"""Steps that are searched for drift; if there are more, evenly spread ones."""
EACH_KIND = 3
"""Rollouts of each kind."""
PHASES = {
    "wait": "waiting for rollouts",
    "sample": "sampling",
    "reward": "rewards",
    "score": "log-probabilities before training",
    "learn": "training",
    "held_out": "held-out problems",
}
Correlations = tuple[float | None, float | None, float | None]
"""In the run, early, late."""


@dataclass(frozen=True)
class PartRow:
    """Hold a part of the reward, or the sum.

    Attributes:
        within, between: Variance within and between the groups of the last third of the steps.
        signal: Share of the variance within groups, in the first and last third.
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
class Phase:
    """Hold a phase's seconds over all steps and their share; tokens: sampled or trained on, None in other phases."""

    name: str
    seconds: float
    share: float
    tokens: int | None


@dataclass(frozen=True)
class RolloutsView:
    """Hold what a stage's rollouts amount to.

    Attributes:
        drift: (name, early mean, late mean, correlation with the reward) of length, repetition, judged steps, and of
            the features of text that became more or less frequent.
        first, more: Stored rollouts with `kind` (best, worst, suspicious, failed), `count` of the model's tokens and
            `repetition`; one of each
            kind, and the others.
        pairs: (part, part, correlations, whether they moved apart).
    """

    stage: str
    steps: int
    rollouts: int
    warnings: list[str]
    parts: list[PartRow]
    drift: list[tuple[str, float | None, float | None, float | None]]
    pairs: list[tuple[str, str, Correlations, bool]]
    first: list[JsonDict]
    more: list[JsonDict]
    phases: list[Phase]


def own(row: dict[str, Any]) -> list[int]:
    """Return the tokens of a stored rollout that the model wrote."""
    tokens: list[int] = row["tokens"]
    return tokens if row["mask"] is None else [t for t, mine in zip(tokens, row["mask"], strict=True) if mine]


def views(run: Run) -> list[RolloutsView]:
    """Return a view of each stage that kept rollouts; files that can't be read are added to the run's notes."""
    out = []
    for stage in run.stages:
        steps = rollout_steps(stage.folder / "rollouts")
        if steps:
            out.append(view(stage.name, stage.folder / "rollouts", steps, run.notes, stage.timings))
    return [v for v in out if v.rollouts]


def view(
    name: str, folder: Path, steps: Sequence[int], notes: list[str], timings: Sequence[dict[str, Any]] = ()
) -> RolloutsView:
    """Return what a stage's rollouts amount to.

    Args:
        name: The stage.
        folder: Its rollouts/.
        steps: Steps whose rollouts are there.
        notes: Gets a message for each file that can't be read.
        timings: Records of timings.jsonl.
    """
    count = min(WATCHED, len(steps))
    rows: dict[int, list[dict[str, Any]]] = {}
    for step in dict.fromkeys(steps[i * (len(steps) - 1) // max(1, count - 1)] for i in range(count)):
        try:
            rows[step] = read_rollouts(rollouts_path(folder, step))
        except DataError as error:
            notes.append(str(error))
    readable = list(rows)
    found = follow_rewards([groups_of(rows[s]) for s in readable], suspects=EACH_KIND)
    seen = [_seen("failed", r) for of_step in rows.values() for r in of_step if r["failures"]][:EACH_KIND]
    for s in reversed(found["suspects"]):
        at = [r for r in rows[readable[s["step"]]] if (r["group"], r["rollout"]) == (s["group"], s["rollout"])]
        seen = [_seen("suspicious", r) for r in at] + seen
    if readable:
        last = [r for r in rows[readable[-1]] if r["reward"] is not None]
        ordered = sorted(last, key=lambda r: (-r["reward"], r["group"], r["rollout"]))
        ends = (("best", ordered), ("worst", ordered[::-1]))
        seen = [_seen(kind, r) for kind, of in ends for r in _one_per_group(of)[:EACH_KIND]] + seen
    first = [s for i, s in enumerate(seen) if all(s["kind"] != t["kind"] for t in seen[:i])]
    more = [s for s in seen if all(s is not f for f in first)]
    tables = _parts(found), _drift(found), _pairs(found)
    return RolloutsView(name, len(steps), found["rollouts"], found["warnings"], *tables, first, more, phases(timings))


def phases(timings: Sequence[dict[str, Any]]) -> list[Phase]:
    """Sum the phases of all steps, in the order of a step; an empty list if the records name no phases."""
    seconds: dict[str, float] = {}
    for record in timings:
        for name, took in (record.get("phases") or {}).items():
            seconds[name] = seconds.get(name, 0.0) + float(took)
    total = sum(seconds.values())
    tokens = {
        name: sum(int(r.get(key) or 0) for r in timings)
        for name, key in (("sample", "sampled_tokens"), ("learn", "learned_tokens"))
    }
    order = [*(n for n in PHASES if n in seconds), *(n for n in seconds if n not in PHASES)]
    return [
        Phase(PHASES.get(n, n.replace("_", " ")), seconds[n], seconds[n] / total, tokens.get(n)) for n in order if total
    ]


def spark(values: Sequence[float | None], domain: tuple[float, float] | None = None) -> str:
    """Return an SVG path of values by step in a box of 100 by 24, with gaps where values are missing."""
    finite = [v for v in values if v is not None]
    if not finite:
        return ""
    low, high = domain or (min(finite), max(finite))
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


def _parts(found: dict[str, Any]) -> list[PartRow]:
    """Return the sum and its parts; if there is one part, which is the sum, that part alone."""
    names = [n for n in found["parts"] if n != "reward"]
    out = []
    for name in (["reward"] if len(names) != 1 else []) + names:
        series = found["parts"][name]
        third = max(1, len(series["mean"]) // 3)
        signal = _mean(series["signal"][:third]), _mean(series["signal"][-third:])
        variances = _mean(series["within"][-third:]), _mean(series["between"][-third:])
        drawn = spark(series["mean"]), spark(series["signal"], (0.0, 1.0))
        out.append(PartRow(name, series["early"], series["late"], *variances, signal, *drawn))
    return out


def _drift(found: dict[str, Any]) -> list[tuple[str, float | None, float | None, float | None]]:
    """Return length and repetition (judged steps if there are any), then features whose share changed by 0.05."""
    shape = [("length", found["length"]), ("repetition", found["repetition"])]
    if found["judged"]["early"] or found["judged"]["late"]:
        shape.append(("judged steps", found["judged"]))
    markers = [(f"share: {n}", s) for n, s in found["markers"].items() if abs(s["change"] or 0.0) >= 0.05]
    return [(n, s["early"], s["late"], s["correlation"]) for n, s in [*shape, *markers] if s["early"] is not None]


def _pairs(found: dict[str, Any]) -> list[tuple[str, str, Correlations, bool]]:
    apart = {(p["a"], p["b"]) for p in found["apart"]}
    return [
        (p["a"], p["b"], (p["all"], p["early"], p["late"]), (p["a"], p["b"]) in apart) for p in found["correlations"]
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [v for v in values if v is not None]
    return sum(finite) / len(finite) if finite else None


def _one_per_group(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first row of every group, in the given order."""
    first: dict[int, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["group"], row)
    return list(first.values())


def _seen(kind: str, row: JsonDict) -> JsonDict:
    tokens = own(row)
    about = {"kind": kind, "count": len(tokens), "repetition": repetition(tokens)}
    return {**row, **about, "images": shown_images(row["images"])}
