"""Measure how far raters agree: Krippendorff's alpha, for any number of raters and with missing ratings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

AgreementMetric = Literal["nominal", "ordinal", "interval"]


def krippendorff_alpha(units: Sequence[Sequence[float]], metric: AgreementMetric = "interval") -> float:
    """Return the agreement of the ratings of the same units: 1 is perfect, 0 is chance, below 0 is opposition.

        alpha = 1 - D_o / D_e
        D_o = 1/n sum_u 1/(m_u - 1) sum_{i != j in u} d(x_i, x_j)^2
        D_e = 1/(n (n - 1)) sum_{i != j of all units} d(x_i, x_j)^2

    m_u is the number of ratings of unit u, n their sum over the units that have two or more. d^2 is 1 if two values
    differ (nominal); (x - y)^2 (interval); (sum_{g=x}^{y} n_g - (n_x + n_y)/2)^2 with n_g the number of ratings g
    (ordinal), which is the squared difference of the two values' mid-ranks.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", sections C and D.

    Args:
        units: Ratings of each unit, in any order. A unit with fewer than two does not count.
        metric: How the difference of two ratings is measured.

    Returns:
        Alpha; nan if there is nothing to compare, or if all ratings are equal (no variation to agree on).

    Raises:
        ValueError: The metric is unknown, or ratings are not finite.
    """
    if metric not in ("nominal", "ordinal", "interval"):
        raise ValueError(f"metric: expected nominal, ordinal or interval, got {metric!r}")
    kept = [np.asarray(u, dtype=np.float64) for u in units if len(u) > 1]
    if not kept:
        return math.nan
    values = np.concatenate(kept)
    if not np.isfinite(values).all():
        raise ValueError("expected finite ratings; leave missing ones out of their unit")
    sizes = np.array([len(u) for u in kept])
    n = len(values)
    levels, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(levels) == 1:
        return math.nan
    unit = np.repeat(np.arange(len(kept)), sizes)
    if metric == "nominal":
        # Ordered pairs within a unit that differ: m^2 - sum of squared counts of each value.
        _, same = np.unique(unit * len(levels) + at, return_counts=True)
        first = np.unique(unit * len(levels) + at) // len(levels)
        differ = sizes.astype(np.float64) ** 2 - np.bincount(first, same.astype(np.float64) ** 2, len(kept))
        expected = float(n) ** 2 - float((counts.astype(np.float64) ** 2).sum())
    else:
        ranks = np.cumsum(counts).astype(np.float64) - counts / 2
        scale = levels if metric == "interval" else ranks
        x = scale[at] - scale[at].mean()
        # sum_{i != j} (x_i - x_j)^2 = 2 m sum x^2 - 2 (sum x)^2 needs no matrix of pairs.
        sums, squares = (np.bincount(unit, w, len(kept)) for w in (x, x * x))
        differ = np.asarray(2 * sizes * squares - 2 * sums**2, dtype=np.float64)
        expected = 2 * n * float((x * x).sum()) - 2 * float(x.sum()) ** 2
    observed = float((differ / (sizes - 1)).sum()) / n
    return 1 - observed / (expected / (n * (n - 1)))
