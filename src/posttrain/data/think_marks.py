"""Find blocks of reasoning in texts by the marks that models write around them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PAIRS = {
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought": "<channel|>",
    "<|open|>think<|sep|>": "<|close|>think<|sep|>",
    "Here are my reasoning steps:": "[BEGIN FINAL RESPONSE]",
}
_TAG = r"(?:\w+:)?think(?:ing)?(?::\w+)?"
OPEN = re.compile("|".join([f"<{_TAG}>", *map(re.escape, _PAIRS)]))
CLOSE = re.compile("|".join([f"</{_TAG}>", *map(re.escape, _PAIRS.values())]))
PAIR = ("<think>", "</think>")
"""The usual marks."""


def after_thinking(text: str) -> str | None:
    """Return what follows the last </think> of a text; None if a <think> is never closed, all of it without either."""
    if PAIR[1] in text:
        return text.rpartition(PAIR[1])[2]
    return None if PAIR[0] in text else text


def close_of(mark: str) -> str:
    """Return the mark that closes a block which this one opens."""
    return _PAIRS.get(mark) or f"</{mark[1:]}"


@dataclass(frozen=True)
class Block:
    """Hold a block of reasoning at the beginning of a text.

    Attributes:
        open: Text up to the reasoning, the opening mark included; empty if a prompt has opened the block.
        inner: The reasoning, with the white space around it.
        close: The closing mark.
        rest: What follows the closing mark.
    """

    open: str
    inner: str
    close: str
    rest: str


def split_block(text: str, opened: bool = False) -> Block | None:
    """Return the block with which a text begins, white space aside; None if there is none, or if it is not closed.

    Args:
        text: The text.
        opened: The prompt before the text has opened a block: the text up to the first closing mark is reasoning.
    """
    begin = len(text) - len(text.lstrip())
    if mark := OPEN.match(text, begin):
        at = text.find(close_of(mark[0]), mark.end())
        if at < 0:
            return None
        end = at + len(close_of(mark[0]))
        return Block(text[: mark.end()], text[mark.end() : at], text[at:end], text[end:])
    closing = CLOSE.search(text) if opened else CLOSE.match(text, begin)
    if closing is None or (opened and OPEN.search(text, 0, closing.start())):
        return None
    return Block("", text[: closing.start()], closing[0], text[closing.end() :])


@dataclass(frozen=True)
class PromptBlock:
    """Describe the block that ends a generation prompt.

    Attributes:
        at: Where it begins in the prompt.
        open: Its opening mark; empty if the prompt writes the closing mark alone.
        after: Text after the opening mark up to the end of the prompt, or up to the closing mark.
        closed: True if the prompt closes it: the answer is written without reasoning.
    """

    at: int
    open: str
    after: str
    closed: bool


def prompt_block(prompt: str) -> PromptBlock | None:
    """Return the block of reasoning that the end of a generation prompt opens, or opens and closes."""
    marks = list(OPEN.finditer(prompt))
    if marks:
        mark = marks[-1]
        rest = prompt[mark.end() :]
        inner, closed, _ = rest.partition(close_of(mark[0]))
        return PromptBlock(mark.start(), mark[0], inner, bool(closed))
    if closing := CLOSE.search(prompt):
        return PromptBlock(closing.start(), "", "", True)
    return None
