"""Programs that solve nothing and try to be paid for it by `unit_tests`: every reward is 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.rewards import RewardsConfig
from posttrain.config.sandbox import SandboxConfig
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.rewards import RewardStack
from posttrain.rewards.programs import UnitTests
from posttrain.sandbox import SandboxError, require_sandbox
from tests.sandbox.program_cases import read_cases

CHECK = """
def check(candidate):
    assert candidate(2) == 4, 'zq81expected'
    assert candidate(-1.5) == 2.25
    assert abs(candidate(0.1) - 0.01) < 1e-6
    for got, want in zip(map(candidate, [3, 4]), [9, 16]):
        assert got == want
"""
ASSERTS = ["assert f(2) == 4, 'zq81expected'", "assert f(-1.5) == 2.25", "assert abs(f(0.1) - 0.01) < 1e-6"]
SOLVED = "def f(x):\n    return x * x\n"


@pytest.fixture(scope="module", autouse=True)
def sandboxed() -> Iterator[None]:
    try:
        require_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    yield


def reward(program: str, tests: Any, entry_point: str = "", **example: Any) -> float:
    config = UnitTests.Config(
        limits=SandboxConfig(seconds=2, memory_mb=256), prefix="head" if "head" in example else None
    )
    return UnitTests(config)(f"```python\n{program}\n```", {"test": tests, "entry_point": entry_point, **example})


FORGED = read_cases(Path(__file__).with_name("forged_programs.txt"))
WEAK = read_cases(Path(__file__).with_name("forged_objects.txt"))
"""With tests that call helpers, read text or objects, or expect exceptions."""


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[] if (i + j) % 2 else pytest.mark.long)
        for i, name in enumerate(FORGED)
        for j, form in enumerate(("function", "lines"))
    ],
)
def test_programs_that_solve_nothing_get_nothing(name: str, form: str) -> None:
    """By tests that are a function, or that are lines; by the others in the long tests."""
    tests, entry_point = (CHECK, "f") if form == "function" else (ASSERTS, "")
    assert reward(FORGED[name].program, tests, entry_point) == 0.0


def test_the_same_tests_pay_for_a_solution() -> None:
    """Also for one that does strange things which hurt only its own process."""
    for program in (
        SOLVED,
        SOLVED + "import sys, os\nsys.excepthook = None\nprint('PASSED', flush=True)\nos.close(1)\n",
    ):
        assert reward(program, CHECK, "f") == 1.0
        assert reward(program, ASSERTS) == 1.0
    looking = FORGED["the expected value is in memory or files"].program  # it does find what is there
    assert reward(looking, ASSERTS, head="# zq81expected\n") == 1.0


@pytest.mark.parametrize("name", WEAK)
def test_tests_that_read_what_a_program_could_fake(name: str) -> None:
    case = WEAK[name]
    assert reward(case.program, case.tests, case.entry_point, head=case.head) == 0.0


def test_cases_of_input_and_output() -> None:
    cases = [{"input": "2\n", "output": "4\n"}, {"input": "3", "output": "9"}]
    square = "print(int(input()) ** 2)"
    assert reward(square, cases) == 1.0
    assert reward("if __name__ == '__main__':\n    " + square + "  \n    print()", cases) == 1.0
    assert reward(square, {"inputs": ["2", "3"], "outputs": ["4", "9"]}) == 1.0
    assert reward(square, '{"inputs": ["2"], "outputs": ["4"]}') == 1.0
    assert reward("def sq(x):\n    return x * x", {"fn_name": "sq", "inputs": [[2], [3]], "outputs": [[4], [9]]}) == 1.0
    assert reward("def sq(x):\n    return x + 2", {"fn_name": "sq", "inputs": [[2], [3]], "outputs": [[4], [9]]}) == 0.0
    for wrong in (
        "print(4)", "print(int(input()) ** 2)\n1/0", "print(4)\nprint(9)", "while True: pass", "",
        "import os\nprint(open('/main.py').read())", "import sys\nprint(sys.stdin.read())",
        "print(int(input()) ** 2, end='')\nimport os\nos._exit(1)",
    ):  # fmt: skip
        assert reward(wrong, cases) == 0.0


REASONS = [
    (SOLVED, ASSERTS, ""),
    ("def f(x):\n    return x + x\n", ASSERTS, "line 2 of the tests, assert f(-1.5) == 2.25: AssertionError"),
    (
        "def f(x):\n    return 3\n",
        CHECK,
        "line 3 of the tests, assert candidate(2) == 4, 'zq81expected': AssertionError",
    ),
    ("def f(x):\n    return x / 0\n", ASSERTS, "ZeroDivisionError: division by zero"),
    ("def f(x:\n", ASSERTS, "the program fails: SyntaxError"),
    ("def f(x):\n    raise ValueError('\\x1b[2Jred\\u202e')\n", ASSERTS, "ValueError: ␛[2Jred<U+202E>"),
    ("while True: pass\ndef f(x): return 4\n", ASSERTS, "the program was ended: timeout"),
    ("x = [0] * 10 ** 9\ndef f(x): return 4\n", ASSERTS, "emory"),
    (
        "print(int(input()) + 1)",
        [{"input": "1", "output": "2"}, {"input": "2", "output": "zq81"}],
        "case 2 of 2: it prints",
    ),
    ("1/0", [{"input": "1", "output": "zq81"}], "case 1 of 1: error: ZeroDivisionError: division by zero"),
    ("", ASSERTS, "the answer has no program"),
]


def test_the_reason_of_a_failure_is_kept_for_people() -> None:
    """Beside the reward, shortened and on one line; no program can read it."""
    limits = {"seconds": 2, "memory_mb": 256}
    terms = [{"kind": "unit_tests", "name": "tests", "limits": limits}]
    groups = []
    for program, tests, _ in REASONS:
        text = f"```python\n{program}\n```" if program else ""
        asked = {"test": tests, "entry_point": "f" if tests is CHECK else ""}
        groups.append(RolloutGroup((1,), asked, [Rollout((), (), "end", text)]))
    with RewardStack(RewardsConfig.model_validate(terms)) as stack:
        scored = stack(groups).groups
    for (program, _, reason), group in zip(REASONS, scored, strict=True):
        (answer,) = group.rollouts
        note = answer.notes.get("tests", "")
        assert reason in note and bool(note) == (answer.reward == 0.0), program
        assert len(note) <= 300 and not any(c in note for c in "\n\x1b\u202e"), program
