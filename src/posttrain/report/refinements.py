"""Prepare evaluations of self-refine for the page: accuracy by round, samples at equal tokens, and chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.report.charts import Chart, Series
from posttrain.report.evaluations import CHANGES, accuracy_range, strategy, strategy_curve
from posttrain.report.formatting import format_fixed, plain_text
from posttrain.report.load import JsonDict, Run

CHAINS_SHOWN = {"gained": 3, "lost": 3, "wrong": 2, "right": 2}
"""Chains of a task, by what became of the answer."""
CHAINS_FOLDED = {"gained": 9, "lost": 9, "wrong": 4, "right": 4}
"""Chains up to this number are shown on demand."""
STOPPED = {
    "rounds": "all rounds were done",
    "verdict": "its own feedback found nothing wrong",
    "agreement": "the answer stayed the same",
    "sources": "the sources of feedback found nothing wrong",
    "cut": "a limit of tokens or turns cut it",
}
COLOURS = ("s0", "s1", "s3", "s4", "s5", "s6", "s7")
"""Styles of the strategies; s2 has the colour of refining."""
TURN_TITLES = {"answer": "Answer", "feedback": "Own feedback", "request": "Request"}


@dataclass(frozen=True)
class ShownTurn:
    """Hold a turn of a chain.

    Attributes:
        right: What the judge said of an answer; None for other turns, and where the judge failed.
    """

    title: str
    kind: str
    text: str
    tokens: int
    right: bool | None
    failed: bool


@dataclass(frozen=True)
class ShownChain:
    """Hold a chain; change: a key of CHANGES."""

    change: str
    item: str
    prompt: str
    expected: str
    turns: list[ShownTurn]
    stopped: str


@dataclass(frozen=True)
class Refinement:
    """Hold a task of self-refine.

    Attributes:
        sides: Summary under `refine` by side, before and after training.
        samples: Single answers of each problem.
        failed: Failures of judge and scores by side.
        chart: Accuracy by tokens of the newest side, refining and the strategies of the samples.
        verdicts: Sentences on each side: refining against the best strategy at equal tokens.
        facts: (name in words, key, {side: count or share}) of what the chains did.
        of: Side that the chains are of.
        counts: Number of chains by change.
        chains, more: Chains that are shown, and those that are folded.
    """

    task: str
    sides: dict[str, Mapping[str, Any]]
    samples: int
    failed: dict[str, dict[str, int]]
    chart: Chart
    verdicts: dict[str, str]
    facts: list[tuple[str, str, dict[str, float]]]
    of: str
    counts: dict[str, int]
    chains: list[ShownChain]
    more: list[ShownChain]


def refinements(run: Run) -> list[Refinement]:
    """Return a view of each task of self-refine; sides that are missing or damaged are left out."""
    out = []
    for row in run.rows():
        found = {name: e for name, e in run.sides(row.task) if isinstance(e.summary.get("refine"), Mapping)}
        if not found:
            continue
        newest = list(found)[-1]
        summaries = {name: e.summary for name, e in found.items()}
        groups = _by_change(found[newest].items)
        out.append(
            Refinement(
                task=row.task,
                sides={name: s["refine"] for name, s in summaries.items()},
                samples=int(summaries[newest]["samples"]),
                failed={name: s["failed"] for name, s in summaries.items() if s.get("failed")},
                chart=_chart(row.task, newest, summaries[newest]),
                verdicts={name: refining_in_words(s["refine"]) for name, s in summaries.items()},
                facts=_facts({name: s["refine"] for name, s in summaries.items()}),
                of=newest,
                counts={name: len(group) for name, group in groups.items()},
                chains=[shown_chain(n, i) for n, group in groups.items() for i in group[: CHAINS_SHOWN[n]]],
                more=[
                    shown_chain(n, i) for n, group in groups.items() for i in group[CHAINS_SHOWN[n] : CHAINS_FOLDED[n]]
                ],
            )
        )
    return out


def refining_in_words(refine: Mapping[str, Any]) -> str:
    """Return sentences: accuracy before and after refining, and against the best strategy at equal tokens."""
    first, last, change = refine["points"][0], refine["points"][-1], refine["change"]
    said = [
        f"Refining took accuracy from {_percent(first['value'])} to {_percent(last['value'])} "
        f"({_points(change)}), for {format_fixed(last['tokens'], 0)} tokens a problem in place of "
        f"{format_fixed(first['tokens'], 0)}."
    ]
    equal = refine["equal_tokens"]
    if not equal["against"]:
        return said[0]
    best = max(equal["against"], key=lambda a: float(a["value"]))
    cost = best if "k" in best else equal  # of older runs all strategies cost the same
    k, name = format_fixed(cost["compared_at"], 1), strategy(best["name"])
    if cost["enough"]:
        said.append(f"At equal tokens ({k} samples) the best of the others, {name}, has {_percent(best['value'])}:")
    else:
        k = f"{cost['compared_at']:g}"
        said.append(
            f"The same tokens pay for {format_fixed(cost['k'], 1)} samples, and there are {k}: set n higher. "
            f"With all {k} the best of the others, {name}, has {_percent(best['value'])}:"
        )
    shown = best["low"] > 0 or best["high"] < 0
    worth = "refining is better" if best["low"] > 0 else "refining is worse" if shown else "no difference is shown"
    said.append(f"{worth} ({_points(best)}).")
    return " ".join(said)


def _facts(sides: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, dict[str, float]]]:
    """Return what the chains did, as rows of a table by side."""
    rows = [
        (CHANGES["gained"], "gained", {side: s["gained"] for side, s in sides.items()}),
        (CHANGES["lost"], "lost", {side: s["lost"] for side, s in sides.items()}),
        ("answers changed", "changed", {side: float(s["changed"]) for side, s in sides.items()}),
    ]
    reasons = dict.fromkeys([*STOPPED, *(why for s in sides.values() for why in s["stopped"])])
    for why in reasons:
        counts = {side: s["stopped"].get(why, 0) for side, s in sides.items()}
        if any(counts.values()):
            rows.append((f"ended: {STOPPED.get(why, why)}", f"stopped.{why}", counts))
    for name, title in (("written", "tokens that it wrote"), ("requests", "tokens of requests")):
        rows.append((title, name, {side: float(s["tokens"][name]) for side, s in sides.items()}))
    external = {side: float(s["tokens"]["external"]) for side, s in sides.items()}
    if any(external.values()):
        rows.append(("tokens of other models, read and written", "external", external))
    return rows


def _points(change: Mapping[str, Any]) -> str:
    size, low, high = (format_fixed(100 * float(change[key]), 1, sign=True) for key in ("difference", "low", "high"))
    return f"{size} points, 95% interval {low} to {high}"


def _percent(value: float) -> str:
    return f"{format_fixed(100 * float(value), 1)}%"


def _chart(task: str, side: str, summary: Mapping[str, Any]) -> Chart:
    """Return accuracy by tokens: the strategies of the samples, and refining after each round with its interval."""
    points = summary["refine"]["points"]
    labels = [
        f"refining, round {p['k']}, {format_fixed(p['tokens'], 0)} tokens: {format_fixed(p['value'], 3)} "
        f"({format_fixed(p['low'], 3)} to {format_fixed(p['high'], 3)})"
        for p in points
    ]
    tokens, value, low, high = ([float(p[key]) for p in points] for key in ("tokens", "value", "low", "high"))
    refining = Series(
        "refining", tokens, value, low, high, "accent", points=True, labels=labels, sizes=[9.0] * len(points)
    )
    strategies = [s for s in summary["strategies"] if s["name"] != "pass"]
    others = [
        strategy_curve(strategy(s["name"]), COLOURS[i % len(COLOURS)], s["points"]) for i, s in enumerate(strategies)
    ]
    everything = [p for s in strategies for p in s["points"]] + list(points)
    series = [refining, *others]
    spoken = "; ".join(
        f"{s.name}: from {s.y[0]:.3f} at {s.x[0]:.0f} tokens to {s.y[-1]:.3f} at {s.x[-1]:.0f}" for s in series
    )
    title = f"Accuracy by tokens spent, {side} training"
    return Chart(
        f"{task}.refining", title, "refining, and samples of single answers", series, f"{title}. {spoken}",
        x="tokens", x_log=True, y_range=accuracy_range(everything), percent=True,
    )  # fmt: skip


def _by_change(items: Sequence[JsonDict]) -> dict[str, list[JsonDict]]:
    """Return items with a chain by what became of the answer, those whose chains are longest first."""
    groups: dict[str, list[JsonDict]] = {name: [] for name in CHANGES}
    for item in items:
        if isinstance(item.get("chain"), Mapping):
            groups[_change(item)].append(item)
    return {name: sorted(group, key=lambda i: -len(i["chain"]["turns"])) for name, group in groups.items()}


def _change(item: Mapping[str, Any]) -> str:
    answers = item["chain"]["answers"]
    both = bool(answers[0]["right"]), bool(answers[-1]["right"])
    return {(False, True): "gained", (True, False): "lost", (False, False): "wrong"}.get(both, "right")


def shown_chain(change: str, item: Mapping[str, Any]) -> ShownChain:
    """Return the chain of an item, whose answer became what `change` says."""
    chain, turns = item["chain"], []
    answers = iter(chain["answers"])
    for number, turn in enumerate(chain["turns"]):
        judged = next(answers) if turn["kind"] == "answer" else {}
        title = TURN_TITLES.get(turn["kind"], turn["kind"])
        failed = "judge" in judged and judged["judge"] is None
        right = None if failed or not judged else bool(judged["right"])
        title = "First answer" if number == 0 else "Revision" if turn["kind"] == "answer" else title
        turns.append(ShownTurn(title, turn["kind"], turn["text"], int(turn["tokens"]), right, failed))
    stopped = STOPPED.get(chain["stopped"], str(chain["stopped"]))
    return ShownChain(
        change, str(item["id"]), plain_text(item["prompt"]), plain_text(item.get("expected")), turns, stopped
    )
