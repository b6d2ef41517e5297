"""Rewards of a completion's steps: each a list of (first character, one past the last, score), for the steps it judges.

A step is what stands between two separators, lines by default, the separator behind it included. What a reward has no
opinion on has no score, which is not the same as 0; nor has a step that says an earlier one again, so that saying a
true thing many times pays no more than saying it once. Source: rewards at the ends of steps, arXiv 2402.03300
section 4.1.3; by whom they are judged is left open there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field

from posttrain.config.rewards import Form, RewardTermConfig
from posttrain.core.arithmetic import MAX_CHARACTERS, NotArithmetic, evaluate
from posttrain.core.errors import RewardError
from posttrain.core.imports import load_object
from posttrain.rewards.answer_extraction import numbers_in
from posttrain.rewards.outcome import ExampleRow, LabelError
from posttrain.rewards.reward import Reward, RewardFunctions

ScoredSpans = list[tuple[int, int, float]]
"""Of each step: its first character, one past its last, its score."""

OPERATORS = "+-*/×·÷−–^"
_SIDE = r"0-9.,()\[\]{}$€£ \t" + re.escape(OPERATORS)
_LEFT, _RIGHT = re.compile(rf"[{_SIDE}]*\Z"), re.compile(rf"[{_SIDE}]*")
_BULLET = re.compile(r"\A\s*(?:[-*•–]\s+|\(?[0-9]{1,3}[.):]\s+)")
_EQUALS = re.compile(r"(?<![=<>!:≠])=(?![=>])")
_SIGNS: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"\\(?:boxed|text|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\s*\{([0-9.,]{1,99})\}\s*\{([0-9.,]{1,99})\}"), r"(\1/\2)"),
    (re.compile(r"\\(?:left|right)(?=[()\[\]])"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;!: ]|[\u00a0\u2009\u202f]"), " "),
    (re.compile(r"\\(?:times|cdot|ast)\b|[⋅∙∗]"), "×"),
    (re.compile(r"\\div\b"), "÷"),
    (re.compile(r"[∕⁄]"), "/"),
    (re.compile(r"[‐‑]"), "-"),
    (re.compile(r"([0-9)\]}])(\s*)[xX](\s*)(?=[0-9(])"), lambda m: _times(m)),
]
"""Signs as other texts write them, and as they are read."""
_GLUED = "_!%‰°√π'’"
"""Before an expression, without a space, these make it another; so do letters, digits of other kinds and fractions."""
_OPERATION = re.compile(
    r"(?:\b(?:x|times|plus|minus|over|mod|modulo|divided\s+by|multiplied\s+by|log|ln|sqrt|root|sin|cos|tan)"
    r"|\\[A-Za-z]+|[±√%‰!²³½¼¾]|(?:%|percent|half|halves|thirds?|quarters?|fifths?|tenths?|[0-9)}])\s+of(?:\s+the)?)\s*\Z",
    re.IGNORECASE,
)
"""At the end of what stands before an expression: it has a part in it."""
_PERCENT = re.compile(r"\s*(?:%|percent\b)")
_UNIT = (
    r"(?:hours?|hrs?|h|minutes?|mins?|days?|weeks?|months?|years?|feet|foot|ft|inch(?:es)?|yards?|miles?|pounds?|lbs?"
    r"|dollars?|euros?|km|kilometers?|m|met(?:er|re)s?|cm|kg|kilograms?|dozens?)"
)
_CHANGED = re.compile(
    r"(?:[kKMBTGxyznie](?![A-Za-z])|[({\[!²³½¼¾^_])"  # directly after the number
    r"|[\s,;(]*(?:with\s+)?(?:an?\s+)?(?:remainder|rem\b|rest\b|[rR]\.?\s*[0-9]|\\?[pb]?mod|base\b|(?:in\s+)?(?:binary|hex))"
    r"|\s*(?:hundred|thousand|million|billion|trillion|dozen|times\b|plus\b|minus\b|over\b|divided\b|multiplied\b|squared|cubed)"
    rf"|\s*{_UNIT}\b\.?,?\s+(?:and\s+)?[0-9]"
)
"""Begins what follows a number and may make it another one."""
_DOTTED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:\.[0-9]{3})+(?![0-9.,])")
"""A number with dots between thousands."""


def split(text: str, separator: str) -> Iterator[tuple[int, int, str]]:
    """Yield (first character, one past the last, text) of every step that is not blank and does not repeat another."""
    at, seen = 0, set()
    for piece in text.split(separator):
        end = min(at + len(piece) + len(separator), len(text))
        written = " ".join(piece.split())
        if written and written not in seen:
            seen.add(written)
            yield at, end, piece
        at = end


# --- validity ---------------------------------------------------------------------------------------------------------


class SeparatedConfig(RewardTermConfig):
    """Settings of rewards whose steps are split at a separator."""

    scores_steps: ClassVar[bool] = True
    separator: str = Field("\n", min_length=1, description="Text between two steps.")


class ValidSteps(Reward):
    """Return 1 for a step whose equations are all true, `wrong` if one is false, no score without an equation."""

    class Config(SeparatedConfig):
        """1 for a step whose equations between numbers are true; steps without one are not judged."""

        kind: Literal["valid_steps"] = "valid_steps"
        wrong: float = Field(0.0, description="For a step with an equation that is false.")

    config: Config

    def __call__(self, text: str, example: ExampleRow) -> ScoredSpans:
        """Check every step."""
        checked = ((a, b, true_line(step)) for a, b, step in split(text, self.config.separator))
        return [(a, b, 1.0 if true else self.config.wrong) for a, b, true in checked if true is not None]


def true_line(line: str) -> bool | None:
    """Return True if the equations between numbers in a line hold, in exact arithmetic; None without an equation.

    `7+4=11`, `so 3 × (2 + 5) = 21 apples`, `$3 + $4 = $7`, `2*3 = 6 = 12/2`. A decimal on the right may be rounded to
    its places: 10/3 = 3.33 is true. An equation has an operator on a side: x = 5 and 7 = 7 are none. Other words than
    numbers (3 apples + 4 apples = 7, 10% of 50 = 5) are not checked.
    """
    found = equations_in(line)
    return all(e.holds for e in found) if found else None


@dataclass(frozen=True, slots=True)
class Equation:
    """An equation between numbers, as `true_line` reads them. It is wrong only if nothing around it may change it.

    Attributes:
        left: The left side as it is written.
        exact: Its value.
        right: The right side as it is written.
        holds: True if it is equal, or rounded to the places of a decimal on the right; 50% counts as 50 and as 0.5.
    """

    left: str
    exact: Fraction
    right: str
    holds: bool


def equations_in(line: str) -> list[Equation]:
    """Return the equations between numbers in a line, in order.

    One side of which a part can't be read ("f(2) + 1", "10% of 50 + 5", "1 200 + 300") is no equation; nor is one that
    is not equal if what follows may change it ("2 remainder 2", "1 hour 30 minutes", "5k", "3 (mod 24)").
    """
    pieces = _EQUALS.split(plain_signs(_BULLET.sub("", line, count=1)))
    found = (_equation(a, b) for a, b in pairwise(pieces))
    return [e for e in found if e is not None]


def _equation(before: str, behind: str) -> Equation | None:
    left, right = _left(before), _right(behind)
    if left is None or right is None or not (left[1] or right[1]):
        return None
    exact, (written, _, places, text, rest) = left[0], right
    holds = _close(exact, written, places)
    if not holds and _PERCENT.match(rest):
        holds = _close(exact, written / 100, places + 2)
    if not holds and (_CHANGED.match(rest) or _equal_with_dots(left[2], text)):
        return None
    return Equation(left[2], exact, text, holds)


def _close(exact: Fraction, written: Fraction, places: int) -> bool:
    return exact == written or bool(places) and abs(exact - written) <= Fraction(1, 2 * 10**places)


def _equal_with_dots(left: str, right: str) -> bool:
    """Return True if two sides are equal with dots between thousands, as in 1.200 + 300 = 1.500."""
    sides = [_DOTTED.sub(lambda m: m[0].replace(".", ""), side) for side in (left, right)]
    try:
        return sides != [left, right] and evaluate(sides[0]) == evaluate(sides[1])
    except NotArithmetic:
        return False


def plain_signs(text: str) -> str:
    r"""Return a text with the signs of LaTeX and of other alphabets as plain ones: 2 \times 3 and 2 x 3 as 2 × 3."""
    for pattern, plain in _SIGNS:
        text = pattern.sub(plain, text)
    return text


def _times(match: re.Match[str]) -> str:
    return match[0] if match[1] == "0" and not match[2] else f"{match[1]}{match[2]}×{match[3]}"


def _tidy(text: str) -> str:
    return re.sub(r"[$€£]\s*", "", text).strip()


def _left(text: str) -> tuple[Fraction, bool, str] | None:
    """(value, whether it has an operator, text) of the expression that a text ends with; the longest readable one."""
    match = _LEFT.search(text[-MAX_CHARACTERS:])
    assert match is not None
    side = match.group()
    leads = text[: len(text) - len(side)].rstrip()
    tail = _tidy(side)
    if leads and tail[:1] and tail[0] in OPERATORS:
        return None  # 3 apples + 4: the left side can't be read
    glued = side[:1] not in tuple(" \t)]}") and (leads[-1:].isalnum() or leads[-1:] in _GLUED)
    if leads and (glued or _OPERATION.search(leads)):
        return None  # f(2) + 1, 10% of 50 + 5
    for at, char in enumerate(tail):
        before = tail[:at].rstrip()[-1:]
        if char in " \t" or (at and before in OPERATORS) or (at and tail[at - 1] not in " \t([{"):
            continue
        if tail[:at].rstrip()[-1:].isdigit():
            continue  # 1 200 + 300, 2 (3 + 4)
        try:
            return evaluate(tail[at:]), _operates(tail[at:]), tail[at:].strip()
        except NotArithmetic:
            continue
    return None


def _right(text: str) -> tuple[Fraction, bool, int, str, str] | None:
    """(value, whether it has an operator, places behind the point, text, what follows) of what a text begins with."""
    match = _RIGHT.match(text[:MAX_CHARACTERS])
    assert match is not None
    side = _tidy(match.group())
    for end in range(len(side), 0, -1):
        rest = side[end:].lstrip(" \t")
        if end < len(side) and (side[end].isdigit() or (side[end] in ".," and side[end + 1 : end + 2].isdigit())):
            continue  # in the midst of a number
        try:
            value = evaluate(side[:end].rstrip(" \t,"))
        except NotArithmetic:
            continue
        if rest[:1].isdigit() or (rest[:1] and rest[0] in OPERATORS and re.match(r".\s*[0-9(]", rest)):
            return None  # the rest can't be read
        written = side[:end].strip().rstrip(",").rstrip(".")
        decimal = re.fullmatch(r"[-−]?[0-9,]*\.([0-9]+)", written)
        behind = side[end:] + text[match.end() :]
        return value, _operates(written), len(decimal[1]) if decimal else 0, written, behind
    return None


def _operates(text: str) -> bool:
    """Return whether there is an operator between two numbers, and not only a sign."""
    return re.search(rf"[0-9.)\]}}]\s*[{re.escape(OPERATORS)}]", text) is not None


# --- agreement --------------------------------------------------------------------------------------------------------


class Agreement(Reward):
    """Score every step that has a result, by the label's intermediate results or by the other completions.

    With a label: 1 if it has the result, else 0. Without: the share of the group's other completions that have this
    result in some step. In a group of one, as held-out answers are, no step has a score then.
    """

    class Config(SeparatedConfig):
        """For a step with a result: whether the label has it, or how many completions do."""

        form: ClassVar[Form] = "group"
        kind: Literal["agreement"] = "agreement"
        label: str | None = Field(
            None,
            description="Column with the right intermediate results: a list of numbers, or a worked "
            "solution. None: agreement with the other completions of the prompt.",
        )

        @property
        def compares_completions(self) -> bool:
            """Return True without a label."""
            return self.label is None

    config: Config

    def __call__(self, texts: Sequence[str], example: ExampleRow) -> list[ScoredSpans]:
        """Compare the results. Raises LabelError for a label that is missing or has no number."""
        results = [
            [(a, b, value) for a, b, step in split(text, self.config.separator) if (value := result(step)) is not None]
            for text in texts
        ]
        if self.config.label is not None:
            right = _intermediate(example, self.config.label)
            return [[(a, b, float(value in right)) for a, b, value in steps] for steps in results]
        if len(texts) < 2:
            return [[] for _ in texts]
        sets = [{value for _, _, value in steps} for steps in results]
        others = len(texts) - 1
        return [[(a, b, (sum(value in s for s in sets) - 1) / others) for a, b, value in steps] for steps in results]


def result(step: str) -> Fraction | None:
    """Return the result of a step: the first number after its last equals sign, or else its last; None if missing."""
    *before, last = _EQUALS.split(step)
    numbers = numbers_in(last)
    if not numbers:
        return None
    return numbers[0] if before else numbers[-1]


def _intermediate(example: ExampleRow, label: str) -> set[Fraction]:
    """The numbers of a label: a list of them, or a worked solution, of which each line's result counts."""
    value = example.get(label)
    if value is None:
        have = sorted(k for k, v in example.items() if v is not None)
        raise LabelError(
            f"the example has no intermediate results {label!r} (it has {have}); name their column with `label:`"
        )
    if isinstance(value, list | tuple):
        parsed = [numbers_in(str(v)) for v in value]
        bad = [v for v, n in zip(value, parsed, strict=True) if len(n) != 1]
        if bad:
            raise LabelError(f"label {label!r} holds {str(bad[0])[:80]!r}: expected one number in each")
        numbers = {n[0] for n in parsed}
    else:
        numbers = {r for line in str(value).splitlines() if (r := result(line)) is not None}
    if not numbers:
        raise LabelError(
            f"label {label!r} is {str(value)[:80]!r}: expected intermediate results, and there is no number"
        )
    return numbers


# --- a model's -------------------------------------------------------------------------------------------------------


class ProcessScorer(Reward):
    """Return a scorer's steps: step_scores(prompt, completion) → "
    "[(first character, one past the last, score)]."""

    class Config(RewardTermConfig):
        """The scores of a process reward model, or of any function."""

        scores_steps: ClassVar[bool] = True
        kind: Literal["process"] = "process"
        scorer: str = Field(
            description="module:function, or the name of one given from Python: (prompt, completion) → "
            "[(first character, one past the last, score)]."
        )
        prompt: str = Field("prompt", description="Column of the example with the prompt.")

    config: Config

    def open(self, functions: RewardFunctions) -> None:
        """Import the scorer."""
        self.scorer = load_object(self.config.scorer, functions, RewardError)

    def __call__(self, text: str, example: ExampleRow) -> ScoredSpans:
        """Call the scorer. Raises LabelError if the example has no prompt."""
        if example.get(self.config.prompt) is None:
            raise LabelError(f"the example has no {self.config.prompt!r} to score steps with; it has {sorted(example)}")
        return list(self.scorer(example[self.config.prompt], text))
