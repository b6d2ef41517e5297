"""Read rows from files and the Hub, with the number that a person would count and a hash of each file.

TSV and JSON are read with the standard library: a tab-separated file has no quotes to interpret (reviews have many
unpaired ones), and nothing guesses that the review "NA" is a missing value. Parquet and the Hub go through `datasets`.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.files import file_hash
from posttrain.data.gym_rows import GYM_PREFIX, gym_source_rows
from posttrain.data.synthetic import sum_chains as chains
from posttrain.data.synthetic import sums

if TYPE_CHECKING:
    import numpy as np

NumberedRows = Iterator[tuple[int, dict[str, Any]]]
ENDINGS = (".tsv", ".csv", ".json", ".jsonl", ".parquet")


@dataclass
class Table:
    """Hold rows as they are in their source.

    Attributes:
        rows: The rows.
        places: File and row number of each. Numbers count from 1: the lines below the header (TSV), the records below
            it (CSV), the lines (JSONL), the list's members (JSON). Blank lines have a number and no row.
        hashes: SHA-256 of each file.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)

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
        rows = _from_hub(source, config) if path is None else READERS[path.suffix.lower()](path)
        name = source if path is None or path.name in table.hashes else path.name
        try:
            for number, row in rows:
                table.rows.append(row)
                table.places.append((name, number))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: expected UTF-8 text: {error}. Save the file as UTF-8") from error
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


def _lines(path: Path) -> Iterator[str]:
    # Split at line feeds only: text may contain other separators, at which str.splitlines would split.
    with path.open(encoding="utf-8-sig", newline="") as f:
        for line in f.read().split("\n"):
            yield line.removesuffix("\r")


def _tsv(path: Path) -> NumberedRows:
    lines = _lines(path)
    header = _header(path, next(lines).split("\t"))
    for number, line in enumerate(lines, 1):
        if line:
            yield number, _zip(path, number, header, line.split("\t"))


def _header(path: Path, names: list[str]) -> list[str]:
    double = sorted({n for n in names if names.count(n) > 1})
    if double:
        raise DataError(f"{path}: two columns are named {double[0]!r}: {names}; give each a name of its own")
    return names


def _csv(path: Path) -> NumberedRows:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f, strict=True)
        number = 0
        try:
            header = _header(path, next(reader, []))
            for number, cells in enumerate(reader, 1):
                if cells:
                    yield number, _zip(path, number, header, cells)
        except csv.Error as error:
            hint = "tabs between cells? then name the file .tsv" if not number else "quotes inside a cell are doubled"
            raise DataError(f"{path}: row {number + 1}: not valid CSV: {error} ({hint})") from error


def _zip(path: Path, number: int, header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise DataError(f"{path}: row {number} has {len(cells)} cells, and the header {len(header)}: {header}")
    return dict(zip(header, cells, strict=True))


def _jsonl(path: Path) -> NumberedRows:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield number, _object(path, number, _parse(path, line, number))


def _json(path: Path) -> NumberedRows:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    value = _parse(path, text, None)
    if isinstance(value, dict):  # {"data": [...]}, or columns
        lists = [v for v in value.values() if isinstance(v, list)]
        if len(lists) == 1 and all(isinstance(x, dict) for x in lists[0]):
            value = lists[0]
        elif lists and len(lists) == len(value) and len({len(v) for v in lists}) == 1:
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*lists, strict=True)]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, found {type(value).__name__}")
    for number, row in enumerate(value, 1):
        yield number, _object(path, number, row)


def _parse(path: Path, text: str, number: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"row {number}" if number is not None else f"line {error.lineno}"
        hint = "" if number is not None else " (one object a line? then name the file .jsonl)"
        raise DataError(f"{path}: {where}: not valid JSON: {error.msg}{hint}") from error


def _object(path: Path, number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path}: row {number}: expected an object, found {type(row).__name__}")
    return row


def _parquet(path: Path) -> NumberedRows:
    from datasets import Dataset

    try:
        yield from enumerate(Dataset.from_parquet(str(path), keep_in_memory=True), 1)
    except Exception as error:  # pyarrow and datasets raise many kinds for a file that is not Parquet
        raise DataError(f"{path}: not readable as Parquet: {error}") from error


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


READERS = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
