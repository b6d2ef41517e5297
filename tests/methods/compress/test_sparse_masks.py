"""Masks and SparseGPT on one linear layer: hand-worked numbers, and slow loops of the formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.methods.compress.sparse_masks import lowest, lowest_of_groups, threshold_of_all, wanda_scores
from posttrain.methods.compress.sparsegpt import sparsegpt


def layer(outputs: int = 6, inputs: int = 20, tokens: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    return torch.randn(outputs, inputs, generator=generator), torch.randn(tokens, inputs, generator=generator) @ mixing


def test_wanda_of_hand_worked_numbers() -> None:
    """Inputs 1 and 2 are 3 and 0.1 large: the smaller weight of the larger input stays."""
    weight = torch.tensor([[1.0, -2.0, 4.0], [0.5, 5.0, -0.1]])
    scores = wanda_scores(weight, torch.tensor([9.0, 0.01, 1.0]))
    assert torch.allclose(scores, torch.tensor([[3.0, 0.2, 4.0], [1.5, 0.5, 0.1]]))
    assert lowest(scores, 1 / 3, "row").tolist() == [[False, True, False], [False, False, True]]
    assert lowest(scores, 1 / 3, "matrix").tolist() == [[False, True, False], [False, False, True]]
    assert lowest(weight.abs(), 0.5, "matrix").tolist() == [[True, False, False], [True, False, True]]


@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (0.29, 29), (0.5, 50), (0.7, 70)])
def test_the_number_of_zeros_is_exact_with_ties(sparsity: float, count: int) -> None:
    assert int(lowest(torch.ones(4, 100), sparsity, "row").sum(1).unique()) == count
    assert int(lowest(torch.ones(4, 100), sparsity, "matrix").sum()) == 4 * count


def test_two_of_four_stay_in_every_group() -> None:
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
    assert lowest_of_groups(scores, 2, 4).tolist() == [[True, False, False, True, True, True, False, False]]
    assert lowest_of_groups(torch.rand(5, 16), 1, 8).unflatten(1, (2, 8)).sum(2).unique().tolist() == [7]


def test_the_threshold_of_all_is_that_of_sorting_all() -> None:
    parts = [torch.rand(7, 11), torch.rand(30, 3) * 5, torch.zeros(2, 2)]
    everything = torch.cat([p.flatten() for p in parts]).sort().values
    for sparsity in (0.1, 0.5, 0.93):
        bound = threshold_of_all([lambda p=p: p for p in parts], sparsity)
        assert bound == float(everything[round(sparsity * len(everything)) - 1])
    assert threshold_of_all([lambda: parts[0]], 0.0) == -1.0


def slowly(weight: Tensor, x: Tensor, sparsity: float, pattern: tuple[int, int] | None, block: int) -> Tensor:
    """SparseGPT by the formulas of its section 3: an inverse for every column, of the columns from it to the right."""
    hessian = (x.t() @ x).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    weight = weight.double().clone()
    inverses = [torch.linalg.inv(hessian[i:, i:]) for i in range(len(hessian))]
    zero = torch.zeros_like(weight, dtype=torch.bool)
    for i in range(weight.shape[1]):
        if pattern is None and i % block == 0:
            ends = range(i, min(i + block, weight.shape[1]))
            costs = torch.stack([weight[:, j] ** 2 / inverses[j][0, 0] for j in ends], 1)
            worst = costs.flatten().sort().values[round(sparsity * costs.numel()) - 1]
            zero[:, i : i + block] = costs <= worst
        if pattern is not None and i % pattern[1] == 0:
            for row in range(len(weight)):
                costs = torch.stack([weight[row, j] ** 2 / inverses[j][0, 0] for j in range(i, i + pattern[1])])
                for j in costs.argsort()[: pattern[1] - pattern[0]]:
                    zero[row, i + j] = True
        for row in range(len(weight)):
            if zero[row, i]:
                weight[row, i:] -= weight[row, i].clone() / inverses[i][0, 0] * inverses[i][:, 0]
                weight[row, i] = 0
    return weight


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
def test_sparsegpt_is_the_slow_loop(pattern: tuple[int, int] | None) -> None:
    weight, x = layer()
    found, mask = sparsegpt(weight, x.t() @ x, 0.5, pattern, block=8)
    expected = slowly(weight, x, 0.5, pattern, 8)
    assert torch.equal(found == 0, mask) and torch.equal(mask, expected == 0)
    assert (found - expected).abs().max() < 1e-5
    masked_alone = weight.masked_fill(mask, 0.0)
    assert ((found - weight) @ x.t()).norm() < 0.9 * ((masked_alone - weight) @ x.t()).norm()


def test_sparsegpt_with_dead_inputs_and_broken_ones() -> None:
    weight, x = layer()
    x[:, 3] = 0
    found, mask = sparsegpt(weight, x.t() @ x, 0.5)
    assert bool((found[:, 3] == 0).all()) and bool(found.isfinite().all()) and int(mask.sum()) == 60
    with pytest.raises(ModelError, match="not finite"):
        sparsegpt(weight, torch.full((20, 20), torch.nan), 0.5)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_weights_are_those_of_llm_compressor(pattern: tuple[int, int] | None) -> None:
    """Recorded; its SparseGPT takes one weight more of each block than it is asked for, which was allowed for."""
    recorded = json.loads(Path(__file__).with_name("recorded_llmcompressor.json").read_text(encoding="utf-8"))
    weight, x = (torch.tensor(recorded[name]) for name in ("weight", "inputs"))
    key = "0.5" if pattern is None else "2:4"
    scores = wanda_scores(weight, x.square().sum(0).double())
    mask = lowest(scores, 0.5, "row") if pattern is None else lowest_of_groups(scores, *pattern)
    assert torch.allclose(weight.masked_fill(mask, 0.0), torch.tensor(recorded["results"][f"wanda {key}"]), atol=1e-6)
    found, mask = sparsegpt(weight, x.t() @ x, 0.5, pattern, block=recorded["block"])
    expected = torch.tensor(recorded["results"][f"sparsegpt {key}"])
    assert torch.equal(mask, expected == 0) and torch.allclose(found, expected, atol=2e-5)
