"""The before/after table that a run ends with in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from posttrain.report.load import read
from posttrain.report.words import p_value, score


def summary_table(run_folder: Path) -> Table:
    """Task with its number of items, before, after, difference, p and intervals; "–" for what was not measured.

    Raises CheckpointError where there is no such folder.
    """
    table = Table(title="Before and after, with 95% intervals")
    table.add_column("task", overflow="fold")
    for name in ("before", "after", "difference", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in read(Path(run_folder)).rows():

        def span(side: dict[str, Any] | None, key: str = "value", metric: str = row.metric) -> str:
            if side is None:
                return "–"
            sign = key == "difference"
            value, low, high = (score(side.get(k), metric, sign) for k in (key, "low", "high"))
            return f"{value}\n\\[{low}, {high}]"  # escaped: brackets are rich's markup

        p = p_value((row.comparison or {}).get("p_value"))
        table.add_row(
            f"{row.task}\n{row.n:,} items", span(row.before), span(row.after), span(row.comparison, "difference"), p
        )
    return table
