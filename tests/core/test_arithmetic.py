"""A calculator that can't be made to run code, or to hang."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from posttrain.core.arithmetic import NotArithmetic, evaluate, written


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7+4+9+5", 25),
        (" 2 * (3 - 5) ", -4),
        ("1/3 + 1/6", Fraction(1, 2)),
        ("0.1+0.2", Fraction(3, 10)),
        ("1,234 * 2", 2468),
        ("1e3 - 1", 999),
        ("2^10", 1024),
        ("2**-2", Fraction(1, 4)),
        ("-2**2", -4),
        ("7//2 + 7%4", 6),
        ("-7//2", -4),
        ("3×4÷6−1", 1),
        ("007 + 08", 15),
        ("1.005 + 0.0050", Fraction(101, 100)),
        ("[2+{1}]*3", 9),
        ("12345678901234567890.5*2", 24691357802469135781),
    ],
)
def test_values_by_hand(text: str, value: Fraction) -> None:
    assert evaluate(text) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nothing to work out"),
        ("1/0", "division by zero"),
        ("5 % (3-3)", "division by zero"),
        ("0**-1", "division by zero"),
        ("__import__('os')", "not arithmetic"),
        ("x+1", "not arithmetic"),
        ("1 if 1 else 2", "not arithmetic"),
        ("1==1", "not arithmetic"),
        ("(1)(2)", "not arithmetic"),
        ("1 2", "not arithmetic"),
        ("2+", "not arithmetic"),
        ("~5", "not arithmetic"),
        ("1e", "not arithmetic"),
        ("e5", "not arithmetic"),
        ("1,2", "not arithmetic"),
        ("2**0.5", "whole numbers"),
        ("2**1000", "whole numbers"),
        ("9**256", "too large"),
        ("(9**100)**100", "too large"),
        ("1e999", "too large"),
        ("1e9999", "not a number"),
        ("9**99*9**99", "too large"),
        ("(" * 99 + "1" + ")" * 100, "not arithmetic"),
        ("1" * 201, "longer than 200"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    began = time.perf_counter()
    with pytest.raises(NotArithmetic, match=says):
        evaluate(text)
    assert time.perf_counter() - began < 0.5


def test_towers_and_chains_stay_small() -> None:
    began = time.perf_counter()
    for text in ("9**9**9**9", "*".join(["9**9"] * 25), "-" * 199 + "1", "(" * 90 + "1" + ")" * 90, "2**256**1"):
        try:
            evaluate(text)
        except NotArithmetic:
            pass
    assert time.perf_counter() - began < 0.5
    assert evaluate("2**256") == 2**256


def test_numbers_as_people_write_them() -> None:
    expected = {
        Fraction(25): "25",
        Fraction(-1, 2): "-0.5",
        Fraction(1, 3): "0.333333333333",
        Fraction(2, 3): "0.666666666667",
        Fraction(1, 8000): "0.000125",
        Fraction(1, 3000000): "0.000000333333333333",
        Fraction(10**20 + 1, 2): "50000000000000000000.5",
        Fraction(0): "0",
    }
    assert {value: written(value) for value in expected} == expected
