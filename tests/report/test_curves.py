"""Curves in a notebook: the table has what was logged, the figure draws the page's charts, the HTML the results."""

import json
import math
import sys

import pytest

from posttrain.core.errors import CheckpointError, MissingExtraError
from posttrain.report.curves import curve_figure, curve_table, results_html
from posttrain.report.load import read


@pytest.fixture
def run(make_run):
    """A run with a second stage, whose held-out rows are measured at steps 0 and 2, and a phase of 0.5 s at step 1."""
    folder = make_run(steps=40)
    stage = folder / "stages" / "2-dpo"
    stage.mkdir()
    rows = [
        {"step": 0, "held_out/loss": 0.7},
        {"step": 1, "loss": 0.6, "lr": 1e-3},
        {"step": 2, "loss": 0.4, "lr": 1e-3},
    ]
    rows[2]["held_out/loss"] = 0.5
    timings = [{"step": 1, "seconds": 2.0, "phases": {"sample": 0.5}}, {"step": 2, "seconds": 1.0}]
    about = {"metrics": [{"name": "held_out/loss", "title": "Held out", "group": "Training", "over": "loss"}]}
    (stage / "method.json").write_text(json.dumps(about))
    for name, records in (("metrics", rows), ("timings", timings)):
        (stage / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return read(folder)


def test_the_table_has_a_row_a_step(run) -> None:
    table = curve_table(run)
    assert list(table.columns[:2]) == ["stage", "step"] and len(table) == 40 + 3
    assert list(table.step) == [*range(1, 41), 0, 1, 2] and set(table.stage) == {"sft", "dpo"}
    two = curve_table(run, "dpo").set_index("step")
    assert two["held_out/loss"][[0, 2]].tolist() == [0.7, 0.5] and math.isnan(two["held_out/loss"][1])
    assert two["phases/sample"][1] == 0.5 and two["seconds"][2] == 1.0 and math.isnan(two["loss"][0])
    with pytest.raises(CheckpointError, match="no steps of a stage 'sftt'; stages with steps: sft, dpo"):
        curve_table(run, "sftt")


def test_the_figure_draws_the_charts_of_the_page(run, monkeypatch: pytest.MonkeyPatch) -> None:
    plt = pytest.importorskip("matplotlib.pyplot", reason="extra: notebook")
    monkeypatch.setenv("MPLBACKEND", "agg")
    try:
        axes = {a.get_title(): a for a in curve_figure(run).axes}
        assert list(axes) == ["sft: Loss", "sft: Gradient norm", "sft: Learning rate", "dpo: Loss"]
        lines = axes["dpo: Loss"].get_lines()
        assert [line.get_ydata().tolist() for line in lines] == [pytest.approx([0.6, 0.4]), [0.7, 0.5]]
        assert [text.get_text() for text in axes["dpo: Loss"].get_legend().get_texts()] == ["training", "held out"]
        named = curve_figure(run, ["tokens_per_second", "lr"]).axes  # lr never changes in dpo: the page has no chart
        assert [a.get_title() for a in named] == ["sft: Speed", "sft: Learning rate", "dpo: lr"]
        assert named[0].get_ylabel() == "tokens/s" and named[2].get_lines()[0].get_ydata().tolist() == [1e-3, 1e-3]
        with pytest.raises(ValueError, match="no metric 'los' was logged; there are: .*loss"):
            curve_figure(run, ["los"])
    finally:
        plt.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # as if it could not be imported
    with pytest.raises(MissingExtraError, match=r"pip install 'posttrain\[notebook\]'"):
        curve_figure(run)


def test_the_results_are_a_table_of_html(run, evil) -> None:
    html = results_html(run, [("report", evil)])
    assert "<td>sentiment</td><td>400</td><td>0.770 [" in html and "&lt;/script&gt;" in html
    assert "<script" not in html and html.count("<tr>") == 3
