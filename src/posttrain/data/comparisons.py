"""Compare rated answers: preference shares, and pairs of the answers to one prompt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist, fmean, pstdev
from typing import Any

import numpy as np

Prompt = str | list[dict[str, Any]]
"""A text, or the turns before the answer."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Hold an answer and its ratings.

    Attributes:
        text: The answer.
        source: Place of the row, `file:row`.
        ratings: Ratings by rater if raters are known, or else by 0, 1, ...
        named: True if raters are known, so that two answers can be compared rater by rater.
        mean: Mean rating if single ratings are unknown.
        spread: Standard deviation of the ratings if single ratings are unknown; None if it is unknown too.
    """

    text: str
    source: str = ""
    ratings: Mapping[Any, float] = field(default_factory=dict)
    named: bool = False
    mean: float | None = None
    spread: float | None = None

    @property
    def score(self) -> float | None:
        """Return the mean rating; None if nobody rated the answer."""
        return fmean(self.ratings.values()) if self.ratings else self.mean


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """Hold two answers to one prompt; their order has no meaning.

    Attributes:
        prompt: Text, or turns.
        a: One answer.
        b: The other answer.
        source: Places of the rows.
        human: Probability that people prefer a; None if nobody was asked.
        margin: By how much a is better, in units of the ratings, or 2 human - 1 if there are only choices.
    """

    prompt: Prompt
    a: str
    b: str
    source: str = ""
    human: float | None = None
    margin: float | None = None


def preference_share(a: Candidate, b: Candidate) -> float:
    """Return the probability that a rater puts a above b, half of the ties counted on each side.

        P = mean over pairs (x of a's ratings, y of b's) of [x > y] + [x = y] / 2

    over the raters of both, each compared with himself, if raters are known and any rated both; or else over all pairs
    of ratings (the common-language effect size of McGraw & Wong 1992, Psychological Bulletin 111:361). From means and
    spreads alone, the normal approximation of the same: Phi((m_a - m_b) / sqrt(s_a^2 + s_b^2)).

    Degenerate: no spread (unknown, or 0 for both): 1, 0 or, for equal means, 1/2. Raises ValueError if one of the two
    was not rated.
    """
    if a.ratings and b.ratings:
        if a.named and b.named and (both := a.ratings.keys() & b.ratings.keys()):
            return fmean(_above(a.ratings[r], b.ratings[r]) for r in both)
        y = np.sort(np.array(list(b.ratings.values())))
        x = np.array(list(a.ratings.values()))
        below, up_to = np.searchsorted(y, x, "left"), np.searchsorted(y, x, "right")
        return float((below + up_to).sum()) / (2 * len(x) * len(y))
    if a.score is None or b.score is None:
        raise ValueError(f"expected two rated answers; {(a if a.score is None else b).source or 'one'} has no rating")
    variance = 0.0
    for c in (a, b):
        spread = pstdev(c.ratings.values()) if c.ratings else c.spread
        variance += 0.0 if spread is None else spread**2
    if variance == 0:
        return _above(a.score, b.score)
    return NormalDist().cdf((a.score - b.score) / math.sqrt(variance))


def _above(x: float, y: float) -> float:
    return 0.5 if x == y else float(x > y)


def choose_pairs(count: int, wanted: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draw pairs (i, j), i < j, of the numbers below `count`, none twice.

    Each round is a permutation, taken two by two, so that every number is used equally often.

    Args:
        count: Number of things to pair.
        wanted: Number of pairs; 0 for all.
        rng: Source of randomness.

    Returns:
        All pairs, or `wanted` of them.
    """
    if not wanted or wanted >= count * (count - 1) // 2:
        return [(i, j) for i in range(count) for j in range(i + 1, count)]
    out: dict[tuple[int, int], None] = {}
    while len(out) < wanted:
        order = rng.permutation(count).tolist()
        for i, j in zip(order[::2], order[1::2], strict=False):
            out.setdefault((min(i, j), max(i, j)))
            if len(out) == wanted:
                break
    return list(out)


class LeftOut(Counter[str]):
    """Count by reason what teaches nothing.

    Attributes:
        all: Place and reason of each item.
    """

    def __init__(self) -> None:
        super().__init__()
        self.all: list[dict[str, str]] = []

    def note(self, reason: str, source: str) -> None:
        """Count one item."""
        self[reason] += 1
        self.all.append({"source": source, "reason": reason})


def pair_up(
    prompt: Prompt,
    candidates: Sequence[Candidate],
    wanted: int,
    rng: np.random.Generator,
    dropped: LeftOut,
    min_margin: float = 0.0,
) -> list[AnswerPair]:
    """Make pairs of a prompt's answers, without those that teach nothing.

    A pair teaches nothing if its answers are the same, its means equal or within min_margin, or if the means say one
    thing and most pairs of ratings the other.

    Args:
        prompt: The prompt.
        candidates: Its answers.
        wanted: Number of pairs that are drawn; 0 for all.
        rng: Source of randomness.
        dropped: Gets the pairs left out.
        min_margin: Smallest difference of the mean ratings.
    """
    out = []
    for i, j in choose_pairs(len(candidates), wanted, rng):
        a, b = candidates[i], candidates[j]
        pair = AnswerPair(prompt, a.text, b.text, f"{a.source} {b.source}".strip())
        if a.score is not None and b.score is not None:
            pair = replace(pair, human=preference_share(a, b), margin=a.score - b.score)
        if reason := _teaches_nothing(pair, min_margin):
            dropped.note(reason, pair.source)
        else:
            out.append(pair)
    return out


def _teaches_nothing(pair: AnswerPair, min_margin: float) -> str:
    if pair.a.strip() == pair.b.strip():
        return "two answers are the same"
    if pair.margin is None or pair.human is None:
        return ""
    if pair.margin == 0:
        return "tie"
    if abs(pair.margin) < min_margin:
        return "within min_margin"
    return "means and raters disagree" if pair.human == 0.5 or (pair.human > 0.5) != (pair.margin > 0) else ""


def labelled_row(pair: AnswerPair, p_a: float, margin: float, **more: Any) -> dict[str, Any]:
    """Return a row of the preference layout, in which the likelier answer is the chosen one.

    Args:
        pair: The two answers.
        p_a: Probability that a is the better one.
        margin: By how much a is better.
        more: Other columns.
    """
    first = p_a > 0.5 or (p_a == 0.5 and margin >= 0)
    return {
        "prompt": pair.prompt,
        "chosen": pair.a if first else pair.b,
        "rejected": pair.b if first else pair.a,
        "probability": p_a if first else 1 - p_a,
        "margin": margin if first else -margin,
        "source": pair.source,
        **more,
    }
