"""Read plain text files, and folders of them, as rows with the column `text`: one a document."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from posttrain.core.files import file_hash
from posttrain.data.bad_rows import BadRow, Row
from posttrain.data.file_shapes import check_encoding
from posttrain.data.table_files import FoundRow, RowSource, not_utf8

TEXT_ENDINGS = (".txt", ".md")
_FILE_BITS = 40
"""A position is the number of the file above these bits, and the place in it below."""


class TextFiles(RowSource):
    """Read documents from text files: each file is one, or several that lines of a separator divide."""

    def __init__(self, files: Sequence[Path], separator: str | None = None) -> None:
        """Make a source.

        Args:
            files: The files, in order.
            separator: A line that consists of it (white space around it aside) ends a document; "": an empty line.
                None: a file is one document.
        """
        for path in files:
            check_encoding(path)
        self.files, self.separator = list(files), separator

    def scan(self, mask: Sequence[int] | None = None) -> Iterator[FoundRow]:
        ordinal = 0
        for number, path in enumerate(self.files):
            with path.open("rb") as f:
                while (place := f.tell()) < os.fstat(f.fileno()).st_size:
                    data = self._document(f)
                    if not data.strip():
                        continue
                    if mask is None or mask[ordinal]:
                        yield FoundRow(ordinal, ordinal + 1, number << _FILE_BITS | place, _row(data))
                    ordinal += 1

    def row_at(self, position: int) -> Row | BadRow:
        with self.files[position >> _FILE_BITS].open("rb") as f:
            f.seek(position & ((1 << _FILE_BITS) - 1))
            return _row(self._document(f))

    def _document(self, f: object) -> bytes:
        """Return what lies between here and the next separator, or the end; the separator is read too."""
        if self.separator is None:
            return f.read()  # type: ignore[attr-defined,no-any-return]
        mark, lines = self.separator.strip().encode(), list[bytes]()
        for line in iter(f.readline, b""):  # type: ignore[attr-defined]
            if line.strip() == mark:
                break
            lines.append(line)
        return b"".join(lines)


def _row(data: bytes) -> Row | BadRow:
    try:
        return {"text": data.removeprefix(b"\xef\xbb\xbf").decode().replace("\r\n", "\n").strip("\n")}
    except UnicodeDecodeError as error:
        return not_utf8(error)


def text_files(path: Path) -> list[Path]:
    """Return the text files of a folder and the folders in it, sorted; hidden ones are left out."""
    found = (p for p in path.rglob("*") if p.suffix.lower() in TEXT_ENDINGS and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))


def folder_hash(path: Path) -> str:
    """Compute the SHA-256 of the names and contents of a folder's text files."""
    lines = (f"{p.relative_to(path).as_posix()} {file_hash(p)}\n" for p in text_files(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
