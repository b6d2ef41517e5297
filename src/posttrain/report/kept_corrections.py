"""Show what a stage of corrections made: rows that were kept, why other chains were dropped, what revisions did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.errors import CheckpointError
from posttrain.core.files import read_lines
from posttrain.report.formatting import plain_text
from posttrain.report.load import numbered_folders, read_json

ROWS_OF_EACH = 4
"""Rows of each outcome on the page."""
OUTCOME_WORDS = {"corrected": "a right answer after a wrong one", "kept right": "a right answer that stayed right"}
FIGURE_WORDS = {
    "right_before": "right first answers",
    "right_after": "right last answers",
    "wrong_to_right": "wrong → right",
    "right_to_wrong": "right → wrong",
    "changed": "changed answers",
}


@dataclass(frozen=True)
class DroppedChains:
    """Hold the chains that were dropped for one reason.

    Attributes:
        reason: Why.
        count: How many.
        first, last: First and last answer of one of them; empty if none was kept as an example.
        source: Place of its problem.
    """

    reason: str
    count: int
    first: str
    last: str
    source: str


@dataclass(frozen=True)
class KeptRow:
    """Hold a row that was kept: its outcome, and (role, text, True if the turn carries loss) of its turns."""

    outcome: str
    source: str
    turns: list[tuple[str, str, bool]]


@dataclass(frozen=True)
class CorrectionsView:
    """Hold what a stage of corrections made.

    Attributes:
        stage: Name of the stage.
        chains: Number of chains.
        kept: (key, words, number of rows) of each outcome.
        dropped: Chains without a row, by reason.
        figures: (key, words, share of the scored chains).
        problems: Number of problems.
        with_a_row: Problems that have a row.
        tables: (file, number of rows) of what was made besides.
        rows: Some of the rows.
    """

    stage: str
    chains: int
    kept: list[tuple[str, str, int]]
    dropped: list[DroppedChains]
    figures: list[tuple[str, str, float]]
    problems: int
    with_a_row: int
    tables: list[tuple[str, int]]
    rows: list[KeptRow]


def kept_corrections(run: Path, notes: list[str]) -> list[CorrectionsView]:
    """Return a view of every finished stage of corrections; what can't be read is added to `notes`."""
    out = []
    for folder in numbered_folders(run / "stages"):
        stats = read_json(folder / "data" / "stats.json", notes)
        if not isinstance(stats, dict) or "wrong_to_right" not in (stats.get("figures") or {}):
            continue
        try:
            rows = list(read_lines(folder / "data" / "rows.jsonl"))
        except (CheckpointError, OSError) as error:
            notes.append(f"rows of stage {folder.name} can't be read: {error}")
            rows = []
        out.append(
            CorrectionsView(
                stage=folder.name.split("-", 1)[1],
                chains=int(stats["chains"]),
                kept=[(key, OUTCOME_WORDS.get(key, key), int(count)) for key, count in stats["kept"].items()],
                dropped=[
                    _dropped(why, int(n), stats.get("examples") or {}) for why, n in (stats["dropped"] or {}).items()
                ],
                figures=[(key, FIGURE_WORDS.get(key, key), float(share)) for key, share in stats["figures"].items()],
                problems=int(stats["problems"]),
                with_a_row=int(stats["problems with a row"]),
                tables=[(f"data/{name}.jsonl", int(stats[name])) for name in ("critic", "critiques") if name in stats],
                rows=[_row(row) for key in OUTCOME_WORDS for row in _some(rows, key)],
            )
        )
    return out


def _dropped(reason: str, count: int, examples: Mapping[str, Any]) -> DroppedChains:
    shown: Mapping[str, Any] = next(iter(examples.get(reason) or []), {})
    first, last = plain_text(shown.get("first")), plain_text(shown.get("last"))
    return DroppedChains(reason, count, first, last, str(shown.get("source", "")))


def _some(rows: list[Any], outcome: str) -> list[Any]:
    """Return a few rows of an outcome, from all over the file."""
    found = [row for row in rows if row.get("outcome") == outcome]
    return found[:: max(1, len(found) // ROWS_OF_EACH)][:ROWS_OF_EACH]


def _row(row: Mapping[str, Any]) -> KeptRow:
    turns = [
        (str(m["role"]), plain_text(m.get("content")), m["role"] == "assistant" and bool(m.get("train", True)))
        for m in row["messages"]
    ]
    return KeptRow(str(row["outcome"]), str(row.get("source", "")), turns)
