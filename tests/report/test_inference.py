"""The charts of accuracy against tokens: what is drawn is what was measured."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import posttrain
from posttrain.report import build_report
from posttrain.report.evaluations import panels
from posttrain.report.load import read
from posttrain.report.terminal import sampling_tables
from tests.report.test_page import Page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages and an evaluation with a score, measured at every stage; and a stage that makes data."""
    sampling = {"max_tokens": 24}
    judge = {"kind": "function", "function": "short"}
    recipe = posttrain.Recipe.model_validate(
        {
            "name": "many",
            "model": {"source": "tiny:llama"},
            "evaluate_stages": True,
            "stages": [
                {"name": "one", "data": {"source": "lab:words", "rows": [0, 8], "chat": False}, "max_steps": 2},
                {"method": "rejection_sampling", "name": "mine", "problems": {"kind": "lab", "size": 4},
                 "rewards": {"terms": [{"kind": "length", "max": 60}]}, "threshold": -9,
                 "sampler": {"max_tokens": 90}},
                {"name": "two", "data": {"source": "stage:mine", "chat": False}, "max_steps": 2},
            ],
            "evaluate": [
                {"name": "sums", "kind": "sample", "problems": {"kind": "lab", "size": 6, "held_out": True}, "n": 4,
                 "judge": judge, "sampler": sampling, "vote": "whole", "headline": "best",
                 "rank_by": [{"kind": "length", "name": "brevity", "target": 0, "width": 24}]},
            ],
        }
    )  # fmt: skip

    def short(text: str, example: dict[str, Any]) -> float:
        return float(len(text) % 3 == 0)

    folder = tmp_path_factory.mktemp("many") / "run"
    posttrain.run(recipe, folder, rewards={"short": short})
    return folder


def test_the_curves_are_the_summaries(run: Path) -> None:
    found = read(run)
    (panel,) = panels(found)
    assert (panel.task, panel.samples, panel.sides) == ("sums", 4, ["before", "after"])
    together, *charts = panel.charts
    assert [c.title for c in charts] == [
        "one sample", "pass@k", "majority vote", "best of k by brevity", "vote weighted by brevity",
    ]  # fmt: skip
    assert [s.name for s in together.series] == [c.title for c in charts]
    for side in ("before", "after"):
        summary = getattr(found, side)["sums"].summary
        for strategy, chart in zip(summary["strategies"], charts, strict=True):
            (line,) = (s for s in chart.series if s.name == side)
            points = strategy["points"]
            for drawn, key in ((line.x, "tokens"), (line.y, "value"), (line.low, "low"), (line.high, "high")):
                assert drawn == [p[key] for p in points]
            assert line.x == sorted(line.x) and chart.y_range[0] <= min(line.low) <= max(line.high) <= chart.y_range[1]
            assert [f"k = {p['k']}, " in label for p, label in zip(points, line.labels, strict=True)]
            drawn = json.loads(chart.data)
            assert drawn["x_log"] and drawn["percent"] and len(drawn["series"]) == 2


def test_stages_are_known_by_what_they_make(run: Path) -> None:
    """As the run wrote it, and as runs were written before it did."""
    found = read(run)
    assert [found.makes(name) for name in ("one", "mine", "two")] == ["model", "data", "model"]
    for record in found.manifest["stages"]:
        assert record.pop("makes")
    assert [found.makes(name) for name in ("one", "mine", "two", "unknown")] == ["model", "data", "model", "model"]
    page = build_report(run).read_text()
    assert "<h3>Stage 1: one</h3>" in page and "<h3>Stage 3: two</h3>" in page and "No step" not in page


def test_the_page_has_charts_points_and_stages(run: Path) -> None:
    page = Page(build_report(run).read_text())
    found = read(run)
    before = {s["name"]: s["points"] for s in found.before["sums"].summary["strategies"]}
    charts = [a["data-chart"] for t, a in page.elements if t == "figure" and "data-chart" in a]
    assert charts[:6] == [f"sums.{n}" for n in ("all", "mean", "pass", "vote", "best:brevity", "weighted:brevity")]
    assert float(page.values["sums.majority vote.4.before"]) == before["vote"][-1]["value"]
    for column, name in (("before", "before"), ("after one", "0-one"), ("after two", "after")):
        side = found.between["one"] if name == "0-one" else getattr(found, name)
        assert float(page.values[f"sums.stage.{column}"]) == side["sums"].summary["value"]
    assert page.values["stage.mine.made.samples"] == "32"
    assert "Rejection sampling" in page.text and "Of 6 questions" in page.text
    comparison = found.comparison[0]
    assert comparison["before"]["value"] == pytest.approx(before["best:brevity"][-1]["value"])  # the headline


def test_a_page_without_such_an_evaluation_has_no_such_section(make_run: Any) -> None:
    page = Page(build_report(make_run()).read_text())
    assert "#sampling" not in [a.get("href") for _, a in page.elements]


def test_the_terminal_s_table(run: Path) -> None:
    out = Console(file=io.StringIO(), width=80)
    (table,) = sampling_tables(run / "evaluations" / "after")
    out.print(table)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    points = {s["name"]: s["points"] for s in read(run).after["sums"].summary["strategies"]}
    assert "what k of 4 samples are worth, after" in " ".join(text.split())
    for k in (1, 2, 4):
        assert f"k = {k}" in text
    assert f"{points['pass'][2]['value']:.3f}" in text and "majority vote" in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert sampling_tables(run / "stages") == []
