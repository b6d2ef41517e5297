"""Every stage in one table and on one chart: figures, paired differences, sizes and speeds are those of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.core.item_statistics import compare, summarize
from posttrain.report import build_report
from posttrain.report.load import read
from posttrain.report.stage_comparison import compare_stages, frontier
from posttrain.report.terminal import stage_tables
from tests.report.test_page import Page

RIGHT = {
    "before": [1, 1, 0, 1, 0, 1],
    "0-sft": [1, 1, 1, 1, 1, 1],
    "1-prune": [1, 0, 0, 1, 0, 1],
    "after": [1] * 5 + [0],
}
BYTES = {"before": 540e6, "0-sft": 540e6, "1-prune": 380e6, "after": 120e6}
RATES = {"before": 30.0, "0-sft": 31.0, "1-prune": 45.0, "after": 80.0}


def items_of(side: str) -> list[dict[str, Any]]:
    return [{"id": i, "correct": bool(r), "prompt": "p", "expected": "a"} for i, r in enumerate(RIGHT[side])]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    stages = [{"name": n, "method": "sft", "makes": "model", "status": "done"} for n in ("sft", "prune", "int4")]
    (tmp_path / "manifest.json").write_text(json.dumps({"status": "done", "seed": 3, "stages": stages}))
    (tmp_path / "recipe.yaml").write_text("name: small\nevaluate: [{name: reviews}]\n")
    for side, rate in RATES.items():
        folder = tmp_path / "evaluations" / side
        folder.mkdir(parents=True)
        items = items_of(side)
        (folder / "reviews.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
        summary = {"task": "reviews", "kind": "choice", **summarize(items, "choice")}
        (folder / "reviews.json").write_text(json.dumps(summary))
        rates = {
            name: {"value": k * rate, "low": k * rate - 1, "high": k * rate + 2}
            for name, k in (("prefill", 10), ("decode", 1), ("batch", 4))
        }
        speed = {
            "task": "speed",
            "kind": "speed",
            "metric": "tokens/s",
            "value": rate,
            "low": rate,
            "high": rate,
            "n": 5,
        }
        speed |= {"rates": rates, "disk_bytes": int(BYTES[side]), "parameters": 134_000_000, "peak_memory": 600_000_000}
        (folder / "speed.json").write_text(json.dumps(speed))
        (folder / "speed.jsonl").write_text(json.dumps({"id": 0, "value": rate}) + "\n")
    return tmp_path


def test_the_table_has_every_stage_with_paired_differences(run: Path) -> None:
    found = compare_stages(read(run))
    assert found is not None
    assert [line.name for line in found.lines] == ["before", "after sft", "after prune", "after int4"]
    assert [row.task for row in found.tasks] == ["reviews"]  # the speed is no task of items
    first, second, third, last = (line.figures[0] for line in found.lines)
    assert first is not None and first.start is None and first.previous is None
    assert second is not None and second.start is not None and second.previous is None  # the stage before is the start
    assert third is not None and last is not None
    assert last.start == compare(items_of("before"), items_of("after"), "choice", seed=3)
    assert last.previous == compare(items_of("1-prune"), items_of("after"), "choice", seed=3)
    assert third.previous is not None and third.previous["difference"] == pytest.approx(-0.5)
    assert found.lines[3].sizes["disk_bytes"] == (120e6, "120 MB")
    assert found.lines[2].rates["batch"] == {"value": 180.0, "low": 179.0, "high": 182.0}


def test_the_charts_are_the_figures_by_size_and_by_speed(run: Path) -> None:
    found = compare_stages(read(run))
    assert found is not None
    by_size, by_speed = found.charts
    assert [s.x[0] for s in by_size.series[1:]] == [540.0, 540.0, 380.0, 120.0]
    assert [s.x[0] for s in by_speed.series[1:]] == [30.0, 31.0, 45.0, 80.0]
    assert [s.y[0] for s in by_size.series[1:]] == [pytest.approx(sum(r) / 6) for r in RIGHT.values()]
    # Fine-tuning is best; int4 is smaller and faster; the pruned model is worse than int4 in both, the start than sft.
    assert (list(by_size.series[0].x), list(by_speed.series[0].x)) == ([120.0, 540.0], [31.0, 80.0])
    assert json.loads(by_size.data)["named"] is True


def test_the_page_and_the_terminal_have_them(run: Path) -> None:
    page = Page(build_report(run).read_text())
    assert page.count("section", id="stages") == 1
    assert page.metrics["after int4.disk_bytes"] == "120 MB"
    assert float(page.values["after prune.decode"]) == 45.0
    assert page.metrics["reviews.stage.after int4.start"] == "+0.167"
    assert page.metrics["reviews.stage.after int4.previous"] == "+0.333"
    assert "speed.before.value" not in page.values  # not in the table of tasks
    charts = [a["data-chart"] for t, a in page.elements if t == "figure" and "data-chart" in a]
    assert {"reviews.size_on_disk", "reviews.speed_of_decoding"} <= set(charts)
    (table,) = stage_tables(read(run))
    assert table.row_count == 4 and len(table.columns) == 6


def test_damaged_items_leave_the_figures(run: Path) -> None:
    (run / "evaluations" / "0-sft" / "reviews.jsonl").write_text('{"id": 0}\n')
    found = compare_stages(read(run))
    assert found is not None and found.lines[1].figures[0] is not None
    assert found.lines[1].figures[0].start is None and found.lines[3].figures[0].start is not None  # type: ignore[union-attr]


def test_the_frontier_by_hand() -> None:
    assert frontier([1, 2, 3], [5, 6, 4], more=False, higher=True) == [0, 1]
    assert frontier([1, 2, 3], [5, 6, 4], more=True, higher=False) == [2]
    assert frontier([2, 2], [1, 1], more=True, higher=True) == [0, 1]  # equal points: neither beats the other
    assert frontier([1, 2, 3], [5, 6, 4], more=True, higher=True) == [1, 2]
