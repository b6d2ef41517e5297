"""Recognise files that are laid out otherwise than their name says, and name what to do."""

from __future__ import annotations

import codecs
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.data.bad_rows import BadRow

HEAD = 2**20
"""Bytes of a file in which its shape is recognised."""
ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}


def check_encoding(path: Path) -> None:
    """Raise DataError for a file whose byte order mark names another encoding than UTF-8."""
    with path.open("rb") as f:
        head = f.read(4)
    for mark, name in ENCODINGS.items():
        if head.startswith(mark):
            raise DataError(f"{path}: expected UTF-8 text: its byte order mark says {name}. Save the file as UTF-8")


def check_names(path: Path, names: list[str]) -> None:
    """Raise DataError if two columns have the same name."""
    if double := sorted({n for n in names if names.count(n) > 1}):
        raise DataError(f"{path}: two columns are named {double[0]!r}: {names}; rename one")


def check_header(path: Path, names: list[str]) -> list[str]:
    """Return the names of the columns of a TSV or CSV file.

    Raises:
        DataError: Two are equal, or the cells are separated by something else.
    """
    check_names(path, names)
    ours, ending = ("\t", ".tsv") if path.suffix.lower() == ".tsv" else (",", ".csv")
    if len(names) == 1 and names[0].lower().startswith("sep="):
        raise DataError(f"{path}: the first line is {names[0]!r}, a note for a spreadsheet. Remove this line")
    other = next((s for s in SEPARATORS if s != ours and len(names) == 1 and s in names[0]), None)
    if other is not None:
        columns = names[0].split(other)
        renamed = {"\t": "name the file .tsv", ",": "name the file .csv"}.get(
            other, "save the table as CSV with commas, or as .tsv with tabs"
        )
        raise DataError(
            f"{path}: the cells are separated by {SEPARATORS[other]} (columns {', '.join(columns)}), and a {ending} "
            f"file has {SEPARATORS[ours]} between them: {renamed}"
        )
    return names


def check_lines(path: Path, line: str) -> None:
    """Raise DataError if the first line of a .jsonl file is no row because the file has another shape.

    Args:
        path: The file.
        line: Its first line that is not empty, without its end; it holds no JSON object.
    """
    stripped = line.strip()
    one_a_line = "a .jsonl file has one object a line"
    if stripped.startswith("["):
        raise DataError(f"{path}: a JSON list, and {one_a_line}. Name the file .json")
    if "\r" in stripped and _is_object(stripped.split("\r")[0]):
        raise DataError(
            f"{path}: its lines end in carriage returns alone (\\r), and a row ends in a line feed (\\n). "
            f"Convert it: tr '\\r' '\\n' < {shlex.quote(path.name)} > new.jsonl"
        )
    if stripped.startswith("{"):
        with path.open("rb") as f:
            head = f.read(HEAD).decode("utf-8-sig", errors="replace").lstrip()
        try:
            _, end = json.JSONDecoder().raw_decode(head)
            indented = "\n" in head[:end]
        except json.JSONDecodeError as error:  # an object that is longer than the head
            indented = stripped == "{" or error.pos >= len(head) - 1
        except (RecursionError, ValueError):
            indented = stripped == "{"
        if indented:
            raise DataError(
                f"{path}: indented JSON: an object takes several lines, and {one_a_line}. "
                f"Convert it: jq -c . {shlex.quote(path.name)} > new.jsonl"
            )


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (RecursionError, ValueError):
        return False


def check_json_value(path: Path, value: Any) -> Sequence[Any]:
    """Return the rows of a .json file: a list of objects, {"data": [...]}, or {column: [cells]}.

    Raises:
        DataError: It holds something else; the message says what was recognised.
    """
    if isinstance(value, list):
        return value
    if isinstance(value, BadRow):
        raise DataError(f"{path}: {value}. {value.hint}")
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a list of objects, found {type(value).__name__}")
    lists = {name: v for name, v in value.items() if isinstance(v, list)}
    tables = [name for name, v in lists.items() if all(isinstance(x, dict | BadRow) for x in v)]
    if len(tables) > 1 and any(lists[name] for name in tables):
        sizes = ", ".join(f"{name}: {len(lists[name]):,} objects" for name in tables)
        largest = max(tables, key=lambda name: len(lists[name]))
        raise DataError(
            f"{path}: several tables in one file ({sizes}), such as the splits of a data set. Save the one that you "
            f"want as a file: jq -c {shlex.quote(f'.[{json.dumps(largest)}][]')} {shlex.quote(path.name)} > new.jsonl"
        )
    if len(tables) == 1 and (len(lists) == 1 or len(lists) < len(value)):
        return lists[tables[0]]
    if lists and len(lists) == len(value) and len({len(v) for v in lists.values()}) == 1:
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    raise DataError(f"{path}: expected a list of objects, found {_object_shape(value, lists)}")


def _object_shape(value: dict[str, Any], lists: dict[str, list[Any]]) -> str:
    """Return what a JSON object looks like, with what to do."""
    names = ", ".join(map(repr, list(value)[:10])) + (", …" if len(value) > 10 else "")
    if lists and len(lists) == len(value):
        sizes = ", ".join(f"{name}: {len(v):,}" for name, v in lists.items())
        return f"columns of different lengths ({sizes}). Every column needs a cell for each row"
    if value and all(isinstance(v, dict) for v in value.values()):
        return (
            f"an object of objects ({names}), as pandas writes with to_json() alone. Write it with "
            "to_json(path, orient='records', lines=True) as .jsonl"
        )
    return f"one object with the fields {names}. A list of one row is [{{...}}]; with one object a line, name it .jsonl"
