"""Rows about the laboratory's sums: questions with chains of thought that lead to their answers, in several kinds.

A data source ``lab:KIND`` holds the same questions in the same order as problems of kind ``lab`` with seed 0 that are
trained on, so that a stage that imitates chains and one that is rewarded for answers can be about the same questions.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from posttrain.data.synthetic import sums

COUNT = 4000
"""Rows of a kind: as many as problems of kind lab by default."""

Numbers = tuple[int, ...]


def careful(numbers: Numbers) -> str:
    """The careful style of the laboratory's texts: a line for every addition, then the sum."""
    return sums.answer_in(sums.CAREFUL, numbers, random.Random(0))  # this style draws nothing


def words(numbers: Numbers) -> str:
    """A chain in words, which none of the laboratory's texts has: ``7 and 4 is 11.`` a line, then ``So 25``."""
    lines, total = [], numbers[0]
    for number in numbers[1:]:
        lines.append(f"{total} and {number} is {total + number}.")
        total += number
    return "\n".join([*lines, f"So {total}"])


def program(numbers: Numbers) -> str:
    """A chain that is a small Python program, an addition a line; what it prints is the sum."""
    return "\n".join([f"a={numbers[0]}", *(f"a=a+{n}" for n in numbers[1:]), "print(a)"])


CHAINS: dict[str, Callable[[Numbers], str]] = {"careful": careful, "words": words, "program": program}
"""Kinds of rows with prompt, completion and answer."""
PLAIN = ("sums", "others", "others_held_out")
"""Kinds of rows with prompt and answer alone: the sums, and the laboratory's other small tasks that have one answer."""
TASKS = ("copy", "reverse", "sort", "running")
"""Which those are: not the sentences, and not what can be answered in more than one way."""
KINDS = (*CHAINS, *PLAIN)


def rows(kind: str) -> list[dict[str, Any]]:
    """Every row of a kind."""
    if kind.startswith("others"):
        return list(_others(held_out=kind == "others_held_out"))
    problems = sums.problems(0, COUNT, held_out=False)
    return [_row(CHAINS[kind], p) for p in problems] if kind in CHAINS else [dict(p) for p in problems]


def _row(chain: Callable[[Numbers], str], problem: Mapping[str, str]) -> dict[str, Any]:
    numbers = tuple(int(n) for n in problem["prompt"].rstrip("=").split("+"))
    return {"prompt": problem["prompt"], "completion": chain(numbers), "answer": problem["answer"]}


def _others(held_out: bool) -> Iterator[dict[str, Any]]:
    """Different questions of the kinds in `TASKS`; one in eight is held out, and never among the others."""
    rng, seen = random.Random(f"others {held_out}"), set[str]()
    while len(seen) < (COUNT // 8 if held_out else COUNT):
        prompt, answer = sums.OTHERS[rng.choice(TASKS)](rng)
        side = zlib.crc32(prompt.encode()) % sums.HELD_OUT_EVERY == 0
        if side == held_out and prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "answer": answer}


_STEP = re.compile(r"^(\d{1,4}) ?(?:\+|and) ?(\d{1,4}) ?(?:=|is) ?(\d{1,4})\.?$", re.MULTILINE)


def valid_steps(text: str, example: Mapping[str, Any]) -> float:
    """A verifier that knows no answer: the share of the question's additions that the chain has, in order and right.

    For a reward of kind function (``function: "posttrain.data.synthetic.sum_chains:valid_steps"``). A step must add
    the question's next number to what the step before came to; the first that doesn't ends the count. No chain: 0.
    """
    first, *rest = (int(n) for n in str(example["prompt"]).rstrip("=").split("+"))
    total, right = first, 0
    for number, step in zip(rest, _STEP.finditer(text), strict=False):
        if [int(g) for g in step.groups()] != [total, number, total + number]:
            break
        total, right = total + number, right + 1
    return right / len(rest)
