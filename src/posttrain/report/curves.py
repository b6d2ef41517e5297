"""Numbers by step become charts: thinned, smoothed, with ticks, as SVG paths in a box of 1000 by 400.

The box is stretched to the space there is (strokes and text are not), so one chart serves a phone and a print.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.report.words import number

Array = NDArray[np.float64]
WIDTH, HEIGHT, POINTS = 1000, 400, 1000


@dataclass(frozen=True)
class Measure:
    """A curve that is drawn: the key in the log, its title and unit, and how."""

    key: str
    title: str
    unit: str = ""
    smooth: bool = True
    from_zero: bool = True


METRICS = [
    Measure("loss", "Loss", "nats per token", from_zero=False),
    Measure("grad_norm", "Gradient norm"),
    Measure("lr", "Learning rate", smooth=False),
]
PREFERENCE_METRICS = [
    Measure("loss", "Loss", from_zero=False),
    Measure("held_out_accuracy", "Held-out accuracy", "share of pairs told right", smooth=False, from_zero=False),
    Measure("held_out_margin", "Held-out margin", "of implicit rewards", smooth=False, from_zero=False),
    Measure("accuracy", "Accuracy", "share of the step's pairs told right", from_zero=False),
    Measure("margin", "Margin", "better less worse implicit reward", from_zero=False),
    Measure("reward_chosen", "Implicit reward, better answers", from_zero=False),
    Measure("reward_rejected", "Implicit reward, worse answers", from_zero=False),
    Measure("reward_desirable", "Implicit reward, good answers", from_zero=False),
    Measure("reward_undesirable", "Implicit reward, bad answers", from_zero=False),
    Measure("logp_chosen", "Log-probability, better answers", "nats an answer", from_zero=False),
    Measure("logp_rejected", "Log-probability, worse answers", "nats an answer", from_zero=False),
    Measure("nll", "Better answers", "nats a token", from_zero=False),
    Measure("kl", "KTO's baseline", "nats an answer"),
    Measure("grad_norm", "Gradient norm"),
    Measure("lr", "Learning rate", smooth=False),
]
"""Of preference optimisation; those that a method logs are drawn."""
RL_METRICS = [
    Measure("reward", "Reward", "mean of the step's rollouts", from_zero=False),
    Measure("held_out", "Held-out reward", "greedy answers", smooth=False),
    Measure("held_out_failed", "Held-out answers without a reward", "of the greedy answers; in no mean", smooth=False),
    Measure("gold_failed", "Samples that gold or a reward failed on", "in no mean", smooth=False),
    Measure("greedy_failed", "Greedy answers without a reward", "a step; their prompts teach nothing"),
    Measure("accuracy", "Accuracy", "share of the step's pairs told right", from_zero=False),
    Measure("margin", "Margin", "better less worse implicit reward", from_zero=False),
    Measure("ties", "Ties", "prompts without a pair"),
    Measure("no_signal", "Groups without signal", "share whose rewards are all alike"),
    Measure("length", "Length", "tokens a completion"),
    Measure("cut", "Cut off", "share that reached the longest length, or the most turns"),
    Measure("replies", "Replies", "of the environment, a completion"),
    Measure("entropy", "Entropy", "nats a token, of what was sampled"),
    Measure("temperature", "Temperature", "of sampling, steered", smooth=False, from_zero=False),
    Measure("entropy_coefficient", "Entropy coefficient", "steered", smooth=False),
    Measure("kl", "KL to the reference", "nats a token"),
    Measure("kl_coefficient", "KL coefficient", "steered", smooth=False),
    Measure("expected_success", "Success expected", "share, of the problems drawn"),
    Measure("problems_asked", "Problems asked", "so far", smooth=False),
    Measure("hard", "Hard prompts", "without success at first, a step"),
    Measure("largest_group", "Largest group", "completions of one prompt"),
    Measure("samples", "Completions sampled", "a step"),
    Measure("drawn", "Prompts sampled", "a step, redraws included"),
    Measure("replayed", "Replayed", "earlier successes that stood in, a step"),
    Measure("replay_kept", "Rare successes kept", smooth=False),
    Measure("carried", "Under way", "completions that go on in the next step"),
    Measure("carry_dropped", "Dropped under way", "completions too old to go on, a step"),
    Measure("staleness_mean", "Staleness", "steps since the first token, mean"),
    Measure("staleness_max", "Staleness, largest", "steps since the first token", smooth=False),
    Measure("clip_fraction", "Clipped", "share of tokens"),
    Measure("approx_kl", "KL of the update", "nats a token, within the step"),
    Measure("mismatch", "Sampler and learner", "mean difference of log-probabilities"),
    Measure("value_loss", "Critic's loss"),
    Measure("explained_variance", "Critic's explained variance", "1: all, 0: none", from_zero=False),
    Measure("loss", "Loss", from_zero=False),
    Measure("grad_norm", "Gradient norm"),
    Measure("lr", "Learning rate", smooth=False),
]
"""Of reinforcement learning, in the order in which a person wants to see them; reward parts come behind `reward`."""
FAILURES = ("held_out_failed", "gold_failed", "greedy_failed")
"""Drawn where there were any."""
SCORER_METRICS = [
    Measure("loss", "Loss", "nats a pair, or a step", from_zero=False),
    Measure("held_out_accuracy", "Held-out accuracy", smooth=False, from_zero=False),
    Measure("accuracy", "Accuracy", "of the batch", from_zero=False),
    Measure("margin", "Margin", "reward of the better answer minus that of the other", from_zero=False),
    Measure("score", "Mean score", "of the batch's answers, or steps", from_zero=False),
    Measure("held_out_loss", "Held-out loss", "nats a pair", smooth=False, from_zero=False),
    Measure("held_out_auc", "Held-out AUC", smooth=False, from_zero=False),
    Measure("held_out_calibration_error", "Held-out calibration error", smooth=False),
    Measure("grad_norm", "Gradient norm"),
    Measure("lr", "Learning rate", smooth=False),
]
"""Of reward models and process reward models."""
TIMINGS = [
    Measure("tokens_per_second", "Speed", "tokens per second"),
    Measure("memory_mb", "Memory", "MB", smooth=False),
]
RL_TIMINGS = [
    Measure("seconds", "Time", "seconds a step"),
    Measure("sample", "Time sampling", "seconds a step"),
    Measure("learn", "Time learning", "seconds a step"),
    Measure("sampled_tokens", "Tokens sampled", "a step"),
    Measure("learned_tokens", "Tokens learnt from", "a step, prompts included"),
]


def measures_for(metrics: Sequence[dict[str, Any]]) -> tuple[list[Measure], list[Measure]]:
    """(metrics, timings) to draw of a stage, by what its records hold."""
    if any("score" in r for r in metrics):
        return SCORER_METRICS, TIMINGS
    if not any("reward" in r or "held_out" in r for r in metrics):
        return (PREFERENCE_METRICS if any("margin" in r for r in metrics) else METRICS), TIMINGS
    names = sorted({k for r in metrics for k in r if k.startswith(("reward/", "failed/"))})
    if sum(n.startswith("reward/") for n in names) == 1:
        names = [n for n in names if n.startswith("failed/")]  # the only part is the reward itself
    parts = [
        Measure(n, f"{'Reward part' if n.startswith('reward/') else 'Failures of'} {n.split('/', 1)[1]}", "mean"
                if n.startswith("reward/") else "rollouts a step", from_zero=False)
        for n in names
    ]  # fmt: skip
    never = {k for k in FAILURES if not any(r.get(k) for r in metrics)}
    return RL_METRICS[:1] + parts + [m for m in RL_METRICS[1:] if m.key not in never], TIMINGS + RL_TIMINGS


@dataclass(frozen=True)
class Chart:
    """Everything the page needs to draw one curve; ticks and marks are (percent of the axis, label)."""

    measure: Measure
    steps: int
    drawn: int
    window: int
    raw: str
    smoothed: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    skipped: list[tuple[float, str]]
    domain: tuple[float, float, float, float]
    points: str
    first: str
    last: str
    last_value: float


def thin(values: Array, limit: int = POINTS) -> NDArray[np.intp]:
    """Indices of at most ``limit`` values to draw: first, last, and the lowest and highest of each of equal runs,
    so that no spike is lost. All of them where there are no more than ``limit``."""
    n = len(values)
    if n <= limit:
        return np.arange(n)
    keep = {0, n - 1}
    edges = np.linspace(0, n, limit // 2).astype(int)
    for start, stop in pairwise(edges.tolist()):
        keep |= {start + int(values[start:stop].argmin()), start + int(values[start:stop].argmax())}
    return np.array(sorted(keep))


def smooth(values: Array, window: int) -> Array:
    """Mean over ``window`` steps around each (fewer at the ends, as many on either side, so it has no lag)."""
    n, half = len(values), window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(n)
    reach = np.minimum(half, np.minimum(i, n - 1 - i))
    return (total[i + reach + 1] - total[i - reach]) / (2 * reach + 1)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.7)
    if whole:
        step = max(1.0, round(step))
    start = math.ceil(low / step - 1e-9)
    return [k * step for k in range(start, math.floor(high / step + 1e-9) + 1)]


def chart(measure: Measure, records: Sequence[dict[str, Any]], skipped_steps: Sequence[int] = ()) -> Chart | None:
    """The chart of one measure; None where no step has a finite value of it (a null, NaN or infinity is left out)."""
    pairs = [(r["step"], float(r[measure.key])) for r in records if _finite(r.get(measure.key))]
    if not pairs:
        return None
    x, y = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    window = max(3, len(y) // 25 | 1)
    even = smooth(y, window) if measure.smooth and len(y) >= 8 else None
    keep = thin(y)
    first_x, last_x = float(min(x[0], *skipped_steps, x[0])), float(max(x[-1], *skipped_steps, x[-1]))
    if first_x == last_x:
        first_x, last_x = first_x - 1, last_x + 1
    low, high = float(y.min()), float(y.max())
    low = 0.0 if measure.from_zero and low > 0 else low
    pad = (high - low) * 0.06 or abs(high) * 0.5 or 1.0
    low, high = (low if low == 0 else low - pad), high + pad
    across = (x[keep] - first_x) / (last_x - first_x)

    def path(values: Array) -> str:
        up = 1 - (values[keep] - low) / (high - low)
        steps = " ".join(f"{a * WIDTH:.1f},{b * HEIGHT:.1f}" for a, b in zip(across, up, strict=True))
        return f"M{steps}" if len(values) > 1 else f"M{steps} h0.1"  # a round cap makes one point a dot

    columns = [x[keep].astype(int).tolist(), y[keep].tolist()] + ([even[keep].tolist()] if even is not None else [])
    points = [[s, *(float(f"{v:.5g}") for v in rest)] for s, *rest in zip(*columns, strict=True)]
    return Chart(
        measure=measure, steps=len(y), drawn=len(keep), window=window if even is not None else 0,
        raw=path(y), smoothed=path(even) if even is not None else "",
        x_ticks=[(100 * (t - first_x) / (last_x - first_x), f"{t:,.0f}") for t in ticks(first_x, last_x, whole=True)],
        y_ticks=[(100 * (1 - (t - low) / (high - low)), number(t)) for t in ticks(low, high, 4)],
        skipped=[(100 * (s - first_x) / (last_x - first_x), f"step {s} skipped") for s in skipped_steps],
        domain=(first_x, last_x, low, high), points=json.dumps(points, separators=(",", ":")),
        first=number(float(y[0])), last=number(float(y[-1])), last_value=float(y[-1]),
    )  # fmt: skip


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
