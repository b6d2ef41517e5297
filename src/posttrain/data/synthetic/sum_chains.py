"""Make rows about the laboratory's sums: questions with chains of thought of several kinds that lead to the answer.

A data source ``lab:KIND`` has the same questions in the same order as problems of kind ``lab`` with seed 0 and
held_out: false, so that a stage that imitates chains and one that is rewarded for answers can use the same questions.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from posttrain.data.synthetic import sums

COUNT = 4000
"""Rows of each kind; the default number of problems of kind lab."""

Numbers = tuple[int, ...]


def careful_chain(numbers: Numbers) -> str:
    """Return a chain in the careful style of the laboratory's texts: a line for every addition, then the sum."""
    return sums.sum_answer(sums.CAREFUL, numbers, random.Random(0))  # this style draws nothing


def chain_in_words(numbers: Numbers) -> str:
    """Return a chain in words, which none of the laboratory's texts has: lines ``7 and 4 is 11.``, then ``So 25``."""
    lines, total = [], numbers[0]
    for number in numbers[1:]:
        lines.append(f"{total} and {number} is {total + number}.")
        total += number
    return "\n".join([*lines, f"So {total}"])


def chain_as_program(numbers: Numbers) -> str:
    """Return a chain that is a small Python program, one addition a line, which prints the sum."""
    return "\n".join([f"a={numbers[0]}", *(f"a=a+{n}" for n in numbers[1:]), "print(a)"])


def chain_by_some_path(numbers: Numbers) -> str:
    """Return one of several valid chains: lines such as ``4+9=13``, each of which adds two numbers that are left.

    From the left, from the right, the largest two first, or in pairs; the question decides which, so that a file of
    these chains shows one valid path for each question, and not always the same one.
    """
    rng = random.Random(f"path {numbers}")
    path = rng.choice(("left", "right", "largest", "pairs"))
    left, lines = list(numbers), []
    while len(left) > 1:
        if path == "largest":
            left.sort()
        i = {"left": 0, "right": len(left) - 2, "largest": len(left) - 2, "pairs": 0}[path]
        a, b = left[i : i + 2]
        lines.append(f"{a}+{b}={a + b}")
        rest = left[:i] + left[i + 2 :]
        left = [*rest, a + b] if path in ("right", "pairs") else [*left[:i], a + b, *left[i + 2 :]]
    return sums.OPENING[sums.CAREFUL] + "\n".join([*lines, str(left[0])])


CHAINS: dict[str, Callable[[Numbers], str]] = {
    "careful": careful_chain,
    "paths": chain_by_some_path,
    "words": chain_in_words,
    "program": chain_as_program,
}
"""Kinds of rows with prompt, completion and answer."""
PLAIN = ("sums", "others", "others_held_out")
"""Kinds of rows with only prompt and answer: the sums, and the laboratory's other small tasks with one answer."""
TASKS = ("copy", "reverse", "sort", "running")
"""Those other tasks: no sentences, and no task with more than one answer."""
CHAIN_KINDS = (*CHAINS, *PLAIN)


def chain_rows(kind: str) -> list[dict[str, Any]]:
    """Return every row of a kind."""
    if kind.startswith("others"):
        return list(_others(held_out=kind == "others_held_out"))
    problems = sums.sum_problems(0, COUNT, held_out=False)
    return [_row(CHAINS[kind], p) for p in problems] if kind in CHAINS else [dict(p) for p in problems]


def _row(chain: Callable[[Numbers], str], problem: Mapping[str, str]) -> dict[str, Any]:
    numbers = tuple(int(n) for n in problem["prompt"].rstrip("=").split("+"))
    return {"prompt": problem["prompt"], "completion": chain(numbers), "answer": problem["answer"]}


def _others(held_out: bool) -> Iterator[dict[str, Any]]:
    """Yield different questions of the kinds in `TASKS`; one in eight is held out, and never among the others."""
    rng, seen = random.Random(f"others {held_out}"), set[str]()
    while len(seen) < (COUNT // 8 if held_out else COUNT):
        prompt, answer = sums.SMALL_TASKS[rng.choice(TASKS)](rng)
        side = zlib.crc32(prompt.encode()) % sums.HELD_OUT_EVERY == 0
        if side == held_out and prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "answer": answer}


_STEP = re.compile(r"^(\d{1,4}) ?(?:\+|and) ?(\d{1,4}) ?(?:=|is) ?(\d{1,4})\.?$", re.MULTILINE)


def valid_additions(text: str, example: Mapping[str, Any]) -> float:
    """Return the share of the question's additions that the chain has, in any order and right (it knows no answer).

    For a reward of kind function (``function: "posttrain.data.synthetic.sum_chains:valid_additions"``). A step must add
    two of the numbers that are left, those of the question and the results of earlier steps; the first that doesn't
    ends the count. No chain: 0.
    """
    left = [int(n) for n in str(example["prompt"]).rstrip("=").split("+")]
    steps, right = len(left) - 1, 0
    for step in _STEP.finditer(text):
        a, b, result = (int(g) for g in step.groups())
        if right == steps or result != a + b or not _taken(left, a, b):
            break
        left.append(result)
        right += 1
    return right / steps


def _taken(numbers: list[int], *wanted: int) -> bool:
    """Take numbers out of a list. False: it does not have them all."""
    for number in wanted:
        if number not in numbers:
            return False
        numbers.remove(number)
    return True
