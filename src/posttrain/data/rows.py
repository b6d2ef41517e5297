"""Read the configured rows, collect those that can't be used, and describe the rest for the manifest and the report.

Every reader of rows goes through `Rows.read`: nothing is cut or left out without being counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Sample
from posttrain.data.formats import BadRow, FilteredRow, Row, check_templates, class_label, open_assistant, recognise
from posttrain.data.marked_text import pieces
from posttrain.data.readers import Table, in_order, read_table

SHOWN_ROWS = 10
"""Rows that a message or a manifest names one by one."""
_T = TypeVar("_T")


@dataclass
class BadRows:
    """Collect rows that can't be used.

    Attributes:
        policy: "stop" for an error if there is a bad row, "skip" to leave them out.
        filtered: Number of rows that data.classes.margin left out; they are not bad.
    """

    policy: Literal["stop", "skip"] = "stop"
    filtered: int = 0
    _entries: list[dict[str, Any]] = field(default_factory=list)
    _hints: dict[str, None] = field(default_factory=dict)

    def add(self, source: str, error: BadRow | str) -> None:
        """Add a row by its place (`file:row`) and the reason why it can't be used."""
        file, _, row = source.rpartition(":")
        self._entries.append({"file": file, "row": int(row) if row.isdigit() else row, "reason": str(error)})
        if hint := getattr(error, "hint", ""):
            self._hints[hint] = None

    @contextmanager
    def collect(self, source: str) -> Iterator[None]:
        """Catch BadRow and FilteredRow of the code inside and count them for the row at this place."""
        try:
            yield
        except BadRow as error:
            self.add(source, error)
        except FilteredRow:
            self.filtered += 1

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return file, row and reason of each bad row, by file and row number."""
        return sorted(self._entries, key=lambda e: (e["file"], e["row"] if isinstance(e["row"], int) else 0))

    @property
    def counts(self) -> Counter[str]:
        """Return the number of bad rows by reason, without the particulars of a row."""
        return Counter(entry["reason"].split(":")[0].split(" (")[0] for entry in self._entries)

    @property
    def dropped(self) -> dict[str, int]:
        """Return the number of rows left out by reason, the filtered ones included."""
        return dict(self.counts) | ({"filtered": self.filtered} if self.filtered else {})

    def check(self, total: int, used: int) -> None:
        """Raise DataError for bad rows if the policy is "stop", and in any case if no row can be used."""
        if self._entries and (self.policy == "stop" or not used):
            raise DataError(self._message(total))
        if self.filtered and not used:
            raise DataError(f"all {self.filtered:,} rows lie within data.classes.margin of a cut")

    def _message(self, total: int) -> str:
        count = len(self._entries)
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.counts.most_common())
        lines = [f"{count:,} of {total:,} rows can't be used ({reasons}):"]
        lines += [f"  {b['file']}:{b['row']}: {b['reason']}" for b in self.rows[:SHOWN_ROWS]]
        lines += [f"  and {count - SHOWN_ROWS:,} more"] if count > SHOWN_ROWS else []
        advice = "Fix these rows, or skip them with on_bad_row: skip beside their source (skipped rows are counted)"
        if any("too long" in reason for reason in self.counts):
            advice += "; on_long: truncate cuts long ones"
        return "\n".join([*lines, *self._hints, advice])


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
    def columns(self) -> list[str]:
        """Return the names of all columns, sorted."""
        return sorted(set().union(*self.table.rows))

    def read(self, make: Callable[[Row, str], _T]) -> list[_T]:
        """Return `make(row, "file:row")` of each row, in order; rows for which it raises BadRow are collected.

        With data.classes the row has its class as `label`.
        """
        out, classes = [], self.config.classes
        for i in self.order:
            row, source = self.table.rows[i], self.table.source(i)
            with self.bad.collect(source):
                out.append(make(row if classes is None else {**row, "label": class_label(row, classes)}, source))
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
            sha256=self.table.hashes,
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
    _rename_columns(table.rows, config)
    columns = set().union(*table.rows)
    if config.classes is not None and config.classes.column not in columns:
        raise DataError(f"data.classes.column names {config.classes.column!r}, and the columns are {sorted(columns)}")
    check_templates(config, columns | ({"label"} if config.classes else set()))
    if layout is None:
        layout = "template" if config.prompt is not None else recognise(table.rows[0], config.layout)
    if layout == "openassistant":
        table = open_assistant(table)
    return Rows(config, table, layout, in_order(config, len(table.rows)), BadRows(config.on_bad_row))


def _rename_columns(rows: list[Row], config: DataConfig) -> None:
    """Apply `columns: {prompt: question}`, by which the column question is called prompt."""
    for ours, theirs in config.columns.items():
        if not any(theirs in row for row in rows):
            raise DataError(f"data.columns.{ours} names {theirs!r}, and the columns are {sorted(rows[0])}")
    for row in rows if config.columns else []:
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
