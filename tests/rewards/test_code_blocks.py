"""The program in a completion: how models write it, and the source that is taken, in `code_blocks.txt`."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from posttrain.rewards.code_blocks import code_in, names_called

PARTS = re.split(r"^### ", Path(__file__).with_name("code_blocks.txt").read_text("utf-8"), flags=re.MULTILINE)[1:]
CASES = {part.split("\n", 1)[0]: part.split("\n", 1)[1].split("=====\n") for part in PARTS}
TESTS = "def test_f():\n    result = f(1)\n    assert result == 1\n"


@pytest.mark.parametrize("name", CASES)
def test_the_program_in_a_completion(name: str) -> None:
    text, expected = CASES[name]
    prints = name.startswith("prints")
    code = code_in(text, names=() if prints else names_called(TESTS, ""), prints=prints)
    assert (code or "").strip("\n") == expected.strip("\n")
    crlf = code_in(text.replace("\n", "\r\n"), names=() if prints else {"f"}, prints=prints)
    assert (crlf or "").replace("\r", "").strip("\n") == expected.strip("\n")


def test_names_that_tests_call() -> None:
    assert names_called("assert add(1, x) == 3", "Solution().add") == {"Solution", "add"}
    assert names_called(TESTS, "") == {"result", "f", "assert", "def"}


@pytest.mark.parametrize(
    "piece",
    ["`", "```\n", "```python\n", "~", "'''\n```\n", '"', "> ", "  ", "def f():\n", "a = 1\n```\n", "<answer>", "f("],
)
def test_long_nonsense_takes_no_time(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    begin = time.process_time()
    for before in ("", "```python\n", "x = '''"):
        code_in(before + text, {"f"})
        code_in(before + text, prints=True)
    assert time.process_time() - begin < 5.0
