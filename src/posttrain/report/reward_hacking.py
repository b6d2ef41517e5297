r"""Signs that a policy learns the reward instead of the task: what each part does over a run's rollouts.

Nothing here proves hacking. A reward that rises while length, repetition or format drift, or while another part falls,
is a reason to read the rollouts named under ``suspects``.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from posttrain.core.types import Rollout, RolloutGroup

GRAM = 4
DRIFT = 0.5
"""Change between a run's first and last third that is named, in standard deviations of the first third's rollouts."""
APART = 0.3
"""Fall of a correlation between two parts that is named."""
FAINT = 0.05
"""Share of a part's variance that lies within groups, below which it is named."""
CUT_SHORT = 0.2
"""Rise of a share (of rollouts cut at the longest length, of a marker) that is named."""
STANDING = {
    "empty": "of completions are empty (last third): the end token comes first; look at the prompt and its template",
    "cut at the longest": "of completions are cut at the longest length (last third): raise sampler.max_tokens",
}
"""Markers that are named wherever at least half of the rollouts have them, whether that is new or not."""
RARE = 0.2
"""Share of a step's rollouts, up to which a marker of one of them is unusual there."""

MARKERS: dict[str, Callable[[Rollout], bool]] = {
    "empty": lambda r: not r.text.strip(),
    "cut at the longest": lambda r: r.finish == "length",
    "boxed": lambda r: "\\boxed" in r.text,
    "answer tag": lambda r: "</answer>" in r.text,
    "think tag": lambda r: "</think>" in r.text,
    "hashes": lambda r: "####" in r.text,
    "several answers": lambda r: len(re.findall(r"\\boxed|</answer>|(?<!#)####(?!#)", r.text)) > 1,
    "other scripts": lambda r: sum(c.isalpha() and ord(c) > 0x24F for c in r.text) > 0.05 * max(1, len(r.text)),
}
"""Features of a text whose share is followed."""

SHAPE: dict[str, Callable[[Rollout], float]] = {
    "length": lambda r: float(r.length),
    "repetition": lambda r: repetition([r.tokens[i] for i in r.own]),
    "judged": lambda r: float(sum(len(steps) for steps in r.steps.values())),
}
"""Measures of a rollout that are followed, of what the model wrote."""


def repetition(tokens: Sequence[int], gram: int = GRAM) -> float:
    """Share of 4-grams that were there before: 1 - different / all. Fewer than 4 tokens: 0."""
    count = len(tokens) - gram + 1
    return 1 - len({tuple(tokens[i : i + gram]) for i in range(count)}) / count if count > 0 else 0.0


def correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's r; None where either does not vary, or there are fewer than two."""
    if len(a) < 2 or max(a) == min(a) or max(b) == min(b):
        return None
    return max(-1.0, min(1.0, statistics.correlation(a, b)))


def within_variance(groups: Sequence[RolloutGroup], value: Callable[[Rollout], float | None]) -> float | None:
    """Mean over groups of the population variance inside each, by size: what a group's advantages are made of."""
    total = count = 0.0
    for group in groups:
        values = [v for r in group.rollouts if (v := value(r)) is not None]
        if values:
            total += statistics.pvariance(values) * len(values)
            count += len(values)
    return total / count if count else None


def between_variance(groups: Sequence[RolloutGroup], value: Callable[[Rollout], float | None]) -> float | None:
    """Variance of the groups' means, by size: with `within_variance` it adds up to the variance over all rollouts."""
    means: list[tuple[float, int]] = []
    for group in groups:
        values = [v for r in group.rollouts if (v := value(r)) is not None]
        if values:
            means.append((statistics.fmean(values), len(values)))
    count = sum(n for _, n in means)
    if not count:
        return None
    mean = sum(m * n for m, n in means) / count
    return sum((m - mean) ** 2 * n for m, n in means) / count


def _variances(groups: Sequence[RolloutGroup], value: Callable[[Rollout], float | None]) -> tuple[Any, Any, Any]:
    """(within, between, within's share of both) of a step."""
    finite = [replace(g, rollouts=[r for r in g.rollouts if math.isfinite(r.reward)]) for g in groups]
    within, between = within_variance(finite, value), between_variance(finite, value)
    total = (within or 0.0) + (between or 0.0)
    return within, between, within / total if within is not None and total > 1e-24 else None


def watch(steps: Sequence[Sequence[RolloutGroup]], suspects: int = 5) -> dict[str, Any]:
    """Follow the rewards of a run over its steps (scored groups, in order; steps and groups may be empty).

    Returns plain data, lists one entry a step, None where there is nothing to say:

    parts: by name (``reward`` is the sum): mean, within (variance inside groups, which is what teaches), between
    (variance of the groups' means, which is how hard the problems are), signal (within's share of both; None where
    nothing varies), early, late (means of the first and last third), change (late less early), drift (that in standard
    deviations of the first third's rollouts).
    correlations: [{a, b, all, early, late, steps}] of parts over rollouts, in the run, its thirds, and each step.
    apart: the pairs of these whose correlation fell by 0.3 or more, or of which one part rose and the other fell.
    length, repetition, judged: mean a step, change, and correlation with the reward. Repetition: see `repetition`;
    judged: steps of a completion that a reward has scored, over all such rewards.
    markers: share of rollouts by feature (see MARKERS): shares a step, change, correlation with the reward.
    suspects: rollouts rewarded above their group's mean that are the most repetitive, unusually long or short, or of a
    form that few others of their step have: [{step, group, rollout, reward, repetition, tokens, length_z, markers,
    score}], worst first.
    warnings: sentences for what drifted.
    """
    flat = [[r for g in groups for r in g.rollouts if math.isfinite(r.reward)] for groups in steps]
    third = max(1, len(flat) // 3)
    early = [r for step in flat[:third] for r in step]
    late = [r for step in flat[-third:] for r in step] if len(flat) > 1 else []
    names = sorted({name for step in flat for r in step for name in r.rewards})
    readers: dict[str, Callable[[Rollout], float | None]] = {"reward": lambda r: r.reward}
    readers.update({n: lambda r, n=n: r.rewards.get(n) for n in names})  # type: ignore[misc]
    parts = {n: _series(read, flat, early, late) for n, read in readers.items()}
    for name, read in readers.items():
        found = [_variances(groups, read) for groups in steps]
        for i, what in enumerate(("within", "between", "signal")):
            parts[name][what] = [f[i] for f in found]
    everything = [r for step in flat for r in step]
    pairs = []
    for a, b in combinations(names, 2):
        among = {k: _between(a, b, rs) for k, rs in (("all", everything), ("early", early), ("late", late))}
        pairs.append({"a": a, "b": b, **among, "steps": [_between(a, b, step) for step in flat]})
    shape: dict[str, dict[str, Any]] = {}
    for name, measure in SHAPE.items():
        shape[name] = _series(measure, flat, early, late)
        shape[name]["correlation"] = correlation([measure(r) for r in everything], [r.reward for r in everything])
    markers: dict[str, dict[str, Any]] = {}
    for name, has in MARKERS.items():
        markers[name] = _series(lambda r, has=has: float(has(r)), flat, early, late)  # type: ignore[misc]
        markers[name]["correlation"] = correlation([float(has(r)) for r in everything], [r.reward for r in everything])
    apart = [p for p in pairs if _moves_apart(p, parts)]
    return {
        "steps": len(flat),
        "rollouts": len(everything),
        "parts": parts,
        "correlations": pairs,
        "apart": apart,
        **shape,
        "markers": markers,
        "suspects": suspicious(steps, suspects),
        "warnings": _warnings(parts, shape, markers, apart),
    }


def _series(
    read: Callable[[Rollout], float | None],
    steps: Sequence[Sequence[Rollout]],
    early: Sequence[Rollout],
    late: Sequence[Rollout],
) -> dict[str, Any]:
    """mean a step and of the first and last third; their change; that in standard deviations of the first (None: 0)."""

    def values(rollouts: Sequence[Rollout]) -> list[float]:
        return [v for r in rollouts if (v := read(r)) is not None]

    means = [statistics.fmean(v) if (v := values(step)) else None for step in steps]
    first, last = values(early), values(late)
    begins, ends = (statistics.fmean(v) if v else None for v in (first, last))
    change = ends - begins if begins is not None and ends is not None else None
    spread = statistics.pstdev(first) if first else 0.0
    drift = change / spread if change is not None and spread else None
    return {"mean": means, "early": begins, "late": ends, "change": change, "drift": drift}


def _between(a: str, b: str, rollouts: Sequence[Rollout]) -> float | None:
    both = [(r.rewards[a], r.rewards[b]) for r in rollouts if a in r.rewards and b in r.rewards]
    return correlation([x for x, _ in both], [y for _, y in both])


def _drifted(series: Mapping[str, Any]) -> int:
    """1 up, -1 down, 0 neither; what did not vary at first has drifted when it changes at all."""
    change, drift = series["change"], series["drift"]
    if not change or (drift is not None and abs(drift) < DRIFT):
        return 0
    return 1 if change > 0 else -1


def _moves_apart(pair: Mapping[str, Any], parts: Mapping[str, Any]) -> bool:
    fell = pair["early"] is not None and pair["late"] is not None and pair["early"] - pair["late"] >= APART
    return fell or _drifted(parts[pair["a"]]) * _drifted(parts[pair["b"]]) < 0


def suspicious(steps: Sequence[Sequence[RolloutGroup]], count: int | None = None) -> list[dict[str, Any]]:
    """The `suspects` of `watch`, at most `count`."""
    found: list[dict[str, Any]] = []
    for s, groups in enumerate(steps):
        lengths = [r.length for g in groups for r in g.rollouts if math.isfinite(r.reward)]
        mean, spread = (statistics.fmean(lengths), statistics.pstdev(lengths)) if lengths else (0.0, 0.0)
        there = [r for g in groups for r in g.rollouts]
        rare = [n for n, has in MARKERS.items() if 0 < sum(map(has, there)) <= RARE * len(there)]
        judged = [r.reward for r in there if math.isfinite(r.reward)]
        for g, group in enumerate(groups):
            rewards = [r.reward for r in group.rollouts if math.isfinite(r.reward)]
            others = rewards if len(rewards) > 1 else judged  # one alone is compared with all of its step
            for i, r in enumerate(group.rollouts):
                if not math.isfinite(r.reward) or r.reward <= statistics.fmean(others):
                    continue
                z = (r.length - mean) / spread if spread else 0.0
                again = repetition([r.tokens[i] for i in r.own])
                entry = {"step": s, "group": g, "rollout": i, "reward": r.reward, "repetition": again}
                odd = [n for n in rare if MARKERS[n](r)]
                # A length within one deviation of the step's mean is usual.
                score = again + max(0.0, abs(z) - 1) / 2 + len(odd) / 4
                found.append({**entry, "tokens": r.length, "length_z": z, "markers": odd, "score": score})
    worst = sorted(found, key=lambda f: (-f["score"], f["step"], f["group"], f["rollout"]))
    return [f for f in worst if f["score"] > 0][:count]


def _warnings(
    parts: Mapping[str, Any], shape: Mapping[str, Any], markers: Mapping[str, Any], apart: Sequence[Mapping[str, Any]]
) -> list[str]:
    out = []
    rises = _drifted(parts["reward"]) > 0
    for name, series in shape.items():
        if rises and _drifted(series):
            way = "rises" if series["change"] > 0 else "falls"
            what = "the number of judged steps" if name == "judged" else name
            out.append(f"the reward rises while {what} {way} (by {series['change']:+.3g} between first and last third)")
    for name, series in markers.items():
        if series["change"] is not None and abs(series["change"]) >= CUT_SHORT:
            out.append(f"share of rollouts with '{name}' changed by {series['change']:+.0%}")
        share = series["late"] if series["late"] is not None else series["early"]
        if name in STANDING and share is not None and share >= 0.5:
            out.append(f"{share:.0%} {STANDING[name]}")
    for pair in apart:
        a, b = pair["a"], pair["b"]
        changes = f"{a} {parts[a]['change'] or 0:+.3g}, {b} {parts[b]['change'] or 0:+.3g}"
        out.append(
            f"parts move apart: {changes}; correlation {_round(pair['early'])} early, {_round(pair['late'])} late"
        )
    for name, series in parts.items():
        last = [v for v in series["within"] if v is not None]
        if name != "reward" and last and last[-1] == 0 and any(last[:-1]):
            out.append(f"{name} no longer varies within groups: it teaches nothing there")
        elif name != "reward" and last and not any(last) and all(v is None for v in series["signal"]):
            out.append(f"{name} was the same for every completion, from first to last: it taught nothing")
        low = [v for v in series["signal"][-max(1, len(series["signal"]) // 3) :] if v is not None]
        if name != "reward" and low and statistics.fmean(low) < FAINT:
            out.append(
                f"{statistics.fmean(low):.0%} of {name}'s variance is within groups (last third): nearly all of it is "
                "between problems, where it teaches nothing"
            )
    return out


def _round(value: float | None) -> str:
    return "none" if value is None else f"{value:+.2f}"
