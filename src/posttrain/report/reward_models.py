"""Show what rewards are worth: held-out figures of reward models, and a trained reward against a gold scorer.

Over-optimisation is drawn as by Gao, Schulman and Hilton (arXiv 2210.10760): d = sqrt(KL(policy || first model)) in
nats per completion across; rewards minus their mean at the first model up, in standard deviations of the first model's
samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.report.charts import Chart, Series
from posttrain.report.formatting import format_fixed, format_number
from posttrain.report.load import Run, StageLog, read_json

SIDES = ("before", "after")
PAIR_FIGURES = (
    ("accuracy", "Accuracy", "pairs in which it prefers the answer that people prefer"),
    ("loss", "Loss", "nats/pair"),
    ("margin", "Mean margin", "reward, chosen − rejected"),
    ("calibration.error", "Calibration error", "mean distance of predicted from observed frequency"),
    ("length.correlation", "Length", "correlation of reward with length, differences within pairs"),
    ("length.prefers_longer", "Prefers the longer", "share of pairs"),
    ("length.people_prefer_longer", "People prefer the longer", "share of pairs"),
    ("spread", "Spread of the members", "mean standard deviation of their rewards"),
)
STEP_FIGURES = (
    ("accuracy", "Accuracy", "steps on the right side of 1/2"),
    ("auc", "AUC", "probability that a correct step scores above a wrong one"),
    ("first_error", "First wrong step", "chains in which it is found, or correctly none"),
    ("calibration.error", "Calibration error", "mean distance of predicted from observed frequency"),
)
INTERVALS = {"accuracy": ("low", "high"), "first_error": ("first_error_low", "first_error_high")}
Figure = tuple[float, float | None, float | None]

SCORERS = ("proxy", "gold")
GOLD_METRICS = ("kl_sequence", "proxy", "gold", "proxy_std", "gold_std")
FIT_POINTS = 4
"""Points away from the first model that the two parameters of the fit need."""
ROUNDING_D = 0.01
"""A smaller d is a rounding error: that of the first model is not exactly 0."""


@dataclass(frozen=True)
class HeldOutView:
    """Hold what a reward model was measured to be worth.

    Attributes:
        of: The items it was measured on.
        members: Models of the ensemble.
        rows: (title, description, key, before, after).
        chart: Reliability plot.
    """

    stage: str
    of: str
    members: int
    rows: list[tuple[str, str, str, Figure | None, Figure | None]]
    chart: Chart


@dataclass(frozen=True)
class GoldView:
    """Hold a stage's trained reward against gold.

    Attributes:
        fitted: The curve fitted to gold, in words; empty if it was not fitted.
        rows: (step, KL, {scorer: (value, low, high)}).
        verdict: What happened, in words.
    """

    stage: str
    chart: Chart
    fitted: str
    rows: list[tuple[int, float, dict[str, tuple[float, float, float]]]]
    verdict: str


def held_out(run: Run) -> list[HeldOutView]:
    """Return what each stage with a usable held_out.json was measured to be worth."""
    out = []
    for stage in run.stages:
        found = read_json(stage.folder / "held_out.json", run.notes)
        usable = isinstance(found, dict) and all(isinstance(found.get(side), dict) for side in SIDES)
        if usable and found.get("kind") in ("reward_model", "process_reward"):
            out.append(_held_out(stage, found))
    return out


def _held_out(stage: StageLog, found: Mapping[str, Any]) -> HeldOutView:
    steps, last = found["kind"] == "process_reward", found["after"]
    rows = []
    for key, title, unit in STEP_FIGURES if steps else PAIR_FIGURES:
        before, after = (_figure(found[side], key) for side in SIDES)
        if before is not None or after is not None:
            rows.append((title, unit, key, before, after))
    of = f"{last.get('pairs', 0):,} held-out pairs"
    if steps:
        of = f"{last.get('steps', 0):,} steps of {last.get('chains', 0):,} held-out chains"
    left = 0.0 if steps else 0.5  # the answer that it prefers has a probability of 1/2 or more
    series = [_reliability(side, found[side].get("calibration", {}).get("bins", [])) for side in SIDES]
    bottom = 0.0 if min([left, *(low for s in series for low in s.low)]) < 0.4 else 0.4
    ideal = Series("", [left, 1.0], [left, 1.0], style="muted", line="dashed")
    chart = Chart(f"reliability.{stage.name}", "Reliability", "observed frequency over predicted probability",
                  [ideal, *(s for s in series if s.x)], f"Reliability plot of {stage.name}", x="probability",
                  x_range=(left, 1.0), y_range=(bottom, 1.0))  # fmt: skip
    return HeldOutView(stage.name, of, int(found.get("members", 1)), rows, chart)


def _figure(side: Mapping[str, Any], key: str) -> Figure | None:
    value: Any = side
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float):
        return None
    low, high = (side.get(name) for name in INTERVALS.get(key, ("", "")))
    return float(value), low, high


def _reliability(side: str, bins: Sequence[Mapping[str, Any]]) -> Series:
    total = sum(b["n"] for b in bins)
    predicted, observed, low, high = ([float(b[k]) for b in bins] for k in ("said", "was", "low", "high"))
    sizes = [7 + 13 * (b["n"] / total) ** 0.5 for b in bins]
    labels = [
        f"{side}: predicted {b['said']:.2f}, observed {b['was']:.2f} ({b['low']:.2f} to {b['high']:.2f}), "
        f"{b['n']:,} items"
        for b in bins
    ]
    style = "accent" if side == "after" else "before"
    return Series(side, predicted, observed, low, high, style, "none", labels=labels, sizes=sizes)


def gold(run: Run) -> list[GoldView]:
    """Return the trained reward against gold of each stage that measured both."""
    out = []
    for stage in run.stages:
        points = [r for r in stage.metrics if all(isinstance(r.get(name), int | float) for name in GOLD_METRICS)]
        if points:
            out.append(_gold(stage.name, points))
    return out


def fit(d: Sequence[float], rewards: Sequence[float]) -> tuple[float, float] | None:
    """Fit R(d) = d (alpha - beta ln d) by least squares over the points away from d = 0.

    Source: arXiv 2210.10760, the form for reinforcement learning.

    Returns:
        (alpha, beta); None if fewer than four points are away from 0, or if all have the same d.
    """
    away = [(x, y) for x, y in zip(d, rewards, strict=True) if x > ROUNDING_D]
    if len(away) < FIT_POINTS or len({x for x, _ in away}) < 2:
        return None
    x, y = np.array(away).T
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([x, -x * np.log(x)], 1), y, rcond=None)
    return float(alpha), float(beta)


def _gold(stage: str, points: Sequence[Mapping[str, Any]]) -> GoldView:
    d = [math.sqrt(max(0.0, float(p["kl_sequence"]))) for p in points]
    values: dict[str, list[float]] = {}
    series = []
    for side, style in zip(SCORERS, ("s2", "s5"), strict=True):
        zero, unit = float(points[0][side]), float(points[0][f"{side}_std"]) or 1.0
        mean, low, high = ([(float(p[k]) - zero) / unit for p in points] for k in (side, f"{side}_low", f"{side}_high"))
        labels = [
            f"{side}, step {p['step']}: {format_fixed(v, 2, True)} at a KL of {x * x:.2f} nats"
            for x, v, p in zip(d, mean, points, strict=True)
        ]
        values[side] = mean
        low, high = (low, high) if len(d) > 1 else ([], [])
        series.append(Series(side, d, mean, low, high, style, points=True, labels=labels))
    found, fitted = fit(d, values["gold"]), ""
    if found is not None:
        alpha, beta = found
        xs = [max(d) * k / 60 for k in range(1, 61)]
        series.append(Series("", xs, [x * (alpha - beta * math.log(x)) for x in xs], style="muted", line="dashed"))
        fitted = f"gold by least squares: d ({format_number(alpha, 3)} − {format_number(beta, 3)} ln d)"
        if beta > 0 and alpha / beta < 20:
            fitted += f", highest at d = {format_number(math.exp(alpha / beta - 1), 3)}"
    verdict = _verdict(points, values)
    chart = Chart(f"gold.{stage}", "Rewards over the distance from the first model", "standard deviations, over √KL",
                  series, f"Proxy and gold over the square root of the KL. {verdict}", x="distance")  # fmt: skip
    rows = [
        (int(p["step"]), float(p["kl_sequence"]),
         {s: (float(p[s]), float(p[f"{s}_low"]), float(p[f"{s}_high"])) for s in SCORERS})
        for p in points
    ]  # fmt: skip
    return GoldView(stage, chart, fitted, rows, verdict)


def _verdict(points: Sequence[Mapping[str, Any]], values: Mapping[str, Sequence[float]]) -> str:
    """Describe proxy and gold at the last measurement, and whether gold was higher before."""
    if len(points) < 2:
        return "Only the first model has been measured so far."
    last, best = points[-1], max(range(len(points)), key=lambda i: values["gold"][i])
    moved = {s: format_fixed(of[-1], 2, True) for s, of in values.items()}
    out = (
        f"At a KL of {format_number(float(last['kl_sequence']), 3)} nats per completion the trained reward has moved "
        f"by {moved['proxy']} standard deviations, gold by {moved['gold']}."
    )
    if best == len(points) - 1:
        return out + " Gold has not been higher before: there is no sign of over-optimisation."
    top = points[best]
    if float(last["gold_high"]) < float(top["gold_low"]):
        end = "Their intervals do not overlap: since then the policy has learned the proxy's mistakes."
    else:
        end = "Their intervals overlap, so this may be chance."
    return out + f" Gold was highest at step {top['step']} ({format_fixed(values['gold'][best], 2, True)}). {end}"
