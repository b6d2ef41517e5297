"""Show a sample's text to people, with the parts that carry loss marked, and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.text import Text

from posttrain.core.image_tokens import ImageSpan, image_spans
from posttrain.core.types import Sample

PICTURE_WIDTH = 32
"""Columns of a picture in a terminal."""


def pieces(sample: Sample, tokenizer: Any) -> list[tuple[str, float]]:
    """Return the text and the weight of each run of tokens with the same weight; special tokens are written out.

    A few words stand for the tokens of a picture.
    """
    out: list[tuple[str, float]] = []
    at = 0
    for span in image_spans(sample.tokens):
        out += _runs(sample.tokens[at : span.start], sample.weights[at : span.start], tokenizer)
        out.append((_in_words(span), 0.0))
        at = span.stop
    return out + _runs(sample.tokens[at:], sample.weights[at:], tokenizer)


def _runs(tokens: Sequence[int], weights: Sequence[float], tokenizer: Any) -> list[tuple[str, float]]:
    """Return text and weight of each run.

    Args:
        tokens: Token ids of text.
        weights: Weight of each.
        tokenizer: Their tokenizer.
    """

    def decode(some: Sequence[int]) -> str:
        return str(tokenizer.decode(list(some), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    out: list[tuple[str, float]] = []
    at, so_far = 0, ""
    for weight, run in groupby(weights):
        end = at + len(list(run))
        # Decoded with the text before it: on its own a run may lose the space that it begins with.
        through = decode(tokens[:end])
        piece = through[len(so_far) :] if through.startswith(so_far) else decode(tokens[at:end])
        out.append((piece, float(weight)))
        at, so_far = end, through
    return out


def _in_words(span: ImageSpan) -> str:
    """Return a picture in a few words: its file, size and number of tokens."""
    image = span.picture.open()
    name = f" {Path(span.picture.path).name}" if span.picture.path else ""
    return f"[image{name}, {image.width} x {image.height}, {span.stop - span.start} tokens]"


BRACKETS = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
"""Marks around text that carries loss, if colours can't be shown."""


def render_terminal(sample: Sample, tokenizer: Any, colours: bool = True) -> Text:
    """Return the sample's text for a terminal, with the tokens that carry loss marked, after its pictures.

    Args:
        sample: The sample.
        tokenizer: Its tokenizer.
        colours: Show tokens with loss in green and the others dimmed, and pictures. False: put tokens with loss within
            BRACKETS.
    """
    text, (before, after) = Text(), BRACKETS
    for span in image_spans(sample.tokens) if colours else ():
        text.append_text(draw_blocks(span.picture.open()))
    for piece, weight in pieces(sample, tokenizer):
        marked = weight and not colours
        text.append(f"{before}{piece}{after}" if marked else piece, style="bold green" if weight else "dim")
    return text


def draw_blocks(image: Any) -> Text:
    """Return a picture as coloured characters, two pixels in each: the upper half block over its background."""
    width = min(PICTURE_WIDTH, image.width)
    small = image.resize((width, 2 * max(1, round(width * image.height / image.width / 2))))
    text = Text()
    for y in range(0, small.height, 2):
        for x in range(width):
            upper, lower = (small.getpixel((x, y + i)) for i in range(2))
            text.append("\N{UPPER HALF BLOCK}", style=f"rgb({_comma(upper)}) on rgb({_comma(lower)})")
        text.append("\n")
    return text


def _comma(pixel: Sequence[int]) -> str:
    return ",".join(map(str, pixel))
