"""Exact and near duplicates among many texts, in bounded memory.

MinHash (Broder 1997) with banding (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4) proposes pairs; only a
pair whose shingles overlap enough when they are counted is a duplicate. Sketches are computed by the package rensa.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from posttrain.core.errors import DataError
from posttrain.data.word_hashes import SEPARATED, WordBatch, mix, row_batches, word_batch

SHINGLE_WORDS = 3
"""Words of a shingle."""
LEAST_BANDS = 32
AGREEMENT = 0.41
"""A pair at the threshold agrees in about this share of the bands."""
MISSED = 2e-5
"""Highest probability that a pair at the threshold is not compared."""
COMPARED = 256
"""Earlier texts that a text is compared with, at most, in each band."""
_MULTIPLIERS = mix(np.arange(1, SHINGLE_WORDS + 1, dtype=np.uint64)) | np.uint64(1)
_SEED = 19


@dataclass(frozen=True)
class Duplicates:
    """Hold which texts repeat an earlier one.

    A text is compared with earlier texts that are kept, so every dropped text has a kept one that is that similar.

    Attributes:
        of: (texts) Number of the kept text that each text repeats; -1: the text is kept.
        similarity: (texts) Jaccard similarity of the shingles with that text; 1 for the same text; 0: kept.
        exact: (texts) True if the text is the same, character for character.
        crowded: Number of texts that have more similar earlier texts than are compared: some of their duplicates may
            be missed.
    """

    of: NDArray[np.int32]
    similarity: NDArray[np.float32]
    exact: NDArray[np.bool_]
    crowded: int = 0

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Return which texts repeat no earlier one."""
        return self.of < 0

    @property
    def stats(self) -> dict[str, int]:
        """Return counts for the report."""
        near = int((~self.kept & ~self.exact).sum())
        return {"texts": len(self.of), "exact": int(self.exact.sum()), "near": near, "crowded": self.crowded}


def find_duplicates(texts: Iterable[str | Sequence[str]], threshold: float = 0.8) -> Duplicates:
    """Find texts that are the same as an earlier one, or nearly so.

    The similarity of two texts is |A and B| / |A or B| of their sets of shingles: all runs of three words, without case
    and punctuation (signs of arithmetic count); a shorter text is one shingle. Of texts in parts (a context and a
    question, say) it is the lowest one of a part, so that another question about the same context is no duplicate. A
    pair at the threshold is found with a probability of 0.99998.

    Args:
        texts: The texts, or for each its parts, of which all have the same number. They are read once, and not kept in
            memory (a temporary file holds hashes of their shingles).
        threshold: Lowest similarity of near duplicates, from 0.5. 1: texts with the same shingles.

    Returns:
        For each text, in their order, the earlier text that it repeats.

    Raises:
        DataError: The package rensa is missing.
        ValueError: The threshold is out of range.
    """
    if not 0.5 <= threshold <= 1:
        raise ValueError(f"expected a threshold from 0.5 to 1, got {threshold}")
    with tempfile.TemporaryFile() as file:
        return _compare(_sketch(texts, *_banding(threshold), file), threshold)


@dataclass(frozen=True)
class _Sketched:
    """Hold what is known of each text after reading it: digests, hashes of bands, shingles in a file."""

    digests: NDArray[np.uint64]
    bands: NDArray[np.uint32]
    shingles: _Shingles
    least: int  # bands in which a pair agrees before it is compared


class _Shingles:
    """Shingles of texts, part by part, in a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.parts = 1
        self._ends = array("q", [0])

    def add(self, hashes: NDArray[np.uint64], ends: NDArray[np.int64]) -> None:
        """Add the shingles of parts, given where each part's end."""
        self.file.write(hashes.tobytes())
        self._ends.frombytes((ends + self._ends[-1]).tobytes())

    def sizes(self, number: int) -> list[int]:
        """Return the number of shingles of each part of a text."""
        ends = self._ends[number * self.parts : (number + 1) * self.parts + 1]
        return [high - low for low, high in zip(ends, ends[1:], strict=False)]

    def of(self, number: int) -> list[NDArray[np.uint64]]:
        """Return the shingles of each part of a text."""
        ends = self._ends[number * self.parts : (number + 1) * self.parts + 1]
        read = np.frombuffer(os.pread(self.file.fileno(), 8 * (ends[-1] - ends[0]), 8 * ends[0]), np.uint64)
        return [read[low - ends[0] : high - ends[0]] for low, high in zip(ends, ends[1:], strict=False)]


def _banding(threshold: float) -> tuple[int, int, int]:
    """Return the slots of a band, the number of bands, and in how many a pair has to agree to be compared."""
    slots = max(3, min(16, round(math.log(AGREEMENT) / math.log(threshold)))) if threshold < 1 else 4
    p = threshold**slots
    bands = max(LEAST_BANDS, math.ceil(math.log(MISSED) / math.log(1 - p))) if p < 1 else LEAST_BANDS
    least, missed = 0, 0.0
    while missed <= MISSED and least < bands:
        missed += math.comb(bands, least) * p**least * (1 - p) ** (bands - least)
        least += 1
    return slots, bands, max(1, least - 1)


def _sketch(texts: Iterable[str | Sequence[str]], slots: int, bands: int, least: int, file: IO[bytes]) -> _Sketched:
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise DataError(
            "near duplicates are found with the package rensa, which is not installed: "
            "pip install 'posttrain[instructions]' (a stage does without: near_duplicates: null)"
        ) from error
    digests, shingles = array("Q"), _Shingles(file)
    hashed: list[NDArray[np.uint32]] = []
    for batch in row_batches(texts):
        if not hashed:
            shingles.parts = len(batch[0])
        for parts in batch:
            if len(parts) != shingles.parts:
                raise ValueError(f"expected {shingles.parts} parts of every text, got {len(parts)}")
            encoded = "\0".join(parts).encode("utf-8", "surrogatepass")
            digests.frombytes(hashlib.blake2b(encoded, digest_size=16).digest())
        hashes, ends = _shingles(word_batch([part for parts in batch for part in parts]))
        if shingles.parts > 1:  # the same words in another part are other shingles
            part = np.arange(len(ends), dtype=np.uint64) % np.uint64(shingles.parts)
            hashes = mix(hashes + np.repeat(part, np.diff(ends, prepend=0)))
        offsets = np.concatenate([[0], ends[shingles.parts - 1 :: shingles.parts]]).astype(np.uint64)
        made = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, bands * slots, _SEED)
        hashed.append(_band_hashes(np.array(made.to_rows(), np.uint32), bands, slots))
        shingles.add(hashes, ends)
    file.flush()
    every = np.concatenate(hashed) if hashed else np.zeros((0, bands), np.uint32)
    return _Sketched(np.frombuffer(digests, np.uint64).reshape(-1, 2), every, shingles, least)


def _band_hashes(sketches: NDArray[np.uint32], bands: int, slots: int) -> NDArray[np.uint32]:
    """Return (texts, bands) hashes of the slots of each band."""
    by_band = sketches.reshape(-1, bands, slots)
    out = np.zeros(by_band.shape[:2], np.uint64)
    for k in range(slots):
        out = mix(out + by_band[:, :, k] + np.uint64(k + 1))
    return (out >> np.uint64(32)).astype(np.uint32)


def _shingles(words: WordBatch) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the hashes of the different shingles, text by text in ascending order, and where each text's end."""
    ends = np.append(words.starts[1:], len(words.letters))[: len(words.starts)]
    hashes = words.hashes(words.starts, ends, ~SEPARATED)
    firsts = words.word_starts_of_texts()
    counts = np.diff(firsts)
    text_of = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(hashes)) - firsts[:-1][text_of]
    left = counts[text_of] - place  # words from here to the end of the text
    total = np.zeros(len(hashes), np.uint64)
    for k in range(SHINGLE_WORDS):
        inside = left > k
        total[inside] += hashes[np.flatnonzero(inside) + k] * _MULTIPLIERS[k]
    begins = (left >= SHINGLE_WORDS) | (place == 0)  # a text of fewer words is one shingle
    made, owner = mix(total[begins]), text_of[begins]
    order = np.lexsort((made, owner))
    made, owner = made[order], owner[order]
    new = np.ones(len(made), bool)
    new[1:] = (made[1:] != made[:-1]) | (owner[1:] != owner[:-1])
    return made[new], np.searchsorted(owner[new], np.arange(1, len(counts) + 1)).astype(np.int64)


def _compare(sketched: _Sketched, threshold: float) -> Duplicates:
    """Go through the texts in order, and compare each with the earlier ones that are kept and agree in enough bands."""
    count = len(sketched.digests)
    of, similarity = np.full(count, -1, np.int32), np.zeros(count, np.float32)
    _mark_exact(sketched.digests, of)
    exact = of >= 0
    similarity[exact] = 1
    candidates = _Candidates(sketched.bands, exact, sketched.least)
    for number in candidates.texts:
        mine = sketched.shingles.of(number)
        if not any(len(part) for part in mine):
            continue
        best, which = 0.0, -1
        for other in candidates.near(number):
            similarity_here = _similarity(mine, other, sketched.shingles, threshold - 1e-9)
            if similarity_here > best:
                best, which = similarity_here, other
        if which < 0:
            candidates.add(number)
        else:
            of[number], similarity[number] = which, best
    near = np.flatnonzero(exact)  # their first copy may repeat a kept text itself
    dropped = near[of[of[near]] >= 0]
    similarity[dropped], of[dropped], exact[dropped] = similarity[of[dropped]], of[of[dropped]], False
    return Duplicates(of, similarity, exact, candidates.crowded)


def _similarity(mine: Sequence[NDArray[np.uint64]], other: int, shingles: _Shingles, least: float) -> float:
    """Return the lowest Jaccard similarity of a part; 0 if one is below `least`."""
    sizes = list(zip(map(len, mine), shingles.sizes(other), strict=True))
    if any(min(pair) < least * max(pair) for pair in sizes):
        return 0.0
    lowest = 1.0
    for part, theirs in zip(mine, shingles.of(other), strict=True):
        if len(part) or len(theirs):
            shared = len(np.intersect1d(part, theirs, assume_unique=True))
            lowest = min(lowest, shared / (len(part) + len(theirs) - shared))
        if lowest < least:
            return 0.0
    return lowest


def _mark_exact(digests: NDArray[np.uint64], of: NDArray[np.int32]) -> None:
    """Write the number of the first text with the same digest into `of`, for each text after it."""
    order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    same = np.zeros(len(order), bool)
    same[1:] = (ordered[1:] == ordered[:-1]).all(1)
    group_first = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))]
    of[order[same]] = group_first[same]


class _Candidates:
    """Earlier kept texts that agree with a text in enough bands.

    Lists of texts with the same hash of a band are linked in one array: a dict of lists would not fit in memory.
    """

    def __init__(self, bands: NDArray[np.uint32], left_out: NDArray[np.bool_], least: int) -> None:
        self.least, self.crowded, self.bands = least, 0, bands.shape[1]
        groups = bands.view(np.int32)  # in place: the hashes of a band are not needed once its groups are known
        used = np.flatnonzero(~left_out)
        total = 0
        for band in range(self.bands):
            values = bands[used, band]
            order = np.argsort(values, kind="stable")
            ordered = values[order]
            new = np.ones(len(order), bool)
            new[1:] = ordered[1:] != ordered[:-1]
            alone = new & np.append(new[1:], True)[: len(new)]
            numbers = np.cumsum(new & ~alone) - 1 + total
            groups[:, band] = -1
            groups[used[order[~alone]], band] = numbers[~alone]
            total = int(numbers[-1]) + 1 if len(numbers) else total
        active = np.flatnonzero((groups >= 0).sum(1) >= least)
        self.texts: list[int] = active.tolist()
        rows = np.full(len(groups), -1, np.int32)
        rows[active] = np.arange(len(active))
        self._row_of = rows.data
        self._groups = np.ascontiguousarray(groups[active]).reshape(-1).data
        self._heads = array("i", [-1]) * total
        self._next = array("i", [-1]) * len(self._groups)

    def near(self, number: int) -> list[int]:
        """Return the kept texts added so far that agree with a text in enough bands, those with most first."""
        counts: dict[int, int] = {}
        bands, heads, following = self.bands, self._heads, self._next
        first = self._row_of[number] * bands
        crowded = False
        for band, group in enumerate(self._groups[first : first + bands]):
            at = heads[group] if group >= 0 else -1
            left = COMPARED
            while at >= 0 and left:
                counts[at] = counts.get(at, 0) + 1
                at, left = following[at * bands + band], left - 1
            crowded |= at >= 0
        self.crowded += crowded
        found = [(-count, row) for row, count in counts.items() if count >= self.least]
        return [self.texts[row] for _, row in sorted(found)]

    def add(self, number: int) -> None:
        """Add a text that is kept."""
        first = self._row_of[number] * self.bands
        for place, group in enumerate(self._groups[first : first + self.bands], first):
            if group >= 0:
                self._next[place], self._heads[group] = self._heads[group], first // self.bands
