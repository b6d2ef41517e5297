"""Intervals and paired comparisons for evaluation results: what a difference between two models is worth.

Accuracies get closed forms that hold at 0, at 1 and for few items; perplexity, a ratio of sums, gets the bootstrap.
Everything is a function of numbers, seeded where it draws, and imports numpy alone.

Letters of a paired two-by-two table, used throughout: n items, of which ``gained`` went from wrong to right,
``lost`` from right to wrong; the rest are right both times or wrong both times.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.core.errors import DataError

Interval = tuple[float, float]
Loss = tuple[float, int]  # of an item: negative log-likelihood in nats, and how many tokens it is of
Columns = tuple[NDArray[np.float64], NDArray[np.float64]]
DRAWS = 5000  # bootstrap samples: the ends of a 95% interval then move by about 2% of its width from seed to seed
_CHUNK = 4_000_000  # indices drawn at a time, so that memory stays near 100 MB for any number of items


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Compute the score interval of a proportion.

    (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = successes / n, z the normal quantile of the level.
    Source: Wilson 1927, JASA 22:209; method 3 of Newcombe 1998, Statistics in Medicine 17:857.

    Args:
        successes: 0 gives an interval that starts at exactly 0, n one that ends at exactly 1.
        n: Number of trials; 0 gives (0, 1).
        level: Confidence level.

    Raises:
        ValueError: Not 0 <= successes <= n, or not 0 < level < 1.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, got {successes} of {n}")
    z = _quantile(level)
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def mean_interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """Compute the interval of a mean: Wilson's if all values are 0 or 1, else the percentile bootstrap's.

    One value, or values that are all alike, do not show how they vary: the bootstrap then gives the value itself twice.

    Args:
        values: At least one.
        level: Confidence level.
        seed: Seed of the bootstrap.
    """
    if not values:
        raise ValueError("no values to take the mean of")
    if all(v in (0, 1) for v in values):
        return wilson(sum(v == 1 for v in values), len(values), level)
    x = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    draws, at_once = DRAWS // 5, max(1, 2**16 // len(x))  # few enough for the cache
    counts = [min(at_once, draws - i) for i in range(0, draws, at_once)]
    return _percentiles(np.concatenate([x[rng.integers(0, len(x), (n, len(x)))].mean(1) for n in counts]), level)


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Compute Student's interval of a mean: mean ± t s / sqrt(n), for few values such as one a seed.

    s is the standard deviation with n - 1, t the quantile at (1 + level) / 2 with n - 1 degrees of freedom, by
    bisection of the distribution's finite series (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4).
    Degenerate: one value, which does not show how it varies, gives None; equal values give no width.
    """
    n = len(values)
    if n < 2:
        return None
    _quantile(level)  # checks the level
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    low, high = 0.0, math.pi / 2  # t = sqrt(n - 1) tan(angle)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within_t(middle, n - 1) < level else (low, middle)
    half = math.sqrt(n - 1) * math.tan(low) * error
    return mean - half, mean + half


def _within_t(angle: float, degrees: int) -> float:
    """Return P(|T| <= sqrt(degrees) tan(angle)) of Student's distribution."""
    cosine, odd = math.cos(angle), degrees % 2
    term = total = (cosine if odd else 1.0) if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def interval_of_means(table: NDArray[np.float64], level: float = 0.95, seed: int = 0) -> list[Interval]:
    """Compute the interval of each column's mean, rows being items, with the same draws for all columns.

    Args:
        table: (items, columns), at least one row.
        level: Confidence level.
        seed: Seed of the bootstrap. See `mean_interval`.
    """
    if table.ndim != 2 or not len(table):
        raise ValueError(f"expected a table with at least one row, got shape {table.shape}")
    n = len(table)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS)
    ends = np.quantile(counts @ table / n, [(1 - level) / 2, (1 + level) / 2], axis=0).T
    sure = ((table == 0) | (table == 1)).all(0)
    return [
        wilson(int(column.sum()), n, level) if closed else (float(low), float(high))
        for column, closed, (low, high) in zip(table.T, sure, ends, strict=True)
    ]


def mean_difference(
    before: Sequence[float], after: Sequence[float], level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, Interval, float]:
    """Compute mean after minus mean before on the same items, its interval and two-sided p-value, by paired bootstrap.

    With x the mean of the items' differences in a draw, p as in :func:`perplexity_difference`. Source: Efron &
    Tibshirani 1993, sections 13.3 and 15.4. Degenerate: equal values give (0, no width, 1.0).

    Args:
        before: Values before.
        after: Values after, of the same items in the same order.
        level: Confidence level.
        draws: Bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        (difference, (low, high), p).

    Raises:
        DataError: The two have different lengths.
        ValueError: There are no values.
    """
    if len(before) != len(after):
        raise DataError(f"expected the same items before and after, got {len(before)} before and {len(after)} after")
    if not before:
        raise ValueError("no values to compare")
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    n = len(change)
    means = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws) @ change / n
    crossing = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return float(change.mean()), _percentiles(means, level), min(1.0, 2 * (1 + crossing) / (draws + 1))


def mcnemar_exact(gained: int, lost: int) -> float:
    """Compute the two-sided exact p-value that items changed in both directions equally often.

    p = min(1, 2 sum_{k=0}^{min(gained, lost)} C(m, k) / 2^m), m = gained + lost: only items that changed count.
    Source: McNemar 1947, Psychometrika 12:153, with the binomial in place of chi-squared.

    Degenerate: nothing changed (m = 0) gives 1.0. Raises ValueError for negative counts.
    """
    if gained < 0 or lost < 0:
        raise ValueError(f"expected counts of items, got gained={gained}, lost={lost}")
    m, tail, term = gained + lost, 0, 1
    for k in range(min(gained, lost) + 1):
        tail += term
        term = term * (m - k) // (k + 1)  # C(m, k+1) from C(m, k), exactly
    # Integers until the last step: 2^m overflows a float from m = 1024 on, and a ratio of integers does not.
    return min(1.0, 2 * tail / 2**m)


def paired_difference(both: int, gained: int, lost: int, neither: int, level: float = 0.95) -> tuple[float, Interval]:
    """Compute accuracy after minus accuracy before on the same items, and its interval.

    With d = p_after - p_before, Wilson limits (l, h) of each, and phi the correlation of the paired table:
        low  = d - sqrt((p_a - l_a)^2 - 2 phi (p_a - l_a)(h_b - p_b) + (h_b - p_b)^2)
        high = d + sqrt((h_a - p_a)^2 - 2 phi (h_a - p_a)(p_b - l_b) + (p_b - l_b)^2)
    phi = (both neither - gained lost) / sqrt(product of the four margins), its numerator reduced by n/2 if it is
    positive, to no less than 0; a margin of zero makes phi 0.
    Source: method 10 of Newcombe 1998, Statistics in Medicine 17:2635; its properties are reviewed in Fagerland,
    Lydersen & Laake 2014, Statistics in Medicine 33:2850. Chosen over the interval of Agresti & Min 2005 because it
    is built from the very Wilson intervals printed beside it, stays within [-1, 1], and keeps a width when no
    item changed (theirs adds pseudo-counts). It is not the inverse of the exact test: near p = 0.05 one may exclude
    zero where the other does not.

    Args:
        both: Items right both times.
        gained: Items that went from wrong to right.
        lost: Items that went from right to wrong.
        neither: Items wrong both times.
        level: Confidence level.

    Raises:
        ValueError: A count is negative, or there are no items.
    """
    n = both + gained + lost + neither
    if min(both, gained, lost, neither) < 0 or n == 0:
        raise ValueError(f"expected counts of items, at least one, got {both=}, {gained=}, {lost=}, {neither=}")
    after, before = both + gained, both + lost
    p_a, p_b = after / n, before / n
    (l_a, h_a), (l_b, h_b) = wilson(after, n, level), wilson(before, n, level)
    margins = after * (n - after) * before * (n - before)
    numerator = float(both * neither - gained * lost)
    if numerator > 0:
        numerator = max(numerator - n / 2, 0.0)
    phi = numerator / math.sqrt(margins) if margins else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    d = (gained - lost) / n
    return d, (max(d - reach(p_a - l_a, h_b - p_b), -1.0), min(d + reach(h_a - p_a, p_b - l_b), 1.0))


def perplexity(items: Sequence[Loss]) -> float:
    """Compute exp(sum of negative log-likelihoods / number of tokens); items are (nats, tokens).

    Raises DataError if there is no token at all; infinite beyond the range of a float.
    """
    nll, count = _columns(items)
    return float(_ratio(nll.sum(), count.sum()))


def perplexity_interval(
    items: Sequence[Loss], level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """Compute :func:`perplexity` and its percentile bootstrap interval.

    Items are drawn with replacement, not tokens, since the tokens of an item depend on each other.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    Degenerate: one item, or equal items, give an interval of no width.

    Args:
        items: (nats, tokens) of each item.
        level: Confidence level.
        draws: Bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        (value, low, high).
    """
    low, high = _percentiles(_resample(_columns(items), draws=draws, seed=seed)[0], level)
    return perplexity(items), low, high


def perplexity_difference(
    before: Sequence[Loss],
    after: Sequence[Loss],
    *,
    ratio: bool = False,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, Interval, float]:
    """Compute perplexity after minus before (or after / before), its interval and p-value, on the same items.

    Paired bootstrap: the same items are drawn for both models, so what makes an item hard for both cancels. With x
    the difference in a draw, p = min(1, 2 (1 + min(#{x <= 0}, #{x >= 0})) / (draws + 1)), at least 2 / (draws + 1).
    Source: Efron & Tibshirani 1993, sections 13.3 and 15.4 (counting the sample itself, hence the ones);
    the pairing as in Koehn 2004, EMNLP, section 5.

    Args:
        before: (nats, tokens) of each item before.
        after: The same items after, in the same order; token counts differ if tokenizers do.
        ratio: after / before instead of the difference.
        level: Confidence level.
        draws: Bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        (difference, (low, high), two-sided p). Degenerate: identical models give (0 or 1, no width, 1.0).
    """
    if len(before) != len(after):
        raise DataError(f"expected the same items before and after, got {len(before)} before and {len(after)} after")
    draws_b, draws_a = _resample(_columns(before), _columns(after), draws=draws, seed=seed)
    crossing = min(int((draws_a <= draws_b).sum()), int((draws_a >= draws_b).sum()))
    p = min(1.0, 2 * (1 + crossing) / (draws + 1))
    if ratio:
        return perplexity(after) / perplexity(before), _percentiles(draws_a / draws_b, level), p
    return perplexity(after) - perplexity(before), _percentiles(draws_a - draws_b, level), p


def paired_change(
    before: Sequence[float], after: Sequence[float], *, closed: bool = True, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Compute mean after minus mean before on the same items, with interval (low, high), p-value and test.

    Args:
        before: Values before.
        after: Values after, of the same items in the same order.
        closed: Use `paired_difference` and McNemar's exact test if all values are 0 or 1. Else: paired bootstrap.
        level: Confidence level.
        seed: Seed of the bootstrap.
    """
    if not closed or not zero_or_one([*before, *after]):
        difference, (low, high), p = mean_difference(before, after, level=level, seed=seed)
        return {"difference": difference, "low": low, "high": high, "test": "paired bootstrap of means", "p_value": p}
    counts = Counter((bool(a), bool(b)) for a, b in zip(before, after, strict=True))
    gained, lost = counts[False, True], counts[True, False]
    difference, (low, high) = paired_difference(counts[True, True], gained, lost, counts[False, False], level)
    p = mcnemar_exact(gained, lost)
    return {"difference": difference, "low": low, "high": high, "test": "McNemar exact", "p_value": p}


def zero_or_one(values: Sequence[float]) -> bool:
    """Return True if every item is right or wrong, and none in between."""
    return all(v in (0.0, 1.0) for v in values)


def _quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, such as 0.95, got {level}")
    return NormalDist().inv_cdf(0.5 + level / 2)


def _columns(items: Sequence[Loss]) -> Columns:
    table = np.array(items, dtype=np.float64).reshape(-1, 2)
    if not (table[:, 1] > 0).any():
        raise DataError("expected items with at least one token that carries loss, got none; see `posttrain inspect`")
    return table[:, 0], table[:, 1]


def _ratio(nll: Any, count: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.exp(nll / count)


def _resample(*models: Columns, draws: int, seed: int) -> list[NDArray[np.float64]]:
    """Compute perplexities of each model in ``draws`` resamples of the items, the same items for all."""
    rng, n = np.random.default_rng(seed), len(models[0][0])
    out = [np.empty(draws) for _ in models]
    step = max(1, _CHUNK // n)
    for start in range(0, draws, step):
        index = rng.integers(n, size=(min(step, draws - start), n))
        for perplexities, (nll, count) in zip(out, models, strict=True):
            total = np.maximum(count[index].sum(1), 1.0)  # a draw of nothing but items without tokens
            perplexities[start : start + len(index)] = _ratio(nll[index].sum(1), total)
    return out


def _percentiles(values: NDArray[np.float64], level: float) -> Interval:
    _quantile(level)  # checks the level
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
