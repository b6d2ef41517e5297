"""Checks of the compiled kernels, made each time that they are opened: they must compute what torch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from posttrain.cpu.library import Kernels


@torch.no_grad()
def is_exact(k: Kernels) -> bool:
    """Return whether products, norms and gates equal torch's up to rounding, on shapes that reach every tile."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:  # whatever kind of number is usual elsewhere
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    for rows, inner, columns in ((1, 33, 16), (8, 64, 50), (17, 100, 97), (24, 48, 64), (41, 32, 17), (130, 65, 49)):
        x, w = (randn(n, inner) for n in (rows, columns))
        exact = x.double() @ w.double().t()
        scale = x.double().abs() @ w.double().abs().t()
        if float(((k.linear(x, w).double() - exact).abs() / scale).max()) > 2e-6:
            return False
    if not _attends(k, randn):
        return False
    gate, up = (randn(3, 37) * 8 for _ in range(2))
    weight = randn(37)
    expected = F.rms_norm(gate, (37,), weight + 1, 1e-5)
    top, total = torch.full((3,), -1e30, dtype=torch.float32, device="cpu"), gate.new_zeros(3)
    for part in (gate, up):
        k.absorb(part.clone(), top, total, None, False)
    if not torch.allclose(top + total.log(), torch.cat([gate, up], 1).logsumexp(1), rtol=1e-5, atol=1e-5):
        return False
    pairs = [(k.gated(gate, up), F.silu(gate) * up), (k.rms_norm(gate, weight, 1e-5, 1.0), expected)]
    if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs):
        return False
    # Gradients, on more rows than one thread takes. Those of gates cross 0, where little is left of large parts.
    gate, up, d = (randn(300, 37) * 4 for _ in range(3))
    gradients = torch.ops.aten.silu_backward(d * up, gate), F.silu(gate) * d
    pairs = list(zip(k.gated_back(gate, up, d, in_place=False), gradients, strict=True))
    r, g = (gate.square().mean(-1, keepdim=True) + 1e-5).rsqrt(), d * (weight + 1)
    pairs.append(
        (k.rms_norm_back(gate, weight, d, 1e-5, 1.0), r * (g - gate * r**2 * (g * gate).mean(-1, keepdim=True)))
    )
    return all(float((a - b).abs().max()) <= 2e-6 * float(b.abs().max()) for a, b in pairs)


def _attends(k: Kernels, randn: Callable[..., Tensor]) -> bool:
    """Return True if attention of three new tokens is torch's: five queries share a key, sizes fill no vector.

    Keys and values are float32, and then int8 with a scale for each token and head.
    """
    query, key, value = randn(10, 3, 40), randn(2, 3, 40), randn(2, 3, 40)
    columns = torch.tensor([20, 4, 0], device="cpu")
    full = [(randn(3, 2, 21, 40),) for _ in range(2)]
    integers = [((x * 40).clamp(-127, 127).to(torch.int8), x.square().mean(-1) / 40) for (x,) in full]
    for own in (full, integers):
        found = k.attend(query, key, value, (own[0], own[1]), None, columns, None, None, 0.2)  # stores key and value
        stored = [x[0] if len(x) == 1 else x[0] * x[1][..., None] for x in own]
        for row, last in enumerate(columns.tolist()):
            keys, values = (x[row, :, : last + 1].repeat_interleave(5, 0) for x in stored)
            scores = 0.2 * torch.bmm(keys, query[:, row, :, None])[..., 0]
            expected = torch.bmm(scores.softmax(-1)[:, None], values)[:, 0]
            if not torch.allclose(found[row], expected, rtol=1e-4, atol=1e-5):
                return False
            if not torch.allclose(stored[0][row, :, last], key[:, row], atol=0.0 if own is full else 0.02):
                return False
    return True
