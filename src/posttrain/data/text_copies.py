"""Tell whether a text is a copy of another one, by their words, and find the words of a template that texts share."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from posttrain.data.text_similarity import common_subsequence, words_of

SEVERAL = 6
"""Words from which a text is the same as one of the same words in another order."""
LONG_INPUT = 13
"""Words that tell a text from others whatever else is said of it."""
LONG_LETTERS = 40
"""Letters that such a text has too, where it is looked for inside of a longer one."""
NEARLY_ALL = 0.9
COPY_LIMIT = 0.7
COMPARED_PAIRS = 2000
"""Pairs of texts that are compared to find the words of a template."""
CHANCE = 0.001
"""Share of such pairs that may be copies without a template."""
TEMPLATE_SHARES = (0.5, 0.2, 0.1, 0.05)
"""Shares of the texts: words that more of them have are those of a template."""
FEWEST = 10
"""Texts that have a word of a template, at least."""


def compared_words(text: str) -> list[str]:
    """Return the words of a text for comparing: letters with separate accents are the same as those with their own."""
    return words_of(text if text.isascii() else unicodedata.normalize("NFKC", text))


def _is_long(words: Sequence[str]) -> bool:
    """Return True if words tell a text from others wherever they stand: a word may be one character of Thai."""
    return len(words) >= LONG_INPUT and sum(map(len, words)) >= LONG_LETTERS


def is_copy(a: Sequence[str], b: Sequence[str], limit: float) -> bool:
    """Return True if one text is a copy of another one, by their words.

    That is if ROUGE-L is at least the limit, or 90% of the words of both are the same in any order (of at least
    SEVERAL words), or 90% of those of one, if they are LONG_INPUT at least (with LONG_LETTERS letters), are in the
    other in their order.

    Args:
        a: Words of one text.
        b: Words of another one.
        limit: Lowest ROUGE-L of copies.
    """
    least, both = min(len(a), len(b)), len(a) + len(b)
    inside = len(a) != len(b) and _is_long(min(a, b, key=len))
    if 2 * least < limit * both - 1e-9 and not inside:
        return False
    common = set(a) & set(b)
    most = min(sum(map(common.__contains__, a)), sum(map(common.__contains__, b)))  # quick, and at least `shared`
    if 2 * most < limit * both - 1e-9 and not (inside and most >= NEARLY_ALL * least):
        return False
    shared = sum((Counter(a) & Counter(b)).values())
    if least >= SEVERAL and 2 * shared >= NEARLY_ALL * both:
        return True
    contained = inside and shared >= NEARLY_ALL * least
    if not contained and 2 * shared < limit * both - 1e-9:  # the longest common subsequence is no longer than this
        return False
    longest = common_subsequence(a, b)
    return 2 * longest >= limit * both - 1e-9 or (contained and longest >= NEARLY_ALL * least)


def core_text(text: str, template: frozenset[str]) -> str:
    """Return a text without the words of a template at its beginning and its end; all of it if it has no others."""
    if not template:
        return text
    own = [m for m in re.finditer(r"\S+", text) if any(w not in template for w in compared_words(m[0]))]
    return text[own[0].start() : own[-1].end()] if own else text


def template_words(texts: Sequence[Sequence[str]]) -> frozenset[str]:
    """Return the words of a template, such as "What is the capital of", that make unrelated texts similar.

    These are words that more than a share of the texts have, with the highest share by which hardly any two random
    texts are copies. Texts that are similar without a template need none to be left out.

    Args:
        texts: Words of each of some texts.
    """
    from posttrain.data.instruction_mixing import Draws  # here: recipes are checked without numpy

    holders = Counter(word for words in texts for word in set(words))
    draws = Draws(len(texts))
    pairs = (
        [(draws.below(len(texts)), draws.below(len(texts))) for _ in range(COMPARED_PAIRS)] if len(texts) > 1 else []
    )
    best: tuple[float, frozenset[str]] = (2 * len(pairs), frozenset())
    for share in (1.0, *TEMPLATE_SHARES):
        common = frozenset(w for w, n in holders.items() if n > max(FEWEST, share * len(texts)))
        if share < 1 and common == best[1]:
            continue
        left = [[word for word in words if word not in common] or words for words in texts]
        copies = sum(i != j and is_copy(left[i], left[j], COPY_LIMIT) for i, j in pairs)
        if 2 * copies <= best[0]:  # a few copies less by chance are no template
            best = copies, common
        if copies <= CHANCE * len(pairs):
            break
    return best[1]
