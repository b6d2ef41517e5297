"""Quality of a judge: consistency in both orders, bias to a position or length, agreement with people."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.core.statistics import mean_interval
from posttrain.judge.judge_prompts import as_text
from posttrain.judge.labels import JudgedPair

ALWAYS = 0.95
"""A judge that names the same place at least this often is said to look at nothing else."""
LONG = 2000
"""Characters of a text that are kept of a disagreement."""


def summarize_judge(judged: Sequence[JudgedPair], show: int = 10) -> dict[str, Any]:
    """Return the numbers of the report; shares have 95% intervals (Wilson's). Pairs without a label are `left_out`.

    A judge's ties (p = 1/2) count half in agreements. Sections without data (no human labels, no orders) are absent.
    """
    ok = [j for j in judged if j.p_a is not None]
    reasons = Counter(j.why.split(":")[0].split(";")[0] for j in judged if j.p_a is None)
    out: dict[str, Any] = {"pairs": len(judged), "judged": len(ok), "left_out": dict(reasons)}
    without = [(j, j.why[:LONG] if j.p_a is None else "a tie") for j in judged if j.p_a in (None, 0.5)]
    out["unlabelled"] = [{"source": j.pair.source, "why": why} for j, why in without[: max(show, 10)]]
    if ok:
        out["ties"] = sum(j.p_a == 0.5 for j in ok)
        out["strength"] = statistics.fmean(max(j.p_a, 1 - j.p_a) for j in ok if j.p_a is not None)
        masses = [j.mass for j in ok if j.mass is not None]
        if masses:
            out["mass"] = statistics.fmean(masses)
        out |= _orders(ok) | _scores(ok) | _lengths(ok) | _humans(ok)
        out["disagreements"] = _disagreements(ok, show)
    out["warnings"] = warnings(out)
    return out


def share(hits: Sequence[float]) -> dict[str, Any]:
    """Return the mean of hits (1), misses (0) and ties (1/2), with its 95% interval (with ties by bootstrap)."""
    low, high = mean_interval(hits)
    return {"value": statistics.fmean(hits), "low": low, "high": high, "n": len(hits)}


def _orders(ok: Sequence[JudgedPair]) -> dict[str, Any]:
    both = [j.orders for j in ok if j.orders is not None]
    if not both:
        return {}
    n = len(both)
    firsts = [x for a, b in both for x in (a, 1 - b)]  # the probability of what stood first, in each question
    low, high = mean_interval([(a + 1 - b) / 2 for a, b in both])
    return {
        "consistency": share([float((a > 0.5) == (b > 0.5)) for a, b in both]),
        "position": {
            "first": share([float(x > 0.5) for x in firsts]),
            "mean_probability": {"value": statistics.fmean(firsts), "low": low, "high": high, "n": n},
        },
    }


def _scores(ok: Sequence[JudgedPair]) -> dict[str, Any]:
    scores = [x for j in ok if j.scores is not None for x in j.scores]
    if not scores:
        return {}
    spread = statistics.pstdev(scores)
    return {"scores": {"mean": statistics.fmean(scores), "spread": spread, "least": min(scores), "most": max(scores)}}


def _lengths(ok: Sequence[JudgedPair]) -> dict[str, Any]:
    """Return how often the longer answer wins: by the judge, and by people on the same pairs."""
    unequal = [j for j in ok if len(j.pair.a) != len(j.pair.b) and j.p_a != 0.5]
    if not unequal:
        return {}
    longer = [(j, len(j.pair.a) > len(j.pair.b)) for j in unequal]
    hits = [float(((j.p_a or 0) > 0.5) == a) for j, a in longer]
    out: dict[str, Any] = {"longer": share(hits)}
    told = [(j.pair.human, a) for j, a in longer if j.pair.human is not None and j.pair.human != 0.5]
    if told:
        out["longer_by_people"] = share([float((h > 0.5) == a) for h, a in told])
    x = [float(len(j.pair.a) - len(j.pair.b)) for j in unequal]
    y = [j.margin for j in unequal]
    if len(x) > 2 and len(set(x)) > 1 and len(set(y)) > 1:
        out["correlation"] = statistics.correlation(x, y)
    return {"length": out}


def _humans(ok: Sequence[JudgedPair]) -> dict[str, Any]:
    """Agreement with people on the better answer. Chance is 1/2, as a pair has no order: kappa = 2 a - 1."""
    told = [j for j in ok if j.pair.human is not None and j.pair.human != 0.5]
    if not told:
        return {}
    agreement = share([_hit(j.p_a, j.pair.human) for j in told])
    kappa = {k: 2 * agreement[k] - 1 for k in ("value", "low", "high")} | {"n": len(told)}
    out: dict[str, Any] = {"agreement": agreement, "kappa": kappa}
    sure = sorted(told, key=lambda j: abs((j.pair.human or 0) - 0.5))
    third = len(sure) // 3
    if third:
        parts = {"least sure third": sure[:third], "most sure third": sure[-third:]}
        out["by_certainty"] = {k: share([_hit(j.p_a, j.pair.human) for j in v]) for k, v in parts.items()}
    if all(j.orders is not None for j in told):
        single = [_hit(x, j.pair.human) for j in told if j.orders for x in j.orders]
        # The two orders of a pair are not independent: the interval is that of the pairs, by their means.
        means = [(a + b) / 2 for a, b in zip(single[::2], single[1::2], strict=True)]
        low, high = mean_interval(means)
        out["one_order"] = {"value": statistics.fmean(single), "low": low, "high": high, "n": len(told)}
    out["one_person"] = statistics.fmean(max(j.pair.human, 1 - j.pair.human) for j in told if j.pair.human is not None)
    return {"people": out}


def _hit(p: float | None, human: float | None) -> float:
    assert p is not None and human is not None
    return 0.5 if p == 0.5 else float((p > 0.5) == (human > 0.5))


def _disagreements(ok: Sequence[JudgedPair], show: int) -> list[dict[str, Any]]:
    """Return pairs with opposite answers of judge and people, surest first; without people, of the two orders."""

    def gap(j: JudgedPair) -> float:
        assert j.p_a is not None
        if j.pair.human is not None:
            return abs(j.p_a - j.pair.human) if _hit(j.p_a, j.pair.human) == 0 else 0.0
        return abs(j.orders[0] - j.orders[1]) if j.orders and (j.orders[0] > 0.5) != (j.orders[1] > 0.5) else 0.0

    ranked = sorted((j for j in ok if gap(j) > 0), key=lambda j: -gap(j))[:show]
    return [
        {
            "source": j.pair.source,
            "prompt": as_text(j.pair.prompt)[:LONG],
            "a": j.pair.a[:LONG],
            "b": j.pair.b[:LONG],
            "judge": j.p_a,
            "people": j.pair.human,
            "orders": list(j.orders) if j.orders else None,
            "scores": list(j.scores) if j.scores else None,
            "rationales": [r[:LONG] for r in j.rationales],
        }
        for j in ranked
    ]


def warnings(s: Mapping[str, Any]) -> list[str]:
    """Return what a person must know before using the labels, in sentences."""
    out = []
    if s["pairs"] and not s["judged"]:
        return [f"Not one of {s['pairs']:,} pairs got a label: {_reasons(s['left_out'])}."]
    if s["left_out"]:
        out.append(
            f"{sum(s['left_out'].values()):,} of {s['pairs']:,} pairs got no label and are left out: "
            f"{_reasons(s['left_out'])}."
        )
    if "position" in s:
        first, n = s["position"]["first"]["value"], s["position"]["first"]["n"]
        for name, often in (("first", first), ("second", 1 - first)):
            if n >= 10 and often >= ALWAYS:
                out.append(
                    f"The judge always names the {name} answer ({often:.0%} of {n:,} questions): its verdicts are "
                    "those of a place, and only what the two orders leave over says anything of the answers."
                )
        if s["consistency"]["high"] < 0.75:
            out.append(
                f"In only {s['consistency']['value']:.0%} of the pairs does it stand by its word when the answers "
                "change places."
            )
    if "scores" in s and s["scores"]["spread"] < 1e-9:
        out.append(f"The judge always gives the same score, {s['scores']['mean']:.2f}.")
    elif "scores" in s and s["scores"]["spread"] < 0.1:
        out.append(
            f"The judge's scores hardly differ: all within {s['scores']['least']:.2f} to {s['scores']['most']:.2f}."
        )
    if s["ties"] == s["judged"] and s["judged"]:
        out.append("Every pair is a tie: the judge tells no two answers apart.")
    if s.get("mass") is not None and s["mass"] < 0.2:
        out.append(
            f"Only {s['mass']:.1%} of its probability is on the labels: it wants to say something else. Change "
            "question, template or labels, or begin its reply (opening)."
        )
    people = s.get("people")
    if people and people["agreement"]["low"] <= 0.5 <= people["agreement"]["high"]:
        out.append("Its agreement with people can't be told from chance.")
    if people and people["agreement"]["high"] < 0.5:
        out.append("It says the opposite of what people say: is the question the right way round?")
    length = s.get("length", {})
    longer, by_people = length.get("longer"), length.get("longer_by_people")
    if longer and by_people and (longer["low"] > by_people["high"] or longer["high"] < by_people["low"]):
        more = "more" if longer["value"] > by_people["value"] else "less"
        out.append(
            f"It takes the longer answer {more} often than people do: {longer['value']:.0%} against "
            f"{by_people['value']:.0%}."
        )
    elif longer and not by_people and (longer["low"] > 0.7 or longer["high"] < 0.3):
        which, often = ("longer", longer["value"]) if longer["value"] > 0.5 else ("shorter", 1 - longer["value"])
        out.append(f"It takes the {which} answer in {often:.0%} of the pairs.")
    return out


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {why}" for why, n in sorted(counts.items(), key=lambda x: -x[1]))
