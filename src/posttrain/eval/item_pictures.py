"""Small copies of the pictures of an evaluation's items, for the report."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.core.image_tokens import image_spans

PICTURED_ITEMS = 256
"""Items of an evaluation that keep small copies, of some kilobytes each; those after them are text in the report."""


def item_pictures(number: int, tokens: Sequence[int]) -> dict[str, list[str]]:
    """Return the field `images` of an item: its pictures as `data:` URLs; nothing for a text.

    Args:
        number: Number of the item, from 0.
        tokens: Its prompt.
    """
    spans = image_spans(tokens) if number < PICTURED_ITEMS else ()
    return {"images": [span.picture.preview() for span in spans]} if spans else {}
