"""AWQ: scale the columns of a weight whose inputs are large, so that rounding hurts them less (arXiv 2306.00978).

The inputs are divided by the same scales, in what comes before: a norm's weight, or the rows of a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from posttrain.models.quantization_grid import Grid, round_to_nearest

EXPONENTS = 20
"""Exponents that are tried: 0, 1/20, ... 19/20."""


@dataclass(frozen=True)
class ScaleSearch:
    """Hold the result of a search.

    Attributes:
        scales_I: Factor of each column; 1 everywhere with exponent 0.
        exponent: The exponent that won.
        error: Squared error of the outputs with these scales.
        plain_error: The same without scales.
    """

    scales_I: Tensor
    exponent: float
    error: float
    plain_error: float


def search_column_scales(
    weights: Sequence[Tensor], hessian_I_I: Tensor, mean_absolute_I: Tensor, grid: Grid, repeats: int = 1, size: int = 1
) -> ScaleSearch:
    """Find s = mean|x|^a, a in [0, 1), with the least ||(W - Q(W s) / s) X||^2, summed over weights of the same input.

    The paper measures the error of the whole block after; here it is that of the linear layers themselves, which the
    sum of x x^T gives exactly, without any inputs. Scales are divided by sqrt(max s * min s).

    Args:
        weights: Weights (O, I) that multiply the same input.
        hessian_I_I: Sum of x x^T.
        mean_absolute_I: Mean of |x| of each column.
        grid: The grid.
        repeats: Columns in how many heads are given the same numbers by one row of what comes before (grouped-query
            attention); they get the same scale.
        size: Columns of a head.
    """
    grid = replace(grid, search=False)  # smaller scales come last, once the columns' scales are known
    hessian, size_I = hessian_I_I.float(), mean_absolute_I.float()
    if repeats > 1:
        heads = size_I.view(-1, repeats, size).mean(1, keepdim=True)
        size_I = heads.expand(-1, repeats, size).reshape(-1)
    best: tuple[float, float, Tensor] | None = None
    plain = 0.0
    for step in range(EXPONENTS):
        scales = size_I.clamp(min=1e-4) ** (step / EXPONENTS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = 0.0
        for weight in weights:
            dense = weight.detach().float()
            difference = round_to_nearest(dense * scales, grid).dense() / scales - dense
            error += float(((difference @ hessian) * difference).sum())
        if step == 0:
            plain = error
        if best is None or error < best[0]:
            best = error, step / EXPONENTS, scales
    assert best is not None
    return ScaleSearch(best[2], best[1], best[0], plain)
