"""Characters of a completion's text → the tokens that they came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What bytes that are no whole character decode to."""

Spans = list[tuple[int, int]]


def token_spans(tokenizer: Any, tokens: Sequence[int], text: str) -> Spans:
    """Return the characters (first, one past the last) of `text` that each token has a part in.

    A character of several bytes may have several tokens: each of them has it. A token that adds no character (a special
    one, or one after the end of `text`) has an empty span. This works for any tokenizer, since it decodes beginnings of
    the tokens, and no single tokens.

    Args:
        tokenizer: The tokenizer.
        tokens: The tokens.
        text: The text that they begin with.

    Raises:
        ValueError: They do not begin with `text`.
    """
    whole = _decode(tokenizer, tokens)
    if not whole.startswith(text):
        raise ValueError(f"the tokens decode to {whole[:60]!r}, and the text is {text[:60]!r}")
    ends, glued = _ends(tokenizer, tokens)
    if glued != whole:
        ends = _slow_ends(tokenizer, tokens, whole)
    spans: Spans = []
    begin, waiting = 0, 0
    for i, end in enumerate(ends):
        if i == len(ends) - 1:
            end = len(whole)
        if end is None:
            waiting += 1
            continue
        # Those that waited have begun the character that this token finishes.
        spans += [(begin, min(begin + 1, end))] * waiting + [(begin, end)]
        begin, waiting = end, 0
    return [(min(a, len(text)), min(b, len(text))) for a, b in spans]


def _ends(tokenizer: Any, tokens: Sequence[int]) -> tuple[list[int | None], str]:
    """Yield how many characters are certain after each token (None: it leaves one unfinished), a stretch at a time.

    And the text as the stretches give it: the whole text, unless a stretch changes what stands before it.
    """
    ends: list[int | None] = []
    out, base, read = "", 0, 0  # tokens[base:read] are the context of those that are next
    waiting: list[str] = []  # what ends in bytes that the next token may make a character of
    for i in range(len(tokens)):
        before, now = _decode(tokenizer, tokens[base:read]), _decode(tokenizer, tokens[base : i + 1])
        if now.endswith(UNFINISHED) and i < len(tokens) - 1:
            ends.append(None)
            waiting.append(now)
            continue
        for k, seen in enumerate(waiting, i - len(waiting)):
            if now.startswith(seen):  # no character came of them: they stay what they are
                ends[k] = len(out) + len(seen) - len(before)
        waiting.clear()
        out += now[len(before) :] if now.startswith(before) else ""
        ends.append(len(out))
        base, read = read, i + 1
    return ends, out


def _slow_ends(tokenizer: Any, tokens: Sequence[int], whole: str) -> list[int | None]:
    """Yield the same by decoding every beginning from the first token on."""
    ends: list[int | None] = []
    for i in range(len(tokens)):
        text = _decode(tokenizer, tokens[: i + 1])
        ends.append(len(text) if whole.startswith(text) else None)
    return ends


def tokens_of(spans: Spans, start: int, end: int) -> tuple[int, int]:
    """Return the tokens (first, one past the last) that have a part in some characters; (0, 0) if none has.

    Args:
        spans: The spans of all tokens.
        start: The first character.
        end: One past the last.
    """
    touching = [i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a]
    return (touching[0], touching[-1] + 1) if touching else (0, 0)


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))
