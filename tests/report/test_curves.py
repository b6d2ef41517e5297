"""Charts: thinning, smoothing and ticks against slow loops, and the path against the numbers it draws."""

import json
import math
import random

import numpy as np
import pytest

from posttrain.report.curves import METRICS, POINTS, Measure, chart, smooth, thin, ticks

LOSS = METRICS[0]


def test_smooth_is_a_centred_mean():
    values = [random.Random(0).gauss(0, 1) for _ in range(30)]
    expected = []
    for i in range(30):
        reach = min(3, i, 29 - i)  # symmetric at the ends, so no lag there either
        around = values[i - reach : i + reach + 1]
        expected.append(sum(around) / len(around))
    assert smooth(np.array(values), 7) == pytest.approx(expected)
    assert smooth(np.arange(20.0), 5) == pytest.approx(np.arange(20.0))  # a straight line stays one


def test_thin_keeps_ends_and_spikes():
    values = np.random.default_rng(0).normal(size=100_000)
    values[54_321], values[98_765] = 50.0, -50.0
    keep = thin(values)
    assert len(keep) <= POINTS and len(keep) > POINTS * 0.9
    assert {0, 99_999, 54_321, 98_765} <= set(keep.tolist()) and sorted(set(keep)) == list(keep)
    assert list(thin(np.array([3.0, 1.0]))) == [0, 1]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.13, 2.7), (1, 125), (1, 100_000), (0, 5e-4), (-3, 4)])
def test_ticks_are_round_and_few(low, high):
    marks = ticks(low, high)
    assert 3 <= len(marks) <= 9 and low - 1e-12 <= marks[0] and marks[-1] <= high * (1 + 1e-9)
    gaps = np.diff(marks)
    assert gaps == pytest.approx(gaps[0])
    mantissa = gaps[0] / 10 ** math.floor(math.log10(gaps[0]) + 1e-9)
    assert mantissa == pytest.approx(min((1, 2, 5), key=lambda m: abs(m - mantissa)))


def test_path_is_the_numbers():
    c = chart(
        Measure("loss", "Loss", smooth=False), [{"step": s, "loss": v} for s, v in ((1, 4.0), (2, 0.0), (5, 2.0))]
    )
    assert c is not None
    first, last, low, high = c.domain
    assert (first, last) == (1, 5) and low <= 0 and high > 4
    points = [tuple(map(float, p.split(","))) for p in c.raw.removeprefix("M").split()]
    for (x, y), (step, value) in zip(points, ((1, 4.0), (2, 0.0), (5, 2.0)), strict=True):
        assert x == pytest.approx(1000 * (step - 1) / 4, abs=0.06)
        assert y == pytest.approx(400 * (1 - (value - low) / (high - low)), abs=0.06)
    assert json.loads(c.points) == [[1, 4.0], [2, 0.0], [5, 2.0]]


def test_values_that_are_not_finite_are_left_out_and_skips_are_marked():
    records = [{"step": s, "loss": v} for s, v in ((1, 2.0), (2, math.nan), (3, None), (4, 1.0))]
    c = chart(LOSS, records, skipped_steps=[2, 3])
    assert c is not None and c.steps == 2 and [round(at) for at, _ in c.skipped] == [33, 67]
    assert chart(LOSS, [{"step": 1, "loss": math.nan}]) is None and chart(LOSS, []) is None


def test_one_step_is_a_dot():
    c = chart(LOSS, [{"step": 3, "loss": 2.0}])
    assert c is not None and c.raw == "M500.0,200.0 h0.1"
