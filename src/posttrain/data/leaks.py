"""Find texts of evaluations in rows that are trained on, exactly, whatever case, punctuation and white space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.data.quality_settings import NGRAM
from posttrain.data.word_hashes import BASE, LETTER, WordBatch, mix, row_batches, word_batch

LEAST_WORDS = 4
"""A text of fewer words is found only where it is a whole text of a row: it may stand inside of any other."""
SHARED = 10
"""A run of words in this many items of an evaluation, and in SHARE of them, is its wording and no item's content."""
SHARE = 0.05
LEAKS_SHOWN = 5
_LONG, _SHORT = 32, 6
"""Letters of the beginning of a run that are looked up first: of runs of at least 32 letters, and of shorter ones."""
COMPARED_RUNS = 1 << 20
"""Places and runs that are compared at a time."""
_NOTHING = np.zeros(0, np.int64)
_Found = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Leaks:
    """Hold which rows contain text of which items of evaluations.

    Attributes:
        rows: Numbers of leaking rows; several in a row if a row contains text of several items.
        items: Number of the item of each, counted through all evaluations.
        evaluations: Name of each item's evaluation and its number there, by item.
        words: Words that were found, by place in `rows`.
        totals: For each evaluation: items, short texts, runs of words, runs that are shared wording.
    """

    rows: NDArray[np.int64]
    items: NDArray[np.int64]
    evaluations: Sequence[tuple[str, int]]
    words: Sequence[str]
    totals: dict[str, dict[str, Any]]

    @property
    def leaking(self) -> NDArray[np.int64]:
        """Return the numbers of the rows that leak, each once, ascending."""
        return np.unique(self.rows)

    @property
    def by_evaluation(self) -> dict[str, list[int]]:
        """Return the numbers of the leaking rows of each evaluation that has some, ascending."""
        out: dict[str, dict[int, None]] = {}
        for row, item in zip(self.rows.tolist(), self.items.tolist(), strict=True):
            out.setdefault(self.evaluations[item][0], {})[row] = None
        return {name: list(rows) for name, rows in out.items()}

    @property
    def stats(self) -> dict[str, Any]:
        """Return counts and examples of each evaluation, for the report."""
        out: dict[str, Any] = {}
        names = np.array([self.evaluations[i][0] for i in self.items.tolist()], dtype=object)
        for name, totals in self.totals.items():
            own = np.flatnonzero(names == name) if len(names) else _NOTHING
            shown = {int(self.rows[k]): k for k in own[::-1].tolist()}  # one of each row
            out[name] = {
                **totals,
                "leaking_rows": len(shown),
                "leaked_items": len(np.unique(self.items[own])),
                "examples": [
                    {"row": row, "item": self.evaluations[int(self.items[k])][1], "words": self.words[k]}
                    for row, k in sorted(shown.items())[:LEAKS_SHOWN]
                ],
            }
        return out


class LeakIndex:
    """Runs of words of evaluations, to be found in rows.

    A text of an evaluation leaks where a row has 13 of its consecutive words, in this order and beside each other. A
    text of fewer words leaks where a row has all of it; one of fewer than four words (or six letters) only where it is
    a whole text of a row. Only letters, digits, and signs of arithmetic beside digits are compared. Words are what
    white space separates; in scripts without spaces (Chinese, Japanese, Thai) every character is one.

    A run of words in at least ten items of an evaluation, and 5% of them, is taken as wording that its items share
    (a prompt's template), and not looked for.
    """

    def __init__(self, n: int = NGRAM) -> None:
        if n < 2:
            raise ValueError(f"expected at least 2 words, got n={n}")
        self.n = n
        self._names: list[str] = []
        self._item_of: list[tuple[str, int]] = []
        self._totals: dict[str, dict[str, Any]] = {}
        self._letters: list[NDArray[np.uint32]] = []
        self._size = 0
        self._runs: list[tuple[NDArray[Any], ...]] = []
        self._tables: _Tables | None = None

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._item_of)

    def add(self, evaluation: str, items: Iterable[str | Sequence[str]]) -> None:
        """Add the items of an evaluation; more of them, if it was added before.

        Args:
            evaluation: Its name.
            items: Text of each item, or its texts (question and answer, say), each of which is looked for. A text that
                says little on its own, such as the label of a class, does not belong here.
        """
        self._tables = None
        every = [[item] if isinstance(item, str) else list(item) for item in items]
        first, count = len(self._item_of), len(every)
        parts = [self._read(word_batch(texts), np.array(owners, np.int64) + first) for texts, owners in _batched(every)]
        hashes, item, begins, lengths, whole = _columns(parts)
        shared = _shared(hashes, item, count)
        keep = ~shared
        total = self._totals.setdefault(
            evaluation, {"items": 0, "searched": 0, "short": 0, "runs": 0, "shared_runs": 0}
        )
        self._item_of += [(evaluation, total["items"] + i) for i in range(count)]
        total["items"] += count
        total["searched"] += len(np.unique(item[keep]))
        total["short"] += int((whole > 0).sum())
        total["runs"] += len(np.unique(hashes))
        total["shared_runs"] += len(np.unique(hashes[shared]))
        self._runs.append(tuple(column[keep] for column in (hashes, item, begins, lengths, whole)))

    def _read(self, words: WordBatch, owners: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Return hash, item, place, length of each run, and 1 if it is a short text, 2 if it must be a whole text."""
        spaced = words.starts[words.spaced]
        firsts = np.searchsorted(spaced, np.concatenate([[0], words.text_ends]))
        begins, ends, texts, whole = [], [], [], []
        for text, (low, high) in enumerate(zip(firsts[:-1].tolist(), firsts[1:].tolist(), strict=True)):
            end = int(words.text_ends[text])
            if low == high:
                continue
            own = spaced[low:high]
            if high - low >= self.n:
                begins.append(own[: high - low - self.n + 1])
                ends.append(np.append(own[self.n :], end))
                whole.append(np.zeros(high - low - self.n + 1, np.int8))
            else:
                tiny = high - low < LEAST_WORDS or end - own[0] < _SHORT
                begins.append(own[:1])
                ends.append(np.array([end], np.int64))
                whole.append(np.array([2 if tiny else 1], np.int8))
            texts.append(np.full(len(begins[-1]), text))
        self._letters.append(words.letters)
        offset, self._size = self._size, self._size + len(words.letters)
        if not begins:
            return _columns([])
        low_ends, high_ends = np.concatenate(begins), np.concatenate(ends)
        hashes = words.hashes(low_ends, high_ends)
        item = owners[np.concatenate(texts)]
        return hashes, item, low_ends + offset, high_ends - low_ends, np.concatenate(whole)

    def search(self, rows: Iterable[str | Sequence[str]]) -> Leaks:
        """Find the rows that contain text of an item.

        Args:
            rows: Text of each row, or its texts (prompt, completion, demonstrations); they are read once, and few are
                in memory at a time.

        Returns:
            Every pair of a row and an item that have a run of words in common.
        """
        if self._tables is None:
            self._tables = _Tables(self._letters, self._runs)
        pairs: dict[tuple[int, int], str] = {}
        for texts, owners in _batched(rows):
            words = word_batch(texts)
            row_of_text = np.array(owners, np.int64)
            for begins, ends, runs in self._tables.find(words):
                hit = row_of_text[np.searchsorted(words.text_ends, begins, side="right")]
                columns = (column.tolist() for column in (begins, ends, runs, hit))
                for begin, end, run, row in zip(*columns, strict=True):
                    new = [(row, item) for item in self._tables.items_of(run) if (row, item) not in pairs]
                    if new and self._tables.equal(words, begin, end, run):
                        pairs |= dict.fromkeys(new, _readable(words, begin, end))
        every = sorted(pairs)
        found = np.array(every, np.int64).reshape(-1, 2)
        return Leaks(found[:, 0], found[:, 1], self._item_of, [pairs[pair] for pair in every], self._totals)


class _Tables:
    """Runs of words sorted for look-up."""

    def __init__(self, letters: Sequence[NDArray[np.uint32]], runs: Sequence[tuple[NDArray[Any], ...]]) -> None:
        self.letters = np.concatenate([*letters, np.zeros(0, np.uint32)])
        hashes, items, begins, lengths, whole = _columns(runs)
        order = np.lexsort((items, whole, hashes))
        hashes, self._items = hashes[order], items[order]
        new = np.ones(len(hashes), bool)
        new[1:] = (hashes[1:] != hashes[:-1]) | np.diff((whole[order] == 2).astype(np.int8)).astype(bool)
        self._first_item = np.append(np.flatnonzero(new), len(hashes))
        first = order[new]
        self.hashes, self.begins, self.lengths = hashes[new], begins[first], lengths[first]
        only_whole = whole[first] == 2
        self.whole = _Lookup(self.hashes[only_whole], np.flatnonzero(only_whole))
        long = ~only_whole & (self.lengths >= _LONG)
        short = ~only_whole & ~long
        self.long = _Lookup(self._prefixes(long, _LONG), np.flatnonzero(long))
        self.shortest = min([_SHORT, *self.lengths[short].tolist()])
        self.short_beginnings = _Lookup(self._prefixes(short, self.shortest), np.flatnonzero(short))
        self.short = _Lookup(self.hashes[short], np.flatnonzero(short))
        self.short_lengths = np.unique(self.lengths[short]).tolist()

    def _prefixes(self, chosen: NDArray[np.bool_], size: int) -> NDArray[np.uint64]:
        """Return the hash of the first letters of each chosen run."""
        begins = self.begins[chosen]
        out = np.zeros(len(begins), np.uint64)
        for low in range(0, len(begins), 1 << 16):
            part = begins[low : low + (1 << 16)]
            out[low : low + (1 << 16)] = _hash_windows(self.letters[part[:, None] + np.arange(size)])
        return out

    def items_of(self, run: int) -> list[int]:
        """Return the items that have a run of words."""
        return self._items[self._first_item[run] : self._first_item[run + 1]].tolist()

    def equal(self, words: WordBatch, begin: int, end: int, run: int) -> bool:
        """Return True if the letters are those of the run, and not only their hash."""
        ours, theirs = words.letters[begin:end], self.letters[self.begins[run] : self.begins[run] + self.lengths[run]]
        same_first = (ours[0] ^ theirs[0]) & LETTER == 0
        return bool(same_first) and bool(np.array_equal(ours[1:], theirs[1:]))

    def find(self, words: WordBatch) -> Iterator[_Found]:
        """Yield where runs of words begin and end, and which they are, by their hashes."""
        yield from self._whole_texts(words)
        if len(words.starts):
            ends_of = words.text_ends[np.searchsorted(words.text_ends, words.starts, side="right")]
            boundary = np.zeros(len(words.letters) + 1, bool)
            boundary[words.starts] = boundary[words.text_ends] = True
            if len(self.long.runs):
                yield from self._long_runs(words, ends_of, boundary)
            if len(self.short.runs):
                yield from self._short_runs(words, ends_of, boundary)

    def _whole_texts(self, words: WordBatch) -> Iterator[_Found]:
        begins, ends = np.concatenate([[0], words.text_ends[:-1]]), words.text_ends
        filled = begins < ends
        begins, ends = begins[filled], ends[filled]
        for place, run in self.whole.pairs(words.hashes(begins, ends) if len(begins) else np.zeros(0, np.uint64)):
            yield begins[place], ends[place], run

    def _long_runs(self, words: WordBatch, ends_of: NDArray[np.int64], boundary: NDArray[np.bool_]) -> Iterator[_Found]:
        long_enough = words.starts + _LONG <= ends_of
        starts, limits = words.starts[long_enough], ends_of[long_enough]
        for place, run in self.long.pairs(words.hashes(starts, starts + _LONG)):
            begins, ends = starts[place], starts[place] + self.lengths[run]
            fits = np.flatnonzero(ends <= limits[place])
            fits = fits[boundary[ends[fits]]]
            begins, ends, run = begins[fits], ends[fits], run[fits]
            if len(run):
                same = words.hashes(begins, ends) == self.hashes[run]
                yield begins[same], ends[same], run[same]

    def _short_runs(
        self, words: WordBatch, ends_of: NDArray[np.int64], boundary: NDArray[np.bool_]
    ) -> Iterator[_Found]:
        fits = words.starts + self.shortest <= ends_of
        begins, limits = words.starts[fits], ends_of[fits]
        likely = self.short_beginnings.among(words.hashes(begins, begins + self.shortest))
        begins, limits = begins[likely], limits[likely]
        for length in self.short_lengths if len(begins) else ():
            inside = np.flatnonzero(begins + length <= limits)
            inside = inside[boundary[begins[inside] + length]]
            own = begins[inside]
            for place, run in self.short.pairs(words.hashes(own, own + length)):
                yield own[place], own[place] + length, run


class _Lookup:
    """Hashes with the runs that have them; a bit table rejects most hashes at once."""

    def __init__(self, hashes: NDArray[np.uint64], runs: NDArray[np.int64]) -> None:
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.runs = hashes[order], runs[order]
        bits = min(26, max(12, (16 * len(hashes)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._filled = np.zeros(1 << bits, bool)
        self._filled[self.hashes >> self._shift] = True

    def among(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the places of the hashes that are here."""
        if not len(self.hashes):
            return _NOTHING
        likely = np.flatnonzero(self._filled[hashes >> self._shift])
        at = np.minimum(np.searchsorted(self.hashes, hashes[likely]), len(self.hashes) - 1)
        return likely[self.hashes[at] == hashes[likely]]

    def pairs(self, hashes: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (places, runs) of every hash that is here, once for each run that has it, a million at a time."""
        places = self.among(hashes)
        low = np.searchsorted(self.hashes, hashes[places], side="left")
        counts = np.searchsorted(self.hashes, hashes[places], side="right") - low
        part = (np.cumsum(counts) - 1) // COMPARED_RUNS
        edges = np.concatenate([[0], np.flatnonzero(np.diff(part)) + 1, [len(places)]])
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            own = counts[first:last]
            within = np.arange(own.sum()) - np.repeat(np.cumsum(own) - own, own)
            yield np.repeat(places[first:last], own), self.runs[np.repeat(low[first:last], own) + within]


def _readable(words: WordBatch, begin: int, end: int) -> str:
    """Return the words of a span."""
    inner = words.starts[np.searchsorted(words.starts, begin) : np.searchsorted(words.starts, end)].tolist()
    edges = zip(inner, [*inner[1:], end], strict=True)
    return " ".join("".join(map(chr, (words.letters[a:b] & LETTER).tolist())) for a, b in edges)


def _columns(parts: Sequence[tuple[NDArray[Any], ...]]) -> tuple[NDArray[Any], ...]:
    """Return the columns of all parts end to end: hash, item, place, length, kind of each run."""
    empty = (np.zeros(0, np.uint64), _NOTHING, _NOTHING, _NOTHING, np.zeros(0, np.int8))
    return tuple(np.concatenate(column) for column in zip(empty, *parts, strict=True))


def _hash_windows(windows: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return the hash that `WordBatch.hashes` gives of each row of letters."""
    values = windows.astype(np.uint64)
    values[:, 0] &= np.uint64(LETTER)
    values += np.uint64(1)
    powers = np.cumprod(np.concatenate([[np.uint64(1)], np.full(windows.shape[1] - 1, BASE)]), dtype=np.uint64)
    return mix((values * powers).sum(1, dtype=np.uint64))


def _shared(hashes: NDArray[np.uint64], items: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Return which runs stand in so many items of an evaluation that they are its wording."""
    limit = max(SHARED, SHARE * count)
    order = np.lexsort((items, hashes))
    ordered, owners = hashes[order], items[order]
    group = np.cumsum(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]) - 1
    new = np.append(True, (np.diff(owners) != 0) | (np.diff(group) != 0))[: len(owners)]
    holders = np.bincount(group, weights=new) if len(group) else np.zeros(0)
    out = np.zeros(len(hashes), bool)
    out[order] = holders[group] >= limit if len(group) else False
    return out


def _batched(rows: Iterable[str | Sequence[str]]) -> Iterator[tuple[list[str], list[int]]]:
    """Yield texts of several rows, and the number of the row of each."""
    first = 0
    for batch in row_batches(rows):
        yield [t for texts in batch for t in texts], [n for n, texts in enumerate(batch, first) for _ in texts]
        first += len(batch)
