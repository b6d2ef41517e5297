"""Over-optimisation: the reward that a stage learns from against a gold scorer's, over the KL from its first model.

The axes are those of Gao, Schulman and Hilton (arXiv 2210.10760): d = sqrt(KL(policy || first model)), nats a
completion, across; rewards less their mean at the first model up, in standard deviations of the first model's samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.report.curves import HEIGHT, WIDTH, ticks
from posttrain.report.load import Run
from posttrain.report.words import fixed, number

SIDES = ("proxy", "gold")
STYLES = {"proxy": "s2", "gold": "s5"}
NEEDED = ("kl_sequence", "proxy", "gold", "proxy_std", "gold_std")
LEAST = 4
"""Points away from the first model that two numbers are fitted to."""
EDGE = 0.01
"""Below this d is rounding: the first model's own is not exactly 0."""


@dataclass(frozen=True)
class Curve:
    """A scorer's curve: its paths, where its points are in percent, and what each says to who points at it."""

    name: str
    style: str
    path: str
    band: str
    dots: list[tuple[float, float, str]]


@dataclass(frozen=True)
class View:
    """A stage's plot. rows: (step, KL, {scorer: (value, low, high)}), as measured. fit, fitted: path of the curve
    fitted to gold, and what it says; empty where there is none. verdict: what happened, in words."""

    stage: str
    curves: list[Curve]
    fit: str
    fitted: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    rows: list[tuple[int, float, dict[str, tuple[float, float, float]]]]
    verdict: str


def measured(run: Run) -> list[View]:
    """One view a stage that measured a gold scorer; none elsewhere."""
    out = []
    for stage in run.stages:
        points = [r for r in stage.metrics if all(isinstance(r.get(name), int | float) for name in NEEDED)]
        if points:
            out.append(_view(stage.name, points))
    return out


def fit(d: Sequence[float], rewards: Sequence[float]) -> tuple[float, float] | None:
    """(alpha, beta) of R(d) = d (alpha - beta ln d), by least squares over the points away from d = 0.

    Source: arXiv 2210.10760, the form for reinforcement learning. None where fewer than four points are away from 0,
    or all are at one place: two numbers can't be told from them.
    """
    there = [(x, y) for x, y in zip(d, rewards, strict=True) if x > EDGE]
    if len(there) < LEAST or len({x for x, _ in there}) < 2:
        return None
    x, y = np.array(there).T
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([x, -x * np.log(x)], 1), y, rcond=None)
    return float(alpha), float(beta)


def _view(stage: str, points: Sequence[Mapping[str, Any]]) -> View:
    d = [math.sqrt(max(0.0, float(p["kl_sequence"]))) for p in points]
    first = points[0]
    units = {s: float(first[f"{s}_std"]) or 1.0 for s in SIDES}

    def scaled(side: str, value: float) -> float:
        return (value - float(first[side])) / units[side]

    values = {s: [[scaled(s, float(p[k])) for k in (s, f"{s}_low", f"{s}_high")] for p in points] for s in SIDES}
    every = [v for of in values.values() for three in of for v in three]
    right = 1.05 * max(d) or 1.0
    pad = 0.05 * (max(every) - min(every)) or 0.5
    low, high = min(every) - pad, max(every) + pad

    def across(x: float) -> float:
        return x / right

    def up(y: float) -> float:
        return 1 - (min(max(y, low), high) - low) / (high - low)

    def path(xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{WIDTH * across(x):.1f},{HEIGHT * up(y):.1f}" for x, y in zip(xs, ys, strict=True))

    curves = []
    for side in SIDES:
        mean, least, most = ([v[k] for v in values[side]] for k in range(3))
        dots = [
            (100 * across(x), 100 * up(y), f"{side}, step {p['step']}: {fixed(y, 2, True)} at a KL of {x * x:.2f} nats")
            for x, y, p in zip(d, mean, points, strict=True)
        ]
        band = f"M{path([*d, *d[::-1]], [*most, *least[::-1]])}Z" if len(d) > 1 else ""
        curves.append(Curve(side, STYLES[side], "M" + path(d, mean), band, dots))
    found, line, said = fit(d, [v[0] for v in values["gold"]]), "", ""
    if found is not None:
        alpha, beta = found
        xs = [max(d) * k / 60 for k in range(1, 61)]
        line = "M" + path(xs, [x * (alpha - beta * math.log(x)) for x in xs])
        said = f"Gold by least squares: d ({number(alpha, 3)} − {number(beta, 3)} ln d)"
        if beta > 0 and alpha / beta < 20:
            said += f", highest at d = {number(math.exp(alpha / beta - 1), 3)}"
    return View(
        stage, curves, line, said,
        [(100 * across(t), number(t)) for t in ticks(0, right, 6)],
        [(100 * up(t), number(t)) for t in ticks(low, high, 5)],
        [
            (int(p["step"]), float(p["kl_sequence"]),
             {s: (float(p[s]), float(p[f"{s}_low"]), float(p[f"{s}_high"])) for s in SIDES})
            for p in points
        ],
        _verdict(points, {s: [v[0] for v in values[s]] for s in SIDES}),
    )  # fmt: skip


def _verdict(points: Sequence[Mapping[str, Any]], values: Mapping[str, Sequence[float]]) -> str:
    """Proxy and gold at the last measurement, and whether gold was higher before; in words."""
    if len(points) < 2:
        return "The first model alone has been measured so far."
    last, best = points[-1], max(range(len(points)), key=lambda i: values["gold"][i])
    moved = {s: fixed(of[-1], 2, True) for s, of in values.items()}
    out = (
        f"At a KL of {number(float(last['kl_sequence']), 3)} nats a completion the reward that is learnt from has "
        f"moved by {moved['proxy']} standard deviations, gold by {moved['gold']}."
    )
    if best == len(points) - 1:
        return out + " Gold has not been higher before: no over-optimisation is seen."
    top = points[best]
    lost = float(last["gold_high"]) < float(top["gold_low"])
    end = (
        "Their intervals are apart: what was learnt since is the proxy's mistakes."
        if lost
        else "Their intervals overlap, so this may be chance."
    )
    return out + f" Gold was highest at step {top['step']} ({fixed(values['gold'][best], 2, True)}). {end}"
