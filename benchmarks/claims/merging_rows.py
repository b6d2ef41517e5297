"""Rows of the specialists that `merging.py` merges: what is trained on, and what is measured and never trained on.

Two tasks conflict if their prompts have one form and their answers differ in kind: a specialist, which saw one of them,
answers the other's prompts in its own way.
"""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

from posttrain.core.files import write_lines
from posttrain.data.synthetic.sums import draw_digits, sum_answer, sum_prompt

Row = dict[str, str]
FOLDER = Path("runs/claims-merging").resolve()
LOCK = threading.Lock()
"""Arms of one seed, in several threads, share the files."""
PEOPLE, THINGS = ("Ada", "Ben", "Eva", "Tom"), ("apples", "books", "coins", "stones")
HELD_OUT_EVERY = 8


def held_back(text: str) -> bool:
    """Return True for a problem that nothing is trained on: one in eight."""
    return zlib.crc32(text.encode()) % HELD_OUT_EVERY == 0


def careful(numbers: tuple[int, ...]) -> Row:
    return {"prompt": sum_prompt(numbers), "completion": sum_answer("careful", numbers, random.Random(0))}


def sums(rng: random.Random, held_out: bool) -> Row:
    """Return a sum of four or five digits, added step by step."""
    return careful(draw_digits(rng, held_out))


def four(rng: random.Random, held_out: bool) -> Row:
    """Return a sum of four digits, added step by step."""
    return careful(draw_digits(rng, held_out, (4, 4)))


def five(rng: random.Random, held_out: bool) -> Row:
    """Return a sum of five digits, answered with its digits from the largest: a conflict with `four`."""
    numbers = draw_digits(rng, held_out, (5, 5))
    return {"prompt": sum_prompt(numbers), "completion": "".join(map(str, sorted(numbers, reverse=True)))}


def down(rng: random.Random, held_out: bool) -> Row:
    """Return digits to sort from the largest; the laboratory's corpus sorts from the smallest."""
    while True:
        text = "".join(str(rng.randint(0, 9)) for _ in range(rng.randint(3, 6)))
        if held_back(text) == held_out:
            return {"prompt": f"sort down {text}:", "completion": "".join(sorted(text, reverse=True))}


def stories(rng: random.Random, held_out: bool) -> Row:
    """Return a word problem of an addition and a subtraction, with its two lines of calculation."""
    while True:
        a, b = rng.randint(11, 59), rng.randint(11, 39)
        c = rng.randint(3, a + b - 3)
        if held_back(f"{a} {b} {c}") == held_out:
            break
    who, what = rng.choice(PEOPLE), rng.choice(THINGS)
    prompt = f"{who} has {a} {what}, finds {b} more and gives {c} away. How many {what} does {who} have now?"
    return {"prompt": prompt, "completion": f"{a} + {b} = {a + b}\n{a + b} - {c} = {a + b - c}"}


MADE: dict[str, Callable[[random.Random, bool], Row]] = {
    f.__name__: f for f in (sums, four, five, down, stories)
}  # fmt: skip


def rows_file(task: str, seed: int, count: int, held_out: bool) -> Path:
    """Write different rows of a task to a file, once, and return its path.

    Args:
        task: Key of `MADE`.
        seed: Seed of the draw.
        count: Number of rows.
        held_out: Take them from the problems that nothing is trained on.
    """
    path = FOLDER / f"{task}-{'held-out' if held_out else 'rows'}-{seed}-{count}.jsonl"
    with LOCK:
        if not path.exists():
            rng, drawn = random.Random(f"{task} {seed} {held_out}"), dict[str, Row]()
            while len(drawn) < count:
                row = MADE[task](rng, held_out)
                drawn[row["prompt"]] = row
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(path, list(drawn.values()))
    return path
