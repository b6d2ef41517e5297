"""Statistics of evaluation: against published examples, and against enumeration written without the library."""

import itertools
import math
import random

import numpy as np
import pytest

from posttrain.core import item_statistics
from posttrain.core import statistics as stats
from posttrain.core.errors import DataError

Z = 1.959963984540054  # two-sided 95% point of the normal distribution, from tables


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, Table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published(successes, n, low, high):
    assert stats.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (3, 7), (100, 400), (7, 7)])
def test_wilson_solves_its_equation(successes, n):
    """The ends are where |p - successes/n| = z sqrt(p(1-p)/n), found by bisection."""

    def root(inside, outside):
        for _ in range(200):
            middle = (inside + outside) / 2
            close = abs(middle - successes / n) <= Z * math.sqrt(middle * (1 - middle) / n)
            inside, outside = (middle, outside) if close else (inside, middle)
        return inside

    p = successes / n
    assert stats.wilson(successes, n) == pytest.approx((root(p, 0.0), root(p, 1.0)), abs=1e-9)


def test_wilson_edges():
    assert stats.wilson(0, 0) == (0.0, 1.0)
    assert stats.wilson(0, 9)[0] == 0.0 and stats.wilson(9, 9)[1] == 1.0
    low, high = stats.wilson(8, 10, level=0.99)
    assert low < stats.wilson(8, 10)[0] and high > stats.wilson(8, 10)[1]
    for bad in [(-1, 3), (4, 3)]:
        with pytest.raises(ValueError, match="successes"):
            stats.wilson(*bad)
    with pytest.raises(ValueError, match="level"):
        stats.wilson(1, 3, level=95)


def test_mcnemar_published_and_by_hand():
    # Fagerland, Lydersen & Laake 2013, BMC Med Res Methodol 13:91: airway hyper-responsiveness, exact p = 0.070.
    assert stats.mcnemar_exact(1, 7) == 2 * (1 + 8) / 256
    assert stats.mcnemar_exact(0, 5) == 2 / 32
    assert stats.mcnemar_exact(0, 0) == 1.0
    assert stats.mcnemar_exact(4, 4) == 1.0
    assert 0 < stats.mcnemar_exact(2500, 2100) < 1e-8  # 2^4600 is no float
    with pytest.raises(ValueError, match="counts"):
        stats.mcnemar_exact(-1, 2)


@pytest.mark.parametrize(("gained", "lost"), [(a, b) for a in range(6) for b in range(6)])
def test_mcnemar_enumerates_all_coin_flips(gained, lost):
    m = gained + lost
    flips = [sum(f) for f in itertools.product((0, 1), repeat=m)]
    extreme = sum(abs(2 * k - m) >= abs(gained - lost) for k in flips)
    assert stats.mcnemar_exact(gained, lost) == pytest.approx(extreme / len(flips), rel=1e-12)


@pytest.mark.parametrize(
    ("table", "difference", "low", "high", "digits"),
    [
        # Newcombe 1998, Statistics in Medicine 17:2635, example (36, 12, 2, 0), method 10.
        ((36, 12, 2, 0), 0.2000, 0.0569, 0.3404, 4),
        # Fagerland, Lydersen & Laake 2014, Statistics in Medicine 33:2850 (Bentur et al. 2009).
        ((1, 1, 7, 12), -0.286, -0.507, -0.026, 3),
        # The same authors, Statistical Analysis of Contingency Tables, chapter 8 (Cavo et al. 2012); phi reduced.
        ((59, 6, 16, 80), -0.0621, -0.1186, -0.0046, 4),
        # Altman et al. 2000, Statistics with Confidence, table 6.2.
        ((14, 5, 0, 22), 0.12, 0.01, 0.23, 2),
    ],
)
def test_paired_difference_published(table, difference, low, high, digits):
    d, interval = stats.paired_difference(*table)
    assert (d, *interval) == pytest.approx((difference, low, high), abs=0.5001 * 10**-digits)


def test_paired_difference_is_antisymmetric_and_bounded():
    for table in itertools.product(range(4), repeat=4):
        if not sum(table):
            continue
        both, gained, lost, neither = table
        d, (low, high) = stats.paired_difference(both, gained, lost, neither)
        back, (back_low, back_high) = stats.paired_difference(both, lost, gained, neither)
        assert (back, back_low, back_high) == pytest.approx((-d, -high, -low), abs=1e-12)
        assert -1 <= low <= d <= high <= 1 and low < high
    with pytest.raises(ValueError, match="at least one"):
        stats.paired_difference(0, 0, 0, 0)


def test_paired_difference_covers_the_truth():
    """Of 4,000 experiments of 60 items, about 95% of the intervals hold the true difference."""
    p = (0.6, 0.2, 0.08, 0.12)
    tables = np.random.default_rng(5).multinomial(60, p, size=4000)
    inside = 0
    for table in tables.tolist():
        low, high = stats.paired_difference(*table)[1]
        inside += low <= p[1] - p[2] <= high
    assert 0.935 < inside / 4000 < 0.975


TOKENS = [4, 6, 2, 10, 5]
BEFORE = list(zip([4.0, 9.0, 3.0, 20.0, 5.5], TOKENS, strict=True))  # 41.5 nats of 27 tokens
AFTER = list(zip([3.0, 8.5, 3.2, 12.0, 5.0], TOKENS, strict=True))  # 31.7


def quantile(values, q):
    """Linear interpolation between order statistics, by hand."""
    ordered, at = sorted(values), q * (len(values) - 1)
    low = ordered[math.floor(at)]
    return low + (ordered[math.ceil(at)] - low) * (at - math.floor(at))


def every_resample(items):
    return [
        math.exp(sum(nll for nll, _ in pick) / sum(tokens for _, tokens in pick))
        for pick in itertools.product(items, repeat=len(items))
    ]


def check_quantiles(drawn, exact):
    # Between the exact quantiles a little further out and a little further in: a discrete distribution has steps.
    for value, q in zip(drawn, (0.025, 0.975), strict=True):
        assert quantile(exact, q - 0.003) <= value <= quantile(exact, q + 0.003)


def test_perplexity_by_hand():
    # Two items: (2 + 4) / (1 + 2) = 2 nats a token.
    assert stats.perplexity([(2.0, 1), (4.0, 2)]) == pytest.approx(math.e**2)
    assert stats.perplexity([(1e6, 1)]) == math.inf
    assert stats.perplexity([(0.0, 0), (3.0, 1)]) == pytest.approx(math.e**3)
    for nothing in ([], [(0.0, 0)]):
        with pytest.raises(DataError, match="at least one token"):
            stats.perplexity(nothing)


def test_bootstrap_against_every_resample():
    """5^5 equally likely resamples, all listed: what the random draws approach."""
    value, *drawn = stats.perplexity_interval(BEFORE, draws=100_000)
    assert value == pytest.approx(math.exp(41.5 / 27))
    check_quantiles(drawn, every_resample(BEFORE))
    assert stats.perplexity_interval(BEFORE, seed=3) == stats.perplexity_interval(BEFORE, seed=3)
    assert stats.perplexity_interval(BEFORE, seed=3) != stats.perplexity_interval(BEFORE, seed=4)
    assert stats.perplexity_interval([(3.0, 2)]) == pytest.approx((math.exp(1.5),) * 3)


def test_bootstrap_in_chunks_is_the_same_size(monkeypatch):
    whole = stats.perplexity_interval(BEFORE, draws=50_000)
    monkeypatch.setattr(stats, "_CHUNK", 7 * len(BEFORE))  # 7 draws at a time: 5000 is no multiple
    assert stats.perplexity_interval(BEFORE) == pytest.approx(whole, rel=0.05)


def test_paired_bootstrap_against_every_resample():
    pairs = list(zip(every_resample(BEFORE), every_resample(AFTER), strict=True))
    difference, drawn, p = stats.perplexity_difference(BEFORE, AFTER, draws=100_000)
    assert difference == pytest.approx(math.exp(31.7 / 27) - math.exp(41.5 / 27))
    exact = [a - b for b, a in pairs]
    check_quantiles(drawn, exact)
    tail = min(sum(x <= 0 for x in exact), sum(x >= 0 for x in exact)) / len(exact)
    assert p == pytest.approx(2 * tail, abs=0.003)
    ratio, drawn, _ = stats.perplexity_difference(BEFORE, AFTER, ratio=True, draws=100_000)
    assert ratio == pytest.approx(math.exp((31.7 - 41.5) / 27))
    check_quantiles(drawn, [a / b for b, a in pairs])


def test_paired_bootstrap_edges():
    assert stats.perplexity_difference(BEFORE, BEFORE) == (0.0, (0.0, 0.0), 1.0)
    # Each item better: no draw crosses zero, the smallest p there is.
    better = [(nll - 1, tokens) for nll, tokens in BEFORE]
    assert stats.perplexity_difference(BEFORE, better, draws=999)[2] == 2 / 1000
    # Pairing narrows: unpaired intervals of the two overlap, that of the difference is clear of zero.
    _, low_b, _ = stats.perplexity_interval(BEFORE)
    _, _, high_a = stats.perplexity_interval(better)
    assert high_a > low_b and stats.perplexity_difference(BEFORE, better)[1][1] < 0
    with pytest.raises(DataError, match="same items"):
        stats.perplexity_difference([(1.0, 1)], [(1.0, 1), (2.0, 1)])


def answers(right, ids="abcdefghij"):
    return [{"id": i, "correct": r == "1"} for i, r in zip(ids, right, strict=True)]


def test_compare_accuracy():
    before, after = answers("1100000011"), answers("1011110011")
    random.Random(1).shuffle(after)  # matched by id, not by place
    entry = item_statistics.compare(before, after, "choice", task="t")
    low, high = stats.wilson(4, 10)
    # b is lost; c, d, e, f are gained; a, i, j right both times; g, h wrong both times.
    assert entry["before"] == {"value": 0.4, "low": low, "high": high, "n": 10}
    assert (entry["gained"], entry["lost"], entry["n"], entry["task"]) == (4, 1, 10, "t")
    assert entry["p_value"] == 2 * (1 + 5) / 32 and entry["test"] == "McNemar exact"
    assert (entry["difference"], (entry["low"], entry["high"])) == stats.paired_difference(3, 4, 1, 2)
    assert entry["difference"] == pytest.approx(entry["after"]["value"] - entry["before"]["value"])
    assert set(entry) == {
        "task", "before", "after", "difference", "low", "high", "test", "p_value", "n", "gained", "lost",
    }  # fmt: skip


def test_compare_perplexity_matches_by_id():
    before, after = ([{"id": i, "nll": x, "tokens": t} for i, (x, t) in enumerate(side)] for side in (BEFORE, AFTER))
    entry = item_statistics.compare(before, after[::-1], "perplexity")
    assert (entry["gained"], entry["lost"], entry["test"]) == (4, 1, "paired bootstrap") and "task" not in entry
    expected = stats.perplexity_difference(BEFORE, AFTER)
    assert (entry["difference"], (entry["low"], entry["high"]), entry["p_value"]) == expected
    assert entry["after"]["value"] == pytest.approx(math.exp(31.7 / 27))


def test_compare_refuses_what_does_not_match():
    with pytest.raises(DataError, match=r"only before: 'c'; only after: 'x'"):
        item_statistics.compare(answers("110", "abc"), answers("110", "abx"), "choice")
    with pytest.raises(DataError, match="'a' twice among the items after"):
        item_statistics.compare(answers("11", "ab"), answers("110", "aba"), "choice")
    with pytest.raises(DataError, match="at least one item"):
        item_statistics.compare([], [], "generate")
    with pytest.raises(DataError, match="'chioce'"):
        item_statistics.compare(answers("1", "a"), answers("1", "a"), "chioce")
