"""One of several sources: its settings, its layout, and the rows that are taken from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.data.bad_rows import BadRow
from posttrain.data.formats import Record, Row, check_templates, class_label, fill, recognise, to_record
from posttrain.data.message_trees import open_assistant
from posttrain.data.passages import PassageIndex, read_passages
from posttrain.data.readers import Source, in_order
from posttrain.data.row_fields import SourceRow
from posttrain.data.table_files import FoundRow, RowSource
from posttrain.data.text_cells import check_text_cells


@dataclass(frozen=True, slots=True)
class PlacedRow:
    """Hold a row with its place and the settings of its source.

    Attributes:
        row: The row, with columns renamed; with data.classes its class is the field `label`, with data.passages the
            passages found for it are the field `passages`.
        source: Its place, `file:row`.
        layout: Name of its layout.
        config: Settings of its source.
        part: Number of its source.
        found: Where it is in the source.
    """

    row: SourceRow
    source: str
    layout: str
    config: DataConfig
    part: int
    found: FoundRow

    def record(self) -> Record:
        """Return the row as a record. Raises BadRow."""
        return to_record(self.row, self.layout, self.config)


@dataclass
class Part:
    """Hold a source that is read.

    Attributes:
        number: Its number among the sources.
        source: The source.
        rows: Its rows; those of message trees are made of the source's.
        layout: Name of their layout.
        selected: Indices of the rows that are taken, in their order. None: all.
    """

    number: int
    source: Source
    rows: RowSource
    layout: str
    selected: np.ndarray | None

    @property
    def config(self) -> DataConfig:
        """Return the settings of its rows."""
        return self.source.config

    @cached_property
    def size(self) -> int:
        """Return the number of rows that are taken."""
        return self.rows.count if self.selected is None else len(self.selected)

    def scan(self, mask: Sequence[int]) -> Iterator[FoundRow]:
        """Return the rows for which `mask` is 1, in file order."""
        return self.source.scan(mask) if self.rows is self.source.rows else self.rows.scan(mask)

    def read(self, found: FoundRow) -> PlacedRow:
        """Return a row with its place and settings. Raises BadRow, FilteredRow."""
        return PlacedRow(self._values(found), self.place(found), self.layout, self.config, self.number, found)

    def read_again(self, position: int, number: int) -> PlacedRow:
        """Return a row that was read before, by its position and number."""
        self.source.check_unchanged()
        return self.read(FoundRow(-1, number, position, self.rows.row_at(position)))

    def place(self, found: FoundRow) -> str:
        """Return the place of a row as `file:row`."""
        return f"{self.source.name}:{found.number}"

    def _values(self, found: FoundRow) -> SourceRow:
        """Return a row with columns renamed, its class as `label`, its passages. Raises BadRow, FilteredRow."""
        if isinstance(found.row, BadRow):
            raise found.row
        row = SourceRow(rename(found.row, self.config), self.config.ignore)
        if self.config.classes is not None:
            row["label"] = class_label(row, self.config.classes)
        if self.rows.text_only:
            check_text_cells(dict(row))
        if (looked_up := self.config.passages) is not None:
            row["passages"] = "\n".join(self.passages.nearest(fill(looked_up.query, row), looked_up.most))
        return row

    @cached_property
    def passages(self) -> PassageIndex:
        """Return the passages that rows are looked up in. Raises DataError if they can't be read."""
        assert self.config.passages is not None
        return PassageIndex(read_passages(self.config.passages.documents, self.config.passages.column))

    @cached_property
    def head_columns(self) -> set[str]:
        """Return the columns of the first rows, renamed."""
        return set(rename(dict.fromkeys(self.source.head_columns), self.config))

    def has(self, column: str) -> bool:
        """Return True if any row has the column, once renamed."""
        return column in self.head_columns or column in rename(dict.fromkeys(self.source.columns), self.config)


def rename(row: Row, config: DataConfig) -> Row:
    """Apply `columns: {prompt: question}`, by which the column question is called prompt."""
    if not config.columns:
        return row
    renamed = {ours: row.get(theirs) for ours, theirs in config.columns.items()}
    theirs = set(config.columns.values())
    return {name: value for name, value in row.items() if name not in theirs} | renamed


def open_part(number: int, source: Source, layout: str | None = None) -> Part:
    """Open a source, check its columns, find its layout and the rows that are taken.

    Args:
        number: Its number among the sources.
        source: The source.
        layout: Name for the layout if the caller reads the columns itself. None: recognise it.

    Raises:
        DataError: The source, its columns or the templates can't be used.
    """
    config, first, rows = source.config, source.first, source.rows
    if first is None:
        if not rows.count:
            raise DataError(f"{source.name} holds no rows")
        layout = layout or "unreadable"
    else:
        _check_columns(source, first)
        if layout is None:
            renamed = rename(first, config)
            layout = "template" if config.prompt is not None else recognise(renamed, config.layout)
        if layout == "openassistant":
            rows = open_assistant(list(source.scan()), source.name)
    return Part(number, source, rows, layout, _selected(source, rows.count))


def _check_columns(source: Source, first: Row) -> None:
    """Check that the columns exist which the settings name. Raises DataError."""
    config = source.config
    for ours, theirs in config.columns.items():
        if not source.has(theirs):
            raise DataError(f"data.columns.{ours} names {theirs!r}, and the columns are {sorted(first)}")

    def check(columns: set[str]) -> None:
        columns = set(rename(dict.fromkeys(columns), config))
        if config.classes is not None and config.classes.column not in columns:
            named = config.classes.column
            raise DataError(f"data.classes.column names {named!r}, and the columns are {sorted(columns)}")
        check_templates(config, columns)

    _check_head_first(check, source)


def _check_head_first(check: Callable[[set[str]], Any], source: Source) -> None:
    """Check the columns of the first rows, and those of all rows only if that fails."""
    try:
        check(source.head_columns)
    except DataError:
        check(source.columns)


def _selected(source: Source, count: int) -> np.ndarray | None:
    """Return the indices of the rows that a source's `rows`, `shuffle_seed` and `max_rows` take; None for all."""
    entry, config = source.entry, source.config
    if not entry.model_fields_set & {"rows", "shuffle_seed", "max_rows"}:
        return None
    return in_order(config, count)[: entry.max_rows]
