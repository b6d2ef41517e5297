"""Rewards that run the program in a completion, in the sandbox: its answer, or the tests that it passes.

Program chains: PAL, arXiv 2211.10435, and ReFT's P-CoT, arXiv 2401.08967 section 4. Unit tests: arXiv 2107.03374.
"""

from __future__ import annotations

import re
import secrets
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from posttrain import sandbox
from posttrain.config.rewards import RewardTermConfig
from posttrain.config.sandbox import SandboxConfig
from posttrain.rewards.answer_extraction import numbers_in
from posttrain.rewards.outcome import ExampleRow, LabelError, labels
from posttrain.rewards.reward import Reward, RewardFunctions
from posttrain.rewards.verifiers import label_answer

_DEFINED = re.compile(r"^def solution\(\s*\)", re.MULTILINE)
_CALLED = re.compile(r"^[^#\n]*(?<!def )solution\(", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")


def code_in(text: str) -> str | None:
    """Return the program in a completion, None if there is none.

    It is the last fenced block of Python (or of no language), an open block up to its end, or without any block the
    whole text. Blocks of other languages do not count.
    """
    if "</think>" in text:
        text = text.rsplit("</think>", 1)[1]
    if "```" not in text:
        return text if text.strip() else None
    program, language, block = None, None, ""
    for line in [*text.splitlines(keepends=True), "```"]:
        fence = line.strip()
        if language is None:
            if fence.startswith("```"):
                language, block = fence[3:].strip().lower(), ""
        elif fence == "```":
            if language in _PYTHON and block.strip():
                program = block
            language = None
        else:
            block += line
    return program


def printed(text: str, limits: SandboxConfig) -> str | None:
    """Return the last line, not blank, that a completion's program prints; None if it fails or prints nothing.

    A `solution()` that is defined but not called is called, and its result printed.

    Raises:
        SandboxError: Nothing can be run.
    """
    code = code_in(text)
    if code is None:
        return None
    if _DEFINED.search(code) and not _CALLED.search(code):
        code += "\nprint(solution())\n"
    done = sandbox.run_program(code, limits=limits)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines[-1] if done.status == "ok" and lines else None


class SandboxedConfig(RewardTermConfig):
    """Settings of rewards that run the program of a completion in the sandbox, never without (docs/sandbox.md)."""

    in_worker: ClassVar[bool] = True
    limits: SandboxConfig = Field(default_factory=SandboxConfig, description="What a program may use.")

    @model_validator(mode="after")
    def _time(self) -> SandboxedConfig:
        if self.limits.seconds > 4 * self.timeout:
            raise ValueError(
                f"limits.seconds is {self.limits.seconds:g}, and a call is cut off after 4 * timeout = "
                f"{4 * self.timeout:g} s by the clock: raise timeout, or lower limits.seconds"
            )
        return self


class SandboxedReward(Reward):
    """Base of the rewards that run the program of a completion."""

    def open(self, functions: RewardFunctions) -> None:
        """Check that there is a sandbox."""
        sandbox.require_sandbox()


class Program(SandboxedReward):
    """Return 1 if the last line that the program prints has the label's number, or is a label that has no number.

    Another printed number gets `partial`. No program, or one that fails: 0.
    """

    class Config(SandboxedConfig):
        """1 if the completion's program prints the right answer, else 0."""

        kind: Literal["program"] = "program"
        label: str = Field(
            "answer", description="Column of the example with the right answer, or a list of right answers."
        )
        tolerance: float = Field(1e-6, ge=0, description="Largest absolute difference that counts as right.")
        partial: float = Field(0.0, description="For a program that prints another number (ReFT: 0.1).")

    config: Config

    def __call__(self, text: str, example: ExampleRow) -> float:
        """Run the program. Raises LabelError without a label, SandboxError if nothing can be run."""
        right = labels(example, self.config.label)
        line = printed(text, self.config.limits)
        if line is None:
            return 0.0
        numbers = numbers_in(line)
        for label in right:
            value = numbers_in(label_answer(label))
            if (len(value) == 1 and numbers and abs(numbers[-1] - value[0]) <= self.config.tolerance) or line == label:
                return 1.0
        return self.config.partial if numbers else 0.0


class UnitTests(SandboxedReward):
    """Return 1 if the program passes the example's tests, else 0.

    The source that runs is the column `prefix` (if any), the program, the column `tests`, and check(entry_point) if the
    example names one: human-eval's layout. To pass is to reach the end: exiting early, even with code 0, is failing.
    """

    class Config(SandboxedConfig):
        """1 if the completion's program passes the example's tests, else 0."""

        kind: Literal["unit_tests"] = "unit_tests"
        tests: str = Field("test", description="Column with the tests: source, or a list of lines (assert …).")
        prefix: str | None = Field(
            None, description="Column with source that goes before the program (its signature, for instance)."
        )
        entry_point: str = Field("entry_point", description="Column with the name that check() is called with, if any.")

    config: Config

    def __call__(self, text: str, example: ExampleRow) -> float:
        """Run the program with its tests. Raises LabelError if the example has no tests."""
        config = self.config
        tests = example.get(config.tests)
        tests = "\n".join(map(str, tests)) if isinstance(tests, list | tuple) else tests
        if not isinstance(tests, str) or not tests.strip():
            columns = sorted(k for k, v in example.items() if v is not None)
            raise LabelError(
                f"the example has no tests in {config.tests!r} (it has {columns}); name their column with `tests:`"
            )
        code = code_in(text)
        if code is None:
            return 0.0
        lines = [str(example.get(config.prefix) or "") + code if config.prefix else code, tests]
        if example.get(config.entry_point):
            lines.append(f"check({example[config.entry_point]})")
        mark = secrets.token_hex(16)  # the program can't know it, so it can't print it early
        done = sandbox.run_program("\n".join([*lines, f"print({mark!r})"]), limits=config.limits)
        return float(done.status == "ok" and done.stdout.rstrip().endswith(mark))
