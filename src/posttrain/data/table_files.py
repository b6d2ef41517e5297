"""Read the rows of a file, each with the number that a person would count. A row that can't be read is a BadRow.

TSV and JSON are read with the standard library: a tab-separated file has no quotes to interpret (reviews have many
unpaired ones), and nothing guesses that the review "NA" is a missing value. Files are read line by line or batch by
batch and never as a whole, JSON lists excepted.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from posttrain.core.errors import DataError
from posttrain.data.bad_rows import BadRow, Row, check_values
from posttrain.data.cells import key_given_twice, load_json, without_nulls
from posttrain.data.file_shapes import check_encoding, check_header, check_json_value, check_lines, check_names

MAX_LINE_BYTES = 2**28
"""Bytes of a line; a longer one is no row of a table."""
LARGE_JSON = 2**28
"""Bytes from which a .json file gets a warning: it takes several times as much memory."""
PARQUET_BATCH = 256
"""Rows decoded at a time."""
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
ENCODING_HINT = "Save the file as UTF-8"
log = logging.getLogger("posttrain")


class FoundRow(NamedTuple):
    """Hold a row of a source.

    Attributes:
        ordinal: Its index among the rows of the source, from 0; blank lines have none.
        number: Its number as a person counts, from 1: the lines after the header (TSV), the records after it (CSV), the
            lines (JSONL), the members of the list (JSON). Blank lines are counted.
        position: Where `row_at` finds it.
        row: The row, or why it can't be read.
    """

    ordinal: int
    number: int
    position: int
    row: Row | BadRow


class RowSource:
    """Read rows in order, or one at a time.

    Attributes:
        text_only: True if a cell can hold text alone (TSV, CSV).
    """

    text_only: ClassVar[bool] = False

    @cached_property
    def count(self) -> int:
        """Return the number of rows, those included that can't be read."""
        return sum(1 for _ in self.scan())

    def scan(self, mask: Sequence[int] | None = None) -> Iterator[FoundRow]:
        """Return the rows in order.

        Args:
            mask: For each row 1 if it is wanted, else 0. None: all are.

        Raises:
            DataError: The file is of another shape.
            OSError: It can't be read.
        """
        raise NotImplementedError

    def row_at(self, position: int) -> Row | BadRow:
        """Return the row at a position that `scan` gave."""
        raise NotImplementedError


class TableFile(RowSource):
    """Read the rows of a file; a subclass a format."""

    def __init__(self, path: Path) -> None:
        check_encoding(path)
        self.path = path


class _Lines(TableFile):
    """Read a file with one row a line.

    Lines are split at line feeds only: text may contain other separators, at which str.splitlines would split.
    """

    @cached_property
    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Return (number, position, line) of each line that is a row."""
        with self.path.open("rb") as f:
            number, position = self._begin(f), f.tell()
            while line := f.readline(MAX_LINE_BYTES):
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    raise DataError(
                        f"{self.path}: a line has more than {MAX_LINE_BYTES:,} bytes. Is each row on its line?"
                    )
                number += 1
                if not self._is_blank(line):
                    yield number, position, line
                position += len(line)

    def _begin(self, f: io.BufferedReader) -> int:
        """Read what comes before the first row. Returns the number of the line before it."""
        if f.read(3) != b"\xef\xbb\xbf":  # a byte order mark
            f.seek(0)
        return 0

    def _is_blank(self, line: bytes) -> bool:
        return not line.strip() or (len(line) < 32 and not line.decode(errors="replace").strip())

    def scan(self, mask: Sequence[int] | None = None) -> Iterator[FoundRow]:
        last = None if mask is None else _last(mask)
        for index, (number, position, line) in enumerate(self._lines()):
            if mask is None or mask[index]:
                yield FoundRow(index, number, position, self._parse(line, index))
                if index == last:
                    return

    def row_at(self, position: int) -> Row | BadRow:
        with self.path.open("rb") as f:
            f.seek(position)
            return self._parse(f.readline())

    def _parse(self, line: bytes, index: int = -1) -> Row | BadRow:
        try:
            text = line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            return not_utf8(error)
        return self._row(text, index)

    def _row(self, text: str, index: int) -> Row | BadRow:
        """Return the row of a line without its end; `index` is -1 if its place is not known."""
        raise NotImplementedError


def _last(mask: Sequence[int]) -> int:
    """Return the index of the last row that is wanted, or -1."""
    return bytes(mask).rfind(b"\x01")


def not_utf8(error: UnicodeDecodeError) -> BadRow:
    """Return the reason for a text that is not UTF-8."""
    return BadRow(f"expected UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}", ENCODING_HINT)


class TSVFile(_Lines):
    """Read tab-separated cells after a header."""

    text_only = True

    @cached_property
    def header(self) -> list[str]:
        """Return the names of the columns."""
        with self.path.open("rb") as f:
            super()._begin(f)
            line = f.readline(MAX_LINE_BYTES)
        try:
            names = line.decode().removesuffix("\n").removesuffix("\r").split("\t")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: the header: {not_utf8(error)}. {ENCODING_HINT}") from error
        return check_header(self.path, names)

    def _begin(self, f: io.BufferedReader) -> int:
        if self.header:
            f.readline()
        return 0

    def _is_blank(self, line: bytes) -> bool:
        return line in (b"\n", b"\r\n", b"\r")

    def _row(self, text: str, index: int) -> Row | BadRow:
        return _zip(self.header, text.split("\t"))


class JSONLFile(_Lines):
    """Read one JSON object a line."""

    def _row(self, text: str, index: int) -> Row | BadRow:
        row = json_row(text)
        if index == 0 and isinstance(row, BadRow):
            check_lines(self.path, text)
        return row


class CSVFile(TableFile):
    """Read comma-separated cells after a header; a cell in quotes may hold commas, quotes and ends of lines."""

    text_only = True

    @cached_property
    def header(self) -> list[str]:
        """Return the names of the columns."""
        with self.path.open("rb") as f:
            try:
                names = next(self._reader(_CSVLines(f)), [])
            except csv.Error as error:
                hint = "tabs between cells? then name the file .tsv"
                raise DataError(f"{self.path}: the header is not valid CSV: {error} ({hint})") from error
        if bad := _undecoded(names):
            raise DataError(f"{self.path}: the header: {bad}. {ENCODING_HINT}")
        return check_header(self.path, names)

    def scan(self, mask: Sequence[int] | None = None) -> Iterator[FoundRow]:
        header = self.header
        with self.path.open("rb") as f:
            lines = _CSVLines(f)
            reader = self._reader(lines)
            next(reader, header)
            number, index, last = 0, -1, None if mask is None else _last(mask)
            while index != last:
                number, position, before = number + 1, lines.position, lines.count
                row = self._next(reader, number, lines, before)
                if row is None:
                    return
                if row != {}:
                    index += 1
                    if mask is None or mask[index]:
                        yield FoundRow(index, number, position, row)

    def row_at(self, position: int) -> Row | BadRow:
        with self.path.open("rb") as f:
            f.seek(position)
            lines = _CSVLines(f)
            return self._next(self._reader(lines), 0, lines, 0) or {}

    @staticmethod
    def _reader(lines: _CSVLines) -> Iterator[list[str]]:
        csv.field_size_limit(2**31 - 1)
        return csv.reader(lines, strict=True)

    def _next(self, reader: Iterator[list[str]], number: int, lines: _CSVLines, before: int) -> Row | BadRow | None:
        """Return the next row; {} for a blank line, None at the end of the file."""
        try:
            cells = next(reader)
        except StopIteration:
            return None
        except csv.Error as error:
            if "unexpected end of data" in str(error):  # not of one row alone: where rows begin after it is unknown
                raise DataError(
                    f"{self.path}: row {number}: a quote opens a cell and is not closed up to the end of the file, "
                    f"{lines.count - before:,} lines later. Close it; quotes inside a cell are doubled"
                ) from error
            return BadRow(f"not valid CSV: {error} (quotes inside a cell are doubled)")
        return _undecoded(cells) or (_zip(self.header, cells) if cells else {})


class _CSVLines:
    """Hand out the lines of a CSV file as text, and count them and their bytes.

    Bytes that are not UTF-8 become surrogates, so that only their row is bad. A carriage return alone ends a line too,
    as csv requires.
    """

    def __init__(self, f: io.BufferedReader) -> None:
        self.file, self.count = f, 0
        self.pending: list[bytes] = []
        self.position = f.tell()
        if self.position == 0 and f.read(3) == b"\xef\xbb\xbf":  # a byte order mark
            self.position = 3
        else:
            f.seek(self.position)

    def __iter__(self) -> _CSVLines:
        return self

    def __next__(self) -> str:
        if not self.pending:
            line = self.file.readline()
            if not line:
                raise StopIteration
            inner = line.find(b"\r", 0, -2)
            self.pending = [line] if inner < 0 else re.findall(rb"[^\r]*\r(?!\n)|.+", line, re.DOTALL)[::-1]
        line = self.pending.pop()
        self.count += 1
        self.position += len(line)
        return line.decode(errors="surrogateescape")


def _undecoded(cells: Sequence[str]) -> BadRow | None:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) - 0xDC00  # as surrogateescape writes it
        return BadRow(f"expected UTF-8 text: byte {byte:#04x}", ENCODING_HINT)
    return None


def _zip(header: list[str], cells: list[str]) -> Row | BadRow:
    if len(cells) != len(header):
        return BadRow(f"wrong number of cells: it has {len(cells)}, and the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


def json_row(text: str) -> Row | BadRow:
    """Return the object that a JSON text holds, or why there is none."""
    try:
        value = load_json(text)
    except BadRow as error:
        return error
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {error.msg} (at character {error.pos + 1})")
    except RecursionError:
        return BadRow("not valid JSON: nested too deeply")
    except ValueError as error:  # a number with thousands of digits
        return BadRow(f"not valid JSON: {error}")
    return _object(value, ESCAPED_SURROGATE.search(text) is not None)


def _object(value: Any, doubtful: bool) -> Row | BadRow:
    """Return a value that is an object; with `doubtful` the values in it may be unusable (see `check_values`)."""
    if isinstance(value, BadRow):
        return value
    if not isinstance(value, dict):
        return BadRow(f"expected an object, found {type(value).__name__}")
    if doubtful:
        try:
            check_values(value)
        except BadRow as error:
            return error
    return value


class JSONFile(TableFile):
    """Read a list of objects, or columns; the whole file is held in memory."""

    def scan(self, mask: Sequence[int] | None = None) -> Iterator[FoundRow]:
        for index, row in enumerate(self.rows):
            if mask is None or mask[index]:
                yield FoundRow(index, index + 1, index, row)

    def row_at(self, position: int) -> Row | BadRow:
        return self.rows[position]

    @cached_property
    def rows(self) -> list[Row | BadRow]:
        """Return all rows."""
        size = self.path.stat().st_size
        if size > LARGE_JSON:
            log.warning(
                "%s: %.1f GB of a .json file are read into memory at once. As .jsonl, its rows are read one by one: "
                "jq -c '.[]' %s > new.jsonl",
                *(self.path, size / 1e9, shlex.quote(self.path.name)),
            )
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: {not_utf8(error)}. {ENCODING_HINT}") from error
        if not text.strip():
            return []
        bad: list[BadRow] = []

        def read_object(pairs: list[tuple[str, Any]]) -> Row | BadRow:
            out = dict(pairs)
            if len(out) == len(pairs):
                return out
            bad.append(key_given_twice(pairs))
            return bad[-1]

        try:
            value = json.loads(text, object_pairs_hook=read_object)
        except json.JSONDecodeError as error:
            hint = "one object a line? then name the file .jsonl"
            raise DataError(f"{self.path}: line {error.lineno}: not valid JSON: {error.msg} ({hint})") from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{self.path}: not valid JSON: {error}") from error
        doubtful = bool(bad) or ESCAPED_SURROGATE.search(text) is not None
        return [_object(row, doubtful) for row in check_json_value(self.path, value)]


class ParquetFile(TableFile):
    """Read a Parquet file, a few rows at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self._reached: tuple[int, Iterator[FoundRow]] = (0, iter(()))
        with self._errors():
            # With a buffer, pages are read as they are decoded, not all of a row group at once.
            self.file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        check_names(path, self.file.schema_arrow.names)

    @cached_property
    def count(self) -> int:
        return int(self.file.metadata.num_rows)

    def scan(self, mask: Sequence[int] | None = None) -> Iterator[FoundRow]:
        first = 0
        for group in range(self.file.metadata.num_row_groups):
            size = self.file.metadata.row_group(group).num_rows
            if mask is None or any(mask[first : first + size]):
                yield from self._scan_group(group, first, mask)
            first += size

    def _scan_group(self, group: int, first: int, mask: Sequence[int] | None) -> Iterator[FoundRow]:
        with self._errors():
            for batch in self.file.iter_batches(PARQUET_BATCH, row_groups=[group]):
                size = batch.num_rows
                wanted = range(size) if mask is None else [i for i in range(size) if mask[first + i]]
                if wanted:
                    chosen = batch if len(wanted) == size else batch.take(list(wanted))
                    for i, row in zip(wanted, arrow_rows(chosen), strict=True):
                        yield FoundRow(first + i, first + i + 1, first + i, row)
                first += size

    def row_at(self, position: int) -> Row | BadRow:
        # Rows of a group can only be decoded from its first one, so the place reached is kept for the row after it.
        reached, rows = self._reached
        if not reached <= position:
            rows = iter(())
        found = next((f for f in rows if f.position == position), None)
        if found is None:
            group, first = self._group_of(position)
            rows = self._scan_group(group, first, None)
            found = next(f for f in rows if f.position == position)
        self._reached = position + 1, rows
        return found.row

    def _group_of(self, position: int) -> tuple[int, int]:
        """Return the row group of a row, and its first row."""
        first = 0
        for group in range(self.file.metadata.num_row_groups):
            size = self.file.metadata.row_group(group).num_rows
            if position < first + size:
                return group, first
            first += size
        raise IndexError(position)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: two fields of a name in an object
            raise DataError(f"{self.path}: not readable as Parquet: {error}") from error


def arrow_rows(batch: Any) -> Iterator[Row | BadRow]:
    """Return the rows of a record batch, without nulls inside of cells; one with text that is not UTF-8 is a BadRow."""
    try:
        yield from map(without_nulls, batch.to_pylist())
    except UnicodeDecodeError:  # raised before the first row is handed out
        for i in range(batch.num_rows):
            try:
                row: Row | BadRow = without_nulls(batch.slice(i, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                row = not_utf8(error)
            yield row


FILE_READERS: dict[str, type[TableFile]] = {
    ".tsv": TSVFile,
    ".csv": CSVFile,
    ".json": JSONFile,
    ".jsonl": JSONLFile,
    ".parquet": ParquetFile,
}
