"""Read rows from files, the Hub and what is made here, with the place of each row and a hash of each file."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.files import file_hash
from posttrain.data.bad_rows import BadRow
from posttrain.data.gym_rows import GYM_PREFIX, gym_source_rows
from posttrain.data.synthetic import sum_chains as chains
from posttrain.data.synthetic import sums
from posttrain.data.table_files import FILE_READERS, NumberedRows

if TYPE_CHECKING:
    import numpy as np

ENDINGS = tuple(FILE_READERS)


@dataclass
class Table:
    """Hold rows as they are in their source.

    Attributes:
        rows: The rows; {} in place of one that can't be read.
        places: File and row number of each. Numbers count from 1: the lines below the header (TSV), the records below
            it (CSV), the lines (JSONL), the list's members (JSON). Blank lines have a number and no row.
        hashes: SHA-256 of each file.
        bad: Why a row can't be read, by its index.
        text_only: Names of the sources whose cells hold text alone (TSV, CSV).
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    bad: dict[int, BadRow] = field(default_factory=dict)
    text_only: set[str] = field(default_factory=set)

    def add(self, row: dict[str, Any] | BadRow, place: tuple[str, int]) -> None:
        """Append a row, or why it can't be read."""
        if isinstance(row, BadRow):
            self.bad[len(self.rows)] = row
            row = {}
        self.rows.append(row)
        self.places.append(place)

    @property
    def first(self) -> dict[str, Any]:
        """Return the first row that can be read; {} if none can."""
        return next((row for i, row in enumerate(self.rows) if i not in self.bad), {})

    @property
    def columns(self) -> set[str]:
        """Return the names of all columns."""
        return set().union(*self.rows)

    def source(self, index: int) -> str:
        """Return the place of a row as `file:row`."""
        file, number = self.places[index]
        return f"{file}:{number}"


def read_table(config: DataConfig) -> Table:
    """Return all rows of the configured sources, in file order. Raises DataError for what can't be found or read."""
    table = Table()
    for source in [config.source] if isinstance(config.source, str) else config.source:
        if source.startswith(("lab:", GYM_PREFIX)):
            _made(source, table)
            continue
        path = _locate(source)
        rows = _from_hub(source, config) if path is None else FILE_READERS[path.suffix.lower()](path)
        name = source if path is None or path.name in table.hashes else path.name
        if path is not None and path.suffix.lower() in (".tsv", ".csv"):
            table.text_only.add(name)
        try:
            for number, row in rows:
                table.add(row, (name, number))
        except OSError as error:
            raise DataError(f"{path}: can't be read: {error}") from error
        if path is not None:
            table.hashes[name] = file_hash(path)
    if not table.rows:
        raise DataError(f"{config.source} holds no rows")
    return table


def in_order(config: DataConfig, count: int) -> np.ndarray:
    """Return the indices of the configured rows of `count`, shuffled, then cut. Raises DataError if there are fewer."""
    import numpy as np

    order = np.arange(count)
    if config.shuffle_seed is not None:
        order = np.random.default_rng(config.shuffle_seed).permutation(count)
    if config.rows is not None:
        low, high = config.rows
        if not 0 <= low < high <= count:
            raise DataError(f"data.rows is [{low}, {high}], and {config.source} has rows 0 to {count}")
        order = order[low:high]
    return order


def _made(source: str, table: Table) -> None:
    """Add rows that are made here: reasoning-gym:NAME, lab:calculator, lab:calculator:SEED, lab:KIND of chains."""
    name, _, seed = source.removeprefix("lab:").partition(":")
    if source.startswith(GYM_PREFIX):
        rows = gym_source_rows(source)
    elif name == "calculator" and (seed or "0").isdigit():
        rows = sums.calculator_rows(int(seed or 0), sums.CALL_ROWS)
    elif name in chains.CHAIN_KINDS and not seed:
        rows = chains.chain_rows(name)
    else:
        kinds = ", ".join(f"lab:{kind}" for kind in chains.CHAIN_KINDS)
        raise DataError(f"data source {source!r}: expected lab:calculator, lab:calculator:SEED with a number, {kinds}")
    table.rows += rows
    table.places += [(source, number) for number in range(1, len(rows) + 1)]
    hashed = [[r["question"], r["answer"]] for r in rows] if source.startswith(GYM_PREFIX) else rows
    table.hashes[source] = hashlib.sha256(json.dumps(hashed, default=repr).encode()).hexdigest()


def _locate(source: str) -> Path | None:
    """Return the path of a file, or None for the name of a Hub data set."""
    if source.startswith("packaged:"):
        return packaged_or_own(source)
    path = Path(source).expanduser()
    if path.suffix.lower() in ENDINGS:
        if not path.is_file():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], 1)
            hint = f" Did you mean {path.with_name(near[0])}?" if near else ""
            raise DataError(f"data source {source!r}: there is no such file.{hint}")
        return path
    if path.exists() or source.startswith(("/", ".", "~")):
        raise DataError(f"data source {source!r}: expected a file ending in one of {', '.join(ENDINGS)}")
    return None


def packaged_or_own(source: str) -> Path:
    """Return the path as given, or of a file that ships with posttrain (packaged:NAME; DataError if it has none)."""
    if not source.startswith("packaged:"):
        return Path(source).expanduser()
    folder = Path(str(resources.files("posttrain.data") / "packaged"))
    path = folder / source.removeprefix("packaged:")
    if not path.is_file():
        have = sorted(p.name for p in folder.iterdir() if not p.name.startswith(("README", "LICENSE")))
        raise DataError(f"data source {source!r}: posttrain ships {have}, not this")
    return path


def _from_hub(name: str, config: DataConfig) -> NumberedRows:
    from datasets import load_dataset

    try:
        yield from enumerate(load_dataset(name, config.subset, split=config.split), 1)
    except Exception as error:  # offline, missing, gated, no such split: all end here, with the library's own words
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"data source {name!r} is no file here, and as a Hub data set (subset {config.subset}, split "
            f"{config.split}) it can't be opened: {first}. Expected a path ending in one of {', '.join(ENDINGS)}, "
            "packaged:NAME, or a Hub name that the network or the Hub's cache holds"
        ) from error
