"""Keys or values in int8: each token of each head has a scale, so that what is appended changes nothing stored.

    scale = max(max |x|, 1e-30) / 127        x' = round(x / scale) scale, ties to even        |x - x'| <= scale / 2

Compiled kernels write and read the same (`posttrain/cpu/csrc/attention.c`).
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_STEPS = 127
SMALLEST = 1e-30
"""A row of zeros has a scale as well."""
SCALE_BYTES = 4


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to int8.

    Args:
        x: (..., size). A row with a number that is not finite gets a scale that is not: a broken model must show.

    Returns:
        Integers (..., size) and float32 scales (...).
    """
    x = x.float()
    scales = x.abs().amax(-1).clamp_min(SMALLEST) / INT8_STEPS
    return (x / scales[..., None]).round_().to(torch.int8), scales


def dequantize_rows(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows that integers and scales stand for, in one pass over memory.

    Args:
        integers: (..., size).
        scales: (...).
        dtype: Of the result.
    """
    out = torch.empty(integers.shape, dtype=dtype, device=integers.device)
    return torch.mul(integers, scales[..., None], out=out)
