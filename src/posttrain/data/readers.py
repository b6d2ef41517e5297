"""Open sources of rows: files, the Hub, and what is made here, with the place of each row and a hash of the content."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import DataConfig, SourceConfig
from posttrain.core.errors import DataError
from posttrain.core.files import file_hash, named_path
from posttrain.core.hub import check_hub
from posttrain.core.packaged_files import packaged_file
from posttrain.data.bad_rows import BadRow, Row
from posttrain.data.cells import without_nulls
from posttrain.data.gym_rows import GYM_PREFIX, gym_source_rows
from posttrain.data.synthetic import sum_chains as chains
from posttrain.data.synthetic import sums
from posttrain.data.synthetic import worked_problems as worked
from posttrain.data.table_files import FILE_READERS, FoundRow, RowSource
from posttrain.data.text_files import TEXT_ENDINGS, TextFiles, folder_hash, text_files

if TYPE_CHECKING:
    import numpy as np

ENDINGS = (*FILE_READERS, *TEXT_ENDINGS)
HEAD_ROWS = 1000
"""Rows in which columns are looked up before all rows are read for them."""
HUB_BATCH = 256
"""Rows of a Hub data set decoded at a time."""


@dataclass
class RowList(RowSource):
    """Hold rows in memory.

    Attributes:
        rows: The rows, or why one can't be read.
        numbers: The number of each. None: they are counted from 1.
    """

    rows: Sequence[Row | BadRow] = ()
    numbers: Sequence[int] | None = None

    def scan(self, mask: Sequence[int] | None = None) -> Iterator[FoundRow]:
        for i, row in enumerate(self.rows):
            if mask is None or mask[i]:
                yield FoundRow(i, i + 1 if self.numbers is None else self.numbers[i], i, row)

    def row_at(self, position: int) -> Row | BadRow:
        return self.rows[position]


class HubRows(RowSource):
    """Read a data set of the Hub, which `datasets` keeps on the disk."""

    def __init__(self, name: str, config: DataConfig) -> None:
        check_hub([], [name])
        from datasets import load_dataset

        try:
            self.data = load_dataset(name, config.subset, split=config.split)
        except Exception as error:  # offline, missing, gated, no such split: all end here, with the library's own words
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"data source {name!r} is no file here, and as a Hub data set (subset {config.subset}, split "
                f"{config.split}) it can't be opened: {first}. Expected a path ending in one of {', '.join(ENDINGS)}, "
                "packaged:NAME, or a Hub name that the network or the Hub's cache holds"
            ) from error

    @cached_property
    def count(self) -> int:
        return len(self.data)

    def scan(self, mask: Sequence[int] | None = None) -> Iterator[FoundRow]:
        wanted = range(len(self.data)) if mask is None else [i for i, w in enumerate(mask) if w]
        for first in range(0, len(wanted), HUB_BATCH):
            numbers = list(wanted[first : first + HUB_BATCH])
            columns = self.data[numbers]
            for i, cells in zip(numbers, zip(*columns.values(), strict=True), strict=True):
                yield FoundRow(i, i + 1, i, without_nulls(dict(zip(columns, cells, strict=True))))

    def row_at(self, position: int) -> Row | BadRow:
        return without_nulls(dict(self.data[position]))


@dataclass
class Source:
    """Describe one source of rows, which is opened when its rows are needed.

    Attributes:
        entry: What is set for this source.
        config: Settings of its rows: those of the data block, with what is set for this source.
        name: Name in the places of rows: a file's name, or its path if another file has the same name; numbered if a
            source is named more than once.
        path: The file, or a folder of text files. None: rows of the Hub, or made here.
    """

    entry: SourceConfig
    config: DataConfig
    name: str
    path: Path | None = None

    @cached_property
    def rows(self) -> RowSource:
        """Return the rows, opened. Raises DataError if they can't be."""
        if self.path is not None:
            if self.path.is_dir() or self.path.suffix.lower() in TEXT_ENDINGS:
                files = text_files(self.path) if self.path.is_dir() else [self.path]
                return TextFiles(files, self.config.separator)
            return FILE_READERS[self.path.suffix.lower()](self.path)
        source = self.entry.source
        return RowList(_made_rows(source)) if is_made(source) else HubRows(source, self.config)

    @cached_property
    def hash(self) -> str | None:
        """Return the SHA-256 of the file or of the rows that are made here; None for the Hub's."""
        if self.path is not None:
            self._state = _file_state(self.path)
            return _path_hash(self.path)
        if not isinstance(self.rows, RowList):
            return None
        rows: Any = list(self.rows.rows)
        hashed = [[r["question"], r["answer"]] for r in rows] if self.entry.source.startswith(GYM_PREFIX) else rows
        return hashlib.sha256(json.dumps(hashed, default=repr).encode()).hexdigest()

    @cached_property
    def identity(self) -> str:
        """Return a value that differs if the rows may: the hash, or what `datasets` names a data set of the Hub by."""
        return self.hash or str(self.rows.data._fingerprint if isinstance(self.rows, HubRows) else self.name)

    @property
    def size(self) -> int:
        """Return how many bytes the rows take where they are; 0 if they are made here."""
        if self.path is not None:
            return _file_state(self.path)[0]
        return int(self.rows.data.data.nbytes) if isinstance(self.rows, HubRows) else 0

    def check_unchanged(self) -> None:
        """Raise DataError if the file has changed since it was hashed."""
        if self.path is None or self.hash is None or self._state == (state := _file_state(self.path)):
            return
        if _path_hash(self.path) != self.hash:
            raise DataError(f"{self.path}: the file changed after it was opened. Run again once it is complete")
        self._state = state

    def scan(self, mask: Sequence[int] | None = None) -> Iterator[FoundRow]:
        """Return the rows, or those for which `mask` is 1. Raises DataError if they can't be read."""
        try:
            yield from self.rows.scan(mask)
        except OSError as error:
            raise DataError(f"{self.path or self.name}: can't be read: {error}") from error

    @cached_property
    def first(self) -> Row | None:
        """Return the first row that can be read; None if none can."""
        return next((found.row for found in self.scan() if isinstance(found.row, dict)), None)

    @cached_property
    def columns(self) -> set[str]:
        """Return the names of all columns, read from all rows."""
        return set().union(*(found.row for found in self.scan() if isinstance(found.row, dict)))

    @cached_property
    def head_columns(self) -> set[str]:
        """Return the names of the columns of the first rows."""
        return set().union(*(found.row for found in islice(self.scan(), HEAD_ROWS) if isinstance(found.row, dict)))

    def has(self, column: str) -> bool:
        """Return True if any row has the column."""
        return column in self.head_columns or column in self.columns


def _file_state(path: Path) -> tuple[int, int]:
    """Return the size and the time of the last change: of a folder, the sum and the latest of its text files."""
    states = [os.stat(p) for p in (text_files(path) if path.is_dir() else [path])]
    return sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)


def _path_hash(path: Path) -> str:
    return folder_hash(path) if path.is_dir() else file_hash(path)


def is_made(source: str) -> bool:
    """Return True for a source whose rows are made here."""
    return source.startswith(("lab:", GYM_PREFIX))


def find_sources(config: DataConfig) -> list[Source]:
    """Return the sources of the data. Raises DataError for a file that does not exist."""
    found: list[Source] = []
    for entry in config.sources():
        path = None if is_made(entry.source) else _locate(entry.source)
        names = {other.name for other in found}
        name = entry.source if path is None or path.name in names else path.name
        if name in names:
            name += f" ({1 + sum(other.entry.source == entry.source for other in found)})"
        found.append(Source(entry, config.of_source(entry), name, path))
    return found


def in_order(config: DataConfig, count: int) -> np.ndarray:
    """Return the indices of the configured rows of `count`, shuffled, then cut. Raises DataError if there are fewer."""
    import numpy as np

    order = np.arange(count)
    if config.shuffle_seed is not None:
        order = np.random.default_rng(config.shuffle_seed).permutation(count)
    if config.rows is not None:
        low, high = config.rows
        if not 0 <= low < high <= count:
            raise DataError(f"data.rows is [{low}, {high}], and {config.name} has rows 0 to {count}")
        order = order[low:high]
    return order


@lru_cache(maxsize=8)  # stages and evaluations of a recipe ask for the same ones
def _made_rows(source: str) -> list[Row]:
    """Make the rows of reasoning-gym:NAME, lab:calculator, lab:calculator:SEED, lab:KIND of chains or word problems."""
    if source.startswith(GYM_PREFIX):
        return gym_source_rows(source)
    name, _, seed = source.removeprefix("lab:").partition(":")
    if name == "calculator" and (seed or "0").isdigit():
        return sums.calculator_rows(int(seed or 0), sums.CALL_ROWS)
    if name in chains.CHAIN_KINDS and not seed:
        return chains.chain_rows(name)
    if name in worked.PROBLEM_KINDS and not seed:
        return worked.problem_rows(name)
    kinds = ", ".join(f"lab:{kind}" for kind in (*chains.CHAIN_KINDS, *worked.PROBLEM_KINDS))
    raise DataError(f"data source {source!r}: expected lab:calculator, lab:calculator:SEED with a number, {kinds}")


def _locate(source: str) -> Path | None:
    """Return the path of a file, or None for the name of a Hub data set."""
    if source.startswith("packaged:"):
        return packaged_or_own(source)
    path = named_path(source)
    if path.suffix.lower() in ENDINGS:
        if not path.is_file():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], 1)
            hint = f" Did you mean {path.with_name(near[0])}?" if near else ""
            raise DataError(f"data source {source!r}: there is no such file.{hint}")
        return path
    if path.is_dir() and text_files(path):
        return path
    if path.exists() or source.startswith(("/", ".", "~")):
        raise DataError(
            f"data source {source!r}: expected a file ending in one of {', '.join(ENDINGS)}, or a folder with "
            f"{' or '.join(TEXT_ENDINGS)} files"
        )
    return None


def packaged_or_own(source: str) -> Path:
    """Return the path as given, or of a file that comes with posttrain (packaged:NAME; DataError if none does)."""
    if not source.startswith("packaged:"):
        return named_path(source)
    return packaged_file(source.removeprefix("packaged:"))
