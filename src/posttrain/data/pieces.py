"""What the model will see, for people: a sample's text in pieces, those that carry loss apart from the rest."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.text import Text

from posttrain.types import Sample


def pieces(sample: Sample, tokenizer: Any) -> list[tuple[str, float]]:
    """(text, weight) of neighbouring tokens of like weight; special tokens are written out."""
    out = []
    for weight, run in groupby(zip(sample.tokens, sample.weights, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        out.append((text, float(weight)))
    return out


def render_terminal(sample: Sample, tokenizer: Any) -> Text:
    """The sample's text, tokens that carry loss in green, the rest dimmed."""
    text = Text()
    for piece, weight in pieces(sample, tokenizer):
        text.append(piece, style="bold green" if weight else "dim")
    return text
