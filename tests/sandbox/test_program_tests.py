"""What tests can do with a program: every layout and kind of value that crosses, right and wrong programs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.config.sandbox import SandboxConfig
from posttrain.sandbox import SandboxError, require_sandbox
from posttrain.sandbox.program_tests import TestsError, run_tests
from tests.sandbox.program_cases import read_cases

ADD = "def add(a, b):\n    return a + b\n"
NODE = """class Node:
    def __init__(self, val, next=None):
        self.val = val
        self.next = next
    def listed(self):
        out, node = [], self
        while node:
            out.append(node.val)
            node = node.next
        return out

def reverse(head):
    '''Reverse a linked list.'''
"""


@pytest.fixture(scope="module", autouse=True)
def sandboxed() -> Iterator[None]:
    try:
        require_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    yield


RIGHT = read_cases(Path(__file__).with_name("right_programs.txt"))
WRONG = read_cases(Path(__file__).with_name("wrong_programs.txt"))
"""Their names end with a part of the reason."""


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(name: str) -> None:
    case = RIGHT[name]
    assert run_tests(case.program, case.tests, case.head, case.entry_point).reason == ""


@pytest.mark.parametrize("name", WRONG)
def test_wrong_programs_fail(name: str) -> None:
    limits = SandboxConfig(seconds=1 if name.endswith("timeout") else 5, memory_mb=256)
    done = run_tests(WRONG[name].program, WRONG[name].tests, limits=limits)
    assert not done.passed and name.partition(": ")[2] in done.reason, done


BAD = {
    "tests that don't compile": ("assert f( == 1", "don't compile"),
    "tests that call nothing": ("def test():\n    assert True", "without a call of the program"),
    "check that nothing calls": ("def check(candidate):\n    assert candidate(1)", "has no name to call it with"),
    "a module that is not there": ("import no_such_module\nassert f() == 1", "import 'no_such_module'"),
    "a value that can't cross": ("class A: pass\nassert f(A()) == 1", "a value of type A, which can't cross"),
    "an argument that nothing provides": ("def test_it(tmp_path): assert f() == 1", "takes 'tmp_path'"),
}


@pytest.mark.parametrize("name", BAD)
def test_tests_that_can_not_be_run_are_no_fault_of_the_program(name: str) -> None:
    tests, message = BAD[name]
    with pytest.raises(TestsError, match=message):
        run_tests("def f(x=None): return 1", tests)


def test_what_a_prompt_defines_is_defined_on_both_sides() -> None:
    """Functions of the prompt judge next to the tests; objects of its classes cross as their fields."""
    program = (
        "    out = None\n    while head:\n        out = Node(head.val, out)\n        head = head.next\n    return out\n"
    )
    tests = "def check(candidate):\n    r = candidate(Node(1, Node(2, Node(3))))\n    assert r.listed() == [3, 2, 1]\n"
    assert run_tests(program, tests, NODE, "reverse").reason == ""
    long = "def check(candidate):\n    head = None\n    for i in range(3000): head = Node(i, head)\n"
    long += "    assert candidate(head).listed() == list(range(3000))\n    assert head.listed()[0] == 2999\n"
    assert run_tests(program, long, NODE, "reverse").reason == ""
    changed = "def check(candidate):\n    a = Node(1); a.next = Node(2, a)\n    candidate(a)\n"
    changed += "    assert a.next.val == 7 and a.next.next is a"
    assert run_tests("    head.next.val = 7\n", changed, NODE, "reverse").reason == ""
    again = NODE + program  # the whole function, after a head that has it without a body
    assert run_tests(again, tests, NODE, "reverse").reason == ""
    future = "from __future__ import annotations\n" + again
    assert run_tests(future, tests, NODE, "reverse").reason == ""
    assert run_tests("def f(x):\n    return x", "def check(c):\n    assert c(1) == 1", "def f(x):\n", "f").reason == ""


def test_an_entry_point_may_be_an_expression() -> None:
    program = "class Solution:\n    def add(self, a, b):\n        return a + b"
    assert run_tests(program, "def check(c):\n    assert c(1, 2) == 3", entry_point="Solution().add").reason == ""


def test_arguments_change_as_asked() -> None:
    program, tests = "def f(x):\n    x.sort()\n    return len(x)", "x = [2, 1]\nassert f(x) == 2\nassert x == [1, 2]"
    assert run_tests(program, tests, copies="always").passed
    assert not run_tests(program, tests).passed
    assert not run_tests("def f(x): x.sort()", "x = [2, 1]\nf(x)\nassert x == [1, 2]", copies="never").passed


def test_one_run_after_another_in_the_same_process() -> None:
    """Neither a time-out, nor values that one run leaves, reach the next; and it does not take long."""
    assert not run_tests(ADD, "add(1, 2)\nwhile True: pass", limits=SandboxConfig(seconds=0.5)).passed
    assert run_tests(ADD, "import math\nmath.pi = 3\nassert add(1, 2) == 3").passed
    began = time.monotonic()
    assert run_tests(ADD, "import math\nassert math.pi > 3.1 and add(1, 2) == 3").passed
    assert time.monotonic() - began < 5
