"""Answers with what people said of them, and the pairs that they make."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean, pstdev
from typing import Any

import numpy as np

SHOWN = 10
"""Of what was left out, by name."""
Prompt = str | list[dict[str, Any]]
"""A text, or the turns before the answer."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer. ratings: everyone's, by rater where they are known (else by 0, 1, ...).

    named: whether the raters are known, so that two answers can be compared rater by rater. mean and spread: where
    the single ratings are not there (spread: None where that is not known either).
    """

    text: str
    source: str = ""
    ratings: Mapping[Any, float] = field(default_factory=dict)
    named: bool = False
    mean: float | None = None
    spread: float | None = None

    @property
    def score(self) -> float | None:
        """The mean rating; None where nobody rated it."""
        return fmean(self.ratings.values()) if self.ratings else self.mean


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, in no order that means anything.

    human: the probability that people prefer a; None where nobody was asked. margin: by how much (a over b), in units
    of the ratings, or as 2 human - 1 where there are only choices. source: file and rows that it came from.
    """

    prompt: Prompt
    a: str
    b: str
    source: str = ""
    human: float | None = None
    margin: float | None = None


def preference_share(a: Candidate, b: Candidate) -> float:
    """The probability that a rater puts a above b, half of the ties counted on each side.

        P = mean over pairs (x of a's ratings, y of b's) of [x > y] + [x = y] / 2

    over the raters of both, each compared with himself, where raters are known and any rated both; else over all
    pairs of ratings (the common-language effect size of McGraw & Wong 1992, Psychological Bulletin 111:361). From means
    and spreads alone, the normal approximation of the same: Phi((m_a - m_b) / sqrt(s_a^2 + s_b^2)).

    Degenerate: no spread (not known, or 0 for both): 1, 0 or, for equal means, 1/2. Raises ValueError where one of the
    two was not rated.
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


def choose(count: int, wanted: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Pairs of the numbers below `count`, i < j, none twice: all (wanted 0), or as many, every number used alike.

    Each round is a permutation, taken two by two.
    """
    every = count * (count - 1) // 2
    if not wanted or wanted >= every:
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
    """What can teach nothing, counted by reason. all: by where it comes from; shown: the first of it."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[dict[str, str]] = []

    @property
    def shown(self) -> list[dict[str, str]]:
        return self.all[:SHOWN]

    def note(self, reason: str, source: str) -> None:
        self[reason] += 1
        self.all.append({"source": source, "reason": reason})


def pair_up(
    prompt: Prompt,
    candidates: Sequence[Candidate],
    wanted: int,
    rng: np.random.Generator,
    dropped: LeftOut,
    min_margin: float = 0.0,
) -> list[Pair]:
    """Pairs of a prompt's answers; those that can teach nothing are left out and noted in `dropped`.

    A pair is left out where its answers are the same, its means equal or within min_margin, or where the means say one
    thing and most pairs of ratings the other.
    """
    out = []
    for i, j in choose(len(candidates), wanted, rng):
        a, b = candidates[i], candidates[j]
        human = margin = None
        source = f"{a.source} {b.source}".strip()
        if a.text.strip() == b.text.strip():
            dropped.note("two answers are the same", source)
            continue
        if a.score is not None and b.score is not None:
            margin = a.score - b.score
            human = preference_share(a, b)
            if margin == 0:
                dropped.note("tie", source)
                continue
            if abs(margin) < min_margin:
                dropped.note("within min_margin", source)
                continue
            if human == 0.5 or (human > 0.5) != (margin > 0):
                dropped.note("means and raters disagree", source)
                continue
        out.append(Pair(prompt, a.text, b.text, source, human, margin))
    return out


def labelled(pair: Pair, p_a: float, margin: float, **more: Any) -> dict[str, Any]:
    """A row of the preference layout: the likelier answer is the chosen one. p_a and margin are of a."""
    first = p_a > 0.5 or (p_a == 0.5 and margin >= 0)
    chosen, rejected = (pair.a, pair.b) if first else (pair.b, pair.a)
    return {
        "prompt": pair.prompt,
        "chosen": chosen,
        "rejected": rejected,
        "probability": p_a if first else 1 - p_a,
        "margin": margin if first else -margin,
        "source": pair.source,
        **more,
    }
