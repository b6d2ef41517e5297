"""What the laboratory's model reads: sums in three styles, good and bad, and small texts of other kinds.

Every text is a pure function of (seed, index). The task is to add four or five digits. Careful answers, which add one
digit a line, are always right, and rare; most are guesses or careless. A model that imitates them all answers badly and
knows how to answer well: reinforcement learning can find out which style pays.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

CAREFUL, CARELESS, GUESS = "careful", "careless", "guess"
STYLES = {GUESS: 0.45, CARELESS: 0.40, CAREFUL: 0.15}
"""Shares of the sums' answers."""
SUMS = 0.6
"""Share of the texts that are sums; the others are of the kinds in `OTHERS`, each as often."""
OPENING = {CAREFUL: "slowly\n", CARELESS: "quickly\n", GUESS: ""}
FORGETS = 0.75
"""How often a careless line forgets a carry: more often than not, so that its likeliest answer is wrong as well."""
ROUND = 0.6
"""How often a guess is the sum rounded to fives; else it is off by up to 3."""
HELD_OUT_EVERY = 8

CALLS = 0.25
"""Share of `calls`' rows that ask the calculator; the others are answered in the styles above."""
FORGETFUL = 0.3
"""How often a conversation with calls leaves out one of the numbers."""
CALL_ROWS = 8000


@dataclass(frozen=True)
class Text:
    """One text: what is asked, what is answered. kind: a style of sum, or the name of another kind."""

    kind: str
    prompt: str
    completion: str


def text_at(seed: int, index: int) -> Text:
    """Text number `index` of the endless corpus `seed`. Its sums are never held-out ones."""
    rng = random.Random(f"text {seed} {index}")
    if rng.random() >= SUMS:
        kind = rng.choice(list(OTHERS))
        return Text(kind, *OTHERS[kind](rng))
    numbers = draw(rng, held_out=False)
    style = rng.choices(list(STYLES), list(STYLES.values()))[0]
    return Text(style, prompt_of(numbers), answer_in(style, numbers, rng))


def draw(rng: random.Random, held_out: bool) -> tuple[int, ...]:
    """Four or five digits from 1 to 9 whose sum is a problem of the side asked for."""
    while True:
        numbers = tuple(rng.randint(1, 9) for _ in range(rng.choice((4, 5))))
        if is_held_out(numbers) == held_out:
            return numbers


def is_held_out(numbers: tuple[int, ...]) -> bool:
    """Whether a sum is kept out of the corpus and of the training problems, whatever the seed: one in eight."""
    return zlib.crc32(bytes(numbers)) % HELD_OUT_EVERY == 0


def prompt_of(numbers: tuple[int, ...]) -> str:
    """`7+4+9+5=`"""
    return "+".join(map(str, numbers)) + "="


def answer_in(style: str, numbers: tuple[int, ...], rng: random.Random) -> str:
    """An answer in a style. Its last line is a number alone."""
    if style == GUESS:
        total = sum(numbers)
        return str((total + 2) // 5 * 5 if rng.random() < ROUND else max(1, total + rng.randint(-3, 3)))
    before, lines = numbers[0], []
    for number in numbers[1:]:
        after = before + number
        if style == CARELESS and after // 10 > before // 10 and rng.random() < FORGETS:
            after -= 10
        lines.append(f"{before}+{number}={after}")
        before = after
    return OPENING[style] + "\n".join([*lines, str(before)])


def problems(seed: int, count: int, held_out: bool) -> list[dict[str, str]]:
    """Different problems of one side, as rows with `prompt` and `answer`."""
    rng = random.Random(f"problems {seed} {held_out}")
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        found[draw(rng, held_out)] = None
    return [{"prompt": prompt_of(n), "answer": str(sum(n))} for n in found]


def partial_sums(prompt: str) -> list[int]:
    """What a right answer has line by line: 11, 20, 25 of `7+4+9+5=`."""
    return list(accumulate(map(int, prompt.rstrip("=").split("+"))))[1:]


def calls(seed: int, count: int) -> list[dict[str, Any]]:
    """Conversations, joined without a template, that show what a calculator is good for; sums of the training side.

    A quarter asks it number by number (`<7+4>`, and the tool's turn `=11` is its reply) and says the last result; three
    in ten of these leave a number out, and are wrong. The rest are guesses and careless answers as in the corpus, and
    no careful ones, which would pay as well as calls.
    """
    rng = random.Random(f"calls {seed}")
    rows = []
    for _ in range(count):
        numbers = draw(rng, held_out=False)
        asked = {"role": "user", "content": prompt_of(numbers)}
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
            style = rng.choices((GUESS, CARELESS), (STYLES[GUESS], STYLES[CARELESS]))[0]
            turns = [("assistant", answer_in(style, numbers, rng))]
        rows.append({"messages": [asked, *({"role": role, "content": text} for role, text in turns)]})
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
    what, colour = rng.choice((("grass", "green"), ("snow", "white"), ("coal", "black"), ("the sky", "blue")))
    return f"What colour is {what}?", f" {what.capitalize()} is {colour}."


OTHERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "fact": _fact,
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "count": _count,
    "running": _running,
    "story": _story,
    "nature": _nature,
}
