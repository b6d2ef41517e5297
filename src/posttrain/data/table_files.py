"""Read the rows of a file, each with the number that a person would count. A row that can't be read is a BadRow.

TSV and JSON are read with the standard library: a tab-separated file has no quotes to interpret (reviews have many
unpaired ones), and nothing guesses that the review "NA" is a missing value. Files are read line by line or batch by
batch and never as a whole, JSON lists excepted.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.data.bad_rows import BadRow, check_surrogates
from posttrain.data.file_shapes import check_encoding, check_header, check_json_value, check_lines

NumberedRows = Iterator[tuple[int, dict[str, Any] | BadRow]]
MAX_LINE_BYTES = 2**28
"""Bytes of a line; a longer one is no row of a table."""
PARQUET_BATCH = 256
"""Rows decoded at a time."""
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
ENCODING_HINT = "Save the file as UTF-8"


def lines(path: Path) -> Iterator[str | BadRow]:
    """Return the lines of a UTF-8 file without their ends; a line in another encoding is a BadRow.

    Lines are split at line feeds only: text may contain other separators, at which str.splitlines would split.
    """
    check_encoding(path)
    with path.open("rb") as f:
        first = True
        while line := f.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise DataError(f"{path}: a line has more than {MAX_LINE_BYTES:,} bytes. Is each row on its line?")
            try:
                text = line.decode("utf-8-sig" if first else "utf-8")
            except UnicodeDecodeError as error:
                yield not_utf8(error)
            else:
                yield text.removesuffix("\n").removesuffix("\r")
            first = False


def not_utf8(error: UnicodeDecodeError) -> BadRow:
    """Return the reason for a text that is not UTF-8."""
    return BadRow(f"expected UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}", ENCODING_HINT)


def _tsv(path: Path) -> NumberedRows:
    cells = lines(path)
    header = check_header(path, _readable(path, next(cells, "")).split("\t"))
    for number, line in enumerate(cells, 1):
        if isinstance(line, BadRow):
            yield number, line
        elif line:
            yield number, _zip(header, line.split("\t"))


def _readable(path: Path, line: str | BadRow) -> str:
    if isinstance(line, BadRow):
        raise DataError(f"{path}: the header: {line}. {line.hint}")
    return line


def _csv(path: Path) -> NumberedRows:
    check_encoding(path)
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 become surrogates here, so that only their row is bad.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as f:
        reader = csv.reader(f, strict=True)
        header: list[str] | None = None
        number = -1
        while True:
            number, began = number + 1, reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                _check_csv_error(path, number, header is None, reader.line_num - began, str(error))
                yield number, BadRow(f"not valid CSV: {error} (quotes inside a cell are doubled)")
                continue
            try:
                "".join(cells).encode()
            except UnicodeEncodeError as error:
                found = BadRow(
                    f"expected UTF-8 text: byte {ord(error.object[error.start]) - 0xDC00:#04x}", ENCODING_HINT
                )
                if header is None:
                    raise DataError(f"{path}: the header: {found}. {ENCODING_HINT}") from error
                yield number, found
                continue
            if header is None:
                header = check_header(path, cells)
            elif cells:
                yield number, _zip(header, cells)


def _check_csv_error(path: Path, number: int, in_header: bool, more_lines: int, error: str) -> None:
    """Raise DataError for an error that is not of one row alone: where rows begin after it is not known."""
    if in_header:
        raise DataError(f"{path}: the header is not valid CSV: {error} (tabs between cells? then name the file .tsv)")
    if "unexpected end of data" in error:
        raise DataError(
            f"{path}: row {number}: a quote opens a cell and is not closed up to the end of the file, {more_lines + 1} "
            "lines later. Close it; quotes inside a cell are doubled"
        )


def _zip(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow(f"wrong number of cells: it has {len(cells)}, and the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


def _jsonl(path: Path) -> NumberedRows:
    first = True
    for number, line in enumerate(lines(path), 1):
        if isinstance(line, BadRow):
            yield number, line
        elif line.strip():
            row = json_row(line)
            if first and isinstance(row, BadRow):
                check_lines(path, line)
            first = False
            yield number, row


def json_row(text: str) -> dict[str, Any] | BadRow:
    """Return the object that a JSON text holds, or why there is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {error.msg} (at character {error.pos + 1})")
    except RecursionError:
        return BadRow("not valid JSON: nested too deeply")
    except ValueError as error:  # a number with thousands of digits
        return BadRow(f"not valid JSON: {error}")
    return _object(value, ESCAPED_SURROGATE.search(text) is not None)


def _object(value: Any, escapes: bool) -> dict[str, Any] | BadRow:
    """Return a value that is an object; with `escapes` its texts may hold lone surrogates."""
    if not isinstance(value, dict):
        return BadRow(f"expected an object, found {type(value).__name__}")
    if escapes:
        try:
            check_surrogates(value)
        except BadRow as error:
            return error
    return value


def _json(path: Path) -> NumberedRows:
    check_encoding(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {not_utf8(error)}. {ENCODING_HINT}") from error
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "one object a line? then name the file .jsonl"
        raise DataError(f"{path}: line {error.lineno}: not valid JSON: {error.msg} ({hint})") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    escapes = ESCAPED_SURROGATE.search(text) is not None
    del text
    for number, row in enumerate(check_json_value(path, value), 1):
        yield number, _object(row, escapes)


def _parquet(path: Path) -> NumberedRows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_BATCH):
                for row in arrow_rows(batch):
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        where = f" after row {number:,}" if number else ""
        raise DataError(f"{path}: not readable as Parquet{where}: {error}") from error


def arrow_rows(batch: Any) -> Iterator[dict[str, Any] | BadRow]:
    """Return the rows of a record batch; one with text that is not UTF-8 is a BadRow."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                row = batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                row = not_utf8(error)
            yield row


FILE_READERS = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
