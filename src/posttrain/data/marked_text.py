"""Show a sample's text to people, with the parts that carry loss marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from posttrain.core.types import Sample


def pieces(sample: Sample, tokenizer: Any) -> list[tuple[str, float]]:
    """Return the text and the weight of each run of tokens with the same weight; special tokens are written out."""

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    out: list[tuple[str, float]] = []
    at, so_far = 0, ""
    for weight, run in groupby(sample.weights):
        end = at + len(list(run))
        # Decoded with the text before it: on its own a run may lose the space that it begins with.
        through = decode(sample.tokens[:end])
        piece = through[len(so_far) :] if through.startswith(so_far) else decode(sample.tokens[at:end])
        out.append((piece, float(weight)))
        at, so_far = end, through
    return out


BRACKETS = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
"""Marks around text that carries loss, if colours can't be shown."""


def render_terminal(sample: Sample, tokenizer: Any, colours: bool = True) -> Text:
    """Return the sample's text for a terminal, with the tokens that carry loss marked.

    Args:
        sample: The sample.
        tokenizer: Its tokenizer.
        colours: Show tokens with loss in green and the others dimmed. False: put them within BRACKETS.
    """
    text, (before, after) = Text(), BRACKETS
    for piece, weight in pieces(sample, tokenizer):
        marked = weight and not colours
        text.append(f"{before}{piece}{after}" if marked else piece, style="bold green" if weight else "dim")
    return text
