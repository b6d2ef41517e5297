"""Make problems whose answer is a small Python function: a list goes through one or two steps, and a result comes out.

A question says in words what is wanted, and shows two tests. Two of the words are open: after "sort" the order may go
up or down, and "drop one" may mean the first or the last; the tests show which. A program of the language is
`def f(x):`, some of `STEP_LINES`, and one of `END_LINES`, so that programs of this language can be run here, line by
line, without any of Python's interpreter: for making talks, and for measuring a laboratory where there is no sandbox.
Anything else that a model writes is run by the reward `unit_tests` in the sandbox alone.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from posttrain.data.synthetic.sums import HELD_OUT_EVERY

PROGRAM_HEAD = "def f(x):"
ERROR = "error"
"""Stands for a result that does not exist, since a line failed."""
VISIBLE, HIDDEN = 2, 6
"""Tests that a question shows, and others that decide if a program is right."""
SHOWN_SLIPS = 0.85
"""Share of the questions whose shown tests fail every program with a slip; the others may miss one, as tests do."""
LONGEST_LIST = 3
"""Most numbers in a list that is tested."""

Value = list[int] | int | str
STEP_LINES: dict[str, Callable[[list[int]], list[int]]] = {
    " x=sorted(x)": sorted,
    " x=sorted(x)[::-1]": lambda x: sorted(x)[::-1],
    " x=x[::-1]": lambda x: x[::-1],
    " x=x[1:]": lambda x: x[1:],
    " x=x[:-1]": lambda x: x[:-1],
}
END_LINES: dict[str, Callable[[list[int]], Value]] = {
    " return x": list,
    " return len(x)": len,
    " return x[0]": lambda x: x[0] if x else ERROR,
    " return x[0] if x else 0": lambda x: x[0] if x else 0,
}
_OF_EACH: dict[str, Callable[[int, int], int]] = {"+": lambda v, n: v + n, "*": lambda v, n: v * n}
_KEPT: dict[str, Callable[[int, int], bool]] = {
    ">=": lambda v, n: v >= n,
    ">": lambda v, n: v > n,
    "<=": lambda v, n: v <= n,
    "<": lambda v, n: v < n,
}


def _mapped(of: Callable[[int, int], int], n: int) -> Callable[[list[int]], list[int]]:
    return lambda x: [of(v, n) for v in x]


def _filtered(keep: Callable[[int, int], bool], n: int) -> Callable[[list[int]], list[int]]:
    return lambda x: [v for v in x if keep(v, n)]


for _n in range(10):
    STEP_LINES.update({f" x=[v{sign}{_n} for v in x]": _mapped(of, _n) for sign, of in _OF_EACH.items()})
    STEP_LINES.update({f" x=[v for v in x if v{sign}{_n}]": _filtered(keep, _n) for sign, keep in _KEPT.items()})


class ProgramStep(NamedTuple):
    """Hold a step of a program, or its end.

    Attributes:
        words: What the question says. Empty: nothing.
        line: The line that does it.
        slip: The line that is written by mistake.
        slips: How often that happens.
    """

    words: str
    line: str
    slip: str
    slips: float


OFTEN, SELDOM = 0.7, 0.06
"""How often a line gets a slip: one that is hard, and another."""
_UP, _DOWN, _FIRST, _LAST = " x=sorted(x)", " x=sorted(x)[::-1]", " x=x[1:]", " x=x[:-1]"
LIST_STEPS: list[tuple[float, tuple[int, ...], ProgramStep]] = [
    (0.09, (0,), ProgramStep("sort", _UP, _DOWN, 0.2)),
    (0.07, (0,), ProgramStep("sort", _DOWN, _UP, 0.8)),
    (0.06, (0,), ProgramStep("drop one", _FIRST, _LAST, 0.2)),
    (0.06, (0,), ProgramStep("drop one", _LAST, _FIRST, 0.8)),
    (0.2, (0,), ProgramStep("double", " x=[v*2 for v in x]", " x=[v+2 for v in x]", OFTEN)),
    (0.16, (3, 4, 5, 6), ProgramStep("from {n}", " x=[v for v in x if v>={n}]", " x=[v for v in x if v>{n}]", OFTEN)),
    (0.12, (4, 5, 6, 7), ProgramStep("below {n}", " x=[v for v in x if v<{n}]", " x=[v for v in x if v<={n}]", SELDOM)),
    (0.12, (1, 2, 3), ProgramStep("add {n}", " x=[v+{n} for v in x]", " x=[v*{n} for v in x]", SELDOM)),
    (0.12, (0,), ProgramStep("reverse", " x=x[::-1]", _UP, SELDOM)),
]
"""(share, numbers that may stand for {n}, the step)."""
END_STEPS: list[tuple[float, ProgramStep]] = [
    (0.5, ProgramStep("", " return x", " return x", 0.0)),
    (0.2, ProgramStep("count", " return len(x)", " return x", SELDOM)),
    (0.3, ProgramStep("first or 0", " return x[0] if x else 0", " return x[0]", OFTEN)),
]
MOST_STEPS = 2


class Case(NamedTuple):
    """Hold a test: a list, and what the function should return for it."""

    given: list[int]
    wanted: Value

    def __str__(self) -> str:
        return f"f({self.given}) == {self.wanted}"


@dataclass(frozen=True)
class ProgramProblem:
    """Hold a problem.

    Attributes:
        steps: The steps, and at last the end.
        visible: Tests that the question shows.
    """

    steps: tuple[ProgramStep, ...]
    visible: tuple[Case, ...]

    @property
    def question(self) -> str:
        """Return the question: what is wanted in words, and the tests."""
        words = ", ".join(step.words for step in self.steps if step.words)
        return "\n".join([words, *map(str, self.visible)])

    @property
    def lines(self) -> tuple[str, ...]:
        """Return the lines of the right program, without its head."""
        return tuple(step.line for step in self.steps)


def written_program(lines: Sequence[str]) -> str:
    """Return the text of a program with these lines."""
    return "\n".join([PROGRAM_HEAD, *lines])


def read_program(text: str) -> tuple[str, ...] | None:
    """Return the lines of a program without its head; None if it is not in the language."""
    head, *lines = text.strip().split("\n")
    known = bool(lines) and lines[-1] in END_LINES and all(line in STEP_LINES for line in lines[:-1])
    return tuple(lines) if head == PROGRAM_HEAD and known else None


def run_lines(lines: Sequence[str], given: Sequence[int]) -> list[Value]:
    """Return a list, what each step makes of it, and at last the result; `ERROR` if there is none.

    Args:
        lines: Lines of a program of the language.
        given: The list.
    """
    x = list(given)
    out: list[Value] = [x]
    for line in lines[:-1]:
        x = STEP_LINES[line](x)
        out.append(x)
    result = END_LINES[lines[-1]](x)
    return [*out[:-1], result] if lines[-1] == " return x" else [*out, result]


def result_of(lines: Sequence[str], given: Sequence[int]) -> Value:
    """Return the result of a program; `ERROR` if it fails."""
    return run_lines(lines, given)[-1]


def failing(lines: Sequence[str], cases: Sequence[Case]) -> int | None:
    """Return the number of the first test that a program fails, from 0; None if it passes all."""
    return next((i for i, case in enumerate(cases) if result_of(lines, case.given) != case.wanted), None)


def draw_problem(rng: random.Random, held_out: bool) -> ProgramProblem:
    """Return a problem whose program is a held-out one, or none.

    Args:
        rng: Source of the program and the tests.
        held_out: Return a held-out problem.
    """
    while True:
        steps = _draw_steps(rng)
        if is_held_out_program([step.line for step in steps]) == held_out:
            break
    wrong = () if rng.random() > SHOWN_SLIPS else wrong_programs(steps, single=True)
    for _ in range(12):
        cases = tuple(_case(steps, draw_list(rng, steps)) for _ in range(VISIBLE))
        if cases[0].given != cases[1].given and all(failing(lines, cases) is not None for lines in wrong):
            break
    return ProgramProblem(steps, cases)


def is_held_out_program(lines: Sequence[str]) -> bool:
    """Return True for a program that is in no corpus and no training problem of any seed: one in eight."""
    return zlib.crc32("\n".join(lines).encode()) % HELD_OUT_EVERY == 0


def draw_list(rng: random.Random, steps: Sequence[ProgramStep] = ()) -> list[int]:
    """Return a list for a test, of different digits; one that a step compares with is in it more often.

    Args:
        rng: Source of the numbers.
        steps: Steps of the program.
    """
    x = rng.sample(range(10), rng.choices(range(LONGEST_LIST + 1), (0.12, 0.1, 0.28, 0.5))[0])
    edges = [int(step.words[-1]) for step in steps if step.words.startswith(("from", "below"))]
    if x and edges and rng.random() < 0.6 and not set(x) & set(edges):
        x[rng.randrange(len(x))] = rng.choice(edges)
    return x


@cache  # some 600 programs are asked about thousands of times
def wrong_programs(steps: tuple[ProgramStep, ...], single: bool = False) -> tuple[tuple[str, ...], ...]:
    """Return the programs with slips that give other results than the right one for some list.

    Args:
        steps: Steps of the program.
        single: Return those with one slip only.
    """
    rng = random.Random("probes")
    right = tuple(step.line for step in steps)
    probes = [_case(steps, draw_list(rng, steps)) for _ in range(24)]
    out = []
    for slips in product(*[(False, True) if step.slip != step.line else (False,) for step in steps]):
        if any(slips) and (not single or sum(slips) == 1):
            lines = tuple(s.slip if slipped else s.line for s, slipped in zip(steps, slips, strict=True))
            if lines != right and failing(lines, probes) is not None:
                out.append(lines)
    return tuple(out)


def hidden_cases(problem: ProgramProblem) -> list[Case]:
    """Return tests that fail every program with slips which is not right, and some more; a function of the problem."""
    rng = random.Random(problem.question)
    wrong, out = list(wrong_programs(problem.steps)), list[Case]()
    for _ in range(400):
        if len(out) >= HIDDEN and not wrong:
            break
        case = _case(problem.steps, draw_list(rng, problem.steps))
        caught = [lines for lines in wrong if failing(lines, [case]) is not None]
        if case not in out and (caught or len(out) < HIDDEN - len(wrong)):
            out.append(case)
            wrong = [lines for lines in wrong if lines not in caught]
    return out


def program_rows(seed: int, count: int, held_out: bool) -> list[dict[str, Any]]:
    """Return different problems as rows: prompt, answer (a right program), visible and test (sources of tests).

    Args:
        seed: Seed of the draw.
        count: Number of problems.
        held_out: Take them from the programs that no model is trained on.
    """
    rng = random.Random(f"programs {seed} {held_out}")
    drawn: dict[str, ProgramProblem] = {}
    while len(drawn) < count:
        problem = draw_problem(rng, held_out)
        drawn[problem.question] = problem
    return [
        {
            "prompt": question,
            "answer": written_program(problem.lines),
            "visible": written_tests(problem.visible),
            "test": written_tests(hidden_cases(problem)),
        }
        for question, problem in drawn.items()
    ]


def written_tests(cases: Sequence[Case]) -> str:
    """Return tests as Python source."""
    return "\n".join(f"assert {case}" for case in cases)


def read_tests(source: str) -> list[Case]:
    """Return the tests of a source that `written_tests` has made."""
    out = []
    for line in source.splitlines():
        given, wanted = line.removeprefix("assert f(").split(") == ")
        out.append(Case(_value(given), _value(wanted)))  # type: ignore[arg-type]
    return out


def passes(text: str, source: str) -> bool:
    """Return True if a text is a program of the language that passes tests made by `written_tests`.

    Args:
        text: The text.
        source: The tests.
    """
    lines = read_program(text)
    return lines is not None and failing(lines, read_tests(source)) is None


def _draw_steps(rng: random.Random) -> tuple[ProgramStep, ...]:
    """Return different steps and an end."""
    steps: list[ProgramStep] = []
    count = rng.randint(1, MOST_STEPS)
    while len(steps) < count:
        (_, numbers, step), *_ = rng.choices(LIST_STEPS, [share for share, _, _ in LIST_STEPS])
        n = rng.choice(numbers)
        step = step._replace(**{name: getattr(step, name).replace("{n}", str(n)) for name in ("words", "line", "slip")})
        if all(step.words.split()[0] != other.words.split()[0] for other in steps):
            steps.append(step)
    ((_, end),) = rng.choices(END_STEPS, [share for share, _ in END_STEPS])
    return (*steps, end)


def _case(steps: Sequence[ProgramStep], given: list[int]) -> Case:
    return Case(given, result_of([step.line for step in steps], given))


def _value(text: str) -> Value:
    if text.startswith("["):
        return [int(n) for n in text[1:-1].split(", ") if n]
    return int(text)
