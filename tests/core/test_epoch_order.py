"""How often rows are drawn, by the weights of their sources: exact counts, and every row in turn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from posttrain.core.epoch_order import RowWeights, epoch_order, epoch_size


def counts(weights: RowWeights, epochs: int, seed: int = 3) -> Counter[int]:
    rows = len(weights.sources)
    return Counter(int(i) for e in range(epochs) for i in epoch_order(seed, e, rows, weights))


def test_every_row_once_without_weights() -> None:
    orders = [epoch_order(3, epoch, 10) for epoch in range(2)]
    assert [sorted(order) for order in orders] == [list(range(10))] * 2 and list(orders[0]) != list(orders[1])
    assert epoch_size(10, None) == 10
    assert np.array_equal(orders[1], np.random.default_rng([3, 1]).permutation(10))  # as before there were weights


def test_whole_and_fractional_weights() -> None:
    """Sources of 4, 6 and 5 rows: 2 * 4 + 3 of 6 + 5 + 1 of 5 = 17 rows an epoch."""
    sources = np.array([0, 1, 2, 1, 0, 1, 2, 2, 1, 0, 1, 2, 1, 0, 2])
    weights = RowWeights(sources, [2.0, 0.5, 1.2])
    assert epoch_size(15, weights) == 17
    one = counts(weights, 1)
    assert [sorted(one[int(i)] for i in np.flatnonzero(sources == s)) for s in range(3)] == [
        [2, 2, 2, 2],
        [0, 0, 0, 1, 1, 1],
        [1, 1, 1, 1, 2],
    ]
    two = counts(weights, 2)  # the other half comes before any row of the first half comes again
    assert [two[int(i)] for i in np.flatnonzero(sources == 1)] == [1] * 6
    five = counts(weights, 5)
    assert [five[int(i)] for i in np.flatnonzero(sources == 2)] == [6] * 5
    assert sorted(five[int(i)] for i in np.flatnonzero(sources == 1)) == [2, 2, 2, 3, 3, 3]


def test_the_draw_depends_on_seed_and_epoch_alone() -> None:
    weights = RowWeights(np.repeat([0, 1], 50), [0.3, 1.0])
    first = epoch_order(1, 4, 100, weights)
    assert np.array_equal(first, epoch_order(1, 4, 100, RowWeights(weights.sources, [0.3, 1.0])))
    assert not np.array_equal(np.sort(first), np.sort(epoch_order(2, 4, 100, weights)))
    assert not np.array_equal(first, np.sort(first))


@pytest.mark.parametrize(
    ("rows", "weight", "size"), [(1, 0.5, 1), (3, 0.01, 1), (3, 0.999, 3), (0, 0.5, 0), (7, 3, 21)]
)
def test_small_sources(rows: int, weight: float, size: int) -> None:
    weights = RowWeights(np.zeros(rows, dtype=int), [weight])
    assert weights.size == size == len(weights.draw(0, 0)) == len(weights.draw(0, 11))
