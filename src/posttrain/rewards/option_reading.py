"""Read which of several options an answer names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from posttrain.rewards.answer_extraction import bare_text, normal
from posttrain.rewards.number_reading import LONGEST_ANSWER

_CUE = re.compile(
    r"\b(?:answers?|options?|choices?|solution|conclusion)(?:\s+(?:is|are|would be|must be|should be|seems to be))?"
    r"\s*(?::|=)?\s*(?:\b(?:option|choice|letter|answer)\b\s*)?(?=[^\w]|(?<=\s)|$)"
    r"|\b(?:correct|right|best|true)\s+(?:\w+\s+)?(?:is|would\s+be|must\s+be)\b"
    r"|^(?:thus|therefore|so|hence|then|finally|overall|clearly|in\s+conclusion)\b,?"
    r"|\b(?:it|that|this)(?:\s+is|['’]s|\s+must\s+be|\s+would\s+be)\b"
    r"|\b(?:choose|chose|pick|select|go\s+with|going\s+with|say|believe|think)(?:\s+(?:option|choice|answer|letter))?\b",
    re.IGNORECASE,
)
_LABEL = re.compile(r"(?P<open>[(\[]?)\b(?P<letter>[A-Za-z])\b(?P<close>[)\].:]?)")
_NEGATED_BEFORE = re.compile(
    r"(?:\b(?:not|never|nor|neither|cannot|except|without|rather than|instead of|eliminate|exclude|rule out)\b"
    r"|n['’]t\b)"
    r"[\s(\[]*(?:(?:be|is|option|choice|answer|letter|equal to|the)\s+){0,3}[(\[]*$",
    re.IGNORECASE,
)
_NEGATED_AFTER = re.compile(
    r"^[\])]*\s*(?:is|was|are|seems|looks)?\s*(?:not|never|wrong|incorrect|false|impossible|eliminated|excluded"
    r"|ruled out)\b"
    r"|^[\])]*\s*(?:is|was|ca|can|could|does|would)n['’]t\b|^[\])]*\s*cannot\b",
    re.IGNORECASE,
)
_DOUBTED = re.compile(
    r"(?:\b(?:doubt|unsure|unlikely|hardly)\b|(?:\bnot|n['’]t)\s+(?:sure|think|believe|say|choose|pick|select|go)\b)[^.!?]*$",
    re.IGNORECASE,
)
_AFFIRMED = re.compile(r"^[\])]*\s*(?:is|seems|must be)\s+(?:the\s+)?(?:correct|right|best|true)\b", re.IGNORECASE)
_HEDGE = re.compile(
    r"^[\])\s.]*(?:\([^()]*\)\s*)?(?:,|/|;|&|\bor\b|\band\b)[\s(\[]*(?:or\s+|and\s+|also\s+|maybe\s+)?[(\[]*$"
)
_NAMES = re.compile(r"\b(?:option|choice|answer|letter)\s*[:(\[]*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Mention:
    """A place where a text names an option.

    Attributes:
        option: Its index.
        start, end: The place.
        weak: True for a letter in prose that may be a word or a name.
        negated: True if it is said not to be the answer.
    """

    option: int
    start: int
    end: int
    weak: bool
    negated: bool


def option_of(text: str, options: Sequence[str], count: int) -> int | None:
    """Return the option that an answer names, counted from 0; None if it names none, or several.

    B, (b), "B) Paris", "The answer is (B)", "I choose B", "B is correct", the text of an option, alone or in a
    sentence. The option after "the answer is" counts, else the only one that is named. One that is denied is not named.
    A letter with the text of another option, and two options after "answer", name none.

    Args:
        text: The answer.
        options: Texts of the options, if known.
        count: Number of options.
    """
    text = re.sub(r"\*\*|__|`|[“”\"$]", "", bare_text(text[-LONGEST_ANSWER:]))
    text = re.sub(r"^[^\w(\[]+|!+$", "", text).strip()
    low = [normal(option) for option in options]
    if low.count(normal(text)) == 1:
        return low.index(normal(text))
    mentions = list(_mentions(text, low, count))
    if _contradicts(text, mentions):
        return None
    named: set[int | None] = _named_after_cues(text, mentions)
    named = named or {m.option for m in mentions if not m.negated and not m.weak}
    return named.pop() if len(named) == 1 else None


def _mentions(text: str, options: Sequence[str], count: int) -> Iterator[Mention]:
    """Yield the options that a text names by letter or by their text, in order."""
    found: list[tuple[int, int, int, bool]] = []
    for match in _LABEL.finditer(text):
        letter = match["letter"]
        option = ord(letter.upper()) - 65
        if option < count:
            start, end = match.span()
            found.append((start, end, option, _is_weak(text, match)))
    lowered = text.casefold()
    for option, words in enumerate(options):
        if len(words) > 1 and options.count(words) == 1:
            pattern = rf"(?<!\w){re.escape(words)}(?!\w)"
            found += [(m.start(), m.end(), option, False) for m in re.finditer(pattern, lowered)]
    for start, end, option, weak in sorted(found):
        negated = bool(_NEGATED_BEFORE.search(text[max(0, start - 60) : start]) or _NEGATED_AFTER.match(text[end:]))
        yield Mention(option, start, end, weak, negated)


def _is_weak(text: str, match: re.Match[str]) -> bool:
    """Return True for a letter that may be a word: one in prose, without brackets or a word that makes it a label."""
    before, after = text[: match.start()], text[match.end() :]
    near = before[-40:]
    if not before.strip() and not after.strip():
        return False
    if match["open"] and match["close"] in (")", "]"):
        return False
    if _NAMES.search(near) and (match["letter"].isupper() or not after.strip()):
        return False
    if match["letter"].islower():
        return True
    if not before.strip() and (match["close"] or re.match(r"\s+[-–]\s", after)):
        return False
    return not _AFFIRMED.match(after)


def _contradicts(text: str, mentions: Sequence[Mention]) -> bool:
    """Return True if a letter stands directly before the text of another option."""
    for one, two in zip(mentions, mentions[1:], strict=False):
        between = text[one.end : two.start]
        of_letter = [m.end - m.start <= 3 for m in (one, two)]
        if one.option != two.option and of_letter[0] != of_letter[1] and re.fullmatch(r"[()\].:,\s–-]*", between):
            if "," not in between or not one.weak:
                return True
    return False


def _named_after_cues(text: str, mentions: Sequence[Mention]) -> set[int | None]:
    """Return the options that follow a cue, such as "the answer is"; None among them for several joined by "or"."""
    out: set[int | None] = set()
    for cue in _CUE.finditer(text):
        for place, mention in enumerate(mentions):
            if mention.start < cue.end():
                continue
            gap = text[cue.end() : mention.start]
            if len(gap) > 40 or re.search(r"[.!?]\s", gap):
                break
            if mention.end - mention.start <= 3 and mention.weak and not _closes_word(text, mention):
                continue
            if not mention.negated and not _DOUBTED.search(text[max(0, cue.start() - 60) : cue.end()]):
                out.add(None if _is_hedged(text, mentions, place) else mention.option)
            break
    return out


def _closes_word(text: str, mention: Mention) -> bool:
    """Return True if a bare letter after a cue is not the first word of a phrase, as in "a city"."""
    after = text[mention.end :]
    word = text[mention.start : mention.end].strip("()[].: ")
    if word in ("A", "a", "I", "i"):
        return not re.match(r"\s+[a-z]", after) or bool(re.match(r"\s+(?:because|since|as|is|or|and|for)\b", after))
    return word.isupper() or not re.match(r"\s+\w", after)


def _is_hedged(text: str, mentions: Sequence[Mention], place: int) -> bool:
    """Return True if another option is named as well: A or B."""
    last = mentions[place]
    for other in mentions[place + 1 :]:
        between = text[last.end : other.start]
        if other.option == mentions[place].option:
            last = other
            continue
        return bool(_HEDGE.match(between)) and not other.negated
    before = [m for m in mentions[:place] if m.option != mentions[place].option and not m.negated]
    return bool(before) and bool(_HEDGE.match(text[before[-1].end : mentions[place].start]))
