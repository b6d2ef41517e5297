"""The section on refining: every figure is the summary's, the sentences say what is shown, and chains can be read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from posttrain.eval.refine_tasks import summary_of_refining
from posttrain.report import build_report
from posttrain.report.evaluations import panels
from posttrain.report.load import read
from posttrain.report.refinements import refinements, refining_in_words, shown_chain
from posttrain.report.terminal import sampling_tables
from tests.eval.test_refine_tasks import PROBLEMS, A, B, V, problem, task
from tests.report.conftest import EVIL, dump
from tests.report.test_page import Page

AFTER = [
    problem(i, [B, A], [10, 20], (16, 4, 0), "rounds", [(*B, 1), (*B, 2), (*B, 3), (*A, 4 * (i == 0))])
    for i in range(4)
]


def with_turns(item: dict[str, Any]) -> dict[str, Any]:
    """Give an item the turns of its answers, with a request between them, and a page's texts."""
    turns: list[dict[str, Any]] = []
    for answer in item["chain"]["answers"]:
        turns += [{"kind": "request", "text": f"again {EVIL}", "tokens": 4}] if turns else []
        turns.append({"kind": "answer", "text": answer["text"], "tokens": 6})
    return {
        **item, "prompt": f"What? {EVIL}", "expected": "1", "output": turns[-1]["text"],
        "chain": {**item["chain"], "turns": turns},
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refined")
    for side, items in (("before", PROBLEMS), ("after", AFTER)):
        value = {"task": "r", "kind": "sample", "metric": "accuracy", "value": 0.5, "low": 0.1, "high": 0.9, "n": 4}
        summary = {**value, **summary_of_refining(task(rank_by=[V]), items)}
        if side == "after":
            summary["failed"] = {"judge": 3}
        dump(folder / "evaluations" / side / "r.json", summary)
        dump(folder / "evaluations" / side / "r.jsonl", [with_turns(i) for i in items], lines=True)
    return folder


def test_every_figure_is_the_summary_s(run: Path) -> None:
    page = Page(build_report(run).read_text())
    for side in ("before", "after"):
        refine = json.loads((run / "evaluations" / side / "r.json").read_text())["refine"]
        for point in refine["points"]:
            assert float(page.values[f"r.round.{point['k']}.{side}"]) == point["value"]
            assert page.metrics[f"r.round.{point['k']}.{side}"] == f"{point['value']:.3f}"
        for name in ("gained", "lost", "changed"):
            assert float(page.values[f"r.{name}.{side}"]) == refine[name]
        for against in refine["equal_tokens"]["against"]:
            assert float(page.values[f"r.equal.{against['name']}.{side}"]) == against["difference"]
    assert page.metrics["r.changed.before"] == "50%" and page.metrics["r.gained.after"] == "4"
    assert page.values["r.stopped.verdict.before"] == "1" and page.values["r.stopped.verdict.after"] == "0"
    assert "r.external.before" in page.values and page.metrics["r.external.before"] == "2.5"
    assert "judge failed on 3 answers" in page.text and "Many samples a question" not in page.text
    assert not any(tag == "img" for tag, _ in page.elements) and EVIL in page.text


def test_the_chart_has_refining_among_the_strategies(run: Path) -> None:
    found = read(run)
    (view,) = refinements(found)
    assert panels(found) == []  # the section has all of it
    refining, *others = view.chart.series
    points = found.after["r"].summary["refine"]["points"]
    assert list(refining.x) == [p["tokens"] for p in points] and list(refining.y) == [p["value"] for p in points]
    assert refining.labels[1].startswith("refining, round 1, 24 tokens: 1.000")
    assert [s.name for s in others] == ["one sample", "majority vote", "best of k by v", "vote weighted by v"]
    assert len({s.style for s in view.chart.series}) == 5 and "s2" not in {s.style for s in others}
    lowest = min(p["low"] for s in found.after["r"].summary["strategies"] if s["name"] != "pass" for p in s["points"])
    assert view.chart.y_range is not None and view.chart.y_range[0] <= lowest and view.chart.y_range[1] == 1.0


def test_chains_are_shown_by_what_became_of_the_answer(run: Path) -> None:
    found = read(run)
    (view,) = refinements(found)
    assert (view.of, view.counts) == ("after", {"gained": 4, "lost": 0, "wrong": 0, "right": 0})
    assert [c.item for c in view.chains] == ["0", "1", "2"] and [c.item for c in view.more] == ["3"]
    chain = view.chains[0]
    assert [(t.title, t.right) for t in chain.turns] == [
        ("First answer", False), ("Request", None), ("Revision", True),
    ]  # fmt: skip
    assert chain.stopped == "all rounds were done"
    found.after.clear()
    (view,) = refinements(found)
    assert (view.of, view.counts) == ("before", {"gained": 1, "lost": 1, "wrong": 1, "right": 1})
    assert [c.change for c in view.chains] == ["gained", "lost", "wrong", "right"]


def test_a_failed_judge_shows_on_the_answer() -> None:
    item = with_turns(PROBLEMS[1])
    item["chain"]["answers"][2]["judge"] = None
    last = shown_chain("lost", item).turns[-1]
    assert (last.right, last.failed) == (None, True)


@pytest.mark.parametrize(
    ("low", "high", "enough", "said"),
    [
        (0.05, 0.3, True, "At equal tokens (2.5 samples) the best of the others, majority vote, has 50.0%: refin"),
        (-0.3, -0.05, True, "refining is worse (+20.0 points, 95% interval −30.0 to −5.0)."),
        (-0.1, 0.3, True, "no difference is shown"),
        (0.05, 0.3, False, "The same tokens pay for 9.5 samples, and there are 2.5: set n higher. With all 2.5"),
    ],
)  # fmt: skip
def test_the_sentences(low: float, high: float, enough: bool, said: str) -> None:
    points = [{"value": 0.5, "tokens": 20.4}, {"value": 0.7, "tokens": 61.6}]
    change = {"difference": 0.2, "low": 0.1, "high": 0.3}
    against = [
        {"name": "mean", "value": 0.4, "difference": 0.3, "low": 0.1, "high": 0.4},
        {"name": "vote", "value": 0.5, "difference": 0.2, "low": low, "high": high},
    ]
    equal = {"k": 2.5 if enough else 9.5, "compared_at": 2.5, "enough": enough, "against": against}
    text = refining_in_words({"points": points, "change": change, "equal_tokens": equal})
    assert text.startswith(
        "Refining took accuracy from 50.0% to 70.0% (+20.0 points, 95% interval +10.0 to +30.0), for 62 tokens a "
        "problem in place of 20."
    )
    assert said in text


def test_the_terminal_has_the_sentences(run: Path) -> None:
    (table,) = sampling_tables(run / "evaluations" / "after")
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    assert "Refining took accuracy from 0.0% to 100.0%" in " ".join(out.getvalue().split())
