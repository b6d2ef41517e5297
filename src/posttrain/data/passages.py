"""Passages of documents, and those that fit a text best, by BM25.

Source: Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond (2009), equation 3.15.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.core.files import read_lines, read_small_text
from posttrain.data.readers import packaged_or_own
from posttrain.data.text_similarity import words_of

K1, B = 1.5, 0.75
"""How soon repeated words stop to count, and how much the length of a passage does."""
LONGEST_PASSAGE = 1000
"""Characters of a passage; a longer paragraph is split."""


class PassageIndex:
    """Passages, and which of them contain each word."""

    def __init__(self, passages: Sequence[str]) -> None:
        self.passages = list(passages)
        counts = [Counter(words_of(p)) for p in self.passages]
        self.lengths = [c.total() for c in counts]
        self.mean = sum(self.lengths) / len(counts) if counts else 0.0
        self.found: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for i, count in enumerate(counts):
            for word, n in count.items():
                self.found[word].append((i, n))

    def nearest(self, query: str, most: int) -> list[str]:
        """Return the passages that fit a text best, best first; none that shares no word with it.

        Args:
            query: The text.
            most: Number of passages at most.
        """
        scores: dict[int, float] = defaultdict(float)
        for word in sorted(set(words_of(query))):
            places = self.found.get(word, [])
            rarity = math.log(1 + (len(self.passages) - len(places) + 0.5) / (len(places) + 0.5))
            for i, n in places:
                norm = K1 * (1 - B + B * self.lengths[i] / self.mean)
                scores[i] += rarity * n * (K1 + 1) / (n + norm)
        best = sorted(scores, key=lambda i: (-scores[i], i))[:most]
        return [self.passages[i] for i in best]


def read_passages(source: str, column: str) -> list[str]:
    """Return the passages of a document, or of all documents of a folder, in order.

    Of .jsonl files each row is a passage; of other files, which are read as text, each paragraph.

    Args:
        source: A file, or a folder with .txt, .md and .jsonl files.
        column: Column of the text in rows.

    Raises:
        DataError: It can't be read, or has no passage.
    """
    path = packaged_or_own(source)
    out = [p for file in document_files(source) for p in _passages(file, column)]
    if not out:
        what = "a folder without .txt, .md or .jsonl files that have text" if path.is_dir() else "empty"
        raise DataError(f"documents {source!r}: {what}. Expected a text file, rows, or a folder of such files")
    return out


def document_files(source: str) -> list[Path]:
    """Return the files of a source of documents, in order."""
    path = packaged_or_own(source)
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".jsonl") and p.is_file())


def _passages(file: Path, column: str) -> list[str]:
    if file.suffix == ".jsonl":
        out = []
        for number, row in enumerate(_rows(file), 1):
            if not isinstance(row.get(column), str):
                raise DataError(
                    f"{file}:{number}: no text in {column!r}; it has {sorted(row)}. Name the column: `column`"
                )
            out += _pieces(row[column])
        return out
    try:
        text = read_small_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"documents {str(file)!r} can't be read: {error}. Expected a text file in UTF-8") from error
    return [piece for paragraph in re.split(r"\n\s*\n", text) for piece in _pieces(paragraph)]


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        return read_lines(file)
    except (OSError, ValueError) as error:
        raise DataError(f"documents {str(file)!r} can't be read: {error}. Expected rows as JSON Lines") from error


def _pieces(paragraph: str) -> list[str]:
    """Return a paragraph, split at spaces into pieces of about equal length if it is too long."""
    text = " ".join(paragraph.split())
    out = []
    while len(text) > LONGEST_PASSAGE:
        cut = text.rfind(" ", LONGEST_PASSAGE // 2, LONGEST_PASSAGE)
        cut = LONGEST_PASSAGE if cut < 0 else cut
        out.append(text[:cut].strip())
        text = text[cut:].strip()
    return [*out, text] if text else out
