"""The reliability plot of a reward model: each bin where its numbers say, and the line on which it would be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import posttrain
from posttrain.report import build_report
from posttrain.report.load import read
from posttrain.report.reward_models import held_out
from tests.report.test_page import Page


def test_bins_lie_where_their_numbers_say(tmp_path: Path) -> None:
    """Predicted from 1/2 to 1 across, observed up to 1 upwards, with intervals."""
    rows = [{"prompt": f"p{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"source": str(tmp_path / "pairs.jsonl")}
    stage = {"method": "reward_model", "name": "rm", "data": {**data, "rows": [0, 16]}, "max_steps": 1, "batch_size": 4}
    stage["held_out"] = {"data": {**data, "rows": [16, 24]}}
    recipe = posttrain.Recipe.model_validate({"name": "r", "model": {"source": "tiny:llama"}, "stages": [stage]})
    folder = posttrain.run(recipe, tmp_path / "run").folder
    path = folder / "stages" / "0-rm" / "held_out.json"
    found = json.loads(path.read_text())
    whole = {side: sum(b["n"] for b in found[side]["calibration"]["bins"]) for side in ("before", "after")}
    assert whole == {"before": 8, "after": 8}  # every held-out pair is in a bin
    found["before"]["calibration"]["bins"] = [{"said": 0.5, "was": 0.6, "low": 0.4, "high": 0.8, "n": 9}]
    found["after"]["calibration"]["bins"] = [
        {"said": 0.75, "was": 0.7, "low": 0.5, "high": 0.9, "n": 3},
        {"said": 0.95, "was": 1.0, "low": 0.8, "high": 1.0, "n": 1},
    ]
    path.write_text(json.dumps(found))
    (view,) = held_out(read(folder))
    ideal, before, after = view.chart.series
    assert (before.x, before.y, before.low, before.high) == ([0.5], [0.6], [0.4], [0.8])
    assert (after.x, after.y, after.low, after.high) == ([0.75, 0.95], [0.7, 1.0], [0.5, 0.8], [0.9, 1.0])
    assert after.sizes == pytest.approx([7 + 13 * 0.75**0.5, 7 + 13 / 2])  # three of four items, and one
    assert "predicted 0.75, observed 0.70 (0.50 to 0.90), 3 items" in after.labels[0]
    # What it predicts of the answer it prefers is 1/2 or more; the axis below ends at the lowest interval.
    assert (view.chart.x_range, view.chart.y_range) == ((0.5, 1.0), (0.4, 1.0))
    assert (ideal.x, ideal.y, ideal.line) == ([0.5, 1.0], [0.5, 1.0], "dashed")  # calibrated predictions
    page = Page(build_report(folder).read_text())
    figure = next(a for t, a in page.elements if a.get("data-plot") and "Reliability" in a["aria-label"])
    assert json.loads(figure["data-plot"])["series"][2]["y"] == [0.7, 1]
