"""The requests for feedback and revisions of the self-refine loop: words by type of task, and templates of your own."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.data.text_similarity import UNSPACED
from posttrain.data.think_marks import after_thinking

RefineTask = Literal["math", "code", "question", "text"]
FIELDS = ("feedback", "answer", "prompt", "verdict")
"""Fields that a template may have."""
NOTHING_FOUND = "(nothing to report)"
"""Stands for the feedback of sources that have nothing to say."""

NO_CHANGE = "No change needed."
"""Words of feedback that ask for no change."""
_ENDS = ".!。！"
"""End a sentence, as a verdict may."""
_CLOSING, _OPENING, _QUOTES = " *\"'”’)]", " *#>-–•\"'“‘([", "\"'“‘"
"""May stand between a verdict and the end of its line; before it; and mean that others are quoted."""
_SENTENCE = re.compile(r"""(?<=[.!?。！？])[*"'”’)\]]*(?:\s+|(?<=[。！？]))""")
_LABEL = re.compile(
    r"(?:[\w*]+ )?(?:verdict|feedback|conclusion|result|answer|reply|review|check|summary|overall|critique|judge?ment)"
    r"\**\s*:|(?:i see|ok|okay|so|well)[:,]", re.IGNORECASE,
)  # fmt: skip
"""May stand before a verdict: `Final verdict:`."""
_SUBJECT = re.compile(
    r"(?:it|this|that|there|everything|all|(?:the|this|your|my) (?:whole |entire |final |last )?"
    r"(?:answer|solution|program|code|function|response|result|text|reasoning)) (?:is|are|was|looks|seems)"
    r"(?: always| all| already| completely| now)?", re.IGNORECASE,
)  # fmt: skip
"""Makes a sentence of a verdict that is a word: `The answer is correct.`"""
_BUT = re.compile(r"\W*(?:but|however|except|although|though|yet|only|unless|still)\b", re.IGNORECASE)

Pieces = list[tuple[str, bool]]
"""Texts in order, each with True if it quotes a source of feedback, and may be cut."""


@dataclass(frozen=True, slots=True)
class RefinePrompts:
    """Hold the templates of requests.

    Attributes:
        critique: Requests feedback from the model itself.
        revision: Requests a revision after feedback.
        alone: Requests a revision without any feedback.
        report: Says what the sources of feedback found, before one of the requests.
        end: Follows the request for feedback, and asks for the words that end the loop.
        end_alone: Follows it if no words end the loop.
    """

    critique: str
    revision: str
    alone: str
    report: str = "Your last answer was checked. The result:\n{feedback}\n\n"
    end: str = " If nothing has to be changed, reply with these words alone: {verdict}"
    end_alone: str = ""


CRITIQUE_ALONE = "Name the specific ways in which your last answer could be better."
REVISION_ALONE = "Write your answer again, better by what you said of it. Reply with the new answer alone."

CHAT: dict[RefineTask, RefinePrompts] = {
    "math": RefinePrompts(
        "Check your solution. Compute every step again, and check that it answers the question that was asked. Name "
        "the first mistake and say why it is one. Do not solve the problem again.",
        "Solve the problem again without these mistakes. Show your steps, and give the final answer in the same form "
        "as before.",
        "There may be a mistake in your solution. If there is, correct it. Show your steps, and give the final answer "
        "in the same form as before.",
    ),
    "code": RefinePrompts(
        "Check your program. Go through it line by line with an example input, and compare what it does with what was "
        "asked for. Name each mistake and the line it is in. Do not write the program again.",
        "Write the whole program again without these mistakes. Reply with the program alone.",
        "There may be a mistake in your program. If there is, correct it. Reply with the whole program alone.",
    ),
    "question": RefinePrompts(
        "Check your answer. Say for each statement in it whether it is true and how you know, and whether the question "
        "is answered. Do not answer the question again.",
        "Answer the question again without these mistakes. Give the final answer in the same form as before.",
        "There may be a mistake in your answer. If there is, correct it. Give the final answer in the same form as "
        "before.",
    ),
    "text": RefinePrompts(
        CRITIQUE_ALONE,
        REVISION_ALONE,
        "Write your answer again, and make it better. Reply with the new answer alone.",
    ),
}
"""Requests as turns of a chat."""

_REPORT = "\n\nThe answer above was checked:\n{feedback}"
_END = " If there are none: {verdict}\nMistakes:"
INLINE: dict[RefineTask, RefinePrompts] = {
    "math": RefinePrompts(
        "\n\nWhich steps of this solution are wrong, and why?",
        "\n\nThe solution without these mistakes:",
        "\n\nThe solution with all mistakes corrected:",
        _REPORT,
        _END,
        "\nMistakes:",
    ),
    "code": RefinePrompts(
        "\n\nWhich lines of this program are wrong, and why?",
        "\n\nThe whole program without these mistakes:",
        "\n\nThe whole program with all mistakes corrected:",
        _REPORT,
        _END,
        "\nMistakes:",
    ),
    "question": RefinePrompts(
        "\n\nWhich statements in this answer are wrong, and why?",
        "\n\nThe answer without these mistakes:",
        "\n\nThe answer with all mistakes corrected:",
        _REPORT,
        _END,
        "\nMistakes:",
    ),
    "text": RefinePrompts(
        "\n\nWhat could be better in this answer?",
        "\n\nThe improved answer:",
        "\n\nA better answer:",
        _REPORT,
        " If nothing: {verdict}\nWhat could be better:",
        "\nWhat could be better:",
    ),
}
"""Text that a model without a chat template continues."""


def fields_of(template: str) -> list[str]:
    """Return the fields of a template.

    Raises:
        ValueError: It can't be read as a template, or has another field.
    """
    try:
        parts = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{error}; write {{{{ and }}}} for braces that are text") from error
    for name, spec, how in parts:
        if name not in FIELDS or spec or how:
            given = "{" + name + (f"!{how}" if how else "") + (f":{spec}" if spec else "") + "}"
            raise ValueError(
                f"{given} is no field of it: it may have {', '.join('{' + f + '}' for f in FIELDS)}; "
                "write {{ and }} for braces that are text"
            )
    return [name for name, _, _ in parts]


def is_worded(template: str) -> bool:
    """Return True if a template has text besides its fields."""
    return any(text for text, _, _, _ in string.Formatter().parse(template))


def fill_template(template: str, values: Mapping[str, str | Sequence[tuple[str, bool]]]) -> Pieces:
    """Return a template with its fields filled in. Values are put in as they are: braces in them mean nothing.

    Args:
        template: The template.
        values: By field, a text, or pieces of which quotations may be cut.
    """
    return list(_filled(template, values))


def _filled(template: str, values: Mapping[str, str | Sequence[tuple[str, bool]]]) -> Iterator[tuple[str, bool]]:
    for text, name, _, _ in string.Formatter().parse(template):
        if text:
            yield text, False
        if name is not None:
            value = values[name]
            yield from [(value, False)] if isinstance(value, str) else value


def quoted(texts: Iterable[str]) -> Pieces:
    """Return what sources said as pieces, each on separate lines; blank texts are left out."""
    out: Pieces = []
    for text in filter(str.strip, texts):
        out += [("\n", False)] if out else []
        out.append((text.strip(), True))
    return out or [(NOTHING_FOUND, False)]


def turn_text(text: str, stops: Sequence[str]) -> str:
    """Return a turn of the model without the stop string that ended it and without spaces around it."""
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
    return text[:cut].strip()


def said(text: str) -> str:
    """Return what a model says to others: its text without what it thinks before; empty if it never stops thinking."""
    return (after_thinking(text) or "").strip()


def gives_verdict(feedback: str, verdict: str) -> bool:
    """Return True if feedback has the words of a verdict in their place: as its first sentence, or its last.

    The sentence is the verdict alone, or begins with a label (`Verdict: ...`) or with what the verdict is about (`The
    answer is correct.`). Case, spaces and marks around it don't count. Words that are inside a sentence, quoted in one
    ("do not write 'correct'"), parts of others ("incorrect") or after a negation are no verdict. Nor is a first
    sentence that the next one takes back ("But ..."). What a model thinks first (<think>…</think>) does not count.
    """
    feedback = said(feedback)
    if "<think>" in feedback:
        return False
    wanted = " ".join(verdict.split()).rstrip(_ENDS)
    if not wanted:  # punctuation alone
        return feedback.strip() == verdict.strip()
    lines = [" ".join(line.split()) for line in feedback.splitlines() if line.strip()]
    return bool(lines) and (_concludes(lines[-1], wanted) or _opens(lines, wanted))


def _concludes(line: str, wanted: str) -> bool:
    """Return True if the last sentence of a line is a verdict."""
    text = line.rstrip(_ENDS + _CLOSING)
    if text[-len(wanted) :].casefold() != wanted.casefold():
        return False
    before = text[: -len(wanted)]
    if re.match(f"[{UNSPACED}]", wanted):  # words of such a script have no spaces between them
        return True
    lead = _SENTENCE.split(before)[-1]
    subject = lead.rstrip(_OPENING)
    marks = lead[len(subject) :]
    if not subject.strip(_OPENING):
        return True
    if subject[-1] in ":,":
        return _LABEL.fullmatch(subject.strip(_OPENING)) is not None
    quotes = any(mark in _QUOTES for mark in marks)
    return " " in marks and not quotes and _SUBJECT.fullmatch(subject.strip(_OPENING)) is not None


def _opens(lines: Sequence[str], wanted: str) -> bool:
    """Return True if the first sentence of feedback is a verdict alone, and the next one does not take it back."""
    text = lines[0].lstrip(_OPENING)
    if text[: len(wanted)].casefold() != wanted.casefold():
        return False
    after = text[len(wanted) :]
    rest = after.lstrip(_ENDS + _CLOSING)
    marks = after[: len(after) - len(rest)]
    ended = not rest or (any(mark in _ENDS for mark in marks) and (marks.endswith(" ") or marks[-1] in "。！"))
    following = rest or (lines[1] if len(lines) > 1 else "")
    return ended and _BUT.match(following) is None
