"""Read the configured rows, collect those that can't be used, and describe the rest for the manifest and the report.

Every reader of rows goes through `Rows.read`: nothing is cut or left out without being counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np

from posttrain.config import DataConfig
from posttrain.core.by_number import ByNumber
from posttrain.core.types import Sample
from posttrain.data.bad_rows import BadRows
from posttrain.data.marked_text import pieces
from posttrain.data.parts import Part, PlacedRow, open_part
from posttrain.data.readers import Source, find_sources, in_order
from posttrain.data.row_fields import LOSS_COLUMNS, MEDIA, FieldCounts, refuse_columns
from posttrain.data.sample_store import SampleStore
from posttrain.data.table_files import FoundRow

REFUSED_COLUMNS = MEDIA | LOSS_COLUMNS
"""Columns that make a bad row if they have a value, since it would change the row's meaning."""
_T = TypeVar("_T")


@dataclass
class Rows:
    """Hold the rows of all sources, which are read when they are needed.

    Attributes:
        config: Settings of the data.
        parts: The sources, each with its settings and layout.
        order: Numbers of the rows that are taken, in their order; rows are numbered through all parts.
        bad: Rows that can't be used, so far.
        truncated: Number of rows that were cut, so far.
        fields: Fields of the rows that had no effect, so far.
        notes: Numbers of what is worth telling about how the rows are rendered, so far.
    """

    config: DataConfig
    parts: list[Part]
    order: np.ndarray
    bad: BadRows
    truncated: int = 0
    fields: FieldCounts = field(default_factory=FieldCounts)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file, by its name."""
        return {part.source.name: part.source.hash for part in self.parts if part.source.hash is not None}

    @property
    def layout(self) -> str:
        """Return the name of the layout; of several, their names."""
        return ", ".join(dict.fromkeys(part.layout for part in self.parts))

    @property
    def columns(self) -> list[str]:
        """Return the names of the columns, sorted; of a large table those of its first rows."""
        return sorted(set().union(*(part.head_columns for part in self.parts)))

    def has(self, column: str) -> bool:
        """Return True if any row of any source has the column."""
        return any(part.has(column) for part in self.parts)

    def read(self, make: Callable[[PlacedRow], _T], refused: Set[str] = REFUSED_COLUMNS) -> list[_T]:
        """Return `make(row)` of each row, in order; rows for which it raises BadRow are collected.

        Fields that `make` does not read are counted. A column in `refused` makes a bad row, but not in a table whose
        columns are named by templates.
        """
        scanned = self._scan()
        if not self._in_file_order():
            scanned = iter(sorted(scanned, key=lambda item: item[0]))
        return [made for _, made in self._make(make, scanned, refused)]

    def stream(self, make: Callable[[PlacedRow], _T], refused: Set[str] = REFUSED_COLUMNS) -> Iterator[tuple[int, _T]]:
        """Yield (place in the order, `make(row)`) of each row, as the rows are in their files.

        Rows for which it raises BadRow are collected. However large the sources, only one row is in memory. A column in
        `refused` makes a bad row, but not in a table whose columns are named by templates.
        """
        return self._make(make, self._scan(), refused)

    def _make(
        self,
        make: Callable[[PlacedRow], _T],
        scanned: Iterator[tuple[int, Part, FoundRow]],
        refused: Set[str],
    ) -> Iterator[tuple[int, _T]]:
        for rank, part, found in scanned:
            with self.bad.collect(part.place(found)):
                row = part.read(found)
                if part.config.prompt is None:
                    refuse_columns(row.row, refused)
                made = make(row)
                self.fields.add(row.row)
                yield rank, made

    def _scan(self) -> Iterator[tuple[int, Part, FoundRow]]:
        """Yield (place in the order, source, row) of the rows that are taken, source by source in file order."""
        for part, ranks in zip(self.parts, self._ranks_by_part(), strict=True):
            for found in part.scan((ranks >= 0).tobytes()):
                yield int(ranks[found.ordinal]), part, found
            part.source.check_unchanged()

    def _ranks_by_part(self) -> Iterator[np.ndarray]:
        """Yield for each source the place in the order of each of its rows; -1 for a row that is not taken."""
        ranks = np.full(sum(part.size for part in self.parts), -1, dtype=np.int64)
        ranks[self.order] = np.arange(len(self.order))
        first = 0
        for part in self.parts:
            of_part = ranks[first : first + part.size]
            first += part.size
            if part.selected is not None:
                spread = np.full(part.rows.count, -1, dtype=np.int64)
                spread[part.selected] = of_part
                of_part = spread
            yield of_part

    def _in_file_order(self) -> bool:
        selected = [part.selected for part in self.parts if part.selected is not None]
        return all(bool(np.all(np.diff(numbers) > 0)) for numbers in [self.order, *selected])

    def by_source(self) -> dict[str, Any]:
        """Return the part of the manifest's entry about each of several sources; {} if there is one."""
        if len(self.parts) == 1 and self.parts[0].source.entry.weight == 1:
            return {}
        entries, first = [], 0
        for part in self.parts:
            taken = int(((self.order >= first) & (self.order < first + part.size)).sum())
            first += part.size
            used = taken - self.bad.by_file[part.source.name]
            about = {"source": part.source.name, "layout": part.layout, "in_source": part.rows.count}
            weight = part.source.entry.weight
            entries.append({**about, "rows": taken, "used": used, **({"weight": weight} if weight != 1 else {})})
        return {"sources": entries}

    def add_notes(self, notes: Iterable[tuple[str, int]]) -> None:
        """Add to the numbers of what is worth telling about how the rows are rendered."""
        for name, number in notes:
            self.notes[name] += number

    def check(self, used: int) -> None:
        """Raise DataError for bad rows unless they are to be skipped, and if none of the rows can be used."""
        self.bad.check(len(self.order), used)

    def statistics(self, samples: Sequence[Sample] | SampleStore, tokenizer: Any) -> dict[str, Any]:
        """Return the manifest's entry about these rows and the samples made of them."""
        if isinstance(samples, SampleStore):
            lengths, loss_tokens, duplicates = samples.lengths, samples.loss_tokens, samples.repeats
        else:
            lengths = np.array([len(s) for s in samples])
            loss_tokens = sum(1 for s in samples for w in s.weights if w)
            duplicates = count_repeats(tuple(s.tokens) for s in samples)
        return manifest_entry(
            lengths,
            self.bad,
            self.config.name,
            sha256=self.hashes,
            layout=self.layout,
            rows=len(self.order),
            truncated=self.truncated,
            loss_tokens=loss_tokens,
            duplicates=duplicates,
            examples=[marked_example(s, tokenizer) for s in samples[:3]],
            rendering={name: number for name, number in self.notes.items() if number},
            **self.by_source(),
            **self.fields.entry(),
        )


def open_rows(config: DataConfig, layout: str | None = None, sources: Sequence[Source] | None = None) -> Rows:
    """Open all sources, and find the layout of each and the rows that are taken.

    Args:
        config: Settings of the data.
        layout: Name for the layout if the caller reads the columns itself. None: recognise it.
        sources: The sources, if they were found before.

    Raises:
        DataError: A source, its columns or the templates can't be used.
    """
    parts = [open_part(i, source, layout) for i, source in enumerate(sources or find_sources(config))]
    count = sum(part.size for part in parts)
    bad = BadRows(config.on_bad_row, {part.source.name: part.config.on_bad_row for part in parts})
    rows = Rows(config, parts, in_order(config, count), bad)
    if all(part.source.first is None for part in parts):
        rows.read(lambda row: row)
        rows.check(0)
    return rows


def manifest_entry(lengths: Sequence[int] | np.ndarray, bad: BadRows, source: str, **fields: Any) -> dict[str, Any]:
    """Return the entry of the manifest and of the report about prepared data.

    Args:
        lengths: Tokens of each sample.
        bad: Rows left out.
        source: Name of the source.
        fields: `layout`, `rows` (taken from the source), and if they apply `sha256` (of each file), `truncated` (rows
            that were cut), `loss_tokens`, `duplicates` (samples that repeat an earlier one), `examples`, `sources`, and
            what `FieldCounts.entry` returns.
    """
    return {
        "source": source,
        "sha256": {},
        "used": len(lengths),
        "dropped": bad.dropped,
        "bad_rows": bad.rows,
        "truncated": 0,
        "tokens": int(np.sum(lengths, dtype=np.int64)),
        "loss_tokens": 0,
        "longest": int(np.max(lengths, initial=0)),
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


class Chosen(ByNumber[_T]):
    """Hold some items of a sequence by their numbers: nothing is copied, so that the sequence may lie on a disk."""

    def __init__(self, items: Sequence[_T], numbers: Sequence[int] | np.ndarray) -> None:
        self.items, self.numbers = items, np.asarray(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def item(self, number: int) -> _T:
        return self.items[int(self.numbers[number])]


@dataclass(frozen=True)
class PreparedItems(Generic[_T]):
    """Hold prepared data item by item, so that held-out data can be compared with training data.

    Attributes:
        items: The items, each with its place (`file:row`) as `source`.
        stats: Entry of the manifest and of the report about them.
    """

    items: Sequence[_T]
    stats: dict[str, Any] = field(default_factory=dict)

    noun: ClassVar[str] = "rows"
    advice: ClassVar[str] = (
        "Give held_out other rows (data.rows: [0, 2000], held_out.rows: [2000, 2200] of the same shuffled file), or a "
        "fraction of the stage's own (held_out: 0.05)"
    )

    def __len__(self) -> int:
        return len(self.items)

    def content(self, number: int) -> Hashable:
        """Return a value of an item that is equal for items with the same content."""
        raise NotImplementedError

    def place(self, number: int) -> str:
        """Return the place of an item, `file:row`."""
        place = getattr(self.items, "place", None)
        return str(self.items[number].source if place is None else place(number))  # type: ignore[attr-defined]

    def take(self, numbers: Sequence[int] | np.ndarray) -> Self:
        """Return the items with these numbers, in this order; the statistics are a copy of those of all items."""
        take = getattr(self.items, "take", None)  # of items that may lie on a disk
        items = [self.items[i] for i in numbers] if take is None else take(numbers)
        return replace(self, items=items, stats=dict(self.stats))
