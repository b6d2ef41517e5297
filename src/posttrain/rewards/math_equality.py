r"""Compare an answer with a label as mathematics.

Two numbers are compared as numbers, exactly. Anything else goes to math-verify, unless the answer has something that
math-verify passes over: a relation, \pm, a base, "not", a scale or other words.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from posttrain.core.errors import RewardError
from posttrain.rewards.answer_extraction import ExtractedAnswer, bare_text, normal
from posttrain.rewards.answer_tokens import plain_typesetting
from posttrain.rewards.number_reading import (
    ANSWER_CUE,
    CHANGES_AFTER,
    CHANGES_BEFORE,
    ReadNumber,
    answer_number,
    is_unit,
)

LONGEST_EXPRESSION = 1000
"""Longest expression in characters that math-verify reads; deep brackets would only time out."""
DEEPEST_EXPRESSION = 50
_PLACES = 6
"""Places to which decimals are compared."""

_PRIME = re.compile(r"[0-9A-Za-z})]\s*(?:'(?![A-Za-z])|\\prime|\^\s*\{?\\prime)")
_SIGNATURE = {
    "≠": r"≠|\\neq?\b|\\not\b|!=",
    "±": r"±|∓|\\pm\b|\\mp\b|\+/-",
    "≡": r"≡|\\equiv\b|\\[pb]?mod\b|(?<![A-Za-z\\])mod\b",
    "'": _PRIME.pattern,
    "relation": r"[<>≤≥]|\\[lg]eq?(?:slant)?\b|\\[lg]t\b",
}
_SETS = re.compile(r"[(\[{]|\\in(?:fty)?\b|\\cup\b|\\lbrace|\\mathbb|[<>≤≥]|\\[lg]eq?(?:slant)?\b|\\[lg]t\b")
_BASE = re.compile(r"[0-9A-F]\s*_\s*\{?\s*[0-9]|_\s*\{?\s*\\?(?:text|mathrm)?\{?(?:two|three|eight|ten|sixteen)")
_HUGE = re.compile(
    r"[0-9]\s*\^\s*[{(]*\s*[0-9.]+\s*\^|\^\s*[{(]*\s*-?[0-9]{5,}|[0-9]{4,}\s*[)}]*\s*!|!\s*[)}]*\s*!|binom\s*\{?\s*[0-9]{5,}"
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_FUNCTIONS = set(
    "sin cos tan cot sec csc log ln lg exp sqrt frac arcsin arccos arctan max min gcd lcm mod det pi".split()
)
_SEGMENT = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_JOINED = re.compile(r"\s*(?:,|;|/|\bor\b|\band\b)\s*(?:or|and)?\s*", re.IGNORECASE)
_TRAILING_UNIT = re.compile(
    r"\\(?:text|mathrm|mbox|textrm)\s*\{[^{}]*\}\s*(?:\^\s*\{?[23]\}?)?\s*$|(?<![A-Za-z\\])[a-z]{2,}\s*(?:\^\s*\{?[23]\}?)?\s*$"
)


def import_math_verify() -> None:
    """Import math-verify and let it load its grammar, which must not count in the first call's time limit."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise RewardError("rewards of kind math need math-verify: pip install math-verify") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limit is off
    parsed_expression("1")


def is_mathematics(text: str) -> bool:
    """Return True if a label can be compared."""
    return answer_number(text, True) is not None or bool(parsed_expression(_tidy(text)))


def equal_expressions(gold: str, answer: ExtractedAnswer) -> bool:
    """Return True if an answer is the same text as `gold`, or mathematically equal to it."""
    same = normal(gold, ignore_case=False) == normal(answer.text, ignore_case=False)
    if same and bool(_PRIME.search(gold)) == bool(_PRIME.search(answer.text)):
        return True
    if len(answer.text) > LONGEST_EXPRESSION:
        return False
    label, number = answer_number(gold, True), answer_number(answer.text, answer.marked)
    if label is not None and number is not None:
        return _equal_numbers(label, number)
    expression = answer.text if answer.marked else expression_in(answer.text)
    if expression is None or not _comparable(gold, expression, label):
        return False
    from math_verify import verify

    if "=" in expression and "=" not in gold:
        expression = expression.rpartition("=")[2]
    right = parsed_expression(_tidy(gold))
    try:
        given = parsed_expression(_tidy(expression))
        return bool(right and given and verify(list(right), list(given), timeout_seconds=None))
    except Exception:  # an answer on which math-verify fails is no answer
        return False


def _equal_numbers(label: ReadNumber, answer: ReadNumber) -> bool:
    """Compare to 6 places; a percentage is a hundredth: 50% is 0.5, and not 50."""
    a, b = (n.value / 100 if n.percent else n.value for n in (label, answer))
    return a == b or (min(abs(a), abs(b)) > Fraction(1, 1000) and round(a, _PLACES) == round(b, _PLACES))


def expression_in(line: str) -> str | None:
    """Return the expression of a line: its last one in dollars, or what follows "the answer is", an equals sign or is.

    None: there is none, or several are joined by "or" and the like.
    """
    segments = list(_SEGMENT.finditer(line))
    if segments:
        for one, two in zip(segments, segments[1:], strict=False):
            if _JOINED.fullmatch(line[one.end() : two.start()]):
                return None
        before, after = line[: segments[-1].start()].rstrip(), line[segments[-1].end() :].lstrip()
        if CHANGES_BEFORE.search(before) or CHANGES_AFTER.match(after):
            return None
        sign = "-" if re.search(r"\b(?:minus|negative)$", before, re.IGNORECASE) else ""
        return sign + next(group for group in segments[-1].groups() if group is not None)
    cues = list(ANSWER_CUE.finditer(line))
    rest = line[cues[-1].end() :] if cues else re.split(r"\b(?:is|are|equals)\b", line)[-1]
    return rest.strip().rstrip(".,;:!") or None


def _comparable(gold: str, expression: str, label: ReadNumber | None) -> bool:
    """Return True unless the answer has something that changes its value and that math-verify would pass over."""
    if _HUGE.search(expression) or max(map(expression.count, "([{"), default=0) > DEEPEST_EXPRESSION:
        return False
    has = {name: bool(re.search(p, expression)) for name, p in _SIGNATURE.items()}
    wants = {name: bool(re.search(p, gold)) for name, p in _SIGNATURE.items()}
    if any(has[name] != wants[name] for name in has if name != "relation"):
        return False
    if has["relation"] and not _SETS.search(gold) or wants["relation"] and not _SETS.search(expression):
        return False
    if _BASE.search(gold) or _BASE.search(expression):
        return re.sub(r"[\s{}\\]|text|mathrm", "", gold) == re.sub(r"[\s{}\\]|text|mathrm", "", expression)
    if re.search(r"[0-9]\s*:\s*[0-9]", expression) and ":" not in gold:
        return False
    words = [w.lower() for w in _WORD.findall(plain_typesetting(expression))]
    if any(w in ("not", "million", "billion", "thousand", "hundred", "least", "most", "than") for w in words):
        return False
    # A number with words that answer_number refuses is no number; of an expression, they are its units.
    return label is None or not any(w not in _FUNCTIONS and w not in ("or", "and") for w in words)


def _tidy(text: str) -> str:
    """Write plainly what math-verify reads otherwise: dashes, thousands apart, mixed numbers, units at the end."""
    text = re.sub(r"(?<=[0-9])\\[,;:! ](?=[0-9]{3})", "", bare_text(text.replace("–", "-").replace("−", "-")))
    text = re.sub(
        r"(?<![0-9.])([0-9]{1,3})((?:[ ~][0-9]{3})+)(?![0-9])", lambda m: m[1] + re.sub("[ ~]", "", m[2]), text
    )
    unit = _TRAILING_UNIT.search(text)
    if unit and re.search(r"[0-9)}]|\\pi", text[: unit.start()]) and all(map(is_unit, _WORD.findall(unit.group()))):
        if not set(_WORD.findall(unit.group())) & _FUNCTIONS:
            text = text[: unit.start()].rstrip()
    return re.sub(r"(?<![0-9.])([0-9]+) +([0-9]+) ?/ ?([0-9]+)(?![0-9])", r"\1\\frac{\2}{\3}", text)


@lru_cache(maxsize=256)
def parsed_expression(text: str) -> tuple[Any, ...]:
    """Return what math-verify reads in an expression; empty if it reads nothing."""
    # Its own time limit is off: it uses signals, and hides what it cuts off. The worker process has a limit.
    from math_verify import parse

    return tuple(parse(f"\\boxed{{{text}}}", parsing_timeout=None))
