"""Attention over a ragged batch's tree of segments through compiled kernels (`tree.c`): float32, on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from posttrain.core.ragged import RaggedBatch
from posttrain.cpu import library as native

WIDEST = 16
"""Floats of the widest vector; heads of another size than a multiple of it are computed with zeros behind."""
LARGEST = 512
"""The largest head whose tiles stay in a core's cache."""


def table(batch: RaggedBatch) -> Tensor:
    """Make (3, S) int64: where segments start and end, and their parents."""
    return torch.tensor([batch.starts, batch.ends, batch.parents], dtype=torch.long)


def kernels_for(query: Tensor, key: Tensor, value: Tensor) -> native.Kernels | None:
    """Return the compiled kernels, if they take these tensors, else None.

    Args:
        query: (heads, T, size).
        key: (key heads, T, size).
        value: (key heads, T, size).
    """
    size = query.shape[-1]
    plain = all(type(x) is Tensor and x.dtype == torch.float32 and x.stride(-1) == 1 for x in (query, key, value))
    if not plain or size > LARGEST or key.shape != value.shape or query.shape[0] % key.shape[0]:
        return None
    kernels = native.kernels()
    return kernels if kernels is not None and _right(kernels) else None


@lru_cache(maxsize=1)
@torch.inference_mode(False)  # the first to ask may be a sampler
@torch.no_grad()
def _right(kernels: native.Kernels) -> bool:
    """Return whether results and gradients equal a softmax in float64, on a prompt of 70 tokens with two answers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(n, 130, 32, generator=generator) for n in (2, 1, 1, 2))
    segments = torch.tensor([[0, 70, 125], [70, 125, 130], [-1, 0, 0]])
    place = torch.arange(130)
    place[125:] -= 55  # the second answer goes on from the prompt, as the first does
    distance = place[:, None] - place
    answer = torch.arange(130) >= 125
    for window in (None, 40):
        hidden = (distance < 0) | (answer[:, None] & ~answer & (place >= 70))
        hidden |= ~answer[:, None] & answer
        if window is not None:
            hidden |= distance >= window
        with torch.enable_grad():
            exact = [x.double().requires_grad_() for x in (q, k, v)]
            p = (0.3 * exact[0] @ exact[1].mT).masked_fill(hidden, -torch.inf).softmax(-1)
            expected = p @ exact[2]
            gradients = torch.autograd.grad(expected, exact, d_out.double())
        out, lse = forward(kernels, q, k, v, segments, window, 0.3)
        found = out, *backward(kernels, q, k, v, segments, window, 0.3, out, lse, d_out)
        for a, b in zip(found, (expected, *gradients), strict=True):
            if not float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()):
                return False
    return True


def _padded(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the tensors with heads of whole vectors: zeros behind, which change no product."""
    extra = -tensors[0].shape[-1] % WIDEST
    return [torch.nn.functional.pad(x, (0, extra)) for x in tensors] if extra else tensors


def forward(
    kernels: native.Kernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute attention. Tokens after the last segment get 0 and -inf.

    Args:
        kernels: The compiled kernels.
        query: (heads, T, size).
        key: (key heads, T, size).
        value: (key heads, T, size).
        segments: `table` of the batch.
        window: Sliding window (None: none).
        scale: Multiplies the scores.

    Returns:
        ((heads, T, size) output, which lies in memory as (T, heads, size); (heads, T) log-sum-exps).
    """
    heads, own_size = len(query), query.shape[-1]
    query, key, value = _padded((query, key, value))
    total, size = query.shape[1:]
    out, lse = query.new_empty(total, heads, size), query.new_empty(heads, total)
    end = int(segments[1, -1])
    out[end:] = 0.0
    lse[:, end:] = -torch.inf
    asked = _asked((query, key, value), segments, window)
    kernels.use_threads()
    if kernels.lib.tree_attention(*asked, scale, out.data_ptr(), lse.data_ptr()):
        raise MemoryError("no memory for the tiles of attention")
    return out[..., :own_size].transpose(0, 1), lse


def backward(
    kernels: native.Kernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    window: int | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value.

    Args:
        kernels: As `forward` takes them, and so the next ones.
        query: Likewise.
        key: Likewise.
        value: Likewise.
        segments: Likewise.
        window: Likewise.
        scale: Likewise.
        out: Result of `forward`.
        lse: Result of `forward`.
        d_out: Gradient of the output.
    """
    d_out = d_out if d_out.stride(-1) == 1 and d_out.dtype == torch.float32 else d_out.float().contiguous()
    size, kv_heads = query.shape[-1], len(key)
    query, key, value, d_out = _padded((query, key, value, d_out))
    (out,) = _padded((out.transpose(0, 1),))  # in memory as `forward` made it
    d_query, d_key, d_value = (query.new_zeros(query.shape) for _ in range(3))
    asked = _asked((query, key, value, d_out), segments, window)
    ends = (x.data_ptr() for x in (out, lse, d_out, d_query, d_key, d_value))
    kernels.use_threads()
    if kernels.lib.tree_attention_back(*asked, scale, *ends):
        raise MemoryError("no memory for the tiles of attention")
    d_query, d_key, d_value = (x[..., :size] for x in (d_query, d_key, d_value))
    if len(query) != kv_heads:
        d_key, d_value = (x.unflatten(0, (kv_heads, -1)).sum(1) for x in (d_key, d_value))
    return d_query, d_key, d_value


def _asked(tensors: Sequence[Tensor], segments: Tensor, window: int | None) -> tuple[Any, ...]:
    query, key, value = tensors[:3]
    strides = [x.stride(i) for x in tensors for i in (0, 1)] + [0, 0]
    sizes = (segments.shape[1], len(query), len(key), query.shape[2], query.shape[1], window or 0)
    return (
        *(x.data_ptr() for x in (query, key, value)),
        (ctypes.c_long * 8)(*strides[:8]),
        *(segments[i].data_ptr() for i in range(3)),
        (ctypes.c_long * 6)(*sizes),
    )
