"""Pictures in rows: read from paths, `file:` URLs, bytes, base64 and PIL images, and known by a hash of their bytes.

Pillow is imported when the first picture is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from posttrain.core.errors import DataError, MissingExtraError
from posttrain.data.bad_rows import BadRow

PICTURE_FORMS = "a path, a file: URL, a data: URL, bytes, {bytes: ...}, {path: ...} or a PIL image"
PREVIEW_SIZE = 160
PREVIEW_URL = "data:image/jpeg;base64,"
NEEDS_PILLOW = "rows with images need the package Pillow: pip install 'posttrain[vision]'"


@dataclass(frozen=True, slots=True)
class Picture:
    """Hold a picture as its file is, or where that is.

    Attributes:
        digest: Hash of the file's bytes.
        path: The file; empty if the bytes are held.
        data: The bytes; empty if they are in a file.
    """

    digest: str
    path: str = ""
    data: bytes = b""

    def read(self) -> bytes:
        """Return the bytes. Raises DataError for a file that can't be read, or that has changed."""
        data = self.data
        if self.path:
            try:
                data = Path(self.path).read_bytes()
            except OSError as error:
                raise DataError(f"the image {self.path} can't be read: {error}") from error
        if _digest(data) != self.digest:
            raise DataError(f"{self.name} has changed since its row was read: put it back, or run again")
        return data

    def open(self) -> Any:
        """Return a PIL image in RGB: turned upright by its EXIF entry, what is transparent on white.

        Raises:
            DataError: The bytes are no image that Pillow reads.
            MissingExtraError: Pillow is not installed.
        """
        try:
            from PIL import Image, ImageOps
        except ImportError as error:
            raise MissingExtraError(NEEDS_PILLOW) from error
        data = self.read()
        try:
            opened = Image.open(io.BytesIO(data))
            opened.load()
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                # Colours of transparent pixels are arbitrary; vLLM and browsers put white behind them too.
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
        except Exception as error:  # a damaged file makes Pillow raise errors of many kinds
            raise DataError(f"{self.name} can't be decoded as an image: {error}") from error

    def preview(self, size: int = PREVIEW_SIZE) -> str:
        """Return a small copy as a `data:` URL, for reports; `size`: most pixels of a side."""
        image, out = self.open(), io.BytesIO()
        image.thumbnail((size, size))
        image.save(out, format="JPEG", quality=80)
        return PREVIEW_URL + base64.b64encode(out.getvalue()).decode()

    @property
    def name(self) -> str:
        """Return a name for messages."""
        return f"the image {self.path}" if self.path else f"an image of {len(self.data):,} bytes"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def read_picture(value: Any, folder: Path | None = None) -> Picture:
    """Return a picture as a row gives it.

    Args:
        value: One of `PICTURE_FORMS`, or what OpenAI's, Anthropic's and the Hub's rows have.
        folder: Folder that relative paths start from.

    Raises:
        BadRow: The value is no picture, or its file can't be read.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, bytes | bytearray):
        return _of_bytes(bytes(value))
    if isinstance(value, Mapping):
        return _of_fields(value, folder)
    if isinstance(value, Path):
        return _of_path(value, folder)
    if isinstance(value, str) and value.strip():
        return _of_text(value.strip(), folder)
    if hasattr(value, "save") and hasattr(value, "mode"):
        out = io.BytesIO()
        value.save(out, format="PNG")
        return _of_bytes(out.getvalue())
    raise BadRow(f"an image is {type(value).__name__}, expected {PICTURE_FORMS}")


def _of_fields(value: Mapping[str, Any], folder: Path | None) -> Picture:
    given = {name: value[name] for name in ("bytes", "base64", "data", "path", "url", "image") if value.get(name)}
    if isinstance(given.get("bytes"), bytes | bytearray):  # the Hub's rows name a path beside that nobody has
        return _of_bytes(bytes(given["bytes"]))
    for name in ("base64", "data", "bytes"):
        if isinstance(given.get(name), str):
            return _of_base64(given[name])
    for name in ("path", "url", "image"):
        if name in given:
            return read_picture(given[name], folder)
    raise BadRow(f"an image has the fields {sorted(value)}, expected bytes, base64, path or url")


def _of_text(text: str, folder: Path | None) -> Picture:
    scheme = text.partition(":")[0].lower() if ":" in text[:12] else ""
    if scheme == "data":
        head, comma, body = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadRow(f"an image is a data: URL without base64: {head[:40]!r}")
        return _of_base64(body)
    if scheme in ("http", "https", "ftp"):
        raise BadRow(
            f"an image is a {scheme} URL: {text[:80]!r}", "Images are not downloaded: save them, and give their paths"
        )
    if scheme == "file":
        return _of_path(Path(unquote(urlsplit(text).path)), folder)
    return _of_path(Path(text), folder)


def _of_base64(text: str) -> Picture:
    try:
        return _of_bytes(base64.b64decode("".join(text.split()), validate=True))
    except (binascii.Error, ValueError) as error:
        raise BadRow(f"an image is no base64: {error}") from error


def _of_bytes(data: bytes) -> Picture:
    if not data:
        raise BadRow("an image is empty")
    return Picture(_digest(data), data=data)


def _of_path(path: Path, folder: Path | None) -> Picture:
    path = path.expanduser()
    path = path if path.is_absolute() or folder is None else folder / path
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadRow(
            f"an image can't be read: {path}: {error.strerror or error}",
            "Relative paths start from the folder of the rows' file, or from data.image_folder",
        ) from error
    return Picture(_of_bytes(data).digest, str(path.resolve()))
