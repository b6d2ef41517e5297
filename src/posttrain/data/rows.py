"""Read the configured rows, collect those that can't be used, and describe the rest for the manifest and the report.

Every reader of rows goes through `Rows.read`: nothing is cut or left out without being counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Sample
from posttrain.data.bad_rows import BadRows
from posttrain.data.formats import Record, Row, check_templates, class_label, open_assistant, recognise, to_record
from posttrain.data.marked_text import pieces
from posttrain.data.readers import Table, in_order, read_table
from posttrain.data.text_cells import check_text_cells

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """Hold a row with its place and the settings of its source.

    Attributes:
        row: The row, with columns renamed; with data.classes its class is the field `label`.
        source: Its place, `file:row`.
        layout: Name of its layout.
        config: Settings of the data.
    """

    row: Row
    source: str
    layout: str
    config: DataConfig

    def record(self) -> Record:
        """Return the row as a record. Raises BadRow."""
        return to_record(self.row, self.layout, self.config)


@dataclass
class Rows:
    """Hold the rows of a source, with columns renamed.

    Attributes:
        config: Settings of the data.
        table: All rows of the source.
        layout: Name of their layout.
        order: Indices of the rows that are taken, in their order.
        bad: Rows that can't be used, so far.
        truncated: Number of rows that were cut, so far.
    """

    config: DataConfig
    table: Table
    layout: str
    order: np.ndarray
    bad: BadRows
    truncated: int = 0

    @property
    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file, by its name."""
        return self.table.hashes

    @property
    def columns(self) -> list[str]:
        """Return the names of all columns, sorted."""
        return sorted(self.table.columns)

    def read(self, make: Callable[[SourceRow], _T]) -> list[_T]:
        """Return `make(row)` of each row, in order; rows for which it raises BadRow are collected."""
        out = []
        for i in self.order:
            source = self.table.source(i)
            with self.bad.collect(source):
                if i in self.table.bad:
                    raise self.table.bad[i]
                row = self.table.rows[i]
                if self.config.classes is not None:
                    row = {**row, "label": class_label(row, self.config.classes)}
                if self.table.places[i][0] in self.table.text_only:
                    check_text_cells(row)
                out.append(make(SourceRow(row, source, self.layout, self.config)))
        return out

    def check(self, used: int) -> None:
        """Raise DataError for bad rows unless they are to be skipped, and if none of the rows can be used."""
        self.bad.check(len(self.order), used)

    def statistics(self, samples: Sequence[Sample], tokenizer: Any) -> dict[str, Any]:
        """Return the manifest's entry about these rows and the samples made of them."""
        return manifest_entry(
            [len(s) for s in samples],
            self.bad,
            self.config.source,
            sha256=self.hashes,
            layout=self.layout,
            rows=len(self.order),
            truncated=self.truncated,
            loss_tokens=sum(1 for s in samples for w in s.weights if w),
            duplicates=count_repeats(tuple(s.tokens) for s in samples),
            examples=[marked_example(s, tokenizer) for s in samples[:3]],
        )


def open_rows(config: DataConfig, layout: str | None = None) -> Rows:
    """Read a source, rename its columns, and find the layout.

    Args:
        config: Settings of the data.
        layout: Name for the layout if the caller reads the columns itself. None: recognise it.

    Raises:
        DataError: The source, the columns or the templates can't be used.
    """
    table = read_table(config)
    if len(table.bad) == len(table.rows):
        _refuse_all(table, config)
    _rename_columns(table, config)
    columns = table.columns
    if config.classes is not None and config.classes.column not in columns:
        raise DataError(f"data.classes.column names {config.classes.column!r}, and the columns are {sorted(columns)}")
    check_templates(config, columns | ({"label"} if config.classes else set()))
    if layout is None:
        layout = "template" if config.prompt is not None else recognise(table.first, config.layout)
    if layout == "openassistant":
        table = open_assistant(table)
    return Rows(config, table, layout, in_order(config, len(table.rows)), BadRows(config.on_bad_row))


def _refuse_all(table: Table, config: DataConfig) -> None:
    """Raise DataError for a source of which no row can be read."""
    bad = BadRows(config.on_bad_row)
    for i, error in table.bad.items():
        bad.add(table.source(i), error)
    bad.check(len(table.rows), 0)


def _rename_columns(table: Table, config: DataConfig) -> None:
    """Apply `columns: {prompt: question}`, by which the column question is called prompt."""
    for ours, theirs in config.columns.items():
        if theirs not in table.columns:
            raise DataError(f"data.columns.{ours} names {theirs!r}, and the columns are {sorted(table.first)}")
    for row in table.rows if config.columns else []:
        renamed = {ours: row.get(theirs) for ours, theirs in config.columns.items()}
        for theirs in config.columns.values():
            row.pop(theirs, None)
        row.update(renamed)


def manifest_entry(lengths: Sequence[int], bad: BadRows, source: str | Sequence[str], **fields: Any) -> dict[str, Any]:
    """Return the entry of the manifest and of the report about prepared data.

    Args:
        lengths: Tokens of each sample.
        bad: Rows left out.
        source: Name of the source, or names.
        fields: `layout`, `rows` (taken from the source), and if they apply `sha256` (of each file), `truncated` (rows
            that were cut), `loss_tokens`, `duplicates` (samples that repeat an earlier one), `examples`.
    """
    return {
        "source": source if isinstance(source, str) else ", ".join(source),
        "sha256": {},
        "used": len(lengths),
        "dropped": bad.dropped,
        "bad_rows": bad.rows,
        "truncated": 0,
        "tokens": sum(lengths),
        "loss_tokens": 0,
        "longest": max(lengths, default=0),
        "median": int(np.median(lengths)) if len(lengths) else 0,
        "duplicates": 0,
        "examples": [],
        **fields,
    }


def marked_example(sample: Sample, tokenizer: Any, **more: Any) -> dict[str, Any]:
    """Return a sample as an example for the report: its place and its text, with the weights.

    Args:
        sample: The sample.
        tokenizer: Its tokenizer.
        more: Other fields of the example.
    """
    return {"text": sample.source, **more, "pieces": pieces(sample, tokenizer)}


def count_repeats(items: Iterable[Hashable]) -> int:
    """Return how many items equal an earlier one."""
    return sum(n - 1 for n in Counter(items).values())


@dataclass(frozen=True)
class PreparedItems(Generic[_T]):
    """Hold prepared data item by item, so that held-out data can be compared with training data.

    Attributes:
        items: The items, each with its place (`file:row`) as `source`.
        stats: Entry of the manifest and of the report about them.
    """

    items: list[_T]
    stats: dict[str, Any] = field(default_factory=dict)

    noun: ClassVar[str] = "rows"
    advice: ClassVar[str] = (
        "Give held_out.data other rows: with data.rows [0, 2000], [2000, 2200] of the same shuffled file, for instance"
    )

    def contents(self) -> list[Hashable]:
        """Return a value for each item that is equal for items with the same content."""
        raise NotImplementedError


P = TypeVar("P", bound=PreparedItems[Any])


def drop_training_overlap(held_out: P, trained: PreparedItems[Any], where: str) -> P:
    """Return held-out data without the items that are also trained on, which would measure memory.

    Args:
        held_out: Held-out data.
        trained: Training data.
        where: Name of the stage, for messages.

    Returns:
        The remaining items; the others are counted as dropped.

    Raises:
        DataError: More than nine in ten are trained on: the two are the same rows by mistake.
    """
    known = set(trained.contents())
    overlap = [content in known for content in held_out.contents()]
    left = [item for item, trained_on in zip(held_out.items, overlap, strict=True) if not trained_on]
    same, total = sum(overlap), len(overlap)
    if same > 0.9 * total:
        example = held_out.items[overlap.index(True)].source
        raise DataError(
            f"{where}: {same} of {total} held-out {held_out.noun} are trained on too (for example {example}). "
            f"{held_out.advice}"
        )
    dropped = held_out.stats["dropped"] | ({"trained on too": same} if same else {})
    return replace(held_out, items=left, stats={**held_out.stats, "used": len(left), "dropped": dropped})
