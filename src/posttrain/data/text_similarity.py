"""ROUGE-L between texts, and an index that finds the texts near a new one without comparing it with all."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence

UNSPACED_SCRIPTS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),
    (0x3040, 0x30FF),  # Japanese syllables
    (0x31F0, 0x31FF),
    (0x3400, 0x9FFF),  # Chinese characters
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""Scripts that are written without spaces: every letter is a word."""
UNSPACED = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED_SCRIPTS)
"""Their characters, for the brackets of a regular expression."""
_MARKS = (
    "\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670"
    "\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\u0711\u0730-\u074a\u0900-\u0963\u0966-\u0dff\u0f18-\u0f84\u1ab0-\u1aff"
)
"""Marks that belong to the letter before them, and the scripts of India: without their vowel signs, many words of Hindi
or Tamil would be the same."""
_ASCII_WORDS = re.compile("[^\\W_]+")
_WORDS = re.compile(rf"[{UNSPACED}]|(?:[^\W_{UNSPACED}][{_MARKS}]*)+")
"""A word of letters and digits of any script; in scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese)
every character is one."""


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; of an ASCII text those of the package rouge-score, without stemming."""
    return (_ASCII_WORDS if text.isascii() else _WORDS).findall(text.lower())


def common_subsequence(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the length of the longest common subsequence, a row of its table in one operation on a large integer."""
    places: dict[object, int] = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full  # a zero bit: the subsequence grows at this place
    for item in b:
        met = row & places.get(item, 0)
        row = ((row + met) | (row - met)) & full
    return len(a) - row.bit_count()


def rouge_l(a: Sequence[object], b: Sequence[object]) -> float:
    """Compute ROUGE-L of two sequences of words: 2 lcs / (len(a) + len(b)), the F measure; 0 if either is empty."""
    return 2 * common_subsequence(a, b) / (len(a) + len(b)) if a and b else 0.0


class RougeIndex:
    """Find texts whose ROUGE-L with a new text is at least `limit`, exactly.

    The longest common subsequence is no longer than the words that two texts share, each as often as both have it.
    These are counted for all texts at once, from lists of the texts of each word; the few that share enough are
    compared.
    """

    def __init__(self, limit: float, texts: Iterable[str] = ()) -> None:
        self.limit = limit
        self.texts: list[list[int]] = []
        self._lengths = array("q")
        self._numbers: dict[str, int] = {}
        self._holders: dict[tuple[int, int], array[int]] = {}
        """Texts that hold a word at least so many times."""
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self.texts)

    def _encoded(self, text: str) -> list[int]:
        return [self._numbers.setdefault(word, len(self._numbers)) for word in words_of(text)]

    @staticmethod
    def _counted(words: Sequence[int]) -> list[tuple[int, int]]:
        seen: dict[int, int] = {}
        out = []
        for word in words:
            seen[word] = seen.get(word, 0) + 1
            out.append((word, seen[word]))
        return out

    def add(self, text: str) -> None:
        """Add a text; its number is the count of those before it."""
        words = self._encoded(text)
        for key in self._counted(words):
            self._holders.setdefault(key, array("q")).append(len(self.texts))
        self.texts.append(words)
        self._lengths.append(len(words))

    def nearest(self, text: str) -> tuple[float, int | None]:
        """Return the highest ROUGE-L with a text of the index, if it is at least the limit, and that text's number.

        Returns:
            (0.0, None) if there is none; of several the first.
        """
        import numpy as np  # here: recipes are checked without it

        words = [self._numbers.get(word, -1) for word in words_of(text)]  # new words are in no text of the index
        lists = [self._holders[key] for key in self._counted(words) if key in self._holders]
        if not lists:
            return 0.0, None
        shared = np.bincount(np.concatenate([np.frombuffer(x, np.int64) for x in lists]), minlength=len(self.texts))
        needed = self.limit * (len(words) + np.frombuffer(self._lengths, np.int64)) / 2
        best: tuple[float, int | None] = (0.0, None)
        for i in np.flatnonzero((shared >= needed - 1e-9) & (shared > 0)).tolist():
            if 2 * shared[i] > best[0] * (len(words) + len(self.texts[i])):  # else it can't be higher
                score = rouge_l(words, self.texts[i])
                if score >= self.limit - 1e-12 and score > best[0]:
                    best = score, i
        return best


def interval_counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """Return how many values lie in [edges[i], edges[i + 1]); the last interval holds all from its edge on."""
    import numpy as np  # here: recipes are checked without it

    places = np.searchsorted(np.asarray(edges), np.asarray(values), side="right") - 1
    return np.bincount(places[places >= 0], minlength=len(edges)).tolist()  # type: ignore[no-any-return]
