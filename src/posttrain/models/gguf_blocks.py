"""The block formats of GGUF that posttrain writes: floats rounded to a block's grid, or integers taken as they are.

A row is cut into blocks of 32 weights (Q4_K: 256), each with its scale in float16. What the package `gguf` has is its;
Q4_K, which it only reads, and blocks made of a `QuantizedWeight` without rounding it anew, are here. Layouts: ggml's
`block_q8_0`, `block_q4_0`, `block_q4_1`, `block_q4_K`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.models.quantized_weight import QuantizedWeight

GGUF_TYPES = ("F32", "F16", "Q8_0", "Q4_1", "Q4_0", "Q4_K")
"""Types that can be written."""
GGUF_BLOCK = {"Q8_0": 32, "Q4_1": 32, "Q4_0": 32, "Q5_0": 32, "Q4_K": 256}
"""Weights of a block; a row must be a multiple of it."""
REFINEMENTS = 4
"""Rounds in which Q4_K's scales and offsets are fitted to the rounded weights, by least squares."""


def type_for(columns: int, wanted: str) -> str:
    """Return the type of a matrix whose rows have this many weights: llama.cpp's own choice where blocks do not fit."""
    if columns % GGUF_BLOCK.get(wanted, 1) == 0:
        return wanted
    if wanted == "Q4_K" and columns % 32 == 0:
        return "Q5_0"
    return "F16"


def gguf_blocks(rows: np.ndarray, name: str) -> np.ndarray:
    """Round float32 rows to the blocks of a type.

    Args:
        rows: (O, I).
        name: One of `GGUF_TYPES`, or Q5_0.

    Returns:
        The bytes of each row, uint8; float arrays of F32 and F16.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if name == "Q4_K":
        return _q4_k(rows)
    return np.asarray(quantize(np.ascontiguousarray(rows), GGMLQuantizationType[name]))


def exact_type(weight: QuantizedWeight) -> str | None:
    """Return the type whose blocks hold a quantised weight's integers as they are; None: there is none."""
    if weight.order_I is not None or weight.group % 32:
        return None
    if weight.bits == 8:
        return "Q8_0" if weight.zero_O_G is None else None
    return "Q4_0" if weight.zero_O_G is None else "Q4_1"


def exact_blocks(weight: QuantizedWeight) -> np.ndarray:
    """Return a quantised weight's integers in the blocks of `exact_type`; scales are rounded to float16.

    Args:
        weight: The weight.
    """
    rows, columns = weight.shape
    repeated = weight.group // 32
    values = weight.values_O_I.numpy().reshape(-1, 32)
    scale = weight.scale_O_G.float().numpy().repeat(repeated, axis=1).reshape(-1, 1)
    d = scale.astype(np.float16).view(np.uint8)
    if weight.bits == 8:
        blocks = np.concatenate([d, values.view(np.uint8)], axis=1)
        return blocks.reshape(rows, -1)
    nibbles = (values.astype(np.int16) + 8).astype(np.uint8)
    packed = nibbles[:, :16] | (nibbles[:, 16:] << 4)
    if weight.zero_O_G is None:
        return np.concatenate([d, packed], axis=1).reshape(rows, -1)
    # (q - z) s = (q + 8) s - (z + 8) s
    zero = weight.zero_O_G.numpy().astype(np.float32).repeat(repeated, axis=1).reshape(-1, 1)
    low = (-(zero + 8) * scale).astype(np.float16).view(np.uint8)
    return np.concatenate([d, low, packed], axis=1).reshape(rows, -1)


def _q4_k(rows: np.ndarray) -> np.ndarray:
    """Round to blocks of 256 in 8 parts: w = d scale q - d_low low, with scale and low in 6 bits and q in 4."""
    part = rows.astype(np.float32).reshape(-1, 8, 32)
    low, step = _fitted(part)
    largest_step, largest_low = step.max(1, keepdims=True), low.max(1, keepdims=True)
    d, d_low = (np.float16(x / 63) for x in (largest_step, largest_low))
    d32, d_low32 = d.astype(np.float32), d_low.astype(np.float32)
    scale, offset = (
        np.divide(x, f, out=np.zeros_like(x), where=f > 0).round().clip(0, 63) for x, f in ((step, d32), (low, d_low32))
    )
    steps, offsets = (d32 * scale)[..., None], (d_low32 * offset)[..., None]
    q = np.divide(part + offsets, steps, out=np.zeros_like(part), where=steps > 0).round().clip(0, 15).astype(np.uint8)
    pairs = q.reshape(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    s, m = scale.astype(np.uint8), offset.astype(np.uint8)
    # 12 bytes: the low 6 bits of parts 0 to 3; of parts 4 to 7 four bits each in the last bytes, two above the first.
    scales = np.concatenate(
        [s[:, :4] | (s[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6), (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)],
        axis=1,
    )
    heads = np.concatenate([d.view(np.uint8), d_low.view(np.uint8)], axis=1)
    return np.concatenate([heads, scales, packed], axis=1).reshape(rows.shape[0], -1)


def _fitted(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (low, step), both (blocks, 8): part is near step q - low with q in 0 to 15 and low >= 0."""
    low = np.maximum(-part.min(-1), 0)
    step = np.maximum(part.max(-1) + low, 0) / 15
    best = np.full(low.shape, np.inf, np.float32)
    chosen = low, step
    for _ in range(REFINEMENTS + 1):
        wide = step[..., None]
        q = np.divide(part + low[..., None], wide, out=np.zeros_like(part), where=wide > 0).round().clip(0, 15)
        error = np.square(wide * q - low[..., None] - part).sum(-1)
        better = error < best
        best = np.where(better, error, best)
        chosen = np.where(better, low, chosen[0]), np.where(better, step, chosen[1])
        q_mean, w_mean = q.mean(-1), part.mean(-1)
        spread = np.square(q - q_mean[..., None]).sum(-1)
        slope = ((q - q_mean[..., None]) * part).sum(-1)
        step = np.maximum(np.divide(slope, spread, out=step.copy(), where=spread > 0), 0)
        low = np.maximum(step * q_mean - w_mean, 0)
    return chosen


def ggml_type(name: str) -> Any:
    """Return the package's value of a type."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[name]
