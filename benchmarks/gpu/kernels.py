"""Triton kernels on the card: results against PyTorch in float64, times beside PyTorch's operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.base import Account, Where, apart
from posttrain.losses.linear_logprobs import Head, linear_cross_entropy, linear_logprobs

BOUNDS = {torch.float32: 2e-4, torch.bfloat16: 2e-2}
"""Largest difference, as a part of the largest value. The card multiplies float32 matrices with fewer digits."""


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def seconds(where: Where, function: Callable[[], object]) -> float:
    """The median time of a call of five, after two."""
    took = []
    for _ in range(7):
        where.wait()
        began = time.perf_counter()
        function()
        where.wait()
        took.append(time.perf_counter() - began)
    return sorted(took[2:])[2]


def loss(function: Callable[..., tuple[Tensor, ...]], targets: Tensor, weights: Tensor) -> Callable[..., Tensor]:
    """Cross-entropy of hidden states and the head's weight."""
    return lambda hidden, head: function(hidden, Head(head), targets, weights)[0]


def mixed(function: Callable[..., tuple[Tensor, ...]], targets: Tensor) -> Callable[..., Tensor]:
    """Log-probabilities and entropies, added."""
    return lambda hidden, head: torch.stack(function(hidden, Head(head), targets, 0.8, True)).sum(0)


def both(function: Callable[..., Tensor], leaves: Sequence[Tensor], d: Tensor) -> list[Tensor]:
    """The result, and gradients of its sum with coefficients d."""
    out = function(*leaves)
    return [out, *torch.autograd.grad((out * d.to(out.dtype)).sum(), [x for x in leaves if x.requires_grad])]


def check(where: Where) -> Account:
    """Each kernel in float32 and bfloat16, forward and backward, at the sizes of a Qwen2 of 0.5B."""
    account = Account()
    if not where.cuda:
        account.note = "kernels run on a GPU alone; tests/cuda has them in Triton's interpreter"
        return account
    from posttrain.cuda import fused_forwards as fused
    from posttrain.cuda import vocabulary_loss as vocabulary

    tokens, vocabulary_size = 8192, 151936
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int, learns: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(shape, generator=generator, device=where.device).to(dtype)
        return x.requires_grad_(learns)

    for dtype in (torch.float32, torch.bfloat16):
        x, w, norms = draw(1, tokens, 896, dtype=dtype), draw(896, dtype=dtype), draw(1, tokens, 8, 128, dtype=dtype)
        gate, up = (draw(1, tokens, 4864, dtype=dtype) for _ in range(2))
        query = draw(1, tokens, 14, 64, dtype=dtype)
        cos, sin = (draw(1, tokens, 64, learns=False, dtype=dtype) for _ in range(2))
        hidden, head = draw(1500, 896, dtype=dtype), (draw(vocabulary_size, 896) / 30).detach().to(dtype)
        head.requires_grad_()
        targets = torch.randint(vocabulary_size, (1500,), generator=generator, device=where.device)
        weights = torch.rand(1500, generator=generator, device=where.device)

        cases: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = {
            "norm": (lambda x, w: fused._Norm.apply(x, w, 1e-5, 0.0), normed, [x, w]),
            "norm of heads": (lambda x, w: fused._Norm.apply(x, w, 1e-5, 0.0), normed,
                              [norms, draw(128, dtype=dtype)]),
            "gated": (lambda g, u: fused._Gated.apply(g, u, "silu"), lambda g, u: F.silu(g) * u, [gate, up]),
            "rotation": (lambda q, c, s: fused._Rotation.apply(q.transpose(1, 2), c, s),
                         lambda q, c, s: rotated(q.transpose(1, 2), c, s), [query, cos, sin]),
            "cross-entropy": (loss(vocabulary.fused_cross_entropy, targets, weights),
                              loss(linear_cross_entropy, targets, weights), [hidden, head]),
            "log-probabilities": (mixed(vocabulary.fused_logprobs, targets), mixed(linear_logprobs, targets),
                                  [hidden, head]),
        }  # fmt: skip
        for name, (ours, plain, leaves) in cases.items():
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            d = torch.randn(ours(*leaves).shape, generator=generator, device=where.device)
            exact = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
            found, expected = both(ours, leaves, d), both(plain, exact, d)
            account.at_most(label, max(map(apart, found, expected)), BOUNDS[dtype])
            if dtype == torch.bfloat16:
                for who, f in (("ms", ours), ("ms, PyTorch", plain)):
                    took = seconds(where, lambda f=f, leaves=leaves, d=d: both(f, leaves, d))  # type: ignore[misc]
                    account.numbers[f"{name}, {who}"] = round(1e3 * took, 3)
            del exact, found, expected
            torch.cuda.empty_cache()
    times = [n.removesuffix(", ms") for n in account.numbers if n.endswith(", ms")]
    account.note = ", ".join(
        f"{n} {account.numbers[f'{n}, ms, PyTorch'] / account.numbers[f'{n}, ms']:.1f}x" for n in times
    )
    return account
