r"""Find the answer in a completion, as text.

One place counts, never the best of several: a model paid for any of its guesses learns to guess often.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from posttrain.config.rewards import Extract
from posttrain.data.think_marks import after_thinking

LONGEST_NUMBER = 300
"""Characters of a number that are read; a longer one is none."""


@dataclass(frozen=True, slots=True)
class ExtractedAnswer:
    """text: without its marks, stripped. how: tag, boxed, hashes, last_line or whole."""

    text: str
    how: str

    @property
    def marked(self) -> bool:
        """Return True if a tag, a box or hashes mark the answer."""
        return self.how in ("tag", "boxed", "hashes")


def find(text: str, how: Extract = "auto") -> ExtractedAnswer | None:
    r"""Return the answer in a completion; None if it is missing (an empty text, no such mark, an empty mark).

    Text before ``</think>`` is no answer, and a ``<think>`` that is never closed leaves none (``whole`` takes the text
    as it is). Of several marks of a kind the last complete one counts: ``\boxed{1} \boxed{2}`` is 2, ``\boxed{1}
    \boxed{2`` (cut off) is 1. ``tag``: <answer>…</answer>. ``boxed``: balanced braces, escaped ones not counted.
    ``hashes``: the rest of the line after ####. ``last_line``: the last that has a letter or digit, if any. ``auto``:
    the first of tag, boxed, hashes that is found, else the last line. A box in a tag or after hashes is opened.
    """
    if how == "whole":
        return _answer(text, how)
    said = after_thinking(text)
    if said is None:
        return None
    text = said
    if how == "last_line":
        lines = [line for line in text.splitlines() if line.strip()]
        worded = [line for line in lines if re.search(r"\w", re.sub(r"\\end\{\w+\*?\}", "", line))]
        lines = worded or lines
        return _answer(lines[-1], how) if lines else None
    for kind, finder in FINDERS.items():
        inner = finder(text) if how in ("auto", kind) else None
        if inner is not None:
            box = _boxed(inner) if kind != "boxed" else None
            return _answer(inner if box is None else box, kind)
    return find(text, "last_line") if how == "auto" else None


def _answer(text: str, how: str) -> ExtractedAnswer | None:
    return ExtractedAnswer(text.strip(), how) if text.strip() else None


def _tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end] if start >= 0 else None


def _boxed(text: str) -> str | None:
    r"""Content of the box that closes last: of \boxed{…} and \fbox{…}; of one inside another, the outer one."""
    content: str | None = None
    open_at: list[int | None] = []  # where each open brace's content starts, where it is a box's
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if match.group() == "}":
            start = open_at.pop() if open_at else None
            content = content if start is None else text[start : match.start()]
        elif match.group()[-1] == "{" and len(match.group()) != 2:  # \{ is no brace
            open_at.append(match.end() if len(match.group()) > 1 else None)
    return content


def _hashes(text: str) -> str | None:
    parts = re.split(r"(?<!#)####(?!#)", text)
    return parts[-1].strip().split("\n", 1)[0] if len(parts) > 1 else None


FINDERS = {"tag": _tag, "boxed": _boxed, "hashes": _hashes}
"""In the order in which auto tries them."""


def bare_text(text: str) -> str:
    r"""Text without what typesets it: $…$, \(…\), \text{…}, Markdown's stars, quotes, a final full stop."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[()\[\]]", "", text).strip()
    before = None
    while before != text:
        before = text
        text = text.strip().strip("$*`\"'“”").removesuffix(".")
    return text


def normal(text: str, ignore_case: bool = True) -> str:
    """Return `plain` text with single spaces, for comparison."""
    out = " ".join(bare_text(text).split())
    return out.casefold() if ignore_case else out


_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
# A sign counts where no digit or letter stands before it: 10-3 is two numbers. 1.2.3 is none, and nor is the 2 of x2.
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+−])?(?:[$€£]\s?)?"
    rf"(?:(?P<whole>[0-9]+)\s+(?P<of>[0-9]+)/(?P<over>[0-9]+)|(?P<top>{_UNSIGNED})(?:\s?/\s?(?P<under>{_UNSIGNED}))?)"
    r"(?!\.?[0-9]|[eE][-+]?[0-9])"
)


def numbers_in(text: str) -> list[Fraction]:
    r"""Return every number of a text, exactly.

    1,234.5 and 1{,}234.5; 1e3; 3/4, \frac{3}{4} and 1 1/2; a sign, a currency sign before it, a unit or % after it. The
    % is not applied: 50% is 50. Numbers in words, a fraction over 0, and numbers of over 300 characters do not count.
    """
    text = re.sub(r"\\[,!;: ]|\{,\}", lambda m: "," if m.group() == "{,}" else "", text.replace("\\$", "$"))
    text = re.sub(r"([0-9]?)\\[dt]?frac\s*\{([0-9.,]{1,99})\}\s*\{([0-9.,]{1,99})\}", _fraction_text, text)
    return [n for n in map(_value, _NUMBER.finditer(text)) if n is not None]


def _fraction_text(match: re.Match[str]) -> str:
    return f"{match[1]}{' ' if match[1] else ''}{match[2]}/{match[3]} "


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match.group()) > LONGEST_NUMBER:
        return None
    try:
        if match["whole"]:
            size = int(match["whole"]) + Fraction(int(match["of"]), int(match["over"]))
        else:
            size = _fraction(match["top"]) / (_fraction(match["under"]) if match["under"] else 1)
    except ZeroDivisionError:
        return None
    return -size if (match["sign"] or "+") in "-−" else size


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))
