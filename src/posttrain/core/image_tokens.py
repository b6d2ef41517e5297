"""Token ids some of which stand for pictures: the pictures travel with the ids, wherever these go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IMAGE_MARK = "\ufdd0"
"""Stands for a picture in the text of a turn: a code point that is no character, so no text has it."""


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Say which tokens of a sequence stand for a picture.

    Attributes:
        key: Equal for pictures that the model sees alike.
        start, stop: Half-open range of tokens that the processor wrote for the picture.
        token: Id of those tokens in the range that get a vector of the picture; others (row ends) are ordinary.
        inputs: Returns what the vision tower takes of this picture (pixel_values and others), by the processor's names.
        picture: The picture (`posttrain.data.pictures.Picture`), for people and for the store.
    """

    key: str
    start: int
    stop: int
    token: int
    inputs: Callable[[], Mapping[str, Any]]
    picture: Any = None


class ImageTokens(list[int]):
    """Hold token ids with the pictures that some of them stand for.

    Attributes:
        spans: The pictures, in the order of their tokens.
    """

    def __init__(self, tokens: Iterable[int], spans: Sequence[ImageSpan]) -> None:
        super().__init__(tokens)
        self.spans = tuple(spans)

    def places(self, span: ImageSpan) -> list[int]:
        """Return the places of the tokens that get a vector of the picture."""
        return [i for i in range(span.start, span.stop) if self[i] == span.token]


def image_spans(tokens: Sequence[int]) -> tuple[ImageSpan, ...]:
    """Return the pictures among token ids; () if they are text."""
    return getattr(tokens, "spans", ())


def picture_keys(tokens: Sequence[int]) -> tuple[str, ...]:
    """Return the keys of the pictures among token ids: sequences with equal ids and keys are equal."""
    return tuple(span.key for span in image_spans(tokens))


def beginning(tokens: Sequence[int], stop: int) -> list[int]:
    """Return the first `stop` tokens with their pictures. Raises ValueError if the cut would go through a picture."""
    spans, cut = image_spans(tokens), list(tokens[:stop])
    if not spans:
        return cut
    for span in spans:
        if span.start < stop < span.stop:
            raise ValueError(f"tokens {span.start} to {span.stop} are one picture, which a cut at {stop} would split")
    return ImageTokens(cut, [span for span in spans if span.stop <= stop])


def extended(tokens: Sequence[int], more: Sequence[int]) -> list[int]:
    """Return token ids with others behind them, which are text; the pictures of the first stay."""
    spans = image_spans(tokens)
    return ImageTokens([*tokens, *more], spans) if spans else [*tokens, *more]
