"""Principles: the file that holds them, and drawing some for a question so that nothing else has a part in it."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


from posttrain.core.errors import DataError
from posttrain.core.files import read_small_text
from posttrain.data.readers import packaged_or_own


def read_principles(path: str) -> list[str]:
    """Read principles, one a line; blank lines and lines that begin with # do not count.

    Args:
        path: Path of the file, or packaged:NAME for one that is part of posttrain.

    Raises:
        DataError: The file can't be read or has no principle.
    """
    try:
        text = read_small_text(packaged_or_own(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"principles {path!r} can't be read: {error}. Expected a text file with one a line") from error
    principles = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if not principles:
        raise DataError(f"principles {path!r} holds none: expected one a line")
    return principles


def by_content(*content: Any) -> np.random.Generator:
    """Return a random generator that depends on the values (of JSON) alone, wherever and whenever it is made."""
    text = json.dumps(list(content), sort_keys=True).encode()
    import numpy as np

    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:8], "big"))
