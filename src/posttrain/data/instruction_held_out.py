"""Hold examples out of training, and find the training examples that are copies of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from posttrain.data.instruction_examples import ExampleStore

SAME_INPUT = "the input of a held-out row"
SAME_GROUP = "the group of a held-out row"
NEAR_INPUT = "nearly the input of a held-out row"
OTHER_TASK = "a held-out row of another task"


class WordIndex:
    """Find the sets of words that are near a new one: those that share enough of the words of both (Jaccard)."""

    def __init__(self, sets: Iterable[frozenset[str]] = ()) -> None:
        self._sizes: list[int] = []
        self._holders: dict[str, list[int]] = {}
        for words in sets:
            self.add(words)

    def add(self, words: frozenset[str]) -> None:
        """Add a set."""
        for word in words:
            self._holders.setdefault(word, []).append(len(self._sizes))
        self._sizes.append(len(words))

    def is_near(self, words: frozenset[str], overlap: float) -> bool:
        """Return True if a set of the index has at least `overlap` of the words of both in common."""
        known = words & self._holders.keys()
        if len(known) < overlap * len(words) - 1e-9:  # as no set shares more than these
            return False
        shared: dict[int, int] = {}
        for word in known:
            for i in self._holders[word]:
                shared[i] = shared.get(i, 0) + 1
        return any(n >= overlap * (len(words) + self._sizes[i] - n) - 1e-9 for i, n in shared.items())


def near(a: frozenset[str], b: frozenset[str], overlap: float) -> bool:
    """Return True if two sets of words are near each other.

    Args:
        a: Words of one text.
        b: Words of another one.
        overlap: Least share of the words of both that are in both (Jaccard).
    """
    return len(a & b) >= overlap * len(a | b) - 1e-9


def choose_held_out(store: ExampleStore, usable: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Return the examples that are held out: the first in a random order, one of each input and group.

    Args:
        store: The examples of a task.
        usable: Whether each may be taken.
        order: A random number of each.
        count: How many at most.

    Returns:
        Their numbers, in that order.
    """
    candidates = np.flatnonzero(usable)
    inputs, groups = store.column("input_keys"), store.column("groups")
    taken: list[int] = []
    seen = set[tuple[str, int]]()
    for i in candidates[np.argsort(order[candidates], kind="stable")].tolist():
        if len(taken) == count:
            break
        names = {("input", int(inputs[i])), *([("group", int(groups[i]))] if groups[i] else [])}
        if not names & seen:
            seen |= names
            taken.append(i)
    return np.array(taken, dtype=np.int64)


def copies_of(store: ExampleStore, held: np.ndarray, usable: np.ndarray, overlap: float) -> dict[str, np.ndarray]:
    """Return the usable examples of a task that are copies of its held-out ones, by cause.

    Args:
        store: The examples of the task.
        held: Numbers of the held-out ones.
        usable: Whether each is used otherwise.
        overlap: Share of words (Jaccard) from which an input is a copy.
    """
    left = usable.copy()
    left[held] = False
    out: dict[str, np.ndarray] = {}

    def take(cause: str, found: np.ndarray) -> None:
        out[cause] = np.flatnonzero(found & left)
        left[found] = False

    if not len(held):
        return out
    inputs, groups = store.column("input_keys"), store.column("groups")
    take(SAME_INPUT, np.isin(inputs, inputs[held]))
    take(SAME_GROUP, np.isin(groups, groups[held][groups[held] != 0]))
    index = WordIndex(store.word_set(store[int(i)]) for i in held)
    close = np.zeros(len(store), dtype=bool)
    for i, example in enumerate(store):
        if left[i]:
            close[i] = index.is_near(store.word_set(example), overlap)
    take(NEAR_INPUT, close)
    return out


def copies_across(
    stores: Sequence[ExampleStore], held: Sequence[np.ndarray], usable: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Return for each task the usable examples that are held-out examples of other tasks.

    These have the same input, and the same output or an input that is long enough to be of one source.

    Args:
        stores: The examples of each task.
        held: Numbers of the held-out ones of each task.
        usable: Whether each is used otherwise, for each task.
    """
    pairs = [
        np.concatenate(parts) if parts else np.zeros(0, np.uint64)
        for parts in (
            [_mixed(s)[h] for s, h in zip(stores, held, strict=True)],
            [s.column("input_keys")[h][s.column("long_inputs")[h] == 1] for s, h in zip(stores, held, strict=True)],
        )
    ]
    return [
        np.flatnonzero(
            use
            & (
                np.isin(_mixed(s), pairs[0])
                | ((s.column("long_inputs") == 1) & np.isin(s.column("input_keys"), pairs[1]))
            )
        )
        for s, use in zip(stores, usable, strict=True)
    ]


def _mixed(store: ExampleStore) -> np.ndarray:
    """Return a hash of input and answer together."""
    with np.errstate(over="ignore"):
        return np.asarray(store.column("input_keys") * np.uint64(0x9E3779B97F4A7C15) ^ store.column("answer_keys"))
