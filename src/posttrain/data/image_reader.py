"""A model's own processor, kept with its tokenizer: what it writes for a picture, and what the vision tower takes.

The processor is loaded when the first row has a picture; a tokenizer of a text model costs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from posttrain.core.errors import DataError, ModelError
from posttrain.core.image_tokens import ImageSpan, ImageTokens
from posttrain.data.bad_rows import BadRow
from posttrain.data.pictures import Picture

KEPT_INPUT_BYTES = 2**29
"""Bytes of the tower's inputs that are kept for pictures that come again."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "chat_template.json")
_NOT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_READERS: WeakKeyDictionary[Any, _Source | ImageReader] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Source:
    """Say where a processor is: a folder or a name on the Hub, with the arguments of `from_pretrained`."""

    location: str
    arguments: Mapping[str, Any]


class ImageReader:
    """Turn pictures into tokens and into inputs of the vision tower, by the model's processor.

    Attributes:
        token: The text that a chat template writes for a picture, which is replaced by the picture's tokens.
        vector_token: Id of the tokens that get a vector of the picture.
        processor: The processor of transformers.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.token = str(processor.image_token)
        ids = getattr(processor, "image_token_ids", None) or [processor.image_token_id]
        self.vector_token = int(ids[0])
        self.placeholder = int(processor.tokenizer.convert_tokens_to_ids(self.token))
        self._kept: OrderedDict[str, tuple[tuple[int, ...], dict[str, Any]]] = OrderedDict()
        self._bytes = 0

    def read(self, picture: Picture) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return the tokens that the processor writes for a picture, and the tower's inputs as tensors.

        Raises:
            DataError: The picture can't be read or decoded, or the processor refuses it.
        """
        if picture.digest in self._kept:
            self._kept.move_to_end(picture.digest)
            return self._kept[picture.digest]
        image = picture.open()
        try:
            out = self.processor(text=[self.token], images=[image], return_tensors="pt", add_special_tokens=False)
        except Exception as error:  # each processor has limits of its own, of sizes and proportions
            raise DataError(f"the processor refuses {picture.name} ({image.size}): {error}") from error
        tokens = tuple(out["input_ids"][0].tolist())
        if self.vector_token not in tokens:
            raise DataError(f"the processor writes no image token for {picture.name}")
        inputs = {name: value for name, value in out.items() if name not in _NOT_INPUTS}
        self._keep(picture.digest, tokens, inputs)
        return tokens, inputs

    def _keep(self, digest: str, tokens: tuple[int, ...], inputs: dict[str, Any]) -> None:
        self._kept[digest] = tokens, inputs
        self._bytes += _size(inputs)
        while self._bytes > KEPT_INPUT_BYTES and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1][1])

    def inputs(self, picture: Picture) -> dict[str, Any]:
        """Return the tower's inputs of a picture."""
        return self.read(picture)[1]

    def span(self, picture: Picture, start: int, stop: int) -> ImageSpan:
        """Return the span of a picture whose tokens are known.

        Args:
            picture: The picture.
            start: Its first token.
            stop: One past its last.
        """
        return ImageSpan(picture.digest, start, stop, self.vector_token, partial(self.inputs, picture), picture)

    def expand(
        self, tokens: Sequence[int], weights: Sequence[float], pictures: Sequence[Picture]
    ) -> tuple[list[int], list[float]]:
        """Return tokens and weights with the tokens of pictures, which have no loss, in place of placeholders.

        Args:
            tokens: Token ids of a rendered text, a placeholder for each picture.
            weights: Weight of each.
            pictures: The pictures of the conversation; the text may show the first of them only.

        Raises:
            BadRow: A picture can't be read, or the text has more placeholders than there are pictures.
        """
        out: list[int] = []
        out_weights: list[float] = []
        spans: list[ImageSpan] = []
        for token, weight in zip(tokens, weights, strict=True):
            if token != self.placeholder:
                out.append(token)
                out_weights.append(weight)
                continue
            if len(spans) == len(pictures):
                raise BadRow(f"the text has more image tokens ({self.token}) than images ({len(pictures)})")
            picture = pictures[len(spans)]
            try:
                written, _ = self.read(picture)
            except DataError as error:
                raise BadRow(str(error)) from error
            spans.append(self.span(picture, len(out), len(out) + len(written)))
            out += written
            out_weights += [0.0] * len(written)
        return ImageTokens(out, spans), out_weights


def _size(inputs: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in inputs.values() if hasattr(value, "nbytes"))


def keep_processor(tokenizer: Any, location: str, **arguments: Any) -> None:
    """Note where the processor of a tokenizer's model is; it is loaded when a picture needs it.

    Args:
        tokenizer: The tokenizer.
        location: Folder, or name on the Hub.
        arguments: Of transformers' `from_pretrained`.
    """
    _READERS[tokenizer] = _Source(location, arguments)
    stored = Path(location) / PROCESSOR_FILES[2]
    if getattr(tokenizer, "chat_template", None) is None and stored.is_file():  # where older processors have theirs
        tokenizer.chat_template = json.loads(stored.read_text(encoding="utf-8")).get("chat_template")


def use_processor(tokenizer: Any, processor: Any) -> None:
    """Read pictures of this tokenizer's rows by a processor that is loaded."""
    _READERS[tokenizer] = ImageReader(processor)


def image_reader(tokenizer: Any) -> ImageReader:
    """Return the reader of pictures for a tokenizer's model.

    Raises:
        BadRow: The model takes no pictures, or its processor can't be loaded.
    """
    found = _READERS.get(tokenizer)
    if isinstance(found, _Source):
        del _READERS[tokenizer]  # a text model's is looked for once
        found = _READERS[tokenizer] = ImageReader(_load(found))
    if found is None:
        raise BadRow(*NO_IMAGES)
    return found


NO_IMAGES = (
    "the row has images, and the model takes text alone: it has no processor for images",
    "If the rows are right without: data.ignore with the column or the type of the parts, such as [image, images]",
)


def _may_exist(source: _Source) -> bool:
    """Return False for a folder without a processor's files."""
    folder = Path(source.location)
    return not folder.is_dir() or any((folder / name).is_file() for name in PROCESSOR_FILES[:2])


def _load(source: _Source) -> Any:
    from transformers import AutoProcessor
    from transformers.utils import logging

    if not _may_exist(source):
        raise BadRow(*NO_IMAGES)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers names, once for each type that it has, that torchvision is missing
    try:
        processor = AutoProcessor.from_pretrained(source.location, **source.arguments)
    except Exception as error:
        raise ModelError(f"the processor of {source.location} can't be loaded: {error}") from error
    finally:
        logging.set_verbosity(level)
    if getattr(processor, "image_processor", None) is None or getattr(processor, "image_token", None) is None:
        raise BadRow(*NO_IMAGES)
    return processor


def processor_identity(tokenizer: Any) -> str:
    """Return a text that differs if pictures may become other tokens, for keys of caches; "" for a text model."""
    found = _READERS.get(tokenizer)
    if found is None:
        return ""
    if isinstance(found, ImageReader):
        return hashlib.sha256(found.processor.to_json_string().encode()).hexdigest()
    files = [path for name in PROCESSOR_FILES if (path := Path(found.location) / name).is_file()]
    texts = [path.read_text(encoding="utf-8") for path in files]
    return hashlib.sha256("\0".join([*texts, "" if files else found.location]).encode()).hexdigest()


def save_processor(tokenizer: Any, folder: Path) -> None:
    """Write the processor of a tokenizer's model into a model's folder; nothing for a text model."""
    found = _READERS.get(tokenizer)
    if isinstance(found, _Source):
        try:
            found = image_reader(tokenizer)
        except BadRow:
            return
    if found is not None:
        found.processor.save_pretrained(folder)
