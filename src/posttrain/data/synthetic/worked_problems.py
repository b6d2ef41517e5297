"""Make word problems with worked answers: legs of animals in several wordings, wheels, prices that the question gives.

A data source ``lab:legs`` has the problems to train on; the others have other wordings (``legs_reworded``), more kinds
of animals (``legs_longer``), or other things (``wheels``, ``prices``), to measure what was learnt from the first. No
problem of theirs has the same things and numbers as one of ``lab:legs``. Worked answers are right, in three styles:
the bare number, one sum at the end, and one addition a line. A small model errs less the smaller the steps are, so
reinforcement learning can find out which style pays.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

PROBLEMS = 4000
"""Problems of each source but those that are held out, of which there are an eighth."""
KEPT_BACK_EVERY = 8

LEGS = {
    "ant": 6, "bear": 4, "bee": 6, "beetle": 6, "bird": 2, "camel": 4, "cat": 4, "chicken": 2, "cow": 4, "crab": 10,
    "dog": 4, "duck": 2, "goat": 4, "horse": 4, "lizard": 4, "lobster": 10, "ostrich": 2, "owl": 2, "parrot": 2,
    "rabbit": 4, "scorpion": 8, "shrimp": 10, "spider": 8, "starfish": 5, "tiger": 4, "wasp": 6,
}  # fmt: skip
WHEELS = {"bicycle": 2, "car": 4, "tricycle": 3, "truck": 6, "unicycle": 1, "wheelbarrow": 1, "scooter": 2, "bus": 8}
GOODS = ("apple", "book", "cup", "lamp", "pear", "pen", "ruler", "stamp", "toy", "umbrella")
PLURALS = {"bus": "buses", "ostrich": "ostriches", "shrimp": "shrimps", "starfish": "starfish", "wasp": "wasps"}

WORDINGS = (
    "How many legs do {things} have in total?",
    "A farmer counts {things}. How many legs is that?",
    "There are {things} in a barn. How many legs are there altogether?",
    "What is the total number of legs of {things}?",
    "{things} walk by. How many legs walk by?",
    "Count the legs: {things}.",
)
"""Wordings of ``lab:legs``."""
OTHER_WORDINGS = (
    "If I see {things}, how many legs do I see?",
    "In a picture book there are {things}. All of them together have how many legs?",
    "Work out how many legs {things} stand on.",
)

Things = Sequence[tuple[int, str, int]]
"""(number, what, of how much each): 3 ants of 6 legs."""


ANSWER_STYLES = {"bare": 0.2, "one sum": 0.4, "steps": 0.4}
"""Shares of the styles of worked answers."""


def worked_answer(things: Things, style: str = "steps") -> str:
    """Return a worked answer, whose last number is the answer.

    Args:
        things: What is counted.
        style: bare: the number; one sum: a line for each kind, then all in one sum; steps: then one addition a line.
    """
    parts = [n * each for n, _, each in things]
    if style == "bare":
        return str(sum(parts))
    lines = [f"{_named(n, what)}: {n} x {each} = {n * each}" for n, what, each in things]
    if style == "one sum":
        return "\n".join([*lines, f"{' + '.join(map(str, parts))} = {sum(parts)}"])
    totals = list(accumulate(parts))
    return "\n".join([*lines, *(f"{a} + {b} = {a + b}" for a, b in zip(totals, parts[1:], strict=False))])


def problem_rows(kind: str) -> list[dict[str, Any]]:
    """Return the rows of a source: prompt, completion (the worked answer), answer.

    Args:
        kind: Key of `PROBLEM_KINDS`.
    """
    units, kinds, held_out, wordings = PROBLEM_KINDS[kind]
    rng, seen = random.Random(f"worked {kind}"), set[tuple[tuple[int, str], ...]]()
    rows: list[dict[str, Any]] = []
    while len(rows) < (PROBLEMS // KEPT_BACK_EVERY if held_out else PROBLEMS):
        names = rng.sample(list(units), rng.choice(kinds))
        each = [units[what] or rng.randint(2, 9) for what in names]
        things = [(rng.randint(2, 9), what, size) for what, size in zip(names, each, strict=True)]
        key = tuple(sorted((n, what) for n, what, _ in things))
        if is_kept_back(key) == held_out and key not in seen:
            seen.add(key)
            prompt = rng.choice(wordings).format(things=_listed(things), prices=_prices(things))
            prompt = prompt[0].upper() + prompt[1:]
            total = str(sum(n * size for n, _, size in things))
            style = rng.choices(list(ANSWER_STYLES), list(ANSWER_STYLES.values()))[0]
            rows.append({"prompt": prompt, "completion": worked_answer(things, style), "answer": total})
    return rows


def is_kept_back(things: Sequence[tuple[int, str]]) -> bool:
    """Return True for numbers of things that no problem of ``lab:legs`` has, in any order: one in eight."""
    return zlib.crc32(repr(sorted(things)).encode()) % KEPT_BACK_EVERY == 0


def _named(count: int, what: str) -> str:
    return f"{count} {what if count == 1 else PLURALS.get(what, what + 's')}"


def _listed(things: Things) -> str:
    named = [_named(n, what) for n, what, _ in things]
    return f"{', '.join(named[:-1])} and {named[-1]}"


def _prices(things: Things) -> str:
    prices = [f"{'an' if what[0] in 'aeiou' else 'a'} {what} costs {each} coins" for _, what, each in things]
    return f"{', '.join(prices[:-1])} and {prices[-1]}"


Units = Mapping[str, int]
"""Things and of how much each has; 0: another number in each problem, which the question names."""

PROBLEM_KINDS: dict[str, tuple[Units, tuple[int, ...], bool, tuple[str, ...]]] = {
    "legs": (LEGS, (2, 3), False, WORDINGS),
    "legs_held_out": (LEGS, (2, 3), True, WORDINGS),
    "legs_reworded": (LEGS, (2, 3), True, OTHER_WORDINGS),
    "legs_longer": (LEGS, (4,), True, WORDINGS),
    "wheels": (WHEELS, (2, 3), True, ("How many wheels do {things} have in total?",)),
    "prices": (dict.fromkeys(GOODS, 0), (2, 3), True, ("{prices}. How many coins do {things} cost in total?",)),
}
"""(what each thing has, numbers of kinds of things, held out, wordings) of each source."""
