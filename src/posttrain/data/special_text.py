"""Keep special tokens that are spelt inside texts apart from the special tokens that a chat template writes.

A text may contain the characters of a special token ("<|im_end|>"), or the end of one field and the beginning of the
next may spell one together. `guard` moves such characters to a private-use plane of Unicode, where no tokenizer finds
a special token, before the template renders the text; `restore` moves them back before the text is encoded. What is
then still visible as a special token was written by the template.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PLANE = 0x100000
"""First code point of the private-use plane that guarded characters are moved to."""
ESCAPE = chr(PLANE + 0xFFFD)
"""Precedes two guarded characters that stand for one character which the text itself has on that plane."""
NATIVE = re.compile("[\U00100000-\U0010ffff]")
GUARDED = re.compile("[\U00100000-\U0010ffff]+")
_UNIT = re.compile(f"{ESCAPE}..|.", re.DOTALL)


@dataclass(frozen=True)
class ControlTokens:
    """Hold the special tokens of a tokenizer in the forms that `guard` searches for.

    Attributes:
        texts: The tokens, longest first.
        pattern: Matches each of them; None if there are none.
        prefixes: Proper beginnings of the tokens.
        suffixes: Proper ends of the tokens.
        firsts: First characters of the tokens.
        lasts: Last characters of the tokens.
        edges: Both.
        longest: Length of the longest token.
    """

    texts: tuple[str, ...]
    pattern: re.Pattern[str] | None
    prefixes: frozenset[str]
    suffixes: frozenset[str]
    firsts: str
    lasts: str
    edges: str
    longest: int

    @classmethod
    def of(cls, texts: Iterable[str]) -> ControlTokens:
        """Prepare a set of special tokens; empty texts are left out."""
        tokens = tuple(sorted({*texts} - {""}, key=lambda t: (-len(t), t)))
        firsts, lasts = ("".join(sorted({t[end] for t in tokens})) for end in (0, -1))
        return cls(
            tokens,
            re.compile(_trie(tokens)) if tokens else None,
            frozenset(t[:n] for t in tokens for n in range(1, len(t))),
            frozenset(t[n:] for t in tokens for n in range(1, len(t))),
            firsts,
            lasts,
            "".join({*firsts, *lasts}),
            max(map(len, tokens), default=0),
        )


def _trie(words: Iterable[str]) -> str:
    """Return a pattern of all words that shares their beginnings: fast for thousands of reserved tokens."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}

    def pattern(node: Mapping[str, Any]) -> str:
        branches = [re.escape(char) + pattern(rest) for char, rest in node.items() if char]
        if not branches:
            return ""
        inner = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
        return f"{inner}?" if "" in node else inner

    return pattern(root)


def _shift(text: str) -> str:
    return "".join(chr(PLANE + ord(c)) if ord(c) < 0xFFFD else c for c in text)


def _escape_native(match: re.Match[str]) -> str:
    high, low = divmod(ord(match[0]) - PLANE, 256)
    return ESCAPE + chr(PLANE + high) + chr(PLANE + low)


def guard(text: str, control: ControlTokens, found: Counter[str] | None = None) -> str:
    """Return a text in which no special token can be found, neither inside it nor across its edges.

    Args:
        text: The text.
        control: The special tokens.
        found: Counts the special tokens that the text contains.
    """
    if control.pattern is None or not text:
        return text
    guarded = text if text.isascii() else NATIVE.sub(_escape_native, text)
    # Texts without a character that begins or ends a token are the rule, and this is faster than the pattern.
    for char in control.edges:
        if char in guarded:
            break
    else:
        return guarded
    if any(c in guarded for c in control.firsts) and control.pattern.search(guarded):

        def move(match: re.Match[str]) -> str:
            if found is not None:
                found[match[0]] += 1
            return _shift(match[0])

        guarded = control.pattern.sub(move, guarded)
    return _guard_edges(guarded, control)


def _guard_edges(text: str, control: ControlTokens) -> str:
    """Move an end that begins a special token, and a beginning that ends one; templates may trim white space."""
    longest = control.longest
    ends, starts = {len(text), len(text.rstrip())}, {0, len(text) - len(text.lstrip())}
    if any(text.find(c, end - longest if end > longest else 0, end) >= 0 for c in control.firsts for end in ends):
        for end in ends:
            start = next((i for i in range(max(0, end - longest), end) if text[i:end] in control.prefixes), end)
            text = text[:start] + _shift(text[start:end]) + text[end:]
    if any(text.find(c, start, start + longest) >= 0 for c in control.lasts for start in starts):
        for start in starts:
            stop = min(len(text), start + longest)
            end = next((i for i in range(stop, start, -1) if text[start:i] in control.suffixes), start)
            text = text[:start] + _shift(text[start:end]) + text[end:]
    return text


def guard_all(value: Any, guarded: Callable[[str], str]) -> Any:
    """Return a value of JSON with `guarded` applied to every text in it, keys included."""
    if isinstance(value, str):
        return guarded(value)
    if isinstance(value, Mapping):
        return {guarded(str(key)): guard_all(item, guarded) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [guard_all(item, guarded) for item in value]
    return value


def is_guarded(text: str) -> bool:
    """Return True if a text has characters that `guard` has moved."""
    return NATIVE.search(text) is not None


def _restore_run(match: re.Match[str]) -> str:
    out, chars = [], iter(match[0])
    for char in chars:
        if char == ESCAPE:
            high, low = next(chars), next(chars)
            out.append(chr(PLANE + (ord(high) - PLANE) * 256 + ord(low) - PLANE))
        else:
            out.append(chr(ord(char) - PLANE))
    return "".join(out)


def restore(text: str) -> str:
    """Return a guarded text as it was written."""
    return GUARDED.sub(_restore_run, text) if NATIVE.search(text) else text


def cut_guarded(text: str, every: bool) -> list[str]:
    """Return a guarded text as it was written, cut inside each guarded run.

    Args:
        text: The text.
        every: Cut after every guarded character. False: after the first of each run.
    """
    parts, start = [""], 0
    for run in GUARDED.finditer(text):
        parts[-1] += text[start : run.start()]
        units = _UNIT.findall(run[0])
        for unit in units if every else [units[0], "".join(units[1:])]:
            parts[-1] += restore(unit)
            parts.append("")
        if not every and len(units) > 1:
            parts[-2:] = [parts[-2]]
        start = run.end()
    parts[-1] += text[start:]
    return [part for part in parts if part]
