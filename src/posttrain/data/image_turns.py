"""Put pictures into turns as rows name them, and show turns with pictures to a chat template.

The text of a turn has `IMAGE_MARK` where a picture stands, and the turn holds the pictures in that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from posttrain.config import DataConfig
from posttrain.core.files import named_path
from posttrain.core.image_tokens import IMAGE_MARK
from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow
from posttrain.data.cells import is_empty, parse_json
from posttrain.data.pictures import Picture, read_picture
from posttrain.data.row_fields import SourceRow
from posttrain.data.template_source import apply_template, template_of

IMAGE_COLUMNS = ("images", "image")
"""Columns with the pictures of a row."""
IMAGE_TEXT = "<image>"
"""What stands for a picture in the texts of LLaVA's rows and of those that follow them."""
_PROBE = "Qz7f0Xi"
_READS_PARTS: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()


def has_images(messages: Sequence[Message], row: SourceRow) -> bool:
    """Return True if a row names pictures, in its turns or in a column."""
    return any("images" in m for m in messages) or not row.keys().isdisjoint(IMAGE_COLUMNS)


def place_images(messages: Sequence[Message], row: SourceRow, config: DataConfig) -> tuple[Message, ...]:
    """Return the turns of a row with its pictures, those of the column `images` (or `image`) put in their places.

    The column's pictures stand where a part of type image names none, or where a text has `<image>`; without either
    all stand before the first text of the user.

    Args:
        messages: The turns.
        row: The row.
        config: Settings of the data.

    Raises:
        BadRow: A picture can't be read, or the column has more or fewer than the turns have places.
    """
    given = _column(row)
    folder = _folder(config)
    open_places = sum(image is None for m in messages for image in m.get("images", ()))
    turns: list[Message] = [{**m} for m in messages]
    if given and not open_places:
        open_places = _mark_places(turns, len(given))
    if open_places != len(given):
        raise BadRow(f"the turns have places for {open_places} images, and the row names {len(given)}")
    rest = iter(given)
    for turn in turns:
        if turn.get("images"):
            named = [next(rest) if image is None else image for image in turn["images"]]
            turn["images"] = [read_picture(image, folder) for image in named]
    return tuple(turns)


def _column(row: SourceRow) -> list[Any]:
    """Return the pictures of the row's column. Raises BadRow if both columns have some."""
    filled = [name for name in IMAGE_COLUMNS if not is_empty(row.peek(name))]
    if len(filled) > 1:
        raise BadRow("the row has both columns, image and images")
    if not filled:
        return []
    value = row[filled[0]]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, filled[0])
    return list(value) if isinstance(value, list | tuple) else [value]


def _folder(config: DataConfig) -> Path | None:
    if config.image_folder is not None:
        return named_path(config.image_folder)
    source = config.source if isinstance(config.source, str) else ""
    path = named_path(source)
    return path.parent if path.is_file() else None


def _mark_places(turns: Sequence[Message], count: int) -> int:
    """Mark where the column's pictures stand; return the number of places."""
    asked = [turn for turn in turns if turn["role"] != "assistant"]
    written = sum(turn["content"].count(IMAGE_TEXT) for turn in asked)
    if written == count:
        for turn in asked:
            if here := turn["content"].count(IMAGE_TEXT):
                turn["content"] = turn["content"].replace(IMAGE_TEXT, IMAGE_MARK)
                turn["images"] = [None] * here
        return written
    user = next((turn for turn in asked if turn["role"] == "user"), None)
    if written or user is None:
        return written
    user["content"] = IMAGE_MARK * count + user["content"]
    user["images"] = [None] * count
    return count


def pictures_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Picture, ...]:
    """Return the pictures of a conversation, in order."""
    return tuple(image for m in messages for image in m.get("images", ()))


def fragments(content: str) -> list[str]:
    """Return the texts between the pictures of a turn, without those that are empty."""
    return [text for part in content.split(IMAGE_MARK) if (text := part.strip())]


def without_images(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn for people and reports, [image] in place of each picture."""
    turn = {name: value for name, value in message.items() if name != "images"}
    return {**turn, "content": message["content"].replace(IMAGE_MARK, "[image]")}


def shown_to_template(turn: Mapping[str, Any], tokenizer: Any, token: str) -> dict[str, Any]:
    """Return a turn with pictures in the form that the template reads.

    That is a list of parts, or for a template that reads texts alone the image token in the text.

    Args:
        turn: The turn, with `images`.
        tokenizer: The tokenizer.
        token: Text of the image token.
    """
    own = {name: value for name, value in turn.items() if name != "images"}
    texts = turn["content"].split(IMAGE_MARK)
    if not _reads_parts(tokenizer, token):
        return {**own, "content": token.join(texts)}
    parts: list[dict[str, str]] = []
    for i, text in enumerate(texts):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": text}] if text else []
    return {**own, "content": parts}


def _reads_parts(tokenizer: Any, token: str) -> bool:
    """Return True if the template writes the image token for a part of type image."""
    source, known = template_of(tokenizer), _READS_PARTS.setdefault(tokenizer, {})
    if source not in known:
        content = [{"type": "image"}, {"type": "text", "text": _PROBE}]
        try:
            text = apply_template(tokenizer, [{"role": "user", "content": content}])
        except BadRow:
            text = ""
        known[source] = text.count(token) == 1 and text.count(_PROBE) == 1 and "'type'" not in text
    return known[source]
