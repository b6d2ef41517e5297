"""Make the texts that the laboratory's model is trained on: sums in three styles, good and bad, and small other tasks.

Every text is a pure function of (seed, index). The task is to add four or five digits. Careful answers, which add one
digit a line, are always right, and rare; most answers are guesses or careless. A model that imitates them all answers
badly and knows how to answer well: reinforcement learning can find out which style pays.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

CAREFUL, CARELESS, GUESS = "careful", "careless", "guess"
STYLE_SHARES = {GUESS: 0.45, CARELESS: 0.40, CAREFUL: 0.15}
"""Shares of the sums' answers."""
SUMS = 0.6
"""Share of the texts that are sums; the others are `SMALL_TASKS`, each equally often."""
OPENING = {CAREFUL: "slowly\n", CARELESS: "quickly\n", GUESS: ""}
FORGETS = 0.75
"""How often a careless line forgets a carry: more often than not, so that its likeliest answer is wrong as well."""
ROUNDED = 0.6
"""How often a guess is the sum rounded to fives; else it is off by up to 3."""
HELD_OUT_EVERY = 8
TERMS = (4, 5)
"""Fewest and most digits of the corpus's sums."""

CALLS = 0.25
"""Share of `calculator_rows` that call the calculator; the others are answered in the styles above."""
FORGETFUL = 0.3
"""How often a conversation with calls leaves out one of the numbers."""
CALL_ROWS = 8000


@dataclass(frozen=True)
class LabText:
    """Hold one text.

    Attributes:
        kind: Style of a sum, or name of another task.
        prompt: The question.
        completion: The answer.
    """

    kind: str
    prompt: str
    completion: str


def text_at(seed: int, index: int) -> LabText:
    """Return text number `index` of the endless corpus `seed`. Its sums are never held-out ones."""
    rng = random.Random(f"text {seed} {index}")
    if rng.random() >= SUMS:
        kind = rng.choice(list(SMALL_TASKS))
        return LabText(kind, *SMALL_TASKS[kind](rng))
    numbers = draw_digits(rng, held_out=False)
    style = rng.choices(list(STYLE_SHARES), list(STYLE_SHARES.values()))[0]
    return LabText(style, sum_prompt(numbers), sum_answer(style, numbers, rng))


def draw_digits(rng: random.Random, held_out: bool, terms: tuple[int, int] = TERMS) -> tuple[int, ...]:
    """Return digits from 1 to 9 whose sum is a held-out problem, or none.

    Args:
        rng: Source of the digits.
        held_out: Return a held-out problem.
        terms: Fewest and most digits.
    """
    while True:
        numbers = tuple(rng.randint(1, 9) for _ in range(rng.choice(range(terms[0], terms[1] + 1))))
        if is_held_out(numbers) == held_out:
            return numbers


def is_held_out(numbers: tuple[int, ...]) -> bool:
    """Return True for a sum that is in no corpus and no training problem of any seed: one in eight."""
    return zlib.crc32(bytes(numbers)) % HELD_OUT_EVERY == 0


def sum_prompt(numbers: tuple[int, ...]) -> str:
    """Return `7+4+9+5=`."""
    return "+".join(map(str, numbers)) + "="


def sum_answer(style: str, numbers: tuple[int, ...], rng: random.Random) -> str:
    """Return an answer in a style, whose last line is a number.

    Args:
        style: Key of `STYLE_SHARES`.
        numbers: The digits to add.
        rng: Source of the mistakes.
    """
    if style == GUESS:
        total = sum(numbers)
        return str((total + 2) // 5 * 5 if rng.random() < ROUNDED else max(1, total + rng.randint(-3, 3)))
    before, lines = numbers[0], []
    for number in numbers[1:]:
        after = before + number
        if style == CARELESS and after // 10 > before // 10 and rng.random() < FORGETS:
            after -= 10
        lines.append(f"{before}+{number}={after}")
        before = after
    return OPENING[style] + "\n".join([*lines, str(before)])


def sum_problems(seed: int, count: int, held_out: bool, terms: tuple[int, int] = TERMS) -> list[dict[str, str]]:
    """Return different problems as rows with `prompt` and `answer`.

    Args:
        seed: Seed of the draw.
        count: Number of problems.
        held_out: Take them from the sums that no model is trained on.
        terms: Fewest and most digits.
    """
    rng = random.Random(f"problems {seed} {held_out}")
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        drawn[draw_digits(rng, held_out, terms)] = None
    return [{"prompt": sum_prompt(n), "answer": str(sum(n))} for n in drawn]


def most_problems(held_out: bool, terms: tuple[int, int] = TERMS) -> int:
    """Return how many different problems `sum_problems` can draw; a tenth less than there are, on average."""
    all_sums = sum(9**n for n in range(terms[0], terms[1] + 1))
    side = all_sums // HELD_OUT_EVERY
    return int(0.9 * (side if held_out else all_sums - side))


def partial_sums(prompt: str) -> list[int]:
    """Return the results of the lines of a right answer: 11, 20, 25 for `7+4+9+5=`."""
    return list(accumulate(map(int, prompt.rstrip("=").split("+"))))[1:]


def calculator_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Return conversations without a template that show the use of a calculator; no held-out sums.

    A quarter calls it number by number (`<7+4>`, and the tool's turn `=11` is its reply) and writes the last result;
    three in ten of these leave a number out, and are wrong. The rest are guesses and careless answers as in the corpus,
    and no careful ones, which would be rewarded as much as calls.
    """
    rng = random.Random(f"calls {seed}")
    rows = []
    for _ in range(count):
        numbers = draw_digits(rng, held_out=False)
        question = {"role": "user", "content": sum_prompt(numbers)}
        if rng.random() < CALLS:
            if rng.random() < FORGETFUL:
                left_out = rng.randrange(1, len(numbers))
                numbers = numbers[:left_out] + numbers[left_out + 1 :]
            before, turns = numbers[0], []
            for number in numbers[1:]:
                turns += [("assistant", f"<{before}+{number}>"), ("tool", f"={before + number}\n")]
                before += number
            turns.append(("assistant", str(before)))
        else:
            style = rng.choices((GUESS, CARELESS), (STYLE_SHARES[GUESS], STYLE_SHARES[CARELESS]))[0]
            turns = [("assistant", sum_answer(style, numbers, rng))]
        rows.append({"messages": [question, *({"role": role, "content": text} for role, text in turns)]})
    return rows


def _digits(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randint(0, 9) for _ in range(rng.randint(low, high))]


def _joined(numbers: list[int], by: str = "") -> str:
    return by.join(map(str, numbers))


def _fact(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(1, 45), rng.randint(1, 9)
    return f"{a}+{b}=", str(a + b)


def _copy(rng: random.Random) -> tuple[str, str]:
    d = _joined(_digits(rng, 3, 8))
    return f"copy {d}:", d


def _reverse(rng: random.Random) -> tuple[str, str]:
    d = _joined(_digits(rng, 2, 6))
    return f"reverse {d}:", d[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    d = _digits(rng, 2, 6)
    return f"sort {_joined(d)}:", _joined(sorted(d))


def _count(rng: random.Random) -> tuple[str, str]:
    start = rng.randint(1, 40)
    return f"count from {start}:", _joined([start + i for i in range(rng.randint(3, 6))], ",")


def _running(rng: random.Random) -> tuple[str, str]:
    d = [rng.randint(1, 9) for _ in range(rng.randint(3, 5))]
    return f"running total of {_joined(d, ',')}:", _joined(list(accumulate(d)), ",")


def _story(rng: random.Random) -> tuple[str, str]:
    name, thing = rng.choice(("Ada", "Ben", "Eva", "Tom")), rng.choice(("apples", "books", "coins", "stones"))
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return f"{name} has {a} {thing} and finds {b} more.", f" Now {name} has {a + b} {thing}."


def _nature(rng: random.Random) -> tuple[str, str]:
    thing, colour = rng.choice((("grass", "green"), ("snow", "white"), ("coal", "black"), ("the sky", "blue")))
    return f"What colour is {thing}?", f" {thing.capitalize()} is {colour}."


SMALL_TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "fact": _fact,
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "count": _count,
    "running": _running,
    "story": _story,
    "nature": _nature,
}
