"""Read single cells of rows: texts, numbers, labels, missing values, and lists that were written as text."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from posttrain.data.bad_rows import BadRow, Row


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise key_given_twice(pairs)
    return out


def key_given_twice(pairs: Sequence[tuple[str, Any]]) -> BadRow:
    """Return the error for an object of JSON that gives a value to one key twice."""
    names = [name for name, _ in pairs]
    twice = next(name for i, name in enumerate(names) if name in names[:i])
    return BadRow(
        f"a key is given twice: {twice!r} in one object", "Readers of JSON keep one of both values. Remove one"
    )


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys)


def load_json(text: str) -> Any:
    """Return the value of a JSON text. Raises BadRow if an object has a key twice, and ValueError if it is invalid."""
    return _JSON.decode(text)


def is_missing(value: Any) -> bool:
    """Return True for null, NaN and infinity: pandas and many JSON writers put NaN where a value is missing."""
    if value is None:
        return True
    if isinstance(value, str | int | list | dict):
        return False
    return isinstance(value, numbers.Real | Decimal) and not math.isfinite(value)


def is_empty(value: Any) -> bool:
    """Return True for a value that says nothing: missing, white space, or an empty list or object (also as text)."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return is_missing(value) or (isinstance(value, list | tuple | dict) and not value)


def without_nulls(row: Row) -> Row:
    """Return a row of an Arrow table without the nulls inside of its lists and objects.

    Arrow gives all objects of a column the same fields: a call {"city": "Oslo"} comes back as {"city": "Oslo", "date":
    null} if another call has a date.
    """
    return {name: _pruned(value) if isinstance(value, list | dict) else value for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pruned(inner) for name, inner in value.items() if inner is not None}
    return [_pruned(inner) for inner in value] if isinstance(value, list) else value


def required_field(row: Row, name: str) -> Any:
    """Return a field of a row. Raises BadRow if it is missing, null, NaN or infinite."""
    value = row.get(name)
    if is_missing(value):
        raise missing_field(name, value)
    return value


def missing_field(name: str, value: Any = None) -> BadRow:
    """Return the error for a field without a value; `value` is what stands there."""
    return BadRow(f"missing field {name!r}" + ("" if value is None else f" (it is {value})"))


def read_text(value: Any, name: str) -> str:
    """Return a cell as text; a number is written out. Raises BadRow for other values."""
    if isinstance(value, str):
        return value
    if is_missing(value):
        raise missing_field(name, value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise BadRow(f"{name} is {type(value).__name__}, expected text")


def read_number(value: Any, name: str, finite: bool = False) -> float:
    """Return a cell as a number.

    Args:
        value: The cell.
        name: Name of the column, for messages.
        finite: Refuse infinity too.

    Raises:
        BadRow: The cell holds no number, or "nan".
    """
    try:
        out = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRow(f"{name} is {value!r}, expected a number") from error
    if math.isnan(out):
        raise BadRow(f"{name} is not a number")
    if finite and math.isinf(out):
        raise BadRow(f"{name} is {value!r}, expected a number that is finite")
    return out


_PYTHON = re.compile(r"[\[{(]\s*(?:[\[{(]\s*)*(?:'|[a-z_.]*\()|[\[{(].*\bNone\b|[\[{(].*\b(?:True|False)\b", re.DOTALL)
_REAL_LISTS = "Save the table as .jsonl or .parquet, where a cell can hold a list, or write it with json.dumps"


def parse_json(value: Any, name: str) -> Any:
    """Return a cell that should hold a list or an object: text that begins like one is read as JSON.

    Args:
        value: The cell.
        name: Name of the column, for messages.

    Raises:
        BadRow: The text is a list or an object as Python writes it, invalid JSON, or an object with a key twice.
    """
    text = value.strip() if isinstance(value, str) else ""
    if text[:1] not in ("[", "{"):
        return value
    try:
        return load_json(text)
    except BadRow as error:
        raise BadRow(f"{error} of {name}", error.hint) from error
    except (ValueError, RecursionError) as error:
        if _PYTHON.match(text):
            raise BadRow(f"{name} is a list or object of Python written as text", _REAL_LISTS) from error
        reason = getattr(error, "msg", str(error))
        raise BadRow(f"{name} is text that begins with {text[0]} and is not valid JSON ({reason})") from error


_GOOD = (
    "true yes good up thumbs_up thumb_up thumbsup chosen accepted desirable desired positive like liked correct 👍 ✅"
)
_BAD = (
    "false no bad down thumbs_down thumb_down thumbsdown rejected undesirable undesired negative dislike disliked "
    "incorrect 👎 ❌"
)
LABEL_WORDS = {**dict.fromkeys(_GOOD.split(), True), **dict.fromkeys(_BAD.split(), False)}
"""Words for a good and a bad answer. Of numbers, 1 is good, 0 and -1 are bad."""
_SKIN_TONES = dict.fromkeys([0xFE0F, *range(0x1F3FB, 0x1F400)])


def is_good_label(value: Any, name: str = "label") -> bool:
    """Return True for a cell that says that an answer is good, False for bad. Raises BadRow for anything else."""
    if is_missing(value):
        raise missing_field(name, value)
    word = str(value).strip().strip(":").lower().translate(_SKIN_TONES)
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if number in (1.0, 0.0, -1.0):
        return number > 0
    word = re.sub(r"[\s_-]+", "_", word)
    if word not in LABEL_WORDS:
        raise BadRow(
            f"{name} out of range: it is {value!r}, which is neither good nor bad",
            f"A label is one of 1, 0, -1, {', '.join(LABEL_WORDS)}; or make it of a number with data.classes",
        )
    return LABEL_WORDS[word]
