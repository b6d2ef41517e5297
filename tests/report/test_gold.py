"""Proxy and gold over the KL: the fit by hand, what is drawn is what was measured, nothing where nothing was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from posttrain.report import build
from posttrain.report.gold import fit, measured
from posttrain.report.load import read


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


def test_what_is_drawn_is_what_was_measured(tmp_path: Path) -> None:
    """Proxy 1 → 5 → 9 in units of 2, gold 0 → 8 → 2 in units of 4, at KLs of 0, 4 and 16: d = 0, 2, 4."""
    run = read(
        folder(tmp_path, record(0, 0, 1, 0), {"step": 5, "reward": 3}, record(10, 4, 5, 8), record(20, 16, 9, 2))
    )
    (view,) = measured(run)
    proxy, gold = view.curves
    assert (view.stage, proxy.name, gold.name, view.fit) == ("policy", "proxy", "gold", "")
    assert [x for x, _, _ in gold.dots] == pytest.approx([0, 100 * 2 / 4.2, 100 * 4 / 4.2])
    assert [what for _, _, what in gold.dots] == [
        "gold, step 0: +0.00 at a KL of 0.00 nats",
        "gold, step 10: +2.00 at a KL of 4.00 nats",
        "gold, step 20: +0.50 at a KL of 16.00 nats",
    ]
    assert proxy.dots[-1][2] == "proxy, step 20: +4.00 at a KL of 16.00 nats"
    assert proxy.dots[0][1] > proxy.dots[1][1] > proxy.dots[2][1]  # higher is higher on the page
    assert view.rows[1] == (10, 4.0, {"proxy": (5.0, 4.0, 6.0), "gold": (8.0, 7.0, 9.0)})
    assert "moved by +4.00 standard deviations, gold by +0.50" in view.verdict
    assert "highest at step 10 (+2.00). Their intervals are apart" in view.verdict  # 2 + 1 < 8 - 1
    page = build(run.folder).read_text()
    assert 'data-metric="gold.policy.20.gold" data-value="2.0"' in page and 'href="#gold"' in page


def test_where_gold_goes_on_rising_nothing_is_claimed(tmp_path: Path) -> None:
    (view,) = measured(read(folder(tmp_path, record(0, 0, 1, 0), record(10, 4, 5, 8))))
    assert view.verdict.endswith("no over-optimisation is seen.")


def test_a_drop_within_the_intervals_may_be_chance(tmp_path: Path) -> None:
    (view,) = measured(read(folder(tmp_path, record(0, 0, 1, 0), record(10, 4, 5, 8), record(20, 9, 6, 7))))
    assert "Their intervals overlap" in view.verdict


def test_absent_where_there_is_no_gold(tmp_path: Path) -> None:
    run = read(folder(tmp_path, {"step": 1, "reward": 0.5, "loss": 1.0}))
    assert measured(run) == [] and 'id="gold"' not in build(run.folder).read_text()
