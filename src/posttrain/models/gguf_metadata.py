"""Read a text from a GGUF file's header, without reading the vocabulary that it holds as well."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type (gguf specification: 8 is a string, 9 an array)."""
STRING = 8


def gguf_text(path: Path, name: str) -> str | None:
    """Return a text of the metadata; None if the fields before the first array hold no such text.

    Converters write the fields that describe the model (`general.`) first, and arrays (the vocabulary) last.
    """
    try:
        with path.open("rb") as file:
            magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version < 2:
                return None
            for _ in range(count):
                key = _string(file)
                (kind,) = struct.unpack("<I", file.read(4))
                if kind == STRING:
                    value = _string(file)
                    if key == name:
                        return value
                elif kind in VALUE_BYTES:
                    file.seek(VALUE_BYTES[kind], 1)
                else:
                    return None
    except (OSError, struct.error, UnicodeDecodeError):
        pass
    return None


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 1 << 20:
        raise UnicodeDecodeError("utf-8", b"", 0, 1, "a text of this length is a damaged header")
    return file.read(length).decode("utf-8")
