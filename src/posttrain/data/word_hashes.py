"""Letters, words and hashes of many texts at once, in numpy, for the comparison of millions of texts."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from posttrain.data.text_similarity import UNSPACED_SCRIPTS

BATCH_LETTERS = 1 << 20
"""Characters of a batch of texts, if no single text is longer."""
BASE = np.uint64(0x9E3779B97F4A7C15 | 1)
"""Base of the polynomial hash: odd, so that it has an inverse modulo 2^64."""
INVERSE = np.uint64(pow(int(BASE), -1, 1 << 64))
SEPARATED = np.uint32(1 << 21)
"""Added to a digit that follows another digit with something between them: 12 3 is not 1 23."""
SIGN = np.uint32(1 << 22)
"""Added, times the sign's number, to a letter or digit after a sign of arithmetic: 12 + 3 is not 12 - 3."""
LETTER = np.uint32((1 << 21) - 1)
_SURE_SIGNS, _UNSURE_SIGNS = "+=<>^\u00d7\u00f7\u2212\u2264\u2265\u2260\u221a", "-*/%"
"""Signs that are arithmetic beside a digit, and those that are punctuation unless they stand between two numbers, apart
from the words on both sides, or before a negative number."""
_SKIPPED, _BETWEEN, _SPACE, _APOSTROPHE, _COMMA, _MARK, _LETTER, _DIGIT, _WORD = range(9)


@lru_cache(1)
def _classes() -> NDArray[np.uint8]:
    """Return the class of every code point."""
    out = np.full(0x110000, _BETWEEN, np.uint8)
    by_category = {"L": _LETTER, "N": _DIGIT, "M": _MARK}
    for code in range(0x40000):  # planes above hold tags, variation selectors and private use
        category = unicodedata.category(chr(code))
        if category[0] in by_category:
            out[code] = by_category[category[0]]
        elif category == "Cf":  # soft hyphen, zero-width space and joiners, direction marks: invisible
            out[code] = _SKIPPED
    for low, high in UNSPACED_SCRIPTS:
        part = out[low : high + 1]
        part[part == _LETTER] = _WORD
    out[0xE0000:0xE1000] = out[0xFE00:0xFE10] = _SKIPPED  # tags, and what chooses the colour of an emoji
    out[0x20D0:0x2100] = _BETWEEN  # marks around symbols
    out[[code for code in range(0x3001) if chr(code).isspace()]] = _SPACE
    out[[ord(c) for c in "'`\u00b4\u02bc\u2019"]] = _APOSTROPHE
    out[ord(",")] = _COMMA
    return out


def folded(text: str) -> str:
    """Return a text without differences of case, of composed and decomposed characters, and of widths of characters."""
    if text.isascii():
        return text.lower()
    lower = unicodedata.normalize("NFKC", text).casefold()
    lower = lower.replace("i\u0307", "i").replace("\u0131", "i")  # Turkish: both lose their form in upper case
    return unicodedata.normalize("NFKC", lower)


@dataclass(frozen=True)
class WordBatch:
    """Letters and digits of several texts end to end, without what is between them, and where words begin.

    Attributes:
        letters: Code points, lower case, some with SEPARATED or SIGN added.
        starts: Places of letters where a word begins: after anything that is no letter or digit; apostrophes, and
            commas before three digits, do not count.
        spaced: For each of `starts`, True if white space lies before it, or its script has no spaces: what counts as
            a word in GPT-3's n-grams, where punctuation is removed first.
        text_ends: Place in `letters` where each text ends.
        sums: (letters + 1) sums of letter times BASE to the power of its place, modulo 2^64.
        inverses: Powers of INVERSE by place.
    """

    letters: NDArray[np.uint32]
    starts: NDArray[np.int64]
    spaced: NDArray[np.bool_]
    text_ends: NDArray[np.int64]
    sums: NDArray[np.uint64]
    inverses: NDArray[np.uint64]

    def hashes(
        self, begins: NDArray[np.int64], ends: NDArray[np.int64], mask: np.uint32 = LETTER
    ) -> NDArray[np.uint64]:
        """Return a hash of the letters of each span: their sum times BASE to the power of the place in it, then mixed.

        Args:
            begins: Place of the first letter of each span.
            ends: Place after its last letter.
            mask: Bits that count of each first letter: what stands before the span makes no difference.
                ~SEPARATED: a sign
                of arithmetic does.
        """
        rest = self.sums[ends] - self.sums[begins + 1]
        first = (self.letters[begins] & mask).astype(np.uint64) + np.uint64(1)
        return mix(first + rest * self.inverses[begins])

    def word_starts_of_texts(self) -> NDArray[np.int64]:
        """Return the number of the first word start of each text, and last the number of all."""
        begins = np.concatenate([[0], self.text_ends])
        return np.searchsorted(self.starts, begins).astype(np.int64)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit of each number over all bits (the last step of splitmix64)."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


_POWERS: dict[int, NDArray[np.uint64]] = {}
"""Powers of each base that were needed so far: they are the same for every batch."""


def _powers(base: np.uint64, count: int) -> NDArray[np.uint64]:
    known = _POWERS.get(int(base))
    if known is None or len(known) < count:
        out = np.full(1 << max(12, (count - 1).bit_length()), base, np.uint64)
        out[0] = 1
        known = _POWERS[int(base)] = np.cumprod(out, dtype=np.uint64)
    return known[:count]


def word_batch(texts: Sequence[str]) -> WordBatch:
    """Return the letters and words of texts."""
    parts = [folded(text) + "\n" for text in texts]
    codes = np.frombuffer("".join(parts).encode("utf-32-le", "surrogatepass"), np.uint32)
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    kinds = _classes()[codes]
    if not kinds.all():
        visible = np.flatnonzero(kinds != _SKIPPED)
        codes, kinds, ends = codes[visible], kinds[visible], np.searchsorted(visible, ends)
    places = np.flatnonzero(kinds >= _MARK)
    letters, kept_kinds = codes[places], kinds[places]
    text_ends = np.searchsorted(places, ends).astype(np.int64)
    begins, spaced = _boundaries(kinds, places, text_ends)
    digit = kept_kinds == _DIGIT
    apart = np.flatnonzero(digit[1:] & digit[:-1] & begins[1:]) + 1
    letters[np.setdiff1d(apart, text_ends, assume_unique=False)] += SEPARATED
    _add_signs(letters, codes, kinds, places, begins)
    starts = np.flatnonzero(begins)
    count = len(letters)
    sums = np.zeros(count + 1, np.uint64)
    values = letters.astype(np.uint64)
    values += np.uint64(1)
    values *= _powers(BASE, count)
    np.cumsum(values, out=sums[1:])
    return WordBatch(letters, starts, spaced[starts], text_ends, sums, _powers(INVERSE, count))


def _boundaries(
    kinds: NDArray[np.uint8], places: NDArray[np.int64], text_ends: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return for each letter whether a word begins there, and whether it is one of those between white space.

    Args:
        kinds: Class of each character.
        places: Places of the letters among the characters.
        text_ends: Place in `places` where each text ends.
    """
    kept = kinds[places]
    begins = np.ones(len(places), bool)
    begins[1:] = places[1:] - places[:-1] > 1
    after = np.flatnonzero(begins)[1:]  # letters with something before them, which is looked at; those are few
    at, last = places[after], places[after - 1]
    joined = (at - last == 2) & (kinds[at - 1] == _APOSTROPHE)
    comma = np.flatnonzero((at - last == 2) & (kinds[at - 1] == _COMMA) & (kept[after] == _DIGIT))
    if len(comma):
        padded, first = np.concatenate([kinds, np.zeros(4, np.uint8)]), at[comma]
        thousands = (padded[first - 2] == _DIGIT) & (padded[first + 3] != _DIGIT)
        joined[comma] = thousands & (padded[first + 1] == _DIGIT) & (padded[first + 2] == _DIGIT)
    begins[after[joined]] = False
    spaces = np.cumsum(kinds == _SPACE, dtype=np.int32)
    spaced = begins.copy()
    spaced[after] &= spaces[at] > spaces[last]
    if (own := kept == _WORD).any():
        own[1:] |= own[:-1]
        own &= kept != _MARK
        begins |= own
        spaced |= own
    firsts = text_ends[:-1][text_ends[:-1] < len(places)]
    begins[firsts] = spaced[firsts] = True
    return begins, spaced


@lru_cache(1)
def _sign_numbers() -> NDArray[np.uint8]:
    out = np.zeros(0x110000, np.uint8)
    for number, sign in enumerate(_SURE_SIGNS + _UNSURE_SIGNS, 1):
        out[ord(sign)] = number
    out[ord("\u2212")] = out[ord("-")]
    return out


def _add_signs(
    letters: NDArray[np.uint32],
    codes: NDArray[np.uint32],
    kinds: NDArray[np.uint8],
    places: NDArray[np.int64],
    begins: NDArray[np.bool_],
) -> None:
    """Add SIGN times the number of the sign to each letter that follows a sign of arithmetic in its text."""
    numbers = _sign_numbers()[codes]
    at = np.flatnonzero(numbers)
    after = np.searchsorted(places, at)
    at, after = at[(after > 0) & (after < len(places))], after[(after > 0) & (after < len(places))]
    before = places[after - 1]
    lines = np.concatenate([[0], np.cumsum(codes == 0x0A, dtype=np.int32)])
    digit_before, digit_after = kinds[before] == _DIGIT, kinds[places[after]] == _DIGIT
    same_line = lines[places[after]] == lines[before]
    left, right = kinds[at - 1] == _SPACE, kinds[at + 1] == _SPACE
    unsure = np.isin(codes[at], [ord(c) for c in _UNSURE_SIGNS])
    negative = left & (kinds[at + 1] == _DIGIT) & (codes[at] == ord("-"))
    clear = (digit_before & digit_after) | (left & right & (digit_before | digit_after)) | negative
    chosen = same_line & np.where(unsure, clear, digit_before | digit_after) & begins[after]
    np.add.at(letters, after[chosen], SIGN * numbers[at[chosen]].astype(np.uint32))


def row_batches(rows: Iterable[str | Sequence[str]]) -> Iterator[list[list[str]]]:
    """Yield rows, each a list of its texts, in lists of about BATCH_LETTERS characters."""
    batch: list[list[str]] = []
    size = 0
    for row in rows:
        texts = [row] if isinstance(row, str) else list(row)
        batch.append(texts)
        size += sum(map(len, texts)) + len(texts) + 1
        if size >= BATCH_LETTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
