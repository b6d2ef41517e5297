"""Checks of the compiled kernels, made each time that they are opened: they must compute what torch does."""

from __future__ import annotations

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
