r"""Read the number that an answer gives, and none where anything changes its value.

A small grammar: words, then [sign] [currency] number [scale] [percent] [unit or words]. A number is 1,234.5, 1 234,
1e3, 4.2 \times 10^3, 10^3, 3/4, \frac{3}{4}, \frac34, 1 1/2, 1½. What stands next to it must be known to be harmless:
an operator, a function, a relation, a letter that may be a variable, "not", "more than", or another number means that
the answer is something else, and then it is none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from posttrain.rewards.answer_extraction import ExtractedAnswer
from posttrain.rewards.answer_tokens import AnswerToken, answer_tokens

LONGEST_ANSWER = 2000
"""Characters of an answer that are read, from its end."""
LARGEST_EXPONENT = 400

_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_UNITS = set(
    "m cm mm km nm um ft yd mi g kg mg lb lbs oz s sec ms min h hr hrs L l ml mL cl dl N J kJ W kW V A K C F Hz kHz Pa "
    "kPa mol mph kph kmh rad deg USD EUR GBP CAD AUD INR JPY CNY Rs st nd rd th pt pts gal qt in".split()
)
_SHORT_WORDS = set("in of to is at by on no so he it we as if be do my up us".split())
_CURRENCY = "$€£¥₹"
_RELATIONS = "≠<>≤≥±∓∈|√∞"
_EQUALS = ("=", "≈", "⇒")
_CLOSERS = {"(": ")", "{": "}", "[": "]", "\\{": "\\}"}
_NEGATIVE = ("minus", "negative")
_BEFORE_A_SIGN = set("is are was were be equals equal to of at get gets gives give have has answer result x y".split())

CHANGES_BEFORE = re.compile(
    r"(?:\b(?:not|never|nor|neither|cannot|without|except|unless|excluding)\b|n['’]t\b)(?: [\w'’]+){0,2}$"
    r"|\b(?:than|least|most|under|over|above|below|beyond|exceeds?|exceeding|almost|nearly|within|up to|half|twice"
    r"|double|triple|times|plus|multiplied by|divided by|mod|modulo|choose|log|ln|lg|sin|cos|tan|cot|sec|exp|sqrt|root"
    r"|square|squares|abs|max|gcd|lcm)$"
    r"|\b(?:root|square|cube|logarithm|power|factorial|reciprocal|inverse|opposite|half|third|quarter|percent|multiple"
    r"|factor|divisor|thirds|quarters|sum|product) of$",
    re.IGNORECASE,
)
CHANGES_AFTER = re.compile(
    r"^(?:squared|cubed|factorial|times|plus|minus|divided|multiplied|modulo|mod|choose|raised|over|point|pi|dozens?"
    r"|thousands|millions|billions|or (?:more|less|fewer|greater|above|below|higher|lower)|at (?:most|least)"
    r"|and (?:more|above|over)|and (?:an? |one |two |three )?(?:half|halves|thirds?|quarters?))\b"
    r"|^(?:is|was|are|would be)(?: \w+)? (?:not|wrong|incorrect|false|impossible)\b"
    r"|^(?:is|was|are|ca|can|could)n['’]t\b|^cannot\b",
    re.IGNORECASE,
)
ANSWER_CUE = re.compile(
    r"\b(?:answer|result|solution)s?\b[^.:=\n]{0,40}?(?:\bis\b|\bare\b|\bequals\b|\bwould be\b|\bmust be\b|:|=)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class ReadNumber:
    """A number that was read.

    Attributes:
        value: As written, without applying a percent sign.
        percent: True if it has one.
    """

    value: Fraction
    percent: bool = False

    def equals(self, label: ReadNumber, tolerance: float = 0.0, relative: float = 0.0) -> bool:
        """Return True if |answer - label| <= tolerance + relative * |label|.

        If only one of them is a percentage, it counts as written and as a share: 50% is 50, and 0.5.

        Args:
            label: The right number.
            tolerance: Largest absolute difference.
            relative: Largest difference as a share of the label.
        """
        mine = [self.value] + ([self.value / 100] if self.percent and not label.percent else [])
        right = [label.value] + ([label.value / 100] if label.percent and not self.percent else [])
        return any(abs(a - b) <= tolerance + relative * abs(b) for a in mine for b in right)


@dataclass(frozen=True, slots=True)
class _Core:
    """A number with its sign, currency and brackets: tokens start to end."""

    start: int
    end: int
    number: ReadNumber


_Place = tuple[int, int, _Core | None]
"""A number from one token to another, as it was read; None: it can't be."""


def answer_number(text: str, marked: bool) -> ReadNumber | None:
    """Return the number of an answer; None if it gives none, several, or something else that has a number in it.

    Args:
        text: The answer.
        marked: True if it was in a mark (a box, for instance) and is read as a whole. Otherwise it is a line: the
            number after "the answer is" counts, or the last one.
    """
    text = text[-LONGEST_ANSWER:]
    return _whole(answer_tokens(text, True)) if marked else _in_line(text)


def number_of(answer: ExtractedAnswer) -> Fraction | None:
    """Return the number of an answer without applying a percent sign; None as in `answer_number`.

    A text that is taken as a whole is a number only if nothing else is in it: `x=x[1:]` is not 1.
    """
    number = answer_number(answer.text, answer.marked or answer.how == "whole")
    return None if number is None else number.value


# --- numbers ----------------------------------------------------------------------------------------------------------


def _at(tokens: list[AnswerToken], place: int) -> str:
    return tokens[place].text if 0 <= place < len(tokens) else ""


def _kind(tokens: list[AnswerToken], place: int) -> str:
    return tokens[place].kind if 0 <= place < len(tokens) else ""


def _argument(tokens: list[AnswerToken], place: int) -> tuple[Fraction, int] | None:
    r"""Return an argument of \frac, as in {3} or 3, and the place after it."""
    if _at(tokens, place) == "{":
        sign, place = (-1, place + 2) if _at(tokens, place + 1) == "-" else (1, place + 1)
        if _kind(tokens, place) == "number" and _at(tokens, place + 1) == "}":
            return sign * (tokens[place].value or Fraction(0)), place + 2
        return None
    if _kind(tokens, place) == "number" and len(tokens[place].text) == 1:
        return tokens[place].value or Fraction(0), place + 1
    return None


def _fraction_at(tokens: list[AnswerToken], place: int) -> tuple[Fraction, int] | None:
    r"""Return a \frac or a vulgar fraction, and the place after it."""
    if _kind(tokens, place) == "vulgar":
        return tokens[place].value or Fraction(0), place + 1
    if _at(tokens, place) != "\\frac":
        return None
    both = _at(tokens, place + 1)
    if re.fullmatch(r"[0-9]{2}", both):  # \frac12
        top, under, end = Fraction(int(both[0])), Fraction(int(both[1])), place + 2
    else:
        first = _argument(tokens, place + 1)
        second = _argument(tokens, first[1]) if first else None
        if first is None or second is None:
            return None
        (top, _), (under, end) = first, second
    return (top / under, end) if under else None


def _exponent_at(tokens: list[AnswerToken], place: int) -> tuple[int, int] | None:
    """Return the exponent after a ^, and the place after it."""
    if _at(tokens, place) != "^":
        return None
    braces = _at(tokens, place + 1) in ("{", "(")
    place += 2 if braces else 1
    sign = -1 if _at(tokens, place) == "-" else 1
    place += _at(tokens, place) in ("-", "+")
    if not re.fullmatch(r"[0-9]{1,3}", _at(tokens, place)) or int(_at(tokens, place)) > LARGEST_EXPONENT:
        return None
    if braces and _at(tokens, place + 1) not in ("}", ")"):
        return None
    return sign * int(_at(tokens, place)), place + (2 if braces else 1)


def _core_at(tokens: list[AnswerToken], place: int) -> tuple[Fraction, int] | None:
    """Return the number that begins at a place, without a sign, and the place after it."""
    fraction = _fraction_at(tokens, place)
    if fraction is not None:
        return fraction
    if _kind(tokens, place) != "number":
        return None
    value: Fraction = tokens[place].value or Fraction(0)
    end = place + 1
    mixed = _fraction_at(tokens, end)
    if mixed is not None and tokens[place].text.isdigit():
        value, end = value + mixed[0], mixed[1]
    elif _kind(tokens, end) == "number" and _at(tokens, end + 1) == "/" and _kind(tokens, end + 2) == "number":
        under = tokens[end + 2].value
        if not all(tokens[i].text.isdigit() for i in (place, end, end + 2)) or not under:
            return None
        value, end = value + (tokens[end].value or Fraction(0)) / under, end + 3
    elif _at(tokens, end) == "/" and _kind(tokens, end + 1) == "number":
        under = tokens[end + 1].value
        if not under:
            return None
        value, end = value / under, end + 2
    elif _at(tokens, end) in ("×", "x") and _at(tokens, end + 1) == "10":
        power = _exponent_at(tokens, end + 2)
        if power is not None:
            value, end = value * Fraction(10) ** power[0], power[1]
    elif tokens[place].text == "10":
        power = _exponent_at(tokens, end)
        if power is not None:
            value, end = Fraction(10) ** power[0], power[1]
    scale = _SCALES.get(_at(tokens, end).lower())
    if scale is not None:
        value, end = value * 10**scale, end + 1
    elif _at(tokens, end) in ("k", "K") and tokens[end].glued:
        value, end = value * 1000, end + 1
    return value, end


def _is_sign(tokens: list[AnswerToken], place: int) -> bool:
    return _at(tokens, place) in ("-", "+") or _at(tokens, place).lower() in (*_NEGATIVE, "positive")


def _is_unary(tokens: list[AnswerToken], place: int) -> bool | None:
    """Return True for a sign, False for an operator or a hyphen, None if it may be either."""
    before, kind = _at(tokens, place - 1), _kind(tokens, place - 1)
    if place == 0 or before in ("(", "{", "[", ":", ",", *_EQUALS) or before in _CURRENCY:
        return True
    if tokens[place].kind == "word":
        return kind != "number"
    if kind == "word" and not tokens[place].glued:
        follows = place + 1 < len(tokens) and tokens[place + 1].glued
        return True if follows or before.lower() in _BEFORE_A_SIGN else None
    return False


def _widened(tokens: list[AnswerToken], start: int, end: int, value: Fraction) -> _Core | None:
    """Return a number with its sign, currency, brackets and percent sign; None if its sign is not clear."""
    signed = False
    while True:
        before = _at(tokens, start - 1)
        if before and before in _CURRENCY:
            start -= 1
        elif before in _CLOSERS and start and _at(tokens, end) == _CLOSERS[before]:
            start, end, signed = start - 1, end + 1, False
        elif before == "}" and _at(tokens, start - 2) == "-" and _at(tokens, start - 3) == "{" and not signed:
            start, value, signed = start - 3, -value, True
        elif start and _is_sign(tokens, start - 1) and _is_unary(tokens, start - 1) is not False:
            if signed or _is_unary(tokens, start - 1) is None:
                return None
            value = -value if before == "-" or before.lower() in _NEGATIVE else value
            start, signed = start - 1, True
        else:
            break
    percent = _at(tokens, end) == "%" or _at(tokens, end).lower() in ("percent", "percentage")
    return _Core(start, end + percent, ReadNumber(value, percent))


def _cores(tokens: list[AnswerToken]) -> list[_Place]:
    """Return all numbers with the places that they take; None for one that can't be read."""
    out: list[_Place] = []
    place = 0
    while place < len(tokens):
        after_unit = _at(tokens, place) == "^" and _kind(tokens, place - 1) == "word"
        power = _exponent_at(tokens, place) if after_unit and is_unit(_at(tokens, place - 1)) else None
        if power is not None:
            place = power[1]
            continue
        if tokens[place].kind in ("number", "vulgar", "bad") or tokens[place].text == "\\frac":
            found = _core_at(tokens, place)
            if found is None:
                out.append((place, place + 1, None))
                place += 1
            else:
                core = _widened(tokens, place, found[1], found[0])
                out.append((place, found[1], core))
                place = core.end if core else found[1]
        else:
            place += 1
    return out


# --- what stands around a number --------------------------------------------------------------------------------------


def is_unit(word: str) -> bool:
    """Return True for the symbol of a unit, or a word of three letters or more."""
    return word in _UNITS or len(word) >= 3 or word in ("in",)


def _is_harmless(tokens: list[AnswerToken], place: int) -> bool:
    """Return True if a word after a number is a unit or a word of prose, and not a variable."""
    word = tokens[place].text
    if word.lower() in ("a", "an"):
        return _kind(tokens, place + 1) == "word"
    return is_unit(word) or word.lower() in _SHORT_WORDS


def _words_before(tokens: list[AnswerToken], place: int, count: int = 4) -> str:
    """Return the words before a place, up to another kind of token."""
    out: list[str] = []
    while place > 0 and tokens[place - 1].kind == "word" and len(out) < count:
        place -= 1
        out.insert(0, tokens[place].text)
    return " ".join(out)


def _words_after(tokens: list[AnswerToken], place: int, count: int = 4) -> str:
    out: list[str] = []
    while place < len(tokens) and tokens[place].kind == "word" and len(out) < count:
        out.append(tokens[place].text)
        place += 1
    return " ".join(out)


def _fits_before(tokens: list[AnswerToken], core: _Core, others: list[_Place]) -> bool:
    """Return True if nothing before a number changes its value."""
    place = core.start - 1
    if place < 0:
        return True
    token = tokens[place]
    ends = {end for _, end, _ in others} | {c.end for _, _, c in others if c}
    if token.kind == "word":
        words = _words_before(tokens, core.start)
        if tokens[core.start].glued or CHANGES_BEFORE.search(words):
            return False
        word = token.text.lower()
        if word in ("or", "nor") and any(end <= place for end in ends):
            return False
        if word in ("and", "to", "through", "versus", "vs") and place in ends:
            return word == "to" and any(t.text.lower() == "from" for t in tokens[:place])
        return True
    if token.text in (",", ";"):
        return place not in ends
    if token.text == ":":
        return not (place in ends and token.glued and tokens[core.start].glued)
    return token.text in (*_EQUALS, "(", ".", "!", "?", "…", "[", "{", "\\{")


def _fits_after(tokens: list[AnswerToken], core: _Core, others: list[_Place], marked: bool) -> bool:
    """Return True if nothing after a number changes its value."""
    place = core.end
    if place >= len(tokens):
        return True
    token, following = tokens[place], _at(tokens, place + 1)
    starts = {start for start, _, _ in others} | {c.start for _, _, c in others if c}
    if token.kind == "word":
        word = token.text
        if word.lower() == "or" and following.lower() == "so":
            return True
        if token.glued and core.number.percent is False and not (word in _UNITS or len(word) > 5):
            return False
        if CHANGES_AFTER.search(_words_after(tokens, place)):
            return False
        if word.lower() in ("or", "and", "to", "through", "versus", "vs") and place + 1 in starts:
            return False
        if word.lower() == "or" and any(start > place for start in starts) and _near(tokens, place, starts):
            return False
        return _is_harmless(tokens, place)
    if token.text == ":":
        return not (token.glued and place + 1 in starts and tokens[place + 1].glued)
    if token.text in (",", ";"):
        return place + 1 not in starts and not (following.lower() in ("or", "and") and place + 2 in starts)
    if token.text == "-":
        return _kind(tokens, place + 1) == "word" and tokens[place + 1].glued and is_unit(following)
    if token.text == "/":
        return _kind(tokens, place + 1) == "word" and is_unit(following)
    if token.text == "!":
        return not marked
    return token.text in (".", "?", "…", ")", "(", "°", *_EQUALS, *_CURRENCY, "\\}", "]")


def _near(tokens: list[AnswerToken], place: int, starts: set[int]) -> bool:
    """Return True if a number follows within three words."""
    return any(p in starts for p in range(place + 1, place + 5)) and place < len(tokens)


def _parts(tokens: list[AnswerToken]) -> list[list[AnswerToken]]:
    """Split at equals signs and the like."""
    out: list[list[AnswerToken]] = [[]]
    for token in tokens:
        if token.text in _EQUALS:
            out.append([])
        else:
            out[-1].append(token)
    return out


def _whole(tokens: list[AnswerToken]) -> ReadNumber | None:
    """Read all of a marked answer: one number, and words that do not change it."""
    while tokens and tokens[-1].text in (".", ",", ";", ":"):
        tokens = tokens[:-1]
    if any(t.text in _RELATIONS or t.text == "!" for t in tokens):
        return None
    parts = [p for p in _parts(tokens) if p]
    if not parts or any(t.text in (",", ";") or t.text.lower() in ("or", "and") for p in parts[:-1] for t in p):
        return None
    last = parts[-1]
    if len(parts) == 2 and (_is_variable(last) or _is_sum(last)):  # 42 = x, 42 = 6 * 7
        last = parts[0]
    cores = _cores(last)
    if len(cores) != 1 or cores[0][2] is None:
        return None
    core = cores[0][2]
    before, after = last[: core.start], last[core.end :]
    if any(t.kind != "word" and t.text not in (":", ".", ",", "(") for t in before):
        return None
    if any(len(t.text) == 1 and t.text not in "aAI" for t in before if t.kind == "word"):
        return None
    if not _fits_before(last, core, []) or not _fits_after(last, core, [], True):
        return None
    if CHANGES_BEFORE.search(" ".join(t.text for t in before)):
        return None
    return core.number if _only_units(last, core.end, len(after)) else None


def _is_variable(tokens: list[AnswerToken]) -> bool:
    return len(tokens) == 1 and tokens[0].kind == "word" and len(tokens[0].text) == 1


def _is_sum(tokens: list[AnswerToken]) -> bool:
    """Return True for numbers with an operator between them."""
    operators = [t for t in tokens[1:] if t.text in ("+", "-", "×", "÷")]
    return bool(operators) and all(t.kind == "number" or t.text in "+-×÷/(){}" for t in tokens)


def _only_units(tokens: list[AnswerToken], start: int, count: int) -> bool:
    """Return True if the tokens after a number are words, units with exponents, and punctuation."""
    place, end = start, start + count
    while place < end:
        token = tokens[place]
        if token.kind == "word":
            if not _is_harmless(tokens, place):
                return False
        elif token.text == "^":
            power = _exponent_at(tokens, place)
            if power is None or _kind(tokens, place - 1) != "word":
                return False
            place = power[1]
            continue
        elif token.text in ("/", "×", "-"):
            if _kind(tokens, place + 1) != "word":
                return False
        elif token.text not in (".", ",", "(", ")", "°", "%", *_CURRENCY):
            return False
        place += 1
    return True


def _in_line(text: str) -> ReadNumber | None:
    """Read the number of a line: after "the answer is" the first one or that of its equation, otherwise the last."""
    cues = list(ANSWER_CUE.finditer(text))
    tokens = answer_tokens(text[cues[-1].end() :], False) if cues else []
    cores = _cores(tokens)
    if cores:
        chosen = cores[0]
        equals = [i for i, t in enumerate(tokens) if t.text in _EQUALS]
        if equals and _at(tokens, chosen[1]) in ("+", "-", "×", "÷", "/", "^", "x"):
            chosen = next((c for c in cores if c[0] > equals[-1]), chosen)
    else:
        tokens = answer_tokens(text, False)
        cores = _cores(tokens)
        chosen = cores[-1] if cores else (0, 0, None)
    core = chosen[2]
    if core is None or not _fits_before(tokens, core, cores) or not _fits_after(tokens, core, cores, False):
        return None
    return core.number
