"""Search the rollouts of a stage file by file, with an index of what they are filtered and sorted by."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.report.load import JsonDict
from posttrain.report.measured_stages import shown_images
from posttrain.sampling.rollout_store import rollout_steps, rollouts_path

COLUMNS_INDEXED = ("reward", "finish", "group", "rollout", "problem")
COLUMNS_SHOWN: tuple[str, ...] = (*COLUMNS_INDEXED, "step", "source", "prompt", "completion", "images")
COLUMNS_SHOWN += ("advantage", "answer", "parts", "failures", "notes")
MOST_FILES = 20_000
"""Files whose index is kept in memory: some 40 bytes a rollout."""
_index: OrderedDict[tuple[Path, int], Any] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True)
class RowQuery:
    """Hold what a reader wants to see.

    Attributes:
        text: Text that the row contains, in any case; empty: any.
        low, high: Limits of the reward. None: no limit.
        finish: How the rollout ended; empty: in any way.
        order: newest, oldest, best or worst (rollouts alone).
        at: Place at which the page begins, as the page before named it; empty: the beginning.
    """

    text: str = ""
    low: float | None = None
    high: float | None = None
    finish: str = ""
    order: str = "newest"
    at: str = ""


@dataclass(frozen=True)
class RowsPage:
    """Hold a page of rows.

    Attributes:
        rows: The rows, as the store has them.
        following: Place at which the next page begins; empty: there are no more.
        searched: What was searched, in words.
        whole: False if the search ended since it took long, so that the page is not full.
    """

    rows: list[JsonDict]
    following: str = ""
    searched: str = ""
    whole: bool = True


def rollout_page(folder: Path, query: RowQuery, count: int, seconds: float) -> RowsPage:
    """Return a page of rollouts.

    Args:
        folder: Folder of the files.
        query: What is looked for. `best` and `worst` sort all of them by reward, and search all of them.
        count: Rollouts on a page.
        seconds: Time after which a search by step returns what it has.
    """

    steps = rollout_steps(folder)
    if query.order in ("best", "worst"):
        return _sorted_page(folder, steps, query, count)
    ordered = steps if query.order == "oldest" else steps[::-1]
    step, row = _place(query.at, 2) if query.at else (None, 0)
    begin = next((i for i, s in enumerate(ordered) if s == step), 0)
    until, out = time.monotonic() + seconds, list[JsonDict]()
    for i, at in enumerate(ordered[begin:], begin):
        path, first = rollouts_path(folder, at), row if at == step else 0
        hits = [h for h in _hits(path, query) if h >= first]
        taken = hits[: count - len(out)]
        out += _rows(path, taken)
        searched = f"{i + 1:,} of {len(ordered):,} steps"
        if len(hits) > len(taken):
            return RowsPage(out, f"{at}.{hits[len(taken)]}", searched)
        if i + 1 < len(ordered) and (len(out) == count or time.monotonic() > until):
            return RowsPage(out, f"{ordered[i + 1]}.0", searched, len(out) == count)
    return RowsPage(out, "", f"{len(ordered):,} of {len(ordered):,} steps")


def _sorted_page(folder: Path, steps: list[int], query: RowQuery, count: int) -> RowsPage:
    found, sign = list[tuple[float, int, int]](), -1.0 if query.order == "best" else 1.0
    (start,) = _place(query.at, 1) if query.at else (0,)
    for step in steps:
        path = rollouts_path(folder, step)
        hits = _hits(path, query)
        rewards = _indexed(path).column("reward").to_pylist() if hits else []
        found += [(sign * rewards[h], step, h) for h in hits if rewards[h] is not None]
    found.sort()
    out = [row for _, step, h in found[start : start + count] for row in _rows(rollouts_path(folder, step), [h])]
    following = str(start + count) if start + count < len(found) else ""
    return RowsPage(out, following, f"{len(found):,} rollouts in {len(steps):,} steps")


def _place(at: str, parts: int) -> list[int]:
    found = at.split(".")
    if len(found) != parts or not all(p.isascii() and p.isdigit() for p in found):
        raise DataError(f"{at[:40]!r} is no place in these rollouts: open them again from the first page")
    return [int(p) for p in found]


def _read(path: Path, columns: list[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            present = [c for c in columns if c in file.schema_arrow.names]
            return file.read(columns=present, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} can't be read as rollouts: {error}. Put it back from a copy") from error


def _indexed(path: Path) -> Any:
    """Return the columns that are filtered by; a file is written once, so what was read stays right."""
    key = (path, path.stat().st_mtime_ns if path.exists() else 0)
    with _lock:
        if key in _index:
            return _index[key]
    table = _read(path, list(COLUMNS_INDEXED))
    with _lock:
        _index[key] = table
        while len(_index) > MOST_FILES:
            _index.popitem(last=False)
    return table


def _hits(path: Path, query: RowQuery) -> list[int]:
    """Return the rows of a file that a query asks for."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = _indexed(path)
    keep = pa.array([True] * table.num_rows)
    rewards = table.column("reward")
    for limit, compare in ((query.low, pc.greater_equal), (query.high, pc.less_equal)):
        if limit is not None:
            keep = pc.and_(keep, pc.fill_null(compare(rewards, limit), False))
    if query.finish:
        keep = pc.and_(keep, pc.equal(table.column("finish"), query.finish))
    if query.text and pc.any(keep).as_py():
        texts = _read(path, ["prompt", "completion"])
        inside = [pc.match_substring(texts.column(c), query.text, ignore_case=True) for c in ("completion", "prompt")]
        keep = pc.and_(keep, pc.or_(*inside))
    return [int(i) for i in pc.indices_nonzero(keep).to_pylist()]


def _rows(path: Path, numbers: list[int]) -> list[JsonDict]:
    if not numbers:
        return []
    rows: list[JsonDict] = _read(path, list(COLUMNS_SHOWN)).take(numbers).to_pylist()
    for row in rows:
        for name in ("parts", "failures", "notes", "answer"):
            try:
                row[name] = json.loads(row.get(name) or "{}")
            except ValueError:
                row[name] = {}
        row["images"] = shown_images(row.get("images"))
    return rows
