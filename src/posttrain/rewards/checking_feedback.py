"""Sources of feedback that check an answer in this process: its calculations, and what its program does.

Calculator and interpreter as critics: CRITIC, arXiv 2305.11738; the traceback in words: self-debugging, arXiv
2304.05128.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import Field

from posttrain import sandbox
from posttrain.config.feedback_sources import FeedbackSourceConfig
from posttrain.config.sandbox import SandboxConfig
from posttrain.core.arithmetic import written
from posttrain.rewards.code_blocks import CodeBlock
from posttrain.rewards.programs import NO_PROGRAM, program_in
from posttrain.rewards.step_rewards import Equation, equations_in
from posttrain.sampling.feedback_source import FeedbackFunctions, FeedbackNote, FeedbackSource
from posttrain.sandbox.program_tests import after_head

AT_ONCE = 4
"""Programs that run at the same time."""
_RUNNER = re.compile(r'^  File "/inside\.py".*\n(?:    .*\n)*', re.MULTILINE)
"""Frames of the file that runs the program."""
WHY_ENDED = {
    "timeout": "it ran longer than {seconds:g} seconds",
    "memory": "it took more than {memory_mb} MB of memory",
    "processes": "it started too many processes",
    "output": "it printed too much",
}
"""Why a limit ended a program."""


class CalculatorFeedback(FeedbackSource):
    """Say which equations between numbers in the answer are wrong, and what is right."""

    class Config(FeedbackSourceConfig):
        """Checks every calculation that the answer writes down (17 * 3 = 41), in exact arithmetic."""

        kind: Literal["calculator"] = "calculator"
        most: int = Field(
            5, ge=1, description="Wrong calculations that are named; others are counted. 1: only the first."
        )

    config: Config

    def __call__(self, answer: str, example: Mapping[str, Any]) -> FeedbackNote | None:
        """Check the calculations; None if there are none."""
        found = [e for line in answer.splitlines() for e in equations_in(line)]
        wrong = list(dict.fromkeys(e for e in found if not e.holds))
        if not found:
            return None
        if not wrong:
            count = len(found)
            text = "The calculation in the answer is" if count == 1 else f"All {count} calculations in the answer are"
            return FeedbackNote(f"{text} right.", True)
        lines = [_correction(e) for e in wrong[: self.config.most]]
        more = len(wrong) - len(lines) if self.config.most > 1 else 0
        lines += [f"{more} more calculation{'s are' if more > 1 else ' is'} wrong."] if more else []
        return FeedbackNote("\n".join(lines), False)


def _correction(equation: Equation) -> str:
    """Return what is wrong and what is right, with spaces as the answer has them."""
    equals = " = " if " " in equation.left else "="
    said, right = (f"{equation.left}{equals}{side}" for side in (equation.right, written(equation.exact)))
    return f"{said} is wrong: {right}"


class InterpreterFeedback(FeedbackSource):
    """Run the program of the answer in the sandbox, and show what it printed, or its traceback."""

    class Config(FeedbackSourceConfig):
        """Runs the answer's program in the sandbox; the feedback is its output or its traceback."""

        kind: Literal["interpreter"] = "interpreter"
        prefix: str | None = Field(
            None, description="Column with source that goes before the program (imports and a function's head)."
        )
        limits: SandboxConfig = Field(default_factory=SandboxConfig, description="What a program may use.")
        most_characters: int = Field(
            600,
            ge=40,
            description="Characters of its output, and of its traceback, that are shown: the first and last.",
        )

    config: Config

    def open(self, functions: FeedbackFunctions) -> None:
        """Check that there is a sandbox."""
        sandbox.require_sandbox()

    def __call__(self, answer: str, example: Mapping[str, Any]) -> FeedbackNote:
        """Run the program of one answer."""
        code = program_in(answer)
        if code is None or ("```" not in answer and "~~~" not in answer and not CodeBlock(code, "").is_code):
            return FeedbackNote(f"{NO_PROGRAM.capitalize()}.", False)
        limits, most = self.config.limits, self.config.most_characters
        head = str(example.get(self.config.prefix) or "") if self.config.prefix else ""
        done = sandbox.run_program(program_after(head, code), limits=limits)
        output, errors = middle_cut(done.stdout.strip("\n"), most), middle_cut(without_runner(done.stderr), most)
        if done.status == "ok":
            text = (
                f"The program printed:\n{fenced(output)}" if output.strip() else "The program ran and printed nothing."
            )
            return FeedbackNote(text, informs=True)
        why = WHY_ENDED.get(done.status, "").format(seconds=limits.seconds, memory_mb=limits.memory_mb)
        text = f"The program was ended: {why}." if why else f"The program failed:\n{fenced(errors)}"
        if output.strip():
            text += f"\nBefore that it printed:\n{fenced(output)}"
        return FeedbackNote(text, False)

    def many(self, answers: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> list[FeedbackNote]:
        """Run the programs of several answers, some at the same time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self, answers, examples))


def program_after(head: str, code: str) -> str:
    """Return a program after its head; a head that ends in a function without a body goes before its body alone."""
    if not head or head.strip() in code:
        return code
    defined = re.findall(r"^(?:async )?def (\w+)", head, re.MULTILINE)
    if defined and re.search(rf"^(?:async )?def {defined[-1]}\b", code, re.MULTILINE):
        head = head[: [m.start() for m in re.finditer(r"^(?:@|(?:async )?def )", head, re.MULTILINE)][-1]]
    return after_head(head, code)


def without_runner(errors: str) -> str:
    """Return a traceback without the lines of the sandbox's own file."""
    return _RUNNER.sub("", errors).strip("\n")


def middle_cut(text: str, most: int) -> str:
    """Return a text of about `most` characters: its beginning and end, and how many were cut between them."""
    if len(text) <= most:
        return text
    head, tail = text[: most // 3], text[-(most - most // 3) :]
    return f"{head}\n[{len(text) - most} characters cut]\n{tail}"


def fenced(text: str) -> str:
    """Return a text between fences that it does not contain."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
