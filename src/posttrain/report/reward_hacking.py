r"""Look for signs that a policy learns the reward instead of the task, in each part over a run's rollouts.

Nothing here proves hacking. A reward that rises while length, repetition or format drift, or while another part falls,
is a reason to read the rollouts named under ``suspects``.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from posttrain.core.types import Rollout, RolloutGroup
from posttrain.rewards.outcome import NOT_GRADED, WITHOUT_END

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
FAILING = 0.05
"""Share of rollouts without a reward that is named."""
COUNTED_WRONG = {
    WITHOUT_END: "have no end token (they were cut at the longest length; see sampler.max_tokens)",
    NOT_GRADED: "could not be graded within the limits of time and memory",
}
"""Beginnings of notes, and what the rollouts that have them are."""
RARE = 0.2
"""Share of a step's rollouts, up to which a marker of one of them is unusual there."""

Reader = Callable[[Rollout], float | None]
"""What is read from a rollout; None if it has no such number."""

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
    """Return the share of 4-grams that occurred before: 1 - different / all. Fewer than 4 tokens give 0."""
    count = len(tokens) - gram + 1
    return 1 - len({tuple(tokens[i : i + gram]) for i in range(count)}) / count if count > 0 else 0.0


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Pearson's r; None if either is constant, or there are fewer than two values."""
    if len(a) < 2 or max(a) == min(a) or max(b) == min(b):
        return None
    return max(-1.0, min(1.0, statistics.correlation(a, b)))


def within_variance(groups: Sequence[RolloutGroup], read: Reader) -> float | None:
    """Return the mean of the groups' population variances, weighted by size: the source of a group's advantages."""
    found = [(statistics.pvariance(v), len(v)) for g in groups if (v := _values(g.rollouts, read))]
    return sum(v * n for v, n in found) / sum(n for _, n in found) if found else None


def between_variance(groups: Sequence[RolloutGroup], read: Reader) -> float | None:
    """Return the variance of the groups' means, weighted by size.

    With `within_variance` it adds up to the variance over all rollouts.
    """
    found = [(statistics.fmean(v), len(v)) for g in groups if (v := _values(g.rollouts, read))]
    count = sum(n for _, n in found)
    mean = sum(m * n for m, n in found) / count if count else 0.0
    return sum((m - mean) ** 2 * n for m, n in found) / count if count else None


def follow_rewards(steps: Sequence[Sequence[RolloutGroup]], suspects: int = 5) -> dict[str, Any]:
    """Follow the rewards of a run over its steps.

    Args:
        steps: Scored groups of each step, in order; steps and groups may be empty.
        suspects: Suspicious rollouts to return at most.

    Returns:
        Plain data; lists have one entry for each step, and None means that there is nothing to tell.

        parts: By name (`reward` is the sum): mean, within (variance inside groups, the training signal), between
            (variance of the groups' means: how much problems differ in difficulty), signal (share of within in both;
            None if nothing varies), early, late (means of the first and last third), change (late minus early), drift
            (change in standard deviations of the first third's rollouts).
        correlations: [{a, b, all, early, late, steps}] of parts over rollouts: in the run, its thirds, each step.
        apart: Those pairs whose correlation fell by 0.3 or more, or of which one part rose and the other fell.
        length, repetition, judged: Mean of each step, change, and correlation with the reward. judged: steps of a
            completion that a reward has scored, over all such rewards.
        markers: Share of rollouts by feature (see MARKERS): the same numbers.
        suspects: Rollouts rewarded above their group's mean that are the most repetitive, unusually long or short, or
            of a form that few others of their step have: [{step, group, rollout, reward, repetition, tokens, length_z,
            markers, score}], most suspicious first.
        warnings: Sentences on what drifted.
    """
    flat = [[r for g in groups for r in g.rollouts if math.isfinite(r.reward)] for groups in steps]
    third = max(1, len(flat) // 3)
    early = [r for step in flat[:third] for r in step]
    late = [r for step in flat[-third:] for r in step] if len(flat) > 1 else []
    everything = [r for step in flat for r in step]
    names = sorted({name for r in everything for name in r.rewards if "/" not in name})  # figures are not trained on
    readers: dict[str, Reader] = {"reward": lambda r: r.reward}
    readers.update({n: lambda r, n=n: r.rewards.get(n) for n in names})  # type: ignore[misc]
    parts = {}
    for name, read in readers.items():
        found = [_variances(groups, read) for groups in steps]
        columns = {key: [f[i] for f in found] for i, key in enumerate(("within", "between", "signal"))}
        parts[name] = _series(read, flat, early, late) | columns
    pairs = []
    for a, b in combinations(names, 2):
        among = {k: _correlation(a, b, rs) for k, rs in (("all", everything), ("early", early), ("late", late))}
        pairs.append({"a": a, "b": b, **among, "steps": [_correlation(a, b, step) for step in flat]})
    rewards = [r.reward for r in everything]

    def followed(measures: Mapping[str, Callable[[Rollout], float]]) -> dict[str, dict[str, Any]]:
        return {
            name: _series(measure, flat, early, late)
            | {"correlation": pearson([float(measure(r)) for r in everything], rewards)}
            for name, measure in measures.items()
        }

    shape, markers = followed(SHAPE), followed(MARKERS)
    apart = [p for p in pairs if _moves_apart(p, parts)]
    unrewarded = [[not math.isfinite(r.reward) for g in groups for r in g.rollouts] for groups in steps]
    warnings = (
        _failures(unrewarded, third)
        + _counted_wrong(everything)
        + _drifts(shape, markers, _drifted(parts["reward"]) > 0)
    )
    return {
        "steps": len(flat),
        "rollouts": len(everything),
        "parts": parts,
        "correlations": pairs,
        "apart": apart,
        **shape,
        "markers": markers,
        "suspects": suspicious(steps, suspects),
        "warnings": warnings + _part_warnings(parts, apart),
    }


def _values(rollouts: Sequence[Rollout], read: Reader) -> list[float]:
    return [float(v) for r in rollouts if (v := read(r)) is not None]


def _variances(groups: Sequence[RolloutGroup], read: Reader) -> tuple[float | None, float | None, float | None]:
    """Return (within, between, share of within in both) of a step."""
    finite = [replace(g, rollouts=[r for r in g.rollouts if math.isfinite(r.reward)]) for g in groups]
    within, between = within_variance(finite, read), between_variance(finite, read)
    total = (within or 0.0) + (between or 0.0)
    return within, between, within / total if within is not None and total > 1e-24 else None


def _series(
    read: Reader, steps: Sequence[Sequence[Rollout]], early: Sequence[Rollout], late: Sequence[Rollout]
) -> dict[str, Any]:
    """Return means (each step, first third, last third), the change, and it in standard deviations of the first."""
    means = [statistics.fmean(v) if (v := _values(step, read)) else None for step in steps]
    first, last = _values(early, read), _values(late, read)
    begins, ends = (statistics.fmean(v) if v else None for v in (first, last))
    change = ends - begins if begins is not None and ends is not None else None
    spread = statistics.pstdev(first) if first else 0.0
    drift = change / spread if change is not None and spread else None
    return {"mean": means, "early": begins, "late": ends, "change": change, "drift": drift}


def _correlation(a: str, b: str, rollouts: Sequence[Rollout]) -> float | None:
    both = [(r.rewards[a], r.rewards[b]) for r in rollouts if a in r.rewards and b in r.rewards]
    return pearson([x for x, _ in both], [y for _, y in both])


def _drifted(series: Mapping[str, Any]) -> int:
    """Return 1 for up, -1 for down, 0 for neither; what was constant at first has drifted if it changes at all."""
    change, drift = series["change"], series["drift"]
    if not change or (drift is not None and abs(drift) < DRIFT):
        return 0
    return 1 if change > 0 else -1


def _moves_apart(pair: Mapping[str, Any], parts: Mapping[str, Any]) -> bool:
    fell = pair["early"] is not None and pair["late"] is not None and pair["early"] - pair["late"] >= APART
    return fell or _drifted(parts[pair["a"]]) * _drifted(parts[pair["b"]]) < 0


def suspicious(steps: Sequence[Sequence[RolloutGroup]], count: int | None = None) -> list[dict[str, Any]]:
    """Return the `suspects` of `follow_rewards`, at most `count`."""
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


def _failures(unrewarded: Sequence[Sequence[bool]], third: int) -> list[str]:
    """Name the share of rollouts without a reward, in the last third of the steps or in all of them."""
    for steps, when in ((unrewarded[-third:], " (last third)"), (unrewarded, "")):
        flat = [missing for step in steps for missing in step]
        if flat and statistics.fmean(flat) >= FAILING:
            count = f"{sum(flat):,} of {len(flat):,} rollouts ({statistics.fmean(flat):.0%})"
            return [f"{count} got no reward{when}: a reward fails on them"]
    return []


def _counted_wrong(rollouts: Sequence[Rollout]) -> list[str]:
    """Name the number of rollouts that a reward counts as wrong without having judged a whole answer."""
    out = []
    for mark, words in COUNTED_WRONG.items():
        names = Counter(
            n
            for r in rollouts
            for n, note in r.notes.items()
            if note.removeprefix(f"{WITHOUT_END}; ").startswith(mark) or note.startswith(mark)
        )
        for name, count in names.items():
            share = f"{count:,} of {len(rollouts):,} rollouts ({count / len(rollouts):.0%})"
            out.append(f"{share} {words}, and count as wrong: {name}")
    return out


def _drifts(shape: Mapping[str, Any], markers: Mapping[str, Any], rises: bool) -> list[str]:
    out = []
    for name, series in shape.items():
        if rises and _drifted(series):
            way = "rises" if series["change"] > 0 else "falls"
            measure = "the number of judged steps" if name == "judged" else name
            change = f"{series['change']:+.3g} between first and last third"
            out.append(f"the reward rises while {measure} {way} (by {change})")
    for name, series in markers.items():
        if series["change"] is not None and abs(series["change"]) >= CUT_SHORT:
            out.append(f"share of rollouts with '{name}' changed by {series['change']:+.0%}")
        share = series["late"] if series["late"] is not None else series["early"]
        if name in STANDING and share is not None and share >= 0.5:
            out.append(f"{share:.0%} {STANDING[name]}")
    return out


def _part_warnings(parts: Mapping[str, Any], apart: Sequence[Mapping[str, Any]]) -> list[str]:
    out = []
    for pair in apart:
        a, b = pair["a"], pair["b"]
        changes = f"{a} {parts[a]['change'] or 0:+.3g}, {b} {parts[b]['change'] or 0:+.3g}"
        early, late = ("none" if (r := pair[k]) is None else f"{r:+.2f}" for k in ("early", "late"))
        out.append(f"parts move apart: {changes}; correlation {early} early, {late} late")
    for name, series in parts.items():
        last = [v for v in series["within"] if v is not None]
        low = [v for v in series["signal"][-max(1, len(series["signal"]) // 3) :] if v is not None]
        if name == "reward" or not last:
            continue
        if last[-1] == 0 and any(last[:-1]):
            out.append(f"{name} no longer varies within groups: it gives no training signal")
        elif not any(last) and all(v is None for v in series["signal"]):
            out.append(f"{name} was the same for every completion of the run: it gave no training signal")
        if low and statistics.fmean(low) < FAINT:
            out.append(
                f"{statistics.fmean(low):.0%} of {name}'s variance is within groups (last third): nearly all of it is "
                "between problems, where it gives no training signal"
            )
    return out
