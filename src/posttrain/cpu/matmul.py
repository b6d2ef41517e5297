"""Speed on a CPU: the quicker route for matrix products, and memory that is not given back.

torch's default float32 products on x86 go through MKL, which keeps to 256-bit instructions on processors that are
not Intel's; oneDNN, which torch also carries, uses 512-bit ones: twice the rate on such a machine. torch takes
oneDNN for float32 only where it is allowed to round to bfloat16 on the way. Processors without bfloat16 matrix tiles
(AMX) gain nothing by rounding, and oneDNN computes in full float32 there. So the switch is thrown only where a
measurement of the error, made each time, shows float32 accuracy; everywhere else torch's default stays.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.cpu import library as native
from posttrain.cpu.quantized_matmul import packed_of, whole

FEW_ROWS = 128
"""Up to so many rows a product is quicker through kernels of our own, or with the weights on the left (below)."""

KERNELS = 256
"""Compiled kernels that oneDNN, and torch on top of it, keep. One for each shape and layout of a product: a batch makes
about a hundred. Either keeps 1,024 by itself, and every one takes half a megabyte: half a gigabyte before long."""

_state: dict[str, str] = {}


def matmul_route() -> str:
    """Throw the switch once for this process, and say which route float32 products take: 'onednn' or 'default'."""
    if "route" not in _state:
        # Read when the first product goes that way; whoever has set them knows better.
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(name, str(KERNELS))
        _state["route"] = "onednn" if _try_onednn() else "default"
    return _state["route"]


def _try_onednn() -> bool:
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is None or not hasattr(settings, "fp32_precision") or not torch.backends.mkldnn.is_available():
        return False
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    if _full_precision():
        return True
    settings.fp32_precision = before
    return False


def _full_precision() -> bool:
    """Return whether products in all layouts keep float32's accuracy (bfloat16's error: 1,000 times)."""
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((1, 576, 96), (33, 512, 160), (257, 1024, 96)):
        a = torch.randn(rows, inner, generator=generator)
        b = torch.randn(inner, columns, generator=generator)
        exact = a.double() @ b.double()
        scale = (a.double().abs() @ b.double().abs()).clamp_min(1e-30)
        for left, right in ((a, b), (a, b.t().contiguous().t()), (a.t().contiguous().t(), b)):
            if float(((left @ right).double() - exact).abs().div(scale).max()) > 2e-6:
                return False
    return True


def few_rows(x: Tensor) -> bool:
    """Return True if x (..., K) has few rows, no gradient is wanted and it is float32: decoding's kind of work."""
    if torch.is_grad_enabled() or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return 0 < x.numel() <= FEW_ROWS * x.shape[-1]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + b.

    Few rows go through the compiled kernels, which read a weight in few bits as it is packed. Without them, over
    oneDNN, they are computed as (W x^T)^T, which takes two thirds of the time: it splits the many rows of W over
    threads and registers, where x has too few. The result is then a transposed view.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).
    """
    if not few_rows(x):
        return linear_of_many(x, weight, bias)
    kernels = native.kernels()
    packed = packed_of(weight) if kernels is not None else None
    if kernels is not None and packed is not None:
        return kernels.quantized_linear(x, packed, bias)
    weight = whole(weight)  # an error if a placeholder has lost what it stands for: kernels would read past its end
    if kernels is not None and native.fits(weight):
        return kernels.linear(x, weight, bias)
    if _state.get("route") != "onednn":
        return F.linear(x, weight, bias)
    flat = x.flatten(0, -2) if x.ndim > 1 else x[None]
    right = flat.t()
    if len(flat) < 16:
        right = right.contiguous()  # a strided right side costs up to a fifth more; with more rows the copy does
    y = torch.mm(weight, right)
    if bias is not None:
        y += bias[:, None]
    return y.t().unflatten(0, x.shape[:-1]) if x.ndim > 1 else y[:, 0]


def linear_of_many(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + b of many rows; a weight that is held packed only is dequantised for it.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).
    """
    return F.linear(x, whole(weight), bias)


@contextmanager
def small_products() -> Iterator[None]:
    """Send batches of small products, such as decoding's attention, through torch's default route.

    oneDNN sets up each of them anew and copies what is no whole tensor, which takes longer than the product.
    """
    if _state.get("route") != "onednn":
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = "bf16"


def keep_memory() -> None:
    """Let malloc keep freed pages (glibc): a step's buffers are the same every time, and fresh pages cost faults."""
    if sys.platform != "linux" or "memory" in _state:
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4
        # Large blocks come from the heap, not from mappings of their own that go back to the system when freed.
        kept = libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, (1 << 31) - 1)
        _state["memory"] = "kept" if kept else "given back"
    except (OSError, AttributeError):
        _state["memory"] = "given back"


def tune() -> None:
    """Both of the above; called when a model is loaded onto a CPU."""
    matmul_route()
    keep_memory()
