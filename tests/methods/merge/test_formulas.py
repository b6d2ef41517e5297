"""Formulas of merging by hand-worked numbers, limits and statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.methods.merge import algorithms
from posttrain.methods.merge.averages import angle_between, karcher_mean, model_stock, multi_slerp, slerp, weighted_mean
from posttrain.methods.merge.task_vectors import (
    combine,
    della_probabilities,
    draw_mask,
    drop_outliers,
    drop_random,
    keep_largest,
)


def close(found: Tensor, expected: list[float] | Tensor, error: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=error, rtol=0)


def test_averages_by_hand() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    close(weighted_mean([x, y], [3, 1]), [0.75, 0.5])
    close(weighted_mean([x, y], [3, 1], normalize=False), [3.0, 2.0])
    close(slerp(x, y, 1 / 3), [math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)])  # an arc of 90 degrees, 30 along it
    close(multi_slerp([x, y], [1, 1]), [1.5 / math.sqrt(2)] * 2)
    close(karcher_mean([x, y], [2, 1]), [4 / 3 * math.cos(math.pi / 6), 4 / 3 * math.sin(math.pi / 6)])
    assert angle_between(x, y) == pytest.approx(math.pi / 2)
    with pytest.raises(ValueError, match="sum to zero"):
        weighted_mean([x, y], [1, -1])
    with pytest.raises(ValueError, match="at least 0"):
        karcher_mean([x, y], [1, -1])


def test_degenerate_directions_are_straight_lines() -> None:
    x, zero = torch.tensor([3.0, 4.0]), torch.zeros(2)
    close(slerp(x, 2 * x, 0.5), 1.5 * x)
    close(slerp(x, -x, 0.25), 0.5 * x)
    close(slerp(x, zero, 0.5), 0.5 * x)
    close(slerp(x, x + 1e-4, 0.5), x + 5e-5)
    near = torch.tensor([math.cos(3e-9), math.sin(3e-9)], dtype=torch.float64)
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert angle_between(one, near) == pytest.approx(3e-9, rel=1e-6)  # an arc cosine would see no angle here
    for mean in (multi_slerp, karcher_mean):
        close(mean([x, -x], [3, 3]), zero)
        close(mean([zero, zero], [1, 1]), zero)
        close(mean([x, zero], [1, 1]), 0.5 * x)


def test_the_karcher_mean_is_where_the_angles_balance() -> None:
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3)]
    weights = [0.5, 0.2, 0.3]
    mean = karcher_mean(points, weights, tolerance=1e-13)
    unit = mean / mean.norm()

    def spread(direction: Tensor) -> float:
        return sum(w * angle_between(direction, p) ** 2 for w, p in zip(weights, points, strict=True))

    for _ in range(20):
        assert spread(unit) < spread(unit + 0.01 * torch.randn(5, generator=generator, dtype=torch.float64))
    close(karcher_mean(points[:2], [0.7, 0.3]), slerp(*(p / p.norm() for p in points[:2]), 0.3) * (
        0.7 * points[0].norm() + 0.3 * points[1].norm()
    ))  # fmt: skip


def test_model_stock_by_hand() -> None:
    base = torch.tensor([1.0, 1.0])
    moved = [base + torch.tensor([2.0, 0.0]), base + torch.tensor([1.0, math.sqrt(3.0)])]  # 60 degrees apart
    close(model_stock(base, moved), base + 2 / 3 * torch.tensor([1.5, math.sqrt(3.0) / 2]))  # 2 * 0.5 / 1.5
    close(model_stock(base, [moved[0], moved[0]]), moved[0])
    close(model_stock(base, [base + torch.tensor([1.0, 0.0]), base + torch.tensor([0.0, 1.0])]), base)
    close(model_stock(base, [base, moved[0]]), base)  # nothing was trained in one
    close(model_stock(base, [base, base]), base)
    close(model_stock(base, [moved[0], 2 * base - moved[0]]), base)  # opposite deltas: 1 + (k - 1) c is 0
    close(model_stock(base[:1], [base[:1] + 1, base[:1] - 2]), base[:1])
    rows = model_stock(torch.stack([base, base]), [torch.stack([m, moved[0]]) for m in moved], by_rows=True)
    close(rows[1], moved[0])
    close(rows[0], model_stock(base, moved))


def test_ties_by_hand() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    deltas = [torch.tensor([4.0, -3.0, 0.5, 2.0]), torch.tensor([-1.0, -5.0, 0.2, 3.0])]
    trimmed = [keep_largest(d, 0.75) for d in deltas]
    close(trimmed[0], [4.0, -3.0, 0.0, 2.0])
    close(trimmed[1], [-1.0, -5.0, 0.0, 3.0])
    close(combine(trimmed, [1, 1], elect_signs=True, normalize=True), [4.0, -4.0, 0.0, 2.5])
    close(combine(trimmed, [1, 5], elect_signs=True), [-5.0, -28.0, 0.0, 17.0])  # now the second decides the first sign
    close(combine(trimmed, [1, 1]), [3.0, -8.0, 0.0, 5.0])
    merge = algorithms.MergeInputs("w", [base + d for d in deltas], [1, -1], [None, None], 0, lambda: base)
    close(algorithms.task_arithmetic_merge(merge, scale=0.5), [3.5, 2.0, 1.15, 0.5])


def test_thinning_by_hand_and_in_the_limits() -> None:
    delta = torch.tensor([[5.0, -4.0, 3.0, -2.0, 1.0]])
    close(drop_outliers(delta, 0.6, 0.2), [[0.0, -4.0, 3.0, -2.0, 0.0]])
    close(drop_outliers(delta, 0.6, 0.0), keep_largest(delta, 0.6))
    close(drop_outliers(delta, 1.0, 0.2), delta)
    close(keep_largest(delta, 1e-9), [[5.0, 0, 0, 0, 0]])
    close(della_probabilities(delta, 0.5, 0.2), [[0.7, 0.6, 0.5, 0.4, 0.3]])
    close(della_probabilities(delta, 0.5, 0.0), torch.full((1, 5), 0.5))
    close(drop_random(delta, torch.tensor([[1, 0, 1, 0, 1]]), 0.5), [[10.0, 0.0, 6.0, 0.0, 2.0]])
    with pytest.raises(ValueError, match="smaller epsilon"):
        della_probabilities(delta, 0.9, 0.2)
    everything = draw_mask(delta, 1.0, torch.Generator().manual_seed(0))
    for whole in (keep_largest(delta, 1.0), drop_random(delta, everything, 1.0)):
        close(whole, delta)  # density 1 is task arithmetic


def test_random_thinning_keeps_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.rand(100, 200, generator=generator) + 0.5
    for probabilities in (torch.tensor(0.3), della_probabilities(delta, 0.3, 0.2)):
        mask = draw_mask(delta, probabilities, generator)
        thin = drop_random(delta, mask, probabilities)
        assert float(mask.float().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / delta.numel()))
        assert float(thin.mean()) == pytest.approx(float(delta.mean()), rel=0.04)
    again = draw_mask(delta, 0.3, torch.Generator().manual_seed(7))
    assert torch.equal(again, draw_mask(delta, 0.3, torch.Generator().manual_seed(7)))


@pytest.mark.parametrize(
    "name", ["dare_linear", "dare_ties", "della_linear", "della", "breadcrumbs", "breadcrumbs_ties", "ties"]
)
def test_one_model_with_all_of_its_changes_is_that_model(name: str) -> None:
    base, tensor = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    merge = algorithms.MergeInputs("w", [tensor], [1.0], [None], 0, lambda: base)
    close(getattr(algorithms, f"{name}_merge")(merge, density=1.0), tensor)
    half = algorithms.MergeInputs("w", [tensor], [1.0], [0.5], 0, lambda: base)
    changed = (
        getattr(algorithms, f"{name}_merge")(half, density=1.0) != base
    )  # its own density goes before the algorithm's
    assert 0.2 < float(changed.float().mean()) < 0.8
