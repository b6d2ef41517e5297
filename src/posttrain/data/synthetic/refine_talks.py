"""Make the talks that the laboratory of self-refine is trained on: question, answer, check, verdict, another answer.

Every talk is a pure function of (seed, index). The questions are the sums of `sums`. An answer adds one digit a line,
and a line that adds 8 or 9 mostly forgets its carry, so that about half of the answers are wrong, the likeliest ones
too. A check names the first wrong line: this is easier than the answer, since every line can be checked alone. It
mostly overlooks a mistake of a line that adds 9, and sometimes complains about a right line. After a check that found
something the next answer mostly corrects this line; asked for another answer without a check, the model mostly repeats
itself or makes mistakes anew. So a model that imitates the talks gains by its checks, and can learn to gain more.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from posttrain.core.types import Message
from posttrain.data.synthetic import sums

CHECK, AGAIN = "check", "again"
"""What the user writes to get a check, and another answer."""
RIGHT, WRONG = "right", "wrong"
"""Verdicts, the last line of a check."""
OTHERS = 0.15
"""Share of the talks that are about the other small tasks; they have one answer."""
FLOWS = {"answer": 0.15, "check": 0.45, "again": 0.12, "tool": 0.18, "tool_check": 0.1}
"""Shares of what follows the first answer of the others: nothing, checks, another answer, what a tool found, before a
request for another answer or for a check."""
TOOLS = {"calculator": 0.4, "verifier": 0.25, "critic": 0.2, "verdict": 0.15}
"""Whose words the tool has: those of the feedback sources calculator and verifier, of a check, of its verdict alone."""
HARD = (8, 9)
FORGETS_HARD, FORGETS = 0.75, 0.08
"""How often a carry is forgotten by a line that adds one of HARD, and by another."""
CAREFUL = 0.1
"""Share of answers that forget nothing."""
FIRST_ALONE = 0.5
"""How often the calculator names the first wrong line alone."""
OVERLOOKED, OVERLOOKS_IT, OVERLOOKS = 9, 0.75, 0.1
"""A number; how often a check overlooks a wrong line that adds it, and another wrong line."""
COMPLAINS = 0.06
"""How often a check complains about a line of a right answer."""
FOLLOWS = 0.85
"""How often the answer after a complaint changes the line as the complaint says, and adds the rest carefully."""
REPEATS = 0.7
"""How often the answer to AGAIN without a complaint is the same as before; else it is made anew."""
MOST_ROUNDS = 2


class SumLine(NamedTuple):
    """Hold a line of an answer, `before+number=after`."""

    before: int
    number: int
    after: int

    @property
    def right(self) -> bool:
        """Return True if the line is true."""
        return self.before + self.number == self.after


@dataclass(frozen=True)
class Complaint:
    """Hold what is said to be wrong: the number of a line, and what the line should give."""

    line: int
    result: int


def talk_at(seed: int, index: int) -> list[Message]:
    """Return talk number `index` of the endless corpus `seed`. Its sums are never held-out ones."""
    rng = random.Random(f"talk {seed} {index}")
    if rng.random() < OTHERS:
        prompt, completion = sums.SMALL_TASKS[rng.choice(list(sums.SMALL_TASKS))](rng)
        return _turns([prompt, completion.strip()])
    numbers = sums.draw_digits(rng, held_out=False)
    answer = answer_lines(numbers, rng)
    flow = rng.choices(list(FLOWS), list(FLOWS.values()))[0]
    texts = [sums.sum_prompt(numbers), written_answer(answer)]
    if flow == "check":
        texts += _checked(numbers, answer, rng)
    elif flow == "again":
        texts += [AGAIN, written_answer(_without_complaint(numbers, answer, rng))]
    elif flow == "tool":
        texts += _told(numbers, answer, rng)
    elif flow == "tool_check":
        said, complaint = tool_text(answer, rng), first_mistake(answer)
        texts += [f"{said}\n{CHECK}", check_text(answer, complaint)]
        if complaint is not None:
            texts += [AGAIN, written_answer(_corrected(numbers, answer, complaint, rng))]
    return _turns(texts)


def answer_lines(
    numbers: Sequence[int], rng: random.Random, kept: Sequence[SumLine] = (), careful: bool | None = None
) -> list[SumLine]:
    """Return the lines of an answer.

    Args:
        numbers: The digits to add.
        rng: Source of the mistakes.
        kept: Lines that it begins with.
        careful: Forget nothing. None: by chance.
    """
    careful = rng.random() < CAREFUL if careful is None else careful
    lines = list(kept)
    before = lines[-1].after if lines else numbers[0]
    for number in numbers[len(lines) + 1 :]:
        after = before + number
        forgets = FORGETS_HARD if number in HARD else FORGETS
        if not careful and after // 10 > before // 10 and rng.random() < forgets:
            after -= 10
        lines.append(SumLine(before, number, after))
        before = after
    return lines


def written_answer(lines: Sequence[SumLine]) -> str:
    """Return an answer as text, whose last line is a number."""
    return "\n".join([*(f"{a}+{b}={c}" for a, b, c in lines), str(lines[-1].after)])


def first_mistake(lines: Sequence[SumLine]) -> Complaint | None:
    """Return what a check that overlooks nothing complains about; None for a right answer."""
    return next((Complaint(i, a + b) for i, (a, b, c) in enumerate(lines) if a + b != c), None)


def check_text(lines: Sequence[SumLine], complaint: Complaint | None) -> str:
    """Return a check in words: the verdict, after the line that is wrong."""
    if complaint is None:
        return RIGHT
    a, b, c = lines[complaint.line]
    return f"{a}+{b}={complaint.result}, not {c}\n{WRONG}"


def tool_text(lines: Sequence[SumLine], rng: random.Random) -> str:
    """Return what a tool that is never wrong says about an answer."""
    tool = rng.choices(list(TOOLS), list(TOOLS.values()))[0]
    right = first_mistake(lines) is None
    if tool == "verdict":
        return RIGHT if right else WRONG
    if tool == "critic":
        return check_text(lines, first_mistake(lines))
    if tool == "verifier":
        return f"The answer is {RIGHT if right else WRONG}."
    if right:
        return f"All {len(lines)} calculations in the answer are right."
    wrong = [f"{a}+{b}={c} is wrong: {a}+{b}={a + b}" for a, b, c in lines if a + b != c]
    return "\n".join(wrong[:1] if rng.random() < FIRST_ALONE else wrong)


def _told(numbers: Sequence[int], answer: list[SumLine], rng: random.Random) -> list[str]:
    """Return the texts after an answer that a tool looks at: what it says, another answer, again while it is wrong."""
    texts: list[str] = []
    for _ in range(MOST_ROUNDS):
        mistake = first_mistake(answer)
        said = tool_text(answer, rng)
        answer = _corrected(numbers, answer, mistake, rng)
        texts += [f"{said}\n{AGAIN}", written_answer(answer)]
        if first_mistake(answer) is None:
            break
    return texts


def _checked(numbers: Sequence[int], answer: list[SumLine], rng: random.Random) -> list[str]:
    """Return the texts after an answer: check, verdict, another answer, and so on."""
    texts: list[str] = []
    for _ in range(MOST_ROUNDS):
        complaint = _noticed(answer, rng)
        texts += [CHECK, check_text(answer, complaint)]
        if complaint is None and rng.random() < 0.7:
            break
        answer = _corrected(numbers, answer, complaint, rng)
        texts += [AGAIN, written_answer(answer)]
    return texts


def _noticed(answer: Sequence[SumLine], rng: random.Random) -> Complaint | None:
    """Return what a check of the corpus complains about, which may be nothing or a right line."""
    wrong = [i for i, line in enumerate(answer) if not line.right]
    for i in wrong:
        if rng.random() >= (OVERLOOKS_IT if answer[i].number == OVERLOOKED else OVERLOOKS):
            return Complaint(i, answer[i].before + answer[i].number)
    if wrong or rng.random() >= COMPLAINS:
        return None
    line = rng.randrange(len(answer))
    after = answer[line].after
    return Complaint(line, after - 10 if after >= 10 else after + 1)


def _corrected(
    numbers: Sequence[int], answer: list[SumLine], complaint: Complaint | None, rng: random.Random
) -> list[SumLine]:
    """Return the answer after a check."""
    if complaint is None or rng.random() >= FOLLOWS:
        return answer
    before, number, _ = answer[complaint.line]
    kept = [*answer[: complaint.line], SumLine(before, number, complaint.result)]
    return answer_lines(numbers, rng, kept, careful=True)


def _without_complaint(numbers: Sequence[int], answer: list[SumLine], rng: random.Random) -> list[SumLine]:
    """Return the answer to AGAIN without a check."""
    return answer if rng.random() < REPEATS else answer_lines(numbers, rng)


def _turns(texts: Sequence[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
