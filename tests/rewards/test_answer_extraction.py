"""Where the answer is found, and how numbers and options are read."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from posttrain.rewards.answer_extraction import find, normal, numbers_in
from posttrain.rewards.number_reading import answer_number
from posttrain.rewards.option_reading import option_of


@pytest.mark.parametrize(
    ("text", "how", "expected"),
    [
        (r"\boxed{1} no, \boxed{2}", "auto", "2"),
        (r"\boxed{1} no, \boxed{2", "auto", "1"),  # cut off
        (r"\boxed{\frac{1}{2}}", "boxed", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3} m}", "boxed", r"\boxed{3} m"),
        (r"\boxed{4 \boxed{5}", "boxed", "5"),
        (r"\boxed{\{1, 2\}}", "boxed", r"\{1, 2\}"),
        (r"\fbox {7}", "boxed", "7"),
        (r"\boxed{}", "auto", None),  # an empty mark is no answer: what else the text says does not count
        ("<answer>3</answer> or <answer> 4 </answer>", "tag", "4"),
        ("<answer>wait <answer>5</answer>", "tag", "5"),
        ("<answer>5", "tag", None),
        (r"<answer>so \boxed{6}</answer> \boxed{9}", "auto", "6"),
        ("72 / 2 = 36\n#### 36\nDone.", "auto", "36"),
        ("##### 36", "hashes", None),
        ("The answer is 5.\n\n  \n", "auto", "The answer is 5."),
        ("", "auto", None),
        (" \n ", "last_line", None),
        (r"<think>\boxed{1}</think> It is 2", "auto", "It is 2"),
        (r"<think>\boxed{1}", "auto", None),
        (r"<think>\boxed{1}", "whole", r"<think>\boxed{1}"),
        (r"no mark \boxed{1}", "hashes", None),
    ],
)
def test_find(text: str, how: str, expected: str | None) -> None:
    answer = find(text, how)  # type: ignore[arg-type]
    assert (None if answer is None else answer.text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,234.5", ["2469/2"]),
        (r"1{,}234 and 12\,000", ["1234", "12000"]),
        ("-0", ["0"]),
        ("−3", ["-3"]),
        ("-$1,000", ["-1000"]),
        ("$-5", ["-5"]),
        (r"\$18", ["18"]),
        ("50%", ["50"]),
        ("3/4", ["3/4"]),
        (r"-\frac{3}{4}", ["-3/4"]),
        (r"1\frac{1}{2}", ["3/2"]),
        ("1 1/2 cups", ["3/2"]),
        ("5/0", []),
        ("1e3", ["1000"]),
        ("1e1000", []),
        ("1e999999999", []),
        ("10-3", ["10", "3"]),
        ("x=-5", ["-5"]),
        ("- 5 as a list's item", ["5"]),
        ("x2 and H2O", []),
        ("version 1.2.3", []),
        ("1,2345", ["1", "2345"]),
        ("forty-two", []),
        (".5", ["1/2"]),
        ("12.", ["12"]),
        ("5kg", ["5"]),
        ("٣", []),  # other scripts' digits are not guessed at
        ("9" * 301, []),
    ],
)
def test_numbers(text: str, expected: list[str]) -> None:
    assert numbers_in(text) == [Fraction(e) for e in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", 1),
        ("(b).", 1),
        ("**B**", 1),
        (r"\text{B}", 1),
        ("B) Paris", 1),
        ("B) London", None),  # a letter and another option's text
        ("paris", 1),
        ("The answer is (C)", 2),
        ("the answer is c", 2),
        ("Answer: A", 0),
        ("Answer: A. No, the answer is B", None),
        ("A dog", None),
        ("D", None),  # three options
        ("Parisian", None),
        ("", None),
    ],
)
def test_options(text: str, expected: int | None) -> None:
    assert option_of(text, ["London", "Paris", "Rome"], 3) == expected


def test_normal() -> None:
    assert normal(" $\\text{New  York}$. ") == "new york"
    assert normal('"Yes"', ignore_case=False) == "Yes"


@pytest.mark.parametrize(
    "piece", ["1", "1 ", "1,111,", r"\boxed{", "{", r"\frac{1}{", "<answer>", "1/", "1.1", "-", "####", "A ", "(A) "]
)
def test_long_nonsense_takes_no_time(piece: str) -> None:
    """What makes careless patterns quadratic: 10^10 steps here, and a minute or more."""
    text = piece * (100_000 // len(piece))
    begin = time.process_time()
    answer = find(text)
    numbers_in(text)
    if answer is not None:
        option_of(answer.text, ["one", "two"], 26)
        for marked in (True, False):
            answer_number(answer.text, marked)
    assert time.process_time() - begin < 2.0
