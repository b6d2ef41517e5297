"""Triton kernels for NVIDIA GPUs: what lies between the matrix products of a layer, and the loss over a vocabulary.

Plain PyTorch runs each operation as a kernel of its own, which reads and writes all of its memory. One kernel here
takes the place of several: numbers are read once, computed in float32, and written once in the dtype of the inputs.
Sums are in the same order every time. Numbers of rows, in which batches differ, make no new version of a kernel
(`do_not_specialize`), or one for those that 16 divides and one for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

VOCABULARY_BLOCK = 4096
"""Logits that a program of the vocabulary's kernels reads at a time."""
ELEMENTS = 1024
"""Elements of a program of the gated kernels."""
NORM_ELEMENTS = 2048
"""Elements that a program of a norm takes at a time, if a row is shorter: short rows (norms of heads) go together."""
NORM_BLOCKS = 8
"""Blocks of rows that a program of a norm's backward pass takes; it adds up the weight's gradient over them."""


def on_its_device(function: Launcher) -> Launcher:
    """Let a function's kernels run on the GPU of its first argument: Triton takes the process's current one."""

    @wraps(function)
    def launched(x: Tensor, *args: Any) -> Any:
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return function(x, *args)
        with torch.cuda.device_of(x):
            return function(x, *args)

    return launched  # type: ignore[return-value]


def _blocks(n: int, size: int) -> int:
    """Return how many blocks hold n; `triton.cdiv`, called on the host, takes longer than a launch."""
    return -(-n // size)


def _power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n; as `_blocks`."""
    return 1 << (n - 1).bit_length()


# ---------------------------------------------------------------------------------------------------------------- norm
@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, more, weight, total, y, rstd, rows, eps, shift,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:  # the sum is rounded as it is kept, so that backward sees what forward has seen
        values += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
        values = values.to(y.dtype.element_ty)
        tl.store(total + at, values, mask=inside)
        values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / WIDTH + eps)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) + shift
    tl.store(y + at, (values * scale[:, None] * w[None, :]).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _norm_back_kernel(  # type: ignore[no-untyped-def]
    x, weight, rstd, dy, more, dx, d_weight, rows, shift,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, BLOCKS: tl.constexpr, LEARNS: tl.constexpr,
    ADDS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) + shift
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(BLOCKS):
        row = (program * BLOCKS + block) * AT_ONCE + tl.arange(0, AT_ONCE)
        inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if LEARNS:
            total += tl.sum(d * normed, 0)
        d = d * w[None, :]
        inner = tl.sum(d * normed, 1)[:, None] / WIDTH
        d = (d - normed * inner) * scale
        if ADDS:
            d += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    if LEARNS:
        tl.store(d_weight + program * WIDTH + column, total, mask=column < WIDTH)


def _norm_blocks(width: int) -> tuple[int, int, int]:
    """Return (columns of a block, rows at once, warps) for rows of a width."""
    block = _power_of_2(width)
    return block, max(1, NORM_ELEMENTS // block), min(16, max(4, block // 512))


@on_its_device
def norm(x: Tensor, weight: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    """Compute x / sqrt(mean(x^2) + eps) * (weight + shift) over the last axis (arXiv 1910.07467).

    Args:
        x: Rows without gaps, of any number of axes.
        weight: One number for each column.
        eps: Added to the mean of squares.
        shift: Added to the weight.

    Returns:
        (the result, 1 / sqrt(mean(x^2) + eps) of each row in float32).
    """
    _, y, rstd = _norm(x, None, weight, eps, shift)
    return y, rstd


@on_its_device
def add_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute x + more, and `norm` of it, in one pass.

    Args:
        x: As given to `norm`.
        more: Of the same shape, without gaps.
        weight: As given to `norm`.
        eps: Likewise.
        shift: Likewise.

    Returns:
        (x + more, its norm, 1 / sqrt(mean + eps) of each row in float32).
    """
    return _norm(x, more, weight, eps, shift)


def _norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    rows, (block, at_once, warps) = x.numel() // width, _norm_blocks(width)
    y, rstd = x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)
    total, grid = x if more is None else torch.empty_like(y), (_blocks(rows, at_once),)
    given = x, x if more is None else more, weight, total, y, rstd, rows, eps, shift
    _norm_kernel[grid](*given, width, block, at_once, more is not None, num_warps=warps)
    return total, y, rstd


@on_its_device
def norm_back(
    x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, shift: float, learns: bool, more: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `norm` in x, and in the weight if it is trained.

    Args:
        x: As given to `norm`.
        weight: Likewise.
        rstd: What `norm` returned.
        dy: Gradient of the result, without gaps.
        shift: As given to `norm`.
        learns: The weight is trained.
        more: Added to the gradient in x.
    """
    width = x.shape[-1]
    rows, (block, at_once, warps) = x.numel() // width, _norm_blocks(width)
    programs, dx = _blocks(rows, at_once * NORM_BLOCKS), x.new_empty(x.shape)
    parts = rstd.new_empty((programs, width) if learns else 1)
    sizes = width, block, at_once, NORM_BLOCKS, learns, more is not None
    given = x, weight, rstd, dy, dy if more is None else more, dx, parts, rows, shift
    _norm_back_kernel[(programs,)](*given, *sizes, num_warps=warps)
    return dx, parts.sum(0).to(weight.dtype) if learns else None


# ----------------------------------------------------------------------------------------------------------- gated MLP
@triton.jit
def _activated(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return (act(x), its derivative)."""
    if KIND == 0:  # SiLU
        s = 1.0 / (1.0 + tl.exp(-x))
        return x * s, s * (1.0 + x * (1.0 - s))
    elif KIND == 1:  # GELU
        p = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return x * p, p + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # GELU by tanh; tanh(u) = 2 / (1 + exp(-2 u)) - 1
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = 2.0 / (1.0 + tl.exp(-2.0 * u)) - 1.0
        du = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * du


@triton.jit  # strides and a width that 16 divides let it read 16 bytes at a time
def _gated_kernel(  # type: ignore[no-untyped-def]
    gate, up, y, gate_row, up_row, width, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    act, _ = _activated(tl.load(gate + row * gate_row + at, mask=inside, other=0.0).to(tl.float32), KIND)
    product = act * tl.load(up + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, product.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_back_kernel(  # type: ignore[no-untyped-def]
    gate, up, d, d_gate, d_up, y, gate_row, up_row, d_row, d_gate_row, d_up_row, width,
    KIND: tl.constexpr, BLOCK: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    act, slope = _activated(tl.load(gate + row * gate_row + at, mask=inside, other=0.0).to(tl.float32), KIND)
    u = tl.load(up + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(d + row * d_row + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_gate + row * d_gate_row + at, (dy * u * slope).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + row * d_up_row + at, (dy * act).to(d_up.dtype.element_ty), mask=inside)
    if PRODUCT:
        tl.store(y + row * width + at, (act * u).to(y.dtype.element_ty), mask=inside)


GATES = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@on_its_device
def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Compute act(gate) * up.

    Args:
        gate: Input of the activation; rows without gaps inside, which may have gaps between them.
        up: Multiplies its result; likewise.
        kind: A name in `GATES`.
    """
    y, width = gate.new_empty(gate.shape), gate.shape[-1]
    g, u = gate.flatten(0, -2), up.flatten(0, -2)
    grid = len(g), _blocks(width, ELEMENTS)
    _gated_kernel[grid](g, u, y, g.stride(0), u.stride(0), width, GATES[kind], ELEMENTS)
    return y


@on_its_device
def gated_back(
    gate: Tensor, up: Tensor, d: Tensor, out: tuple[Tensor, Tensor], kind: str, product: bool
) -> Tensor | None:
    """Compute the gradients of `gated`; returns act(gate) * up if `product`.

    Args:
        gate: As given to `gated`.
        up: Likewise.
        d: Gradient of its result; rows as those of gate, and so for the others.
        out: Where the gradients of gate and up go; one may be `d`.
        kind: As given to `gated`.
        product: Compute the result again too.
    """
    width, rows = gate.shape[-1], [x.flatten(0, -2) for x in (gate, up, d, *out)]
    y = gate.new_empty(gate.shape) if product else out[0]
    grid = len(rows[0]), _blocks(width, ELEMENTS)
    strides = [x.stride(0) for x in rows]
    _gated_back_kernel[grid](*rows, y, *strides, width, GATES[kind], ELEMENTS, product)
    return y if product else None


# ------------------------------------------------------------------------------------------------------------ rotation
@triton.jit(do_not_specialize=["x_token", "x_head", "y_token", "y_head"])
def _rotate_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, y, x_token, x_head, y_token, y_head,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside, half = (head < HEADS) & (i < HALF), i < HALF
    c1 = tl.load(cos + token * 2 * HALF + i, mask=half, other=0.0).to(tl.float32)
    c2 = tl.load(cos + token * 2 * HALF + HALF + i, mask=half, other=0.0).to(tl.float32)
    s1 = tl.load(sin + token * 2 * HALF + i, mask=half, other=0.0).to(tl.float32)
    s2 = tl.load(sin + token * 2 * HALF + HALF + i, mask=half, other=0.0).to(tl.float32)
    source = x + token * x_token + head * x_head + i
    x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    target = y + token * y_token + head * y_head + i
    tl.store(target, y1.to(y.dtype.element_ty), mask=inside)
    tl.store(target + HALF, y2.to(y.dtype.element_ty), mask=inside)


@on_its_device
def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool, out: Tensor) -> None:
    """Compute x cos + rotate_half(x) sin (arXiv 2104.09864), or the gradient in x.

    Args:
        x: (T, heads, size), the last axis without gaps; `back`: the gradient of the result.
        cos: (1, T, size), without gaps.
        sin: Likewise.
        back: Compute the gradient.
        out: Where the result goes, (T, heads, size), the last axis without gaps; it may be x.
    """
    tokens, heads, size = x.shape
    half = size // 2
    strides = x.stride(0), x.stride(1), out.stride(0), out.stride(1)
    _rotate_kernel[(tokens,)](
        x, cos, sin, out, *strides, heads, half, _power_of_2(heads), _power_of_2(half), back
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- vocabulary
@triton.jit(do_not_specialize=["stride"])
def _statistics_kernel(  # type: ignore[no-untyped-def]
    z, targets, factors, logprobs, lse, entropies, hits, stride,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    factor = tl.load(factors + row)
    top = tl.full([BLOCK], -1e30, dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    weighted = tl.zeros([BLOCK], dtype=tl.float32)
    best = tl.full([BLOCK], VOCABULARY, dtype=tl.int32)
    for start in range(0, VOCABULARY, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(z + at, mask=at < VOCABULARY, other=-float("inf")).to(tl.float32) * factor
        best = tl.where(values > top, at, best)  # of equal ones the first, as torch's max
        higher = tl.maximum(top, values)
        less, more = tl.exp(top - higher), tl.exp(values - higher)
        if ENTROPY:
            weighted = weighted * less + tl.where(at < VOCABULARY, values, 0.0) * more
        total = total * less + more
        top = higher
    highest = tl.max(top, 0)
    share = tl.exp(top - highest)
    together = tl.sum(total * share, 0)
    log_total = highest + tl.log(together)
    target = tl.load(targets + row)
    tl.store(logprobs + row, tl.load(z + target).to(tl.float32) * factor - log_total)
    tl.store(lse + row, log_total)
    if ENTROPY:
        tl.store(entropies + row, log_total - tl.sum(weighted * share, 0) / together)
    likeliest = tl.min(tl.where(top == highest, best, VOCABULARY), 0)
    tl.store(hits + row, likeliest == target)


@triton.jit(do_not_specialize=["stride"])
def _derivative_kernel(  # type: ignore[no-untyped-def]
    z, targets, factors, lse, entropies, d_logprobs, d_entropies, stride,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z += row * stride
    factor, log_total, d_row = tl.load(factors + row), tl.load(lse + row), tl.load(d_logprobs + row)
    inside = at < VOCABULARY
    log_p = tl.load(z + at, mask=inside, other=0.0).to(tl.float32) * factor - log_total
    p = tl.exp(log_p)
    d = tl.where(at == tl.load(targets + row), d_row, 0.0) - d_row * p
    if ENTROPY:
        d -= tl.load(d_entropies + row) * p * (log_p + tl.load(entropies + row))
    tl.store(z + at, (d * factor).to(z.dtype.element_ty), mask=inside)


@on_its_device
def vocabulary_statistics(
    z: Tensor, targets: Tensor, factors: Tensor, entropy: bool, out: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Compute log-probabilities of targets, log-sum-exp, entropies and hits of rows of logits, which are read once.

    Args:
        z: (N, V) products W h, in the dtype of the weights; its last axis without gaps.
        targets: (N) token ids.
        factors: (N), float32: what turns the products into logits.
        entropy: Compute entropies.
        out: Tensors of N for log-probabilities, log-sum-exp, entropies (float32) and hits (bool).
    """
    grid = (len(z),)
    _statistics_kernel[grid](z, targets, factors, *out, z.stride(0), z.shape[1], VOCABULARY_BLOCK, entropy, num_warps=8)


@on_its_device
def vocabulary_derivative(z: Tensor, targets: Tensor, factors: Tensor, known: tuple[Tensor, ...]) -> None:
    """Overwrite products with the derivative in them of sum(d_logprobs * logprobs + d_entropies * entropies).

    Args:
        z: As given to `vocabulary_statistics`.
        targets: Likewise.
        factors: Likewise.
        known: Tensors of N, float32: lse, d_logprobs, and for a loss with entropies also entropies and d_entropies.
    """
    lse, d_logprobs, *rest = known
    grid = (len(z), _blocks(z.shape[1], VOCABULARY_BLOCK))
    entropies, d_entropies = rest or (lse, lse)
    _derivative_kernel[grid](
        z, targets, factors, lse, entropies, d_logprobs, d_entropies, z.stride(0), z.shape[1], VOCABULARY_BLOCK,
        bool(rest), num_warps=8,
    )  # fmt: skip
