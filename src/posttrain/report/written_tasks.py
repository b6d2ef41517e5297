"""Show what a Self-Instruct stage wrote: how many tasks were kept, why others were not, how they differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.errors import CheckpointError
from posttrain.core.files import read_lines
from posttrain.report.load import numbered_folders, read_json

ROWS_SHOWN = 6
"""Rows on the page."""


@dataclass(frozen=True)
class WrittenTasksView:
    """Hold a stage's counts and some of its rows.

    Attributes:
        stage: Name of the stage.
        tasks: Counts of tasks.
        rows: Counts of rows.
        shown: Rows that the model wrote.
        bars: (title, [(interval, count)], largest count) of each histogram.
    """

    stage: str
    tasks: dict[str, Any]
    rows: dict[str, Any]
    shown: list[dict[str, Any]]
    bars: list[tuple[str, list[tuple[str, int]], int]]


def written_tasks(run: Path, notes: list[str]) -> list[WrittenTasksView]:
    """Return a view of every finished Self-Instruct stage; what can't be read is added to `notes`."""
    out = []
    for folder in numbered_folders(run / "stages"):
        stats = read_json(folder / "data" / "stats.json", notes)
        if not isinstance(stats, dict) or "similarity" not in (stats.get("tasks") or {}):
            continue
        tasks = stats["tasks"]
        try:
            rows = [r for r in read_lines(folder / "data" / "rows.jsonl") if r.get("origin") != "seed"]
        except (CheckpointError, OSError) as error:
            notes.append(f"rows of stage {folder.name} can't be read: {error}")
            rows = []
        bars = [
            ("ROUGE-L to the nearest seed task", _bars(tasks["similarity"])),
            ("Words of a task", _bars(tasks["instruction_words"])),
        ]
        step = max(1, len(rows) // ROWS_SHOWN)
        out.append(
            WrittenTasksView(
                folder.name.split("-", 1)[1],
                tasks,
                stats["rows"],
                rows[::step][:ROWS_SHOWN],
                [(title, pairs, max([1, *(n for _, n in pairs)])) for title, pairs in bars],
            )
        )
    return out


def _bars(histogram: dict[str, list[Any]]) -> list[tuple[str, int]]:
    edges, counts = histogram["edges"], histogram["counts"]
    names = [f"{a:g} to {b:g}" for a, b in zip(edges, edges[1:], strict=False)] + [f"from {edges[-1]:g}"]
    return list(zip(names, counts, strict=True))
