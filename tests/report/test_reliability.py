"""The reliability plot of a reward model: each bin where its numbers say, and the line on which it would be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import posttrain
from posttrain.report import build
from posttrain.report.load import read
from posttrain.report.scored import scored


def test_bins_lie_where_their_numbers_say(tmp_path: Path) -> None:
    """By hand: what is said runs from 1/2 to 1 over the width, what was from the lowest interval's end to 1 upwards."""
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
    (view,) = scored(read(folder))
    (one,), (two, three) = view.points["before"], view.points["after"]
    # The plot's bottom is 0.4: 0.6 lies two thirds of the way down, its interval from one third to the bottom.
    assert (one.x, one.y, one.high, one.low) == pytest.approx((0, 200 / 3, 100 / 3, 100))
    assert (two.x, two.y, two.high, two.low) == pytest.approx((50, 50, 100 / 6, 500 / 6))
    assert (three.x, three.y, three.size) == pytest.approx((90, 0, 7 + 13 / 2))
    assert "said 0.75, was 0.70 (0.50 to 0.90), 3 items" in two.label
    # Right about itself: from 1/2, a sixth above the bottom, to 1 in the corner.
    assert view.diagonal == f"M0,{400 * 0.5 / 0.6:.1f}L1000,0"
    page = build(folder).read_text()
    assert page.count('class="ball after"') == 2 and page.count('class="ball before"') == 1
    assert 'style="left:50.00%;top:50.00%' in page and f'd="{view.diagonal}"' in page
