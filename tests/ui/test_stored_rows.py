"""Every row is on one page, filters find what a loop over all rows finds, and a judge's answers are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.judge.answer_store import Store
from posttrain.sampling.rollout_store import read_rollouts, rollouts_path
from posttrain.ui import stored_rows
from posttrain.ui.rollout_pages import RowQuery
from posttrain.ui.stored_rows import StoredRows, row_sources
from tests.ui.conftest import STEPS


def walk(source: StoredRows, **query) -> list[dict]:
    """Return the rows of all pages."""
    rows, at = [], ""
    for _ in range(100):
        page = source.page(RowQuery(**query, at=at))
        rows += page.rows
        at = page.following
        if not at:
            return rows
    raise AssertionError("no end")


def name(row: dict) -> tuple[int, int, int]:
    return row["step"], row["group"], row["rollout"]


@pytest.mark.parametrize("seconds", [10.0, -1.0], ids=["in time", "interrupted after each step"])
def test_rollouts(root: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(stored_rows, "PER_PAGE", 7)
    monkeypatch.setattr(stored_rows, "SEARCH_SECONDS", seconds)
    source = row_sources(root / "first", {})[0]
    assert (source.kind, source.title) == ("rollouts", "sft: rollouts")
    rows = [r for step in range(1, STEPS + 1) for r in read_rollouts(rollouts_path(source.path, step))]
    oldest = [name(r) for r in rows]
    assert [name(r) for r in walk(source, order="oldest")] == oldest
    newest = sorted(oldest, key=lambda n: -n[0])
    assert [name(r) for r in walk(source)] == newest
    for query, keep in (
        ({"text": "walrus"}, lambda r: "WALRUS" in r["completion"]),
        ({"text": "3 + 4"}, lambda r: True),
        ({"text": "(.*"}, lambda r: False),  # text, no pattern
        ({"low": 0.3, "high": 0.6}, lambda r: 0.3 <= r["reward"] <= 0.6),
        ({"finish": "length", "text": "WALRUS"}, lambda r: r["finish"] == "length" and "WALRUS" in r["completion"]),
    ):
        assert [name(r) for r in walk(source, **query)] == [
            n for n in newest if n in {name(r) for r in rows if keep(r)}
        ]
    assert [r["reward"] for r in walk(source, order="best")] == sorted((r["reward"] for r in rows), reverse=True)
    low = [r["reward"] for r in walk(source, order="worst", text="walrus")]
    assert low == sorted(r["reward"] for r in rows if "WALRUS" in r["completion"])
    shown = source.page(RowQuery()).rows[0]
    assert shown["parts"] == {"exact": shown["reward"]} and shown["prompt"] == "What is 3 + 4?"


def test_lines(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = next(s for s in row_sources(root / "first", {}) if s.path.name == "rows.jsonl")
    rows = [json.loads(line) for line in source.path.read_text().splitlines()]
    assert walk(source) == rows and len(source.page(RowQuery()).rows) == 20
    assert walk(source, text="GOOD 4") == [r for r in rows if "good 4" in r["chosen"]]
    monkeypatch.setattr(stored_rows, "SEARCH_SECONDS", -1.0)
    assert not source.page(RowQuery(text="good")).whole


def test_answers_of_a_judge(tmp_path: Path) -> None:
    store = Store(tmp_path / "judge.sqlite3")
    store.put([(f"k{i}", {"model": "m"}, {"prompt": f"100%_{i}"}, {"label": i}) for i in range(25)])
    store.close()
    recipe = {"stages": [{"method": "feedback", "judge": {"store": str(tmp_path / "judge.sqlite3")}}]}
    (source,) = row_sources(tmp_path, recipe)
    assert sorted(r["answer"]["label"] for r in walk(source)) == list(range(25))
    assert [r["question"]["prompt"] for r in walk(source, text="100%_7")] == ["100%_7"]
    assert walk(source, text="%0%_") == []
