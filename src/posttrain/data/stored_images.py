"""Keep the pictures of stored samples: each once, as the bytes of its file or as the file's path with a hash of them.

What the vision tower takes is made anew from these bytes by the model's processor, so a store takes no more room than
the pictures' files, and a resumed run gets the same numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.core.image_tokens import ImageSpan, ImageTokens
from posttrain.data.image_reader import ImageReader
from posttrain.data.pictures import Picture

IMAGE_INDEX, IMAGE_BYTES = "images.json", "images.bin"


class StoredImages:
    """Hold the pictures of samples, by the place of a sample's first token.

    Attributes:
        reader: Makes the tower's inputs; needed if the store was opened from files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Begin a store of pictures, in a folder or in memory."""
        self.folder = folder
        self.reader: ImageReader | None = None
        self._spans: dict[int, tuple[ImageSpan, ...]] = {}
        self._where: dict[int, list[list[int]]] = {}  # per sample: number of the picture, start, stop of its tokens
        self._pictures: list[dict[str, Any]] = []
        self._numbers: dict[str, int] = {}
        self._file = None if folder is None else (folder / IMAGE_BYTES).open("wb")

    def add(self, start: int, spans: Sequence[ImageSpan]) -> None:
        """Add the pictures of the sample whose first token is at `start`."""
        if self._file is None:
            self._spans[start] = tuple(spans)
            return
        for span in spans:
            if span.key in self._numbers:
                continue
            picture: Picture = span.picture
            entry: dict[str, Any] = {"digest": picture.digest, "path": picture.path}
            if not picture.path:
                entry |= {"at": self._file.tell(), "size": len(picture.data)}
                self._file.write(picture.data)
            self._numbers[span.key] = len(self._pictures)
            self._pictures.append(entry)
        self._where[start] = [[self._numbers[span.key], span.start, span.stop] for span in spans]

    def finish(self) -> None:
        """Write what is not written yet."""
        if self._file is None or self.folder is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with (self.folder / IMAGE_INDEX).open("w", encoding="utf-8") as f:
            json.dump({"pictures": self._pictures, "samples": self._where}, f)
            f.flush()
            os.fsync(f.fileno())

    def put_into(self, tokens: list[int], start: int) -> list[int]:
        """Return a sample's tokens with its pictures; those of a sample of text unchanged.

        Args:
            tokens: Its tokens.
            start: Place of its first token in the store.
        """
        if start in self._spans:
            return ImageTokens(tokens, self._spans[start])
        if start not in self._where:
            return tokens
        if self.reader is None:
            raise DataError("samples with images were opened without the model's processor")
        spans = [self.reader.span(self._picture(number), a, b) for number, a, b in self._where[start]]
        return ImageTokens(tokens, spans)

    def _picture(self, number: int) -> Picture:
        entry = self._pictures[number]
        if entry["path"]:
            return Picture(entry["digest"], entry["path"])
        assert self.folder is not None
        with (self.folder / IMAGE_BYTES).open("rb") as f:
            data = os.pread(f.fileno(), entry["size"], entry["at"])
        return Picture(entry["digest"], data=data)


def open_images(folder: Path) -> StoredImages | None:
    """Open the pictures of a store that was written into a folder; None: it has none. Raises ValueError if damaged."""
    if not (folder / IMAGE_INDEX).is_file():
        return None
    written = json.loads((folder / IMAGE_INDEX).read_text(encoding="utf-8"))
    images = StoredImages()
    images.folder, images._pictures = folder, written["pictures"]
    images._where = {int(start): where for start, where in written["samples"].items()}
    return images
