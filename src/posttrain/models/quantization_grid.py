"""The grid of a quantised weight: its scales and zeros, rounding to it, and training with it (fake quantisation).

Scales are those of compressed-tensors: a symmetric group reaches from -max|w| to max|w|, which are 2^bits - 1 steps;
an asymmetric one from min(w, 0) to max(w, 0), so that 0 stays 0 in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.models.quantized_weight import QuantizedWeight

SHRINKS = tuple(1.0 - 0.04 * i for i in range(16))
"""Factors on a group's largest value that are tried where scales are searched: 1 down to 0.4."""


@dataclass(frozen=True)
class Grid:
    """Name a kind of grid.

    Attributes:
        bits: Bits of a value.
        group: Columns that share a scale. None: one scale a row.
        symmetric: The zero is in the middle; else a group has a zero.
        search: Scales are shrunk where that makes the squared error smaller: clipping.
        dtype: Scales have only the digits of this dtype, that of the file.
    """

    bits: Literal[4, 8] = 4
    group: int | None = 32
    symmetric: bool = True
    search: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def lowest(self) -> int:
        """Return the smallest value."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """Return the largest value."""
        return (1 << (self.bits - 1)) - 1

    def columns(self, width: int) -> int:
        """Return the columns of a group for a weight of this width."""
        return width if self.group is None else self.group


def groups_that_fit(widths: Sequence[int], smallest: int = 16, largest: int = 256) -> list[int]:
    """Return the group sizes that divide every width, in steps of 8.

    Args:
        widths: The widths.
        smallest: Least size.
        largest: Most.
    """
    sizes = range(8 * -(-smallest // 8), largest + 1, 8)
    return [size for size in sizes if all(width % size == 0 for width in widths)]


def check_group(grid: Grid, widths: Sequence[int], where: str) -> None:
    """Check that a grid's groups divide all widths.

    Args:
        grid: The grid.
        widths: Input features of the layers.
        where: What the message begins with.

    Raises:
        ModelError: They do not; with the sizes that fit.
    """
    bad = sorted({width for width in widths if grid.group is not None and width % grid.group})
    if bad:
        fits = groups_that_fit(widths)
        sizes = f"sizes that divide all widths: {', '.join(map(str, fits))}" if fits else "no size from 16 fits all"
        raise ModelError(
            f"{where}group: {grid.group} does not divide the layers' widths of {', '.join(map(str, bad))} input "
            f"features ({sizes}; null: one scale for each row)"
        )


def scales_and_zeros(
    weight_O_I: Tensor, grid: Grid, importance_I: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the scale (O, G) and the zero (O, G; None: symmetric) of each group of a weight, float32 and int8.

    Args:
        weight_O_I: The weight.
        grid: The grid.
        importance_I: Weights of the columns' squared errors where scales are searched; None: all 1.

    Raises:
        ModelError: A value is not finite.
    """
    rows, width = weight_O_I.shape
    grouped = weight_O_I.detach().float().reshape(rows, -1, grid.columns(width))
    low, high = grouped.amin(-1).clamp(max=0.0), grouped.amax(-1).clamp(min=0.0)
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise ModelError("a weight has values that are not finite (nan or infinite), so it can't be quantised")
    scale, zero = _fitted(low, high, grid)
    if not grid.search:
        return scale, None if grid.symmetric else zero.to(torch.int8)
    counts = 1.0 if importance_I is None else importance_I.float().view(1, -1, grouped.shape[-1])
    least = torch.full_like(scale, torch.inf)
    best = scale, zero
    for shrink in SHRINKS:
        tried = _fitted(low * shrink, high * shrink, grid)
        error = ((_rounded(grouped, *tried, grid) - grouped).square() * counts).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1])
    return best[0], None if grid.symmetric else best[1].to(torch.int8)


def _fitted(low_O_G: Tensor, high_O_G: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scales and zeros, both float32, of groups that reach from low to high."""
    steps = grid.highest - grid.lowest
    span = torch.maximum(-low_O_G, high_O_G) * 2 if grid.symmetric else high_O_G - low_O_G
    scale = (span / steps).to(grid.dtype).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of zeros, whatever its scale
    if grid.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (grid.lowest - low_O_G / scale).round().clamp(grid.lowest, grid.highest)


def _rounded(grouped_O_G_J: Tensor, scale_O_G: Tensor, zero_O_G: Tensor, grid: Grid) -> Tensor:
    """Return the values of the grid that are nearest to a weight's, as floats."""
    scale, zero = scale_O_G[..., None], zero_O_G[..., None]
    return ((grouped_O_G_J / scale + zero).round().clamp(grid.lowest, grid.highest) - zero) * scale


def round_column(column_O: Tensor, scale_O: Tensor, zero_O: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return a column's integers (int8), and the floats that they stand for.

    Args:
        column_O: The column, or (O, N) columns with scales of (O, 1).
        scale_O: Scale of each row.
        zero_O: Zero of each row; None: symmetric.
        grid: The grid.
    """
    zero = 0.0 if zero_O is None else zero_O.float()
    values = (column_O / scale_O + zero).round().clamp(grid.lowest, grid.highest)
    return values.to(torch.int8), (values - zero) * scale_O


def round_to_nearest(
    weight_O_I: Tensor,
    grid: Grid,
    importance_I: Tensor | None = None,
    activation_bits: Literal[8] | None = None,
) -> QuantizedWeight:
    """Quantise a weight by rounding each value to the nearest one of its group's grid.

    Args:
        weight_O_I: The weight; its groups divide its width.
        grid: The grid.
        importance_I: See `scales_and_zeros`.
        activation_bits: See `QuantizedWeight`.
    """
    scale, zero = scales_and_zeros(weight_O_I, grid, importance_I)
    rows, width = weight_O_I.shape
    grouped = weight_O_I.detach().float().reshape(rows, -1, grid.columns(width))
    values, _ = round_column(grouped, scale[..., None], None if zero is None else zero[..., None], grid)
    values = values.view(rows, width)
    return QuantizedWeight(values, scale, zero, grid.columns(width), grid.bits, None, activation_bits)


class _StraightThrough(torch.autograd.Function):
    """Give the rounded weight, and pass its gradient on to the weight as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid) -> Tensor:
        return round_to_nearest(weight, grid).dense().to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def fake_quantized(weight_O_I: Tensor, grid: Grid) -> Tensor:
    """Return the weight as `round_to_nearest` would leave it, with the straight-through gradient (arXiv 1308.3432).

    The scales follow the weights, so that no value is clipped by more than half a step, and no gradient is cut.

    Args:
        weight_O_I: The weight that is trained.
        grid: The grid.
    """
    result: Tensor = _StraightThrough.apply(weight_O_I, grid)
    return result
