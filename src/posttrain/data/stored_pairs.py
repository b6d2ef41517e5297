"""Pairs and labelled answers whose samples lie in a store: each is put together when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.core.by_number import ByNumber
from posttrain.core.types import Sample
from posttrain.data.bad_rows import SHOWN_ROWS
from posttrain.data.rows import Chosen
from posttrain.data.sample_store import SampleStore


@dataclass(frozen=True, slots=True)
class Pair:
    """Hold two answers to one prompt.

    Attributes:
        chosen: Prompt and better answer, with loss on the answer's tokens, the one that ends the turn included.
        rejected: Prompt and worse answer.
        prompt: Number of tokens of the prompt, with which both samples begin.
        probability: Probability that `chosen` is the better one, in (0.5, 1] (a soft label).
        margin: By how much it is better, a difference of scores, at least 0.
        source: Place of the row, `file:row`.
        row: Prompt and answers as text (messages, prompt_text, completion, rejected) and the row's other columns.
    """

    chosen: Sample
    rejected: Sample
    prompt: int
    probability: float = 1.0
    margin: float = 0.0
    source: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unpaired:
    """Hold one answer that is good or bad.

    Attributes:
        sample: Prompt and answer.
        prompt: Number of tokens of the prompt.
        desirable: True for a good answer.
        source: Place of the row, `file:row`.
        row: Prompt and answer as text and the row's other columns.
    """

    sample: Sample
    prompt: int
    desirable: bool
    source: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


class _LazyRow(Mapping[str, Any]):
    """Give the texts of a row, read from its source when one is needed."""

    def __init__(self, texts: Sequence[Mapping[str, Any]], number: int) -> None:
        self._texts, self._number = texts, number
        self._row: Mapping[str, Any] | None = None

    def _read(self) -> Mapping[str, Any]:
        if self._row is None:
            self._row = self._texts[self._number]
        return self._row

    def __getitem__(self, name: str) -> Any:
        return self._read()[name]

    def __iter__(self) -> Any:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


class StoredPairs(ByNumber[Pair]):
    """Give pairs by number.

    Attributes:
        store: The samples: chosen and rejected by turns.
    """

    def __init__(self, store: SampleStore, texts: Sequence[Mapping[str, Any]]) -> None:
        self.store, self._texts = store, texts

    def __len__(self) -> int:
        return len(self.store) // 2

    def item(self, number: int) -> Pair:
        prompt, probability, margin = (self.store.columns[n][2 * number] for n in ("prompt", "probability", "margin"))
        chosen, rejected = self.store[2 * number], self.store[2 * number + 1]
        row = _LazyRow(self._texts, number)
        return Pair(chosen, rejected, int(prompt), float(probability), float(margin), chosen.source, row)

    @property
    def better(self) -> SampleStore:
        """Return the samples of the better answers."""
        return self.store.take(slice(0, None, 2))

    def place(self, number: int) -> str:
        """Return the place of a pair's row."""
        return self.store.place(2 * number)

    def content(self, number: int) -> frozenset[int]:
        """Return a value that is equal for the same two answers, whichever is the better one."""
        return frozenset(self.store.content(2 * number + i) for i in range(2))

    def take(self, numbers: Sequence[int] | np.ndarray) -> StoredPairs:
        """Return the pairs with these numbers, in this order."""
        chosen = np.asarray(numbers, dtype=np.int64)
        samples = np.stack([2 * chosen, 2 * chosen + 1], axis=1).reshape(-1)
        return StoredPairs(self.store.take(samples), Chosen(self._texts, chosen))

    def repeats(self) -> dict[str, Any]:
        """Count the pairs that repeat an earlier one, and those that say the opposite of an earlier one."""
        content = self.store.columns["content"]
        one, other = content[::2], content[1::2]
        pairs = np.stack([one, other], axis=1)
        same_answers = np.sort(pairs, axis=1)
        duplicates = len(pairs) - len(np.unique(pairs, axis=0))
        return {"duplicates": duplicates} | contradictions(same_answers, one < other, self.place)


def pair_sizes(pairs: Sequence[Pair]) -> list[int]:
    """Return the number of tokens to compute of each pair, its prompt once."""
    if not isinstance(pairs, StoredPairs):
        return [len(p.chosen) + len(p.rejected) - p.prompt for p in pairs]
    lengths = pairs.store.lengths
    return list((lengths[::2] + lengths[1::2] - pairs.store.columns["prompt"][::2]).tolist())


class StoredAnswers(ByNumber[Unpaired]):
    """Give answers with a label by number.

    Attributes:
        store: The samples.
    """

    def __init__(self, store: SampleStore, texts: Sequence[Mapping[str, Any]]) -> None:
        self.store, self._texts = store, texts

    def __len__(self) -> int:
        return len(self.store)

    def item(self, number: int) -> Unpaired:
        sample = self.store[number]
        prompt = int(self.store.columns["prompt"][number])
        return Unpaired(sample, prompt, self.is_good(number), sample.source, _LazyRow(self._texts, number))

    @property
    def better(self) -> SampleStore:
        """Return the samples of all answers."""
        return self.store

    def is_good(self, number: int) -> bool:
        """Return True if an answer is a good one."""
        return bool(self.store.columns["desirable"][number])

    @property
    def good(self) -> int:
        """Return the number of good answers."""
        return int(np.count_nonzero(self.store.columns["desirable"]))

    def take(self, numbers: Sequence[int] | np.ndarray) -> StoredAnswers:
        """Return the answers with these numbers, in this order."""
        return StoredAnswers(self.store.take(numbers), Chosen(self._texts, numbers))

    def repeats(self) -> dict[str, Any]:
        """Count the answers whose label is the opposite of an earlier one's."""
        return contradictions(self.store.columns["content"][:, None], self.store.columns["desirable"], self.store.place)


def contradictions(content: np.ndarray, side: np.ndarray, place: Any) -> dict[str, Any]:
    """Count the rows that say the opposite of an earlier one.

    They are trained on all the same; both together teach nothing.

    Args:
        content: What each row is about, a few numbers a row.
        side: What it says about it: true or false.
        place: Returns the place of a row.
    """
    _, about = np.unique(content, axis=0, return_inverse=True)
    about = about.reshape(-1)
    sides = np.asarray(side, dtype=bool)
    said = [np.bincount(about[sides == value], minlength=int(about.max(initial=-1)) + 1) > 0 for value in (True, False)]
    first: dict[tuple[int, bool], int] = {}
    shown: list[str] = []
    count = 0
    for i in np.flatnonzero((said[0] & said[1])[about]).tolist():
        here, opposite = (int(about[i]), bool(sides[i])), (int(about[i]), not sides[i])
        if opposite in first:
            count += 1
            shown += [f"{place(i)} against {place(first[opposite])}"] if len(shown) < SHOWN_ROWS else []
        first.setdefault(here, i)
    return {"contradictory": count, "contradictions": shown} if count else {}
