"""Page through what a run has stored: rollouts, rows of data, items of evaluations, and a judge's answers.

Nothing is read as a whole. A page is looked for from where the last one ended; a search that takes longer than
`SEARCH_SECONDS` returns what it has found, with the place at which it continues.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.core.errors import CheckpointError, DataError
from posttrain.core.files import cache_folder, named_path
from posttrain.report.load import JsonDict, numbered_folders
from posttrain.sampling.rollout_store import rollout_steps
from posttrain.ui.rollout_pages import RowQuery, RowsPage, rollout_page

PER_PAGE = 20
SEARCH_SECONDS = 0.5
"""Seconds after which a search returns what it has."""
LOGS = ("metrics.jsonl", "timings.jsonl")


@dataclass(frozen=True)
class StoredRows:
    """Hold a store of rows of a run. kind: rollouts, lines or answers."""

    key: str
    title: str
    kind: str
    path: Path = field(repr=False)

    def page(self, query: RowQuery) -> RowsPage:
        """Return a page of its rows.

        Raises:
            DataError: The store can't be read, or the query names no place in it.
        """
        if self.kind == "rollouts":
            return rollout_page(self.path, query, PER_PAGE, SEARCH_SECONDS)
        return _lines_page(self.path, query) if self.kind == "lines" else _answers_page(self.path, query)


def row_sources(run: Path, recipe: Mapping[str, Any]) -> list[StoredRows]:
    """Return the stores of a run.

    Args:
        run: Its folder.
        recipe: Its recipe as plain data, which may name a judge's store.
    """
    out = []
    for stage in numbered_folders(run / "stages"):
        name = stage.name.split("-", 1)[1]
        for folder, title in (("rollouts", "rollouts"), ("held_out", "held-out rollouts")):
            if rollout_steps(stage / folder):
                out.append(StoredRows(f"stages/{stage.name}/{folder}", f"{name}: {title}", "rollouts", stage / folder))
    for top in ("stages", "evaluations", "bad_rows"):
        for path in sorted((run / top).rglob("*.jsonl")):
            if path.name not in LOGS and "checkpoints" not in path.parts:
                key = path.relative_to(run).as_posix()
                out.append(StoredRows(key, key.removeprefix("stages/"), "lines", path))
    for judge in _judges(recipe):
        path = named_path(judge["store"]) if judge.get("store") else cache_folder() / "judge.sqlite3"
        if path.is_file() and all(s.path != path for s in out):
            shared = "" if judge.get("store") else " (of all runs)"
            out.append(StoredRows(f"judge:{len(out)}", f"judge's answers{shared}", "answers", path))
    return out


def _judges(value: Any, name: str = "") -> Iterator[Mapping[str, Any]]:
    """Yield the settings of the judges of a recipe."""
    if isinstance(value, dict):
        if name == "judge" or value.get("kind") == "judge":
            yield value
        for key, inner in value.items():
            yield from _judges(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _judges(inner)


def _place(query: RowQuery) -> int:
    if query.at and not (query.at.isascii() and query.at.isdigit()):
        raise DataError(f"{query.at[:40]!r} is no place in this store: open it again from its first page")
    return int(query.at or 0)


def _lines_page(path: Path, query: RowQuery) -> RowsPage:
    """Return rows of a JSON Lines file from a byte on."""
    at, until, rows = _place(query), time.monotonic() + SEARCH_SECONDS, list[JsonDict]()
    wanted = query.text.lower()
    escaped = json.dumps(wanted, ensure_ascii=False)[1:-1]
    ascii_ = json.dumps(wanted)[1:-1]
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(at)
            for raw in file:
                if len(rows) == PER_PAGE or time.monotonic() > until:
                    break
                at += len(raw)
                line = raw.decode("utf-8", "replace").lower()
                if wanted and escaped not in line and ascii_ not in line:
                    continue
                row = _object(raw)
                if row is not None:
                    rows.append(row)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    searched = f"{100 * at // size if size else 100}% of the file"
    return RowsPage(rows, str(at) if at < size else "", searched, at >= size or len(rows) == PER_PAGE)


def _object(raw: bytes) -> JsonDict | None:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return {"unreadable line": raw.decode("utf-8", "replace")[:2000]} if raw.strip() else None
    return row if isinstance(row, dict) else {"value": row}


def _answers_page(path: Path, query: RowQuery) -> RowsPage:
    """Return answers of a judge's store, the newest first; the store is opened for reading alone."""
    at = _place(query)
    like = "%" + query.text.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_") + "%"
    condition = r"WHERE question LIKE ? ESCAPE '\' OR answer LIKE ? ESCAPE '\'" if query.text else ""
    command = (
        f"SELECT judge, question, answer, created FROM answers {condition} ORDER BY created DESC, key LIMIT ? OFFSET ?"
    )
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5.0)) as database:
            found = database.execute(command, [*([like, like] if query.text else []), PER_PAGE + 1, at]).fetchall()
    except sqlite3.Error as error:
        raise DataError(f"{path} can't be read as a judge's store: {error}") from error
    rows = [
        {"question": json.loads(asked), "answer": json.loads(answer), "judge": json.loads(judge), "created": created}
        for judge, asked, answer, created in found[:PER_PAGE]
    ]
    return RowsPage(rows, str(at + PER_PAGE) if len(found) > PER_PAGE else "", f"{at + len(rows)} answers")


def source_named(sources: list[StoredRows], key: str) -> StoredRows:
    """Return the store with a key, or the first if the key is empty.

    Raises:
        CheckpointError: There is none.
    """
    found = next((s for s in sources if key in ("", s.key)), None)
    if found is None:
        raise CheckpointError(f"this run has stored no {key or 'rows'}")
    return found
