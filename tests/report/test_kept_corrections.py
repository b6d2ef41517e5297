"""The section on corrections: every count is that of stats.json, with examples, and rows can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.report import build_report
from posttrain.report.kept_corrections import kept_corrections
from tests.report.conftest import EVIL, dump
from tests.report.test_page import Page


def row(outcome: str, number: int) -> dict[str, Any]:
    turns = [
        ("user", f"2+{number}? {EVIL}", None),
        ("assistant", "6", False),
        ("user", "again", None),
        ("assistant", "5", None),
    ]
    messages = [{"role": r, "content": c} | ({} if t is None else {"train": t}) for r, c, t in turns]
    return {"messages": messages, "outcome": outcome, "source": f"q:{number}", "problem": number}


STATS = {
    "chains": 72,
    "kept": {"corrected": 9, "kept right": 3},
    "dropped": {"still wrong": 50, "repeated": 10},
    "examples": {
        "still wrong": [{"problem": 4, "source": "q:4", "first": f"7 {EVIL}", "last": "8", "rewards": [0, 0]}]
    },
    "figures": {
        "right_before": 0.25,
        "right_after": 0.5,
        "wrong_to_right": 0.3,
        "right_to_wrong": 0.05,
        "changed": 0.75,
    },
    "problems": 9,
    "problems with a row": 5,
    "tokens": 100,
    "critic": 12,
}


def test_every_count_is_the_stage_s(tmp_path: Path) -> None:
    data = tmp_path / "stages" / "0-corrections" / "data"
    rows = [row("corrected", i) for i in range(9)] + [row("kept right", i) for i in range(3)]
    dump(data / "stats.json", STATS)
    dump(data / "rows.jsonl", rows, lines=True)
    text = build_report(tmp_path).read_text()
    page = Page(text)
    assert page.metrics["corrections.corrections.kept.corrected"] == "9"
    assert page.metrics["corrections.corrections.kept.kept right"] == "3"
    assert page.metrics["corrections.corrections.dropped.still wrong"] == "50"
    assert float(page.values["corrections.corrections.changed"]) == 0.75
    assert 'id="corrections"' in text and "data/critic.jsonl has 12 rows for a critic" in text
    assert "7 &lt;/script&gt;" in text and EVIL not in text
    (view,) = kept_corrections(tmp_path, [])
    assert [d.reason for d in view.dropped] == ["still wrong", "repeated"] and view.dropped[1].first == ""
    assert [r.outcome for r in view.rows] == ["corrected"] * 4 + ["kept right"] * 3
    assert [t for _, _, t in view.rows[0].turns] == [False, False, False, True]


def test_rows_that_are_damaged_are_a_note(tmp_path: Path) -> None:
    data = tmp_path / "stages" / "0-corrections" / "data"
    dump(data / "stats.json", STATS)
    (data / "rows.jsonl").write_text("not a row\n{}\n")
    notes: list[str] = []
    (view,) = kept_corrections(tmp_path, notes)
    assert view.rows == [] and "rows of stage 0-corrections" in notes[0]
    (data / "stats.json").write_text(json.dumps({"tasks": {}}))
    assert kept_corrections(tmp_path, []) == []
