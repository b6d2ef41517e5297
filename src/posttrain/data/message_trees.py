"""Make conversations of the message trees of OpenAssistant: one row a message, each with the id of its parent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.core.errors import DataError
from posttrain.data.bad_rows import BadRow, Row
from posttrain.data.cells import is_empty, is_missing, read_number
from posttrain.data.readers import RowList
from posttrain.data.table_files import FoundRow
from posttrain.data.turns import ROLES

TREE_COLUMNS = ("message_id", "parent_id", "text", "role", "rank")


def open_assistant(found: Sequence[FoundRow], file: str) -> RowList:
    """Make one conversation of each message tree, from the root along the best-ranked answers.

    Columns besides those of the trees are kept, so that they are counted as having no effect. A message that can't be
    placed is a bad row: its parent is not in the file, its id is used twice or is no id, or its parents lead back to
    itself.

    Args:
        found: The rows.
        file: Name of their source.

    Raises:
        DataError: No message begins a tree.
    """
    rows = [row.row if isinstance(row.row, dict) else {} for row in found]
    broken: dict[int, BadRow] = {i: row.row for i, row in enumerate(found) if isinstance(row.row, BadRow)}
    known: dict[Any, int] = {}
    for i, row in enumerate(rows):
        for column in ("message_id", "parent_id"):
            if not is_missing(row.get(column)) and not _is_id(row[column]):
                broken[i] = BadRow(f"{column} is {type(row[column]).__name__}, expected text or a number")
        own = _id(row, "message_id")
        if own is not None and known.setdefault(own, i) != i:
            first = f"{file}:{found[known[own]].number}"
            broken.setdefault(i, BadRow(f"message_id {own!r} is used twice (first in {first})"))
    children: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        if i not in broken:
            children.setdefault(_id(row, "parent_id"), []).append(i)
    for parent, ids in children.items():
        if parent is not None and parent not in known:
            broken |= dict.fromkeys(ids, BadRow(f"its parent is not in the file: {parent}"))
    broken |= _circles(rows, known, children, broken)
    begun = sorted([*children.get(None, []), *broken])
    if not begun:
        raise DataError("no message of this OpenAssistant file begins a tree: expected some without a parent_id")
    made = [broken[i] if i in broken else _conversation(rows, _best_path(rows, i, children)) for i in begun]
    return RowList(made, [found[i].number for i in begun])


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _id(row: Row, column: str) -> str | float | None:
    value = row.get(column)
    return value if _is_id(value) and not is_missing(value) and value != "" else None


def _circles(
    rows: list[Row], known: dict[Any, int], children: dict[Any, list[int]], broken: Mapping[int, BadRow]
) -> dict[int, BadRow]:
    """Return the error for the first message of every circle: those that no root and no broken message leads to."""
    seen = {*children.get(None, []), *broken}
    open_ends = list(seen)
    while open_ends:
        own = _id(rows[i := open_ends.pop()], "message_id")
        below = children.get(own, []) if own is not None and known.get(own) == i else []
        open_ends += [child for child in below if child not in seen]
        seen.update(below)
    out: dict[int, BadRow] = {}
    for i in range(len(rows)):
        path, at = [], i
        while at not in seen:
            seen.add(at)
            path.append(at)
            at = known[_id(rows[at], "parent_id")]
        if at in path:
            out[min(path[path.index(at) :])] = BadRow("its parents lead back to itself")
    return out


def _best_path(rows: list[Row], root: int, children: dict[Any, list[int]]) -> list[int]:
    path = [root]
    while (own := _id(rows[path[-1]], "message_id")) is not None and (answers := children.get(own)):
        path.append(min(answers, key=lambda i: (_rank(rows[i]), i)))
    while path and ROLES.get(str(rows[path[-1]].get("role")).lower()) == "user":
        path.pop()  # a question that nobody answered teaches nothing
    return path


def _conversation(rows: list[Row], path: list[int]) -> Row:
    more = {name: rows[i][name] for i in path for name in rows[i] if not is_empty(rows[i][name])}
    more = {name: value for name, value in more.items() if name not in TREE_COLUMNS}
    return {**more, "messages": [{"role": rows[i].get("role"), "content": rows[i].get("text")} for i in path]}


def _rank(row: Row) -> float:
    try:
        return read_number(row.get("rank"), "rank")
    except BadRow:  # questions, and answers that nobody ranked, come last
        return math.inf
