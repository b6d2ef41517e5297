"""Make the talks that the laboratory of small programs is trained on: question, program, check, verdict, another one.

Every talk is a pure function of (seed, index). The questions are those of `small_programs`. A first program is written
by the words alone, without a look at the tests: words that are open are read in their commoner sense, and some lines
mostly have a slip (`v+2` for double), so that about half of the programs are wrong, the likeliest ones too. A check
runs the program on the shown tests, line by line, and compares: this is easier than to write it. It sometimes looks at
the first test alone. After a check or a tool that found something, the next program is mostly right; asked for another
program without a check, the model mostly repeats itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from posttrain.core.types import Message
from posttrain.data.synthetic import small_programs as language
from posttrain.data.synthetic.refine_talks import (
    AGAIN,
    CAREFUL,
    CHECK,
    FOLLOWS,
    MOST_ROUNDS,
    REPEATS,
    RIGHT,
    WRONG,
)
from posttrain.data.synthetic.small_programs import ProgramProblem

RUN_WORD = "run"
"""What the user writes to have a program run."""
RUNS = 0.3
"""Share of the talks in which a program is run, and nothing else."""
PROGRAM_FLOWS = {"answer": 0.1, "check": 0.4, "again": 0.12, "tool": 0.28, "tool_check": 0.1}
"""Shares of what follows the first program of the others: nothing, checks, another program, what a tool found, before a
request for another program or for a check."""
PROGRAM_TOOLS = {"tests": 0.5, "verifier": 0.2, "critic": 0.15, "verdict": 0.15}
"""Whose words the tool has: those of the feedback sources tests and verifier, of a check, of its verdict alone."""
LAZY = 0.3
"""How often a check looks at the first test alone."""
ENDS_RIGHT = 0.7
"""How often a talk ends after a check that found nothing."""

ProgramLines = Sequence[str]


def program_talk_at(seed: int, index: int) -> list[Message]:
    """Return talk number `index` of the endless corpus `seed`. Its programs are never held-out ones."""
    rng = random.Random(f"program talk {seed} {index}")
    problem = language.draw_problem(rng, held_out=False)
    answer = first_lines(problem, rng)
    if rng.random() < RUNS:
        given = language.draw_list(rng, problem.steps)
        asked = f"{RUN_WORD} f({given})\n{language.written_program(answer)}"
        return _turns([asked, "\n".join(map(str, language.run_lines(answer, given)))])
    flow = rng.choices(list(PROGRAM_FLOWS), list(PROGRAM_FLOWS.values()))[0]
    texts = [problem.question, language.written_program(answer)]
    if flow == "check":
        texts += _checked(problem, answer, rng)
    elif flow == "again":
        again = answer if rng.random() < REPEATS else first_lines(problem, rng)
        texts += [AGAIN, language.written_program(again)]
    elif flow == "tool":
        texts += _told(problem, answer, rng)
    elif flow == "tool_check":
        said, wrong = tool_says(problem, answer, rng)
        texts += [f"{said}\n{CHECK}", run_check(problem, answer) if wrong else RIGHT]
        if wrong:
            texts += [AGAIN, language.written_program(_corrected(problem, answer, wrong, rng))]
    return _turns(texts)


def first_lines(problem: ProgramProblem, rng: random.Random) -> ProgramLines:
    """Return the lines of a program that may have slips.

    Args:
        problem: The problem.
        rng: Source of the slips.
    """
    if rng.random() < CAREFUL:
        return problem.lines
    return tuple(step.slip if rng.random() < step.slips else step.line for step in problem.steps)


def run_check(problem: ProgramProblem, lines: ProgramLines, lazy: bool = False) -> str:
    """Return a check in words: the program run on the shown tests up to the first that fails, and the verdict.

    Args:
        problem: The problem.
        lines: Lines of the program.
        lazy: Look at the first test alone.
    """
    out: list[str] = []
    for case in problem.visible[: 1 if lazy else None]:
        values = language.run_lines(lines, case.given)
        out += [*map(str, values), f"want {case.wanted}"]
        if values[-1] != case.wanted:
            return "\n".join([*out, WRONG])
    return "\n".join([*out, RIGHT])


def tool_says(problem: ProgramProblem, lines: ProgramLines, rng: random.Random) -> tuple[str, bool]:
    """Return what a tool that is never wrong says about a program, and True if it is a complaint.

    Args:
        problem: The problem.
        lines: Lines of the program.
        rng: Chooses the tool.
    """
    tool = rng.choices(list(PROGRAM_TOOLS), list(PROGRAM_TOOLS.values()))[0]
    if tool == "tests":
        return tests_text(problem.visible, lines), language.failing(lines, problem.visible) is not None
    if tool == "critic":
        return run_check(problem, lines), language.failing(lines, problem.visible) is not None
    wrong = lines != problem.lines and tuple(lines) in language.wrong_programs(problem.steps)
    if tool == "verdict":
        return (WRONG if wrong else RIGHT), wrong
    return f"The answer is {WRONG if wrong else RIGHT}.", wrong


def tests_text(tests: Sequence[language.Case], lines: ProgramLines) -> str:
    """Return what the source of feedback `tests` says about a program and tests."""
    number = language.failing(lines, tests)
    if number is None:
        return "The program passes all tests."
    case = tests[number]
    got = language.result_of(lines, case.given)
    failed = "IndexError: list index out of range" if got == language.ERROR else f"f({case.given}) is {got}"
    said = failed if got == language.ERROR else f"AssertionError: {failed}"
    return f"The program fails the tests. Line {number + 1} of the tests, assert {case}: {said}."


def _checked(problem: ProgramProblem, answer: ProgramLines, rng: random.Random) -> list[str]:
    """Return the texts after a program: check, verdict, another program, and so on."""
    texts: list[str] = []
    for _ in range(MOST_ROUNDS):
        said = run_check(problem, answer, rng.random() < LAZY)
        wrong = said.endswith(WRONG)
        texts += [CHECK, said]
        if not wrong and rng.random() < ENDS_RIGHT:
            break
        answer = _corrected(problem, answer, wrong, rng)
        texts += [AGAIN, language.written_program(answer)]
    return texts


def _told(problem: ProgramProblem, answer: ProgramLines, rng: random.Random) -> list[str]:
    """Return the texts after a program that a tool looks at: what it says, another program, again while it is wrong."""
    texts: list[str] = []
    for _ in range(MOST_ROUNDS):
        said, wrong = tool_says(problem, answer, rng)
        answer = _corrected(problem, answer, wrong, rng)
        texts += [f"{said}\n{AGAIN}", language.written_program(answer)]
        if not wrong:
            break
    return texts


def _corrected(problem: ProgramProblem, answer: ProgramLines, wrong: bool, rng: random.Random) -> ProgramLines:
    """Return the program after a check or a tool."""
    return problem.lines if wrong and rng.random() < FOLLOWS else answer


def _turns(texts: Sequence[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
