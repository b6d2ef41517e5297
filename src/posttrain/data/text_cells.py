"""Recognise lists that a text file holds as text: JSON, or as Python prints them."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from posttrain.data.bad_rows import BadRow

TURN_COLUMNS = tuple(
    "prompt chosen rejected completion instruction input output question answer inputs targets text".split()
)
"""Columns of text, in which other files may hold a list of turns."""
LIST_COLUMNS = ("messages", "conversations", "history", "completions", "steps", "labels", "tools", "functions")
"""Columns that hold lists."""
PRINTED_TURN = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
"""Beginning of a list of turns, for what is neither JSON nor Python (an array as numpy prints it, a cut text)."""
HINT = (
    "A cell of a .csv or .tsv file is text. Save the table as .jsonl or .parquet, where a cell can hold a list: "
    "json.loads (or ast.literal_eval) of each such cell, then DataFrame.to_json(path, orient='records', lines=True)"
)


def check_text_cells(row: dict[str, Any]) -> None:
    """Raise BadRow if a cell of a text file holds a list as text that would be read as an answer, or not at all."""
    for column in (*TURN_COLUMNS, *LIST_COLUMNS):
        cell = row.get(column)
        if isinstance(cell, str) and cell.lstrip()[:1] == "[":
            kind, value = _parse(cell.strip())
            turns = isinstance(value, list) and any(isinstance(v, dict) and _is_turn(v) for v in value)
            if not kind and PRINTED_TURN.match(cell):
                kind, turns = "printed", True
            if turns or (value and isinstance(value, list) and column in LIST_COLUMNS):
                held = "a list of turns" if turns else "a list"
                raise BadRow(f"a list as text: {column!r} holds {held} as {kind} text", HINT)


def _is_turn(value: dict[str, Any]) -> bool:
    return {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()


def _parse(text: str) -> tuple[str, Any]:
    """Return the name of a notation and the value that a text is in it; (empty, None) if it is in neither."""
    try:
        return "JSON", json.loads(text)
    except (RecursionError, ValueError):
        pass
    try:
        return "Python", ast.literal_eval(text)
    except (RecursionError, ValueError, SyntaxError, MemoryError):
        return "", None
