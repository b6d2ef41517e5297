"""Hold examples out of training, and find examples that are copies of others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from posttrain.data.instruction_examples import Example, ExampleStore
from posttrain.data.text_similarity import RougeIndex

SAME_INPUT = "the input of a held-out row"
SAME_GROUP = "the group of a held-out row"
NEAR_INPUT = "nearly the input of a held-out row"
REVERSED = "input and answer of a held-out row, exchanged"
OTHER_TASK = "a held-out row of another task"


def choose_held_out(store: ExampleStore, usable: np.ndarray, order: np.ndarray, count: int, most: int) -> np.ndarray:
    """Return the examples that are held out: the first in a random order, one of each input, pair and group.

    Args:
        store: The examples of a task.
        usable: Whether each may be taken.
        order: A random number of each.
        count: How many at most.
        most: Examples that training may lose by them: they themselves, and the others of their groups.

    Returns:
        Their numbers, in that order.
    """
    candidates = np.flatnonzero(usable)
    inputs, groups, pairs = store.column("input_keys"), store.column("groups"), _pairs(store)
    taken: list[int] = []
    seen = set[tuple[str, int]]()
    sizes = dict(zip(*(values.tolist() for values in np.unique(groups[usable], return_counts=True)), strict=True))
    lost = 0
    for i in candidates[np.argsort(order[candidates], kind="stable")].tolist():
        if len(taken) == count:
            break
        names = {
            ("input", int(inputs[i])),
            ("pair", int(pairs[i])),
            *([("group", int(groups[i]))] if groups[i] else []),
        }
        size = sizes[int(groups[i])] if groups[i] else 1
        if not names & seen and lost + size <= most:
            seen |= names
            lost += size
            taken.append(i)
    return np.array(taken, dtype=np.int64)


def copies_of(store: ExampleStore, held: np.ndarray, usable: np.ndarray, similarity: float) -> dict[str, np.ndarray]:
    """Return the usable examples of a task that are copies of its held-out ones, by cause.

    Args:
        store: The examples of the task.
        held: Numbers of the held-out ones.
        usable: Whether each is used otherwise.
        similarity: ROUGE-L from which an input is a copy.
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
    take(REVERSED, np.isin(_pairs(store), _pairs(store)[held]))
    take(NEAR_INPUT, similar_to(store, [store[int(i)] for i in held], left, similarity))
    return out


def similar_to(store: ExampleStore, others: Sequence[Example], wanted: np.ndarray, similarity: float) -> np.ndarray:
    """Return which of the wanted examples have a ROUGE-L of at least `similarity` with one of some others.

    Args:
        store: The examples of a task.
        others: Examples of the same task.
        wanted: Whether each example is compared.
        similarity: Lowest ROUGE-L of copies.
    """
    texts = [store.words(other) for other in others]
    index, known = RougeIndex(similarity, map(" ".join, texts)), frozenset(word for text in texts for word in text)
    out = np.zeros(len(store), dtype=bool)
    if others:
        for i, example in enumerate(store):
            if not wanted[i]:
                continue
            words = store.words(example)
            n = sum(map(known.__contains__, words))  # the other text has n words at least if ROUGE-L is 2 n / (m + n)
            if 2 * n >= similarity * (len(words) + n) - 1e-9:
                out[i] = index.nearest(" ".join(words))[1] is not None
    return out


def copies_across(
    stores: Sequence[ExampleStore], held: Sequence[np.ndarray], usable: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Return for each task the usable examples that are held-out examples of other tasks.

    These are of the same group of the same table; or they have the same input and output, also exchanged; or the same
    input, if it is long enough to be of one source.

    Args:
        stores: The examples of each task.
        held: Numbers of the held-out ones of each task.
        usable: Whether each is used otherwise, for each task.
    """
    everywhere = list(zip(stores, held, strict=True))
    pairs = _joined(_pairs(s)[h] for s, h in everywhere)
    groups = _joined(s.column("groups")[h] for s, h in everywhere)
    long = _joined(s.column("input_keys")[h][s.column("long_inputs")[h] == 1] for s, h in everywhere)
    groups = groups[groups != 0]

    def is_copy(s: ExampleStore) -> np.ndarray:
        same_source = (s.column("long_inputs") == 1) & np.isin(s.column("input_keys"), long)
        return np.isin(_pairs(s), pairs) | np.isin(s.column("groups"), groups) | same_source

    return [np.flatnonzero(use & is_copy(s)) for s, use in zip(stores, usable, strict=True)]


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _pairs(store: ExampleStore) -> np.ndarray:
    """Return a hash of input and answer together, the same if they are exchanged."""
    inputs, answers = store.column("input_keys"), store.column("answer_keys")
    with np.errstate(over="ignore"):
        return np.asarray(np.minimum(inputs, answers) * np.uint64(0x9E3779B97F4A7C15) ^ np.maximum(inputs, answers))
