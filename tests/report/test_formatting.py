"""Numbers in words: what a reader is told about a result."""

import html
import math
import re

import pytest

from posttrain.core.item_statistics import compare
from posttrain.report.formatting import (
    chance_in_words,
    format_fixed,
    format_number,
    format_seconds,
    verdict,
    yaml_markup,
)
from posttrain.report.load import TaskRow


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.36814, "0.3681"), (1234567, "1,234,567"), (2113.9, "2,114"), (5e-5, "5e−5"), (0.0, "0"), (-1.5, "−1.5"),
     (math.nan, "not a number"), (None, "–"), (True, "–"), (1200.0, "1,200")],
)  # fmt: skip
def test_number(value, text):
    assert format_number(value) == text


def test_halves_agree_between_table_and_sentence():
    assert format_fixed(361 / 400, 3) == "0.903" and format_fixed(100 * 361 / 400, 1) == "90.3"  # 0.9025
    assert format_fixed(-0.5, 0, sign=True) == "−1" and format_fixed(0.1325, 3, sign=True) == "+0.133"


@pytest.mark.parametrize(
    ("p", "text"),
    [(5e-5, "less than once in 10,000 times"), (4e-4, "about 4 times in 10,000"), (0.003, "about 3 times in 1,000"),
     (0.34, "about 34 times in 100"), (0.0096, "about once in 100"), (1.0, "nearly always")],
)  # fmt: skip
def test_chance(p, text):
    assert chance_in_words(p) == text


def test_seconds():
    assert [format_seconds(s) for s in (0.26, 15, 214.7, 1800, 9000, None)] == [
        "0.3 s",
        "15 s",
        "3.6 min",
        "30 min",
        "2.5 h",
        "–",
    ]


def row(before, after, kind="choice"):
    if kind == "perplexity":
        sides = [[{"id": i, "nll": x, "tokens": 1} for i, x in enumerate(side)] for side in (before, after)]
    else:
        sides = [[{"id": i, "correct": c == "1"} for i, c in enumerate(side)] for side in (before, after)]
    c = compare(*sides, kind)
    return TaskRow("t", "perplexity" if kind == "perplexity" else "accuracy", kind, c["before"], c["after"], c)


def test_verdict():
    said = verdict(row("0" * 10 + "1" * 10, "1" * 20))
    assert "rose from 50.0% to 100.0% (+50.0 points" in said and "10 went from wrong to right and 0 from" in said
    assert "about 2 times in 1,000" in said and said.endswith("the model got better at this task.")
    assert verdict(row("1" * 20, "0" * 20)).endswith("the model got worse at this task.")
    assert "may well be chance" in verdict(row("0011", "0111"))
    assert "did not change, at 50.0% (" in verdict(row("01", "01"))
    said = verdict(row([2.0, 2.2, 2.4], [1.0, 1.1, 1.2], "perplexity"))  # exp 2.2 to exp 1.1
    assert "(lower is better) fell from 9.03 to 3.00" in said and said.endswith("got better at this task.")
    half = TaskRow("t", "accuracy", "choice", {"value": 0.5, "low": 0.1, "high": 0.9, "n": 4}, None, None)
    assert verdict(half).startswith("Before training, accuracy is 50.0%.") and "not been measured" in verdict(half)


def test_yaml_markup_loses_no_character_and_escapes():
    text = "a: 1  # x\n- b: '<script>'\n  c: true\n# note & more\n  - loose <b>\n\n'k': |\n  two: lines"
    marked = str(yaml_markup(text))
    assert "<script>" not in marked and "<b>" not in marked
    bare = re.sub(r"</?span[^>]*>", "", marked)
    assert html.unescape(bare) == text
    assert '<span class="y-n"> 1  </span><span class="y-c"># x</span>' in marked
    assert '<span class="y-k">c</span>:<span class="y-n"> true</span>' in marked
