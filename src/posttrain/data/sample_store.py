"""Hold samples compactly, in memory or in files: any number can be read in any order without lying in memory.

Token ids lie end to end as 16- or 32-bit integers, weights as runs of equal numbers, and arrays say where each sample
begins. Pictures lie beside them (`stored_images`). Files are read with `pread`, not mapped into memory: mapped pages
would count as memory of the process, and a file that was cut short would kill it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.core.by_number import ByNumber
from posttrain.core.errors import DataError
from posttrain.core.image_tokens import image_spans
from posttrain.core.types import Sample
from posttrain.data.stored_images import StoredImages, open_images

RUN = np.dtype([("length", "<u4"), ("weight", "<f8")])
"""Some tokens in a row with the same weight."""
ENTRY = np.dtype(
    [
        ("rank", "<u8"),  # place in the order of the rows
        ("start", "<u8"),  # first token
        ("length", "<u4"),  # number of tokens
        ("loss", "<u4"),  # number of those with a weight
        ("first_run", "<u8"),
        ("runs", "<u4"),  # number of runs
        ("check", "<u4"),  # CRC-32 of tokens and runs
        ("content", "<u8"),  # hash of the tokens
        ("position", "<u8"),  # of the row in its source
        ("number", "<u4"),  # of the row, as a person counts
        ("part", "<u2"),  # number of the source
    ]
)
BUFFER = 2**22
"""Bytes that are collected before they are written."""
_PLACE = ("start", "length", "first_run", "runs", "check")
TOKENS, RUNS, ENTRIES = "tokens.bin", "runs.bin", "entries.bin"


class _Bytes:
    """Bytes in memory that are appended and read at a place."""

    def __init__(self) -> None:
        self.data, self.size = bytearray(), 0

    def append(self, data: bytes) -> None:
        self.data += data
        self.size += len(data)

    def finish(self) -> None:
        return None

    def read(self, start: int, size: int) -> bytes:
        return bytes(self.data[start : start + size])


class _FileBytes(_Bytes):
    """Hold bytes in a file."""

    def __init__(self, path: Path, write: bool = False) -> None:
        self.path = path
        self.file = path.open("w+b" if write else "rb", buffering=BUFFER if write else 0)
        self.size = 0 if write else os.fstat(self.file.fileno()).st_size

    def append(self, data: bytes) -> None:
        self.file.write(data)
        self.size += len(data)

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), size, start)


class SampleStore(ByNumber[Sample]):
    """Give samples by number.

    Attributes:
        columns: For each sample where it lies (fields of ENTRY without `rank`), and the numbers kept with it.
    """

    def __init__(
        self,
        tokens: _Bytes,
        runs: _Bytes,
        columns: dict[str, np.ndarray],
        names: Sequence[str],
        dtype: str,
        images: StoredImages | None = None,
    ) -> None:
        """Make a store.

        Args:
            tokens: Token ids of all samples.
            runs: Weights of all samples, as RUN.
            columns: Where each sample lies.
            names: Names of the sources.
            dtype: Type of the token ids.
            images: The pictures of the samples. None: there are none.
        """
        self._tokens, self._runs, self.columns = tokens, runs, columns
        self.names, self.dtype, self.images = list(names), np.dtype(dtype), images

    def __len__(self) -> int:
        return len(self.columns["start"])

    def item(self, number: int) -> Sample:
        at = {name: int(self.columns[name][number]) for name in _PLACE}
        width = self.dtype.itemsize
        tokens = self._tokens.read(at["start"] * width, at["length"] * width)
        runs = self._runs.read(at["first_run"] * RUN.itemsize, at["runs"] * RUN.itemsize)
        if zlib.crc32(runs, zlib.crc32(tokens)) != at["check"]:
            raise DataError(f"the cache of tokenised rows is damaged at {self.place(number)}: {self._where()}")
        weights = np.frombuffer(runs, RUN)
        ids = np.frombuffer(tokens, self.dtype).tolist()
        return Sample(
            ids if self.images is None else self.images.put_into(ids, at["start"]),
            np.repeat(weights["weight"], weights["length"]).tolist(),
            self.place(number),
        )

    def _where(self) -> str:
        path = getattr(self._tokens, "path", None)
        return "in memory" if path is None else f"delete {path.parent} and run again"

    def place(self, number: int) -> str:
        """Return the place of a sample's row, `file:row`."""
        return f"{self.names[int(self.columns['part'][number])]}:{int(self.columns['number'][number])}"

    def content(self, number: int) -> int:
        """Return a hash of a sample's tokens and pictures."""
        return int(self.columns["content"][number])

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each sample."""
        return np.asarray(self.columns["length"], dtype=np.int64)

    @property
    def loss_tokens(self) -> int:
        """Return the number of tokens with a weight, of all samples."""
        return int(np.sum(self.columns["loss"], dtype=np.int64))

    @property
    def repeats(self) -> int:
        """Return how many samples have the tokens of an earlier one."""
        return len(self) - len(np.unique(self.columns["content"]))

    def take(self, numbers: Sequence[int] | np.ndarray | slice) -> SampleStore:
        """Return the samples with these numbers, in this order; nothing is copied but where they lie."""
        chosen = numbers if isinstance(numbers, slice) else np.asarray(numbers, dtype=np.int64)
        columns = {name: column[chosen] for name, column in self.columns.items()}
        return SampleStore(self._tokens, self._runs, columns, self.names, self.dtype.str, self.images)


class SampleWriter:
    """Write samples one after the other, in any order of their rows."""

    def __init__(
        self,
        names: Sequence[str],
        vocabulary: int,
        folder: Path | None = None,
        fields: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Begin a store.

        Args:
            names: Names of the sources.
            vocabulary: Number of token ids, which decides how large one is.
            folder: An empty folder for its files. None: the store is held in memory.
            fields: (name, type) of numbers that are kept with each sample.
        """
        self.names, self.folder, self._fields = list(names), folder, [name for name, _ in fields]
        self._entry = np.dtype([*((n, ENTRY[n]) for n in ENTRY.names or ()), *fields])
        self.dtype = "<u2" if vocabulary <= 2**16 else "<u4"
        self._tokens = self._bytes(TOKENS)
        self._runs = self._bytes(RUNS)
        self._entries = self._bytes(ENTRIES)
        self._images: StoredImages | None = None

    def _bytes(self, name: str) -> _Bytes:
        return _Bytes() if self.folder is None else _FileBytes(self.folder / name, write=True)

    def add(
        self,
        rank: int,
        sample: Sample,
        part: int,
        number: int,
        position: int,
        values: Mapping[str, float] | None = None,
    ) -> None:
        """Append a sample.

        Args:
            rank: Place of its row in the order of all rows.
            sample: The sample.
            part: Number of its source.
            number: Number of its row, as a person counts.
            position: Position of its row in the source.
            values: Numbers to keep with it, by the names of `fields`.
        """
        tokens = np.array(sample.tokens, dtype=self.dtype).tobytes()
        weights = np.array(sample.weights, dtype=np.float64)
        starts = np.flatnonzero(np.diff(weights, prepend=np.nan))  # nan differs from everything: a run begins at 0
        runs = np.empty(len(starts), dtype=RUN)
        runs["weight"] = weights[starts]
        runs["length"] = np.diff(starts, append=len(weights))
        packed = runs.tobytes()
        start = self._tokens.size // np.dtype(self.dtype).itemsize
        shown = b""
        if spans := image_spans(sample.tokens):
            self._images = self._images or StoredImages(self.folder)
            self._images.add(start, spans)
            shown = "".join(span.key for span in spans).encode()
        entry = (
            rank,
            start,
            len(weights),
            np.count_nonzero(weights),
            self._runs.size // RUN.itemsize,
            len(runs),
            zlib.crc32(packed, zlib.crc32(tokens)),
            int.from_bytes(blake2b(tokens + shown, digest_size=8).digest(), "little"),
            position,
            number,
            part,
            *((values or {})[name] for name in self._fields),
        )
        self._tokens.append(tokens)
        self._runs.append(packed)
        self._entries.append(np.array(entry, dtype=self._entry).tobytes())

    def finish(self) -> SampleStore:
        """Return the store, its samples in the order of their rows. In a folder, its arrays are files too."""
        for part in (self._tokens, self._runs, self._entries):
            part.finish()
        if self._images is not None:
            self._images.finish()
        if self.folder is None:
            entries = np.frombuffer(self._entries.read(0, self._entries.size), self._entry)
        elif self._entries.size:
            entries = np.memmap(self.folder / ENTRIES, self._entry, mode="r")
        else:
            entries = np.empty(0, self._entry)
        ranks = np.array(entries["rank"])
        order = np.argsort(ranks, kind="stable") if np.any(ranks[1:] < ranks[:-1]) else slice(None)
        names = [name for name in self._entry.names or () if name != "rank"]
        if self.folder is None:
            columns = {name: np.ascontiguousarray(entries[name][order]) for name in names}
            return SampleStore(self._tokens, self._runs, columns, self.names, self.dtype, self._images)
        for name in names:
            with (self.folder / f"{name}.npy").open("wb") as f:
                np.save(f, entries[name][order])
                f.flush()
                os.fsync(f.fileno())
        del entries
        (self.folder / ENTRIES).unlink()
        return open_store(self.folder, self.names, self.dtype)


def open_store(folder: Path, names: Sequence[str], dtype: str) -> SampleStore:
    """Open a store that was written into a folder.

    Args:
        folder: The folder.
        names: Names of the sources.
        dtype: Type of the token ids.
    """
    columns = {path.stem: np.load(path, mmap_mode="r").view(np.ndarray) for path in sorted(folder.glob("*.npy"))}
    images = open_images(folder)
    return SampleStore(_FileBytes(folder / TOKENS), _FileBytes(folder / RUNS), columns, names, dtype, images)


def vocabulary_size(tokenizer: Any) -> int:
    """Return one more than the largest token id of a tokenizer."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
