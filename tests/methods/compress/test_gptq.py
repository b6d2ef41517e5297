"""GPTQ and AWQ on one layer: by hand, against slow loops, and what they promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.methods.compress.awq import search_column_scales
from posttrain.methods.compress.gptq import gptq, output_error
from posttrain.models.quantization_grid import Grid, check_group, fake_quantized, round_to_nearest, scales_and_zeros


def inputs(count: int = 200, width: int = 64, seed: int = 0) -> Tensor:
    """Correlated inputs, some columns much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    sizes = torch.exp(torch.randn(width, generator=generator))
    return (torch.randn(count, width, generator=generator) @ (mix + torch.eye(width))) * sizes


def matrix(rows: int = 24, width: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_two_columns_by_hand() -> None:
    """Scale 7.5 / 7.5. The first column becomes 7, 0.5 too low: with H^-1 = [2 -1; -1 2] / 3 the second gains 0.25."""
    weight, hessian = torch.tensor([[7.5, 2.3]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    grid = Grid(4, None)
    assert round_to_nearest(weight, grid).values_O_I.tolist() == [[7, 2]]
    found = gptq(weight, hessian, grid, damping=0.0, act_order=False)
    assert found.values_O_I.tolist() == [[7, 3]] and found.scale_O_G.tolist() == [[1.0]]


def slow_gptq(weight: Tensor, hessian: Tensor, grid: Grid, damping: float, order: list[int]) -> Tensor:
    """Optimal brain quantisation in a given order, the inverse of what is left computed anew for every column."""
    group, left = grid.columns(weight.shape[1]), weight.double().clone()
    scale, zero = scales_and_zeros(weight, grid)
    damped = hessian.double() + torch.eye(len(hessian)) * damping * hessian.double().diagonal().mean()
    for place, i in enumerate(order):
        rest = order[place:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        s = scale[:, i // group].double()
        z = 0.0 if zero is None else zero[:, i // group].double()
        rounded = ((left[:, i] / s + z).round().clamp(grid.lowest, grid.highest) - z) * s
        error = (left[:, i] - rounded) / inverse[0, 0]
        for k, j in enumerate(rest):
            left[:, j] = left[:, j] - error * inverse[0, k]
        left[:, i] = rounded
    return left


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_a_slow_loop(symmetric: bool, act_order: bool) -> None:
    x, weight = inputs(width=160), matrix(width=160)
    hessian, grid = x.t() @ x, Grid(4, 32 if act_order else None, symmetric)
    order = torch.argsort(hessian.diagonal(), descending=True).tolist() if act_order else list(range(160))
    expected = slow_gptq(weight, hessian, grid, 0.01, order)
    found = gptq(weight, hessian, grid, 0.01, act_order).dense().double()
    assert float((found != expected.float().double()).double().mean()) < 0.002  # ties of rounding
    assert float((found - expected).abs().max()) < 1e-3 or float((found != expected).double().mean()) < 0.002


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    "grid", [Grid(4, 32), Grid(4, 16, False), Grid(4, None), Grid(8, None), Grid(4, 32, search=True)]
)
def test_outputs_are_nearer_than_after_rounding(grid: Grid, act_order: bool) -> None:
    x, weight = inputs(), matrix()
    hessian = x.t() @ x
    plain = output_error(weight, round_to_nearest(weight, grid).dense(), hessian)
    found = output_error(weight, gptq(weight, hessian, grid, act_order=act_order).dense(), hessian)
    slow = float(
        ((x @ (weight - round_to_nearest(weight, grid).dense()).t()) ** 2).sum() / ((x @ weight.t()) ** 2).sum()
    )
    assert plain == pytest.approx(slow, rel=1e-3)
    assert found < 0.7 * plain


def test_columns_without_inputs_are_rounded_to_nearest_and_few_rows_suffice() -> None:
    x, weight, grid = inputs(8), matrix(), Grid(4, 32)
    x[:, 5] = 0.0
    found = gptq(weight, x.t() @ x, grid)
    assert torch.equal(found.values_O_I[:, 5], round_to_nearest(weight, grid).values_O_I[:, 5])
    nothing = gptq(weight, torch.zeros(64, 64), grid)
    assert torch.equal(nothing.dense(), round_to_nearest(weight, grid).dense())
    with pytest.raises(ModelError, match="not finite"):
        gptq(weight, torch.full((64, 64), torch.nan), grid)


def test_column_scales_are_those_of_a_slow_search() -> None:
    x, weights, grid = inputs(), [matrix(), matrix(seed=2)], Grid(4, 32)
    absolute = x.abs().mean(0)
    found = search_column_scales(weights, x.t() @ x, absolute, grid)
    errors = []
    for step in range(20):
        s = absolute ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        errors.append(
            sum(
                float(((x / s) @ round_to_nearest(w * s, grid).dense().t() - x @ w.t()).square().sum()) for w in weights
            )
        )
    assert found.exponent == errors.index(min(errors)) / 20 and 0 < found.exponent
    assert found.error == pytest.approx(min(errors), rel=1e-3) and found.plain_error == pytest.approx(
        errors[0], rel=1e-3
    )
    shared = search_column_scales(weights, x.t() @ x, absolute, grid, repeats=2, size=16).scales_I.view(2, 2, 16)
    assert torch.equal(shared[:, 0], shared[:, 1])


def test_a_smaller_scale_is_kept_where_it_pays() -> None:
    weight = torch.full((1, 32), 0.1)
    weight[0, ::2] = 0.2
    weight[0, 0] = 1.0
    plain, searched = (round_to_nearest(weight, Grid(4, 32, search=s)).dense() for s in (False, True))
    assert float((searched - weight).square().sum()) < float((plain - weight).square().sum())
    importance = torch.ones(32)
    importance[0] = 1e6
    kept = round_to_nearest(weight, Grid(4, 32, search=True), importance).dense()
    assert abs(float(kept[0, 0]) - 1.0) < abs(float(searched[0, 0]) - 1.0) + 1e-6


def test_fake_quantisation_rounds_forward_and_passes_gradients() -> None:
    weight = matrix(4, 32).requires_grad_()
    out = fake_quantized(weight, Grid(4, 16))
    assert torch.equal(out, round_to_nearest(weight, Grid(4, 16)).dense())
    (out * torch.arange(128.0).view(4, 32)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(128.0).view(4, 32))


def test_a_group_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(
        ModelError, match="group: 128 does not divide the layers' widths of 576.*16, 24, 32, 48, 64, 96, 192"
    ):
        check_group(Grid(4, 128), [576, 1536, 576], "")
    with pytest.raises(ModelError, match="not finite"):
        scales_and_zeros(torch.tensor([[1.0, torch.nan]]), Grid(4, None))


def test_values_on_the_grid_by_hand() -> None:
    symmetric = round_to_nearest(torch.tensor([[-7.5, 3.4, 0.2, 7.5]]), Grid(4, None))
    assert symmetric.values_O_I.tolist() == [[-8, 3, 0, 7]] and symmetric.scale_O_G.tolist() == [[1.0]]
    shifted = round_to_nearest(torch.tensor([[3.0, 15.0, 0.4, 7.6]]), Grid(4, None, symmetric=False))
    assert shifted.values_O_I.tolist() == [[-5, 7, -8, 0]] and shifted.zero_O_G.tolist() == [[-8]]  # type: ignore[union-attr]
    assert round_to_nearest(torch.zeros(2, 8), Grid(8, None)).dense().tolist() == [[0.0] * 8] * 2
