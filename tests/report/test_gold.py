"""Proxy and gold over the KL: the fit by hand, what is drawn is what was measured, nothing where nothing was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from posttrain.report import build_report
from posttrain.report.load import read
from posttrain.report.reward_models import fit, gold


def record(step: int, kl: float, proxy: float, gold: float) -> dict[str, Any]:
    around = {
        f"{n}_{side}": v + d for n, v in (("proxy", proxy), ("gold", gold)) for side, d in (("low", -1), ("high", 1))
    }
    return {"step": step, "reward": proxy, "kl_sequence": kl, "proxy": proxy, "gold": gold,
            "proxy_std": 2.0, "gold_std": 4.0, **around}  # fmt: skip


def folder(tmp_path: Path, *records: dict[str, Any]) -> Path:
    stage = tmp_path / "run" / "stages" / "0-policy"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path / "run"


def test_the_fit_by_hand() -> None:
    """R(d) = d (2 - ln d) at e^0, e^1, e^2, e^3 is 2, e, 0, -e^3; what is at d = 0 says nothing of the two numbers."""
    e = math.e
    assert fit([0, 1, e, e**2, e**3], [5.0, 2, e, 0, -(e**3)]) == pytest.approx((2.0, 1.0))
    assert fit([3e-5, 1, e, e**2], [0.0, 2, e, 0]) is None  # three points: the first is rounding
    assert fit([1, 1, 1, 1], [2.0, 2, 2, 2]) is None  # one place


def test_what_is_drawn_is_what_was_gold(tmp_path: Path) -> None:
    """Proxy 1 → 5 → 9 in units of 2, gold 0 → 8 → 2 in units of 4, at KLs of 0, 4 and 16: d = 0, 2, 4."""
    run = read(
        folder(tmp_path, record(0, 0, 1, 0), {"step": 5, "reward": 3}, record(10, 4, 5, 8), record(20, 16, 9, 2))
    )
    (view,) = gold(run)
    proxy, of_gold = view.chart.series
    assert (view.stage, proxy.name, of_gold.name, view.fitted) == ("policy", "proxy", "gold", "")
    assert proxy.x == of_gold.x == [0, 2, 4]
    assert (proxy.y, of_gold.y) == ([0, 2, 4], [0, 2, 0.5])
    assert (of_gold.low, of_gold.high) == ([-0.25, 1.75, 0.25], [0.25, 2.25, 0.75])
    assert of_gold.labels == [
        "gold, step 0: +0.00 at a KL of 0.00 nats",
        "gold, step 10: +2.00 at a KL of 4.00 nats",
        "gold, step 20: +0.50 at a KL of 16.00 nats",
    ]
    assert proxy.labels[-1] == "proxy, step 20: +4.00 at a KL of 16.00 nats"
    assert view.rows[1] == (10, 4.0, {"proxy": (5.0, 4.0, 6.0), "gold": (8.0, 7.0, 9.0)})
    assert "moved by +4.00 standard deviations, gold by +0.50" in view.verdict
    assert "highest at step 10 (+2.00). Their intervals do not overlap" in view.verdict  # 2 + 1 < 8 - 1
    page = build_report(run.folder).read_text()
    assert 'data-metric="gold.policy.20.gold" data-value="2.0"' in page and 'href="#gold"' in page


def test_where_gold_goes_on_rising_nothing_is_claimed(tmp_path: Path) -> None:
    (view,) = gold(read(folder(tmp_path, record(0, 0, 1, 0), record(10, 4, 5, 8))))
    assert view.verdict.endswith("there is no sign of over-optimisation.")


def test_a_drop_within_the_intervals_may_be_chance(tmp_path: Path) -> None:
    (view,) = gold(read(folder(tmp_path, record(0, 0, 1, 0), record(10, 4, 5, 8), record(20, 9, 6, 7))))
    assert "Their intervals overlap" in view.verdict


def test_absent_where_there_is_no_gold(tmp_path: Path) -> None:
    run = read(folder(tmp_path, {"step": 1, "reward": 0.5, "loss": 1.0}))
    assert gold(run) == [] and 'id="gold"' not in build_report(run.folder).read_text()
