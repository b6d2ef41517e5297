"""Krippendorff's alpha against his own published figures, hand-worked ones, and a loop over his definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from posttrain.data.rater_agreement import krippendorff_alpha

_ = None
MATRIX = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]
"""Four observers, twelve units: Krippendorff 2011, section C."""
UNITS = [[row[u] for row in MATRIX if row[u] is not None] for u in range(12)]


@pytest.mark.parametrize(("metric", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_the_published_figures(metric: str, published: float) -> None:
    assert round(krippendorff_alpha(UNITS, metric), 3) == published


def test_two_observers_by_hand() -> None:
    """Krippendorff 2011, section A: ten units, ones and zeros; alpha 0.095. And four ratings worked out here.

    (0,0), (1,2): n = 4. Within units the squared differences of ordered pairs sum to 0 and 2, so D_o = 2/4. Over all
    values 0,0,1,2 they sum to 2 (0+1+4+1+4+1) = 22, so D_e = 22/12 and alpha = 1 - 0.5 * 12 / 22 = 8/11.
    """
    one, two = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert round(krippendorff_alpha(list(zip(one, two, strict=True)), "nominal"), 3) == 0.095
    assert krippendorff_alpha([[0, 0], [1, 2]], "interval") == pytest.approx(8 / 11, abs=1e-12)


def slow(units: list[list[float]], metric: str) -> float:
    """By the coincidence matrix, pair by pair."""
    units = [u for u in units if len(u) > 1]
    levels = sorted({v for u in units for v in u})
    o = {(c, k): 0.0 for c in levels for k in levels}
    for u in units:
        for i, c in enumerate(u):
            for j, k in enumerate(u):
                if i != j:
                    o[c, k] += 1 / (len(u) - 1)
    n_c = {c: sum(o[c, k] for k in levels) for c in levels}
    n = sum(n_c.values())

    def d2(c: float, k: float) -> float:
        if metric == "nominal":
            return float(c != k)
        if metric == "interval":
            return (c - k) ** 2
        low, high = min(c, k), max(c, k)
        return (sum(n_c[g] for g in levels if low <= g <= high) - (n_c[c] + n_c[k]) / 2) ** 2

    observed = sum(o[c, k] * d2(c, k) for c in levels for k in levels)
    expected = sum(n_c[c] * n_c[k] * d2(c, k) for c in levels for k in levels) / (n - 1)
    return 1 - observed / expected


@pytest.mark.parametrize("metric", ["nominal", "ordinal", "interval"])
def test_against_the_coincidence_matrix(metric: str) -> None:
    rng = np.random.default_rng(0)
    units = [(rng.integers(-4, 5) + rng.integers(0, 3, rng.integers(0, 7))).astype(float).tolist() for _ in range(60)]
    assert krippendorff_alpha(units, metric) == pytest.approx(slow(units, metric), abs=1e-12)


def test_degenerate_cases() -> None:
    assert math.isnan(krippendorff_alpha([[1], [2]], "nominal"))  # nobody rated what another did
    assert math.isnan(krippendorff_alpha([[3, 3], [3, 3]], "interval"))  # nothing to agree on
    assert krippendorff_alpha([[1, 1], [2, 2]], "ordinal") == 1
    assert krippendorff_alpha([[1, 2], [2, 1]], "nominal") == pytest.approx(-0.5)  # 1 - 1 / (8 / 12)
    with pytest.raises(ValueError, match="metric"):
        krippendorff_alpha([[1, 2]], "ratio")
    with pytest.raises(ValueError, match="finite"):
        krippendorff_alpha([[1, math.nan]], "nominal")
