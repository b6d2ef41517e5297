"""GPTQ: round a weight column by column, and let the columns that are left make up for each error (arXiv 2210.17323)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.models.quantization_grid import Grid, round_column, scales_and_zeros
from posttrain.models.quantized_weight import QuantizedWeight

COLUMNS_AT_ONCE = 128
"""Columns after which the errors of a block reach the columns behind it."""
MOST_DAMPING = 1.0
"""Most damping that is tried where a Hessian has no Cholesky factor."""


def gptq(
    weight_O_I: Tensor,
    hessian_I_I: Tensor,
    grid: Grid,
    damping: float = 0.01,
    act_order: bool = True,
    activation_bits: Literal[8] | None = None,
) -> QuantizedWeight:
    """Quantise a weight W so that ||(W - Q) X||^2 is small, by the algorithm of the paper (its Algorithm 1).

    Columns are rounded in turn. The error of column i, divided by U[i, i], is subtracted from every later column j
    times U[i, j], where U is the upper Cholesky factor of the inverse of H = X X^T + damping.

    With `act_order` the columns with the largest inputs come first, when most columns are left to make up for them;
    groups stay what they are in the file, so their scales are those of the weight before. Without, the scales of a
    group are those of its columns when it is reached. Columns whose input was 0 in every row are rounded to nearest.

    Args:
        weight_O_I: The weight.
        hessian_I_I: Sum of x x^T over the inputs x; any multiple of it gives the same.
        grid: The grid.
        damping: Part of the mean of H's diagonal that is added to it.
        act_order: See above.
        activation_bits: See `QuantizedWeight`.

    Raises:
        ModelError: H has values that are not finite.
    """
    width, group = weight_O_I.shape[1], grid.columns(weight_O_I.shape[1])
    weight, hessian = weight_O_I.detach().double(), hessian_I_I.double().clone()
    diagonal = hessian.diagonal().clone()
    if not bool(torch.isfinite(hessian).all()):
        raise ModelError("the inputs of a layer are not finite (nan or infinite) on the calibration rows")
    dead = diagonal <= 0
    hessian[dead, dead] = 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(width)
    upper = _factor(hessian[order][:, order], damping)
    scale, zero = scales_and_zeros(weight_O_I, grid, diagonal)
    left, values = weight[:, order].clone(), torch.empty(weight.shape, dtype=torch.int8)
    block = COLUMNS_AT_ONCE if act_order or group > width // 2 else max(group, COLUMNS_AT_ONCE // group * group)
    for start in range(0, width, block):
        end = min(start + block, width)
        errors = torch.empty_like(left[:, start:end])
        for i in range(start, end):
            column = int(order[i])
            g = column // group
            if not act_order and column % group == 0 and group < width:
                own = Grid(grid.bits, None, grid.symmetric, grid.search, grid.dtype)
                new = scales_and_zeros(left[:, i : i + group], own, diagonal[i : i + group])
                scale[:, g] = new[0][:, 0]
                if zero is not None and new[1] is not None:
                    zero[:, g] = new[1][:, 0]
            # In float32, as everywhere: a group's largest value lies halfway between two of the grid.
            found = round_column(left[:, i].float(), scale[:, g], None if zero is None else zero[:, g], grid)
            values[:, column] = found[0]
            errors[:, i - start] = (left[:, i] - found[1]) / upper[i, i]
            left[:, i + 1 : end] -= errors[:, i - start, None] * upper[i, i + 1 : end]
        left[:, end:] -= errors @ upper[start:end, end:]
    return QuantizedWeight(values, scale, zero, group, grid.bits, None, activation_bits)


def _factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a damped matrix, with more damping if it has none."""
    eye, mean = torch.eye(len(hessian), dtype=hessian.dtype), hessian.diagonal().mean()
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + eye * (damping * mean))
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            return upper
        if damping >= MOST_DAMPING:
            raise ModelError("the inputs of a layer have no usable covariance on the calibration rows: use more rows")
        damping = max(damping, 1e-3) * 10


def output_error(weight_O_I: Tensor, changed_O_I: Tensor, hessian_I_I: Tensor) -> float:
    """Return ||(W - Q) X||^2 / ||W X||^2, by H = X X^T.

    Args:
        weight_O_I: The weight W.
        changed_O_I: The weight Q.
        hessian_I_I: H.
    """
    weight, hessian = weight_O_I.detach().double(), hessian_I_I.double()
    difference = weight - changed_O_I.double()
    size = float(((weight @ hessian) * weight).sum())
    return float(((difference @ hessian) * difference).sum()) / size if size > 0 else 0.0
