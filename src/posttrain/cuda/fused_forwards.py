"""Norms, gated MLPs and rotations of transformers' models on a GPU, a kernel each (`triton_kernels`).

A module's forward is replaced only after it and the fused one were compared on the module itself, and a rotation after
results and gradients were. What comes out is the same up to the order of rounding: between reading its inputs and
writing its result a kernel computes in float32. Less is kept for backward: of a norm its input, of a gated MLP the
inputs of the activation and of the product, of a rotation nothing but its angles.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.core.low_rank_linear import LowRankLinear, activation_of, low_rank, low_rank_base
from posttrain.cuda import triton_kernels as kernels

TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest difference, relative to the largest output, at which a fused forward counts as the module's own."""
WIDEST_NORM = 16384
"""Columns of the widest norm."""


def check_kernels(device: torch.device) -> None:
    """Run a small kernel, so that a machine on which Triton can't compile shows it before a model depends on it.

    Raises:
        RuntimeError: The result is wrong; whatever Triton raises otherwise.
    """
    x = torch.tensor([[3.0, -4.0]], device=device)
    y, _ = kernels.norm(x, torch.ones_like(x[0]), 0.0, 0.0)
    if not torch.allclose(y, x * 0.08**0.5, rtol=1e-5):
        raise RuntimeError(f"a norm of (3, -4) is {y.tolist()}")


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, shift):  # type: ignore[no-untyped-def]
        x = x.contiguous()
        y, rstd = kernels.norm(x, weight, eps, shift)
        ctx.save_for_backward(x, weight, rstd)
        ctx.shift = shift
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, rstd = ctx.saved_tensors
        dx, d_weight = kernels.norm_back(x, weight, rstd, dy.contiguous(), ctx.shift, ctx.needs_input_grad[1])
        return dx, d_weight, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kind):  # type: ignore[no-untyped-def]
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return kernels.gated(gate, up, kind)

    @staticmethod
    def backward(ctx, d):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        # Not into `d`: autograd may hand the same memory to others.
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        kernels.gated_back(gate, up, d.contiguous(), (d_gate, d_up), ctx.kind, False)
        return d_gate, d_up, None


class _GatedDown(torch.autograd.Function):
    """act(gate) * up, then the down projection; the product is made again in backward."""

    @staticmethod
    def forward(ctx, gate, up, weight, kind):  # type: ignore[no-untyped-def]
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up, weight)
        ctx.kind = kind
        return F.linear(kernels.gated(gate, up, kind), weight)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        gate, up, weight = ctx.saved_tensors
        learns = ctx.needs_input_grad[2]
        d = torch.matmul(dy, weight)
        d_gate = torch.empty_like(gate)
        product = kernels.gated_back(gate, up, d, (d_gate, d), ctx.kind, learns)
        d_weight = None
        if product is not None:
            d_weight = torch.mm(dy.flatten(0, -2).t(), product.flatten(0, -2))
        return d_gate, d, d_weight, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, False)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return _rotated(dy if dy.stride(-1) == 1 else dy.contiguous(), *ctx.saved_tensors, True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Return `kernels.rotate` of (1, heads, T, size), in memory ordered by token."""
    y = x.new_empty(x.shape[2], x.shape[1], x.shape[3])
    kernels.rotate(x[0].transpose(0, 1), cos, sin, back, y)
    return y.transpose(0, 1)[None]


def _takes(*tensors: Tensor) -> bool:
    """Return True if kernels can read all of these: one GPU, one dtype, not while torch compiles or traces."""
    if torch.compiler.is_compiling():  # it fuses the operations itself
        return False
    first = tensors[0]
    return all(x.device == first.device and x.dtype == first.dtype and type(x.data) is Tensor for x in tensors)


def _norm_forward(shift: float) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _takes(hidden_states, self.weight) or not hidden_states.numel():
            return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
        eps = float(getattr(self, "variance_epsilon", None) or self.eps)
        return _Norm.apply(hidden_states, self.weight, eps, shift)  # type: ignore[no-any-return]

    return forward


def _mlp_forward(kind: str) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _takes(x) or not x.numel():
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        plain = type(down) is nn.Linear and down.bias is None and _takes(gate, up, down.weight)
        if plain and torch.is_grad_enabled():
            return _GatedDown.apply(gate, up, down.weight, kind)  # type: ignore[no-any-return]
        return down(_Gated.apply(gate, up, kind))  # type: ignore[no-any-return]

    return forward


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found = None if args or kwargs or not x.numel() or torch.compiler.is_compiling() else low_rank(self)
    if found is None or not torch.is_grad_enabled() or found[1].dtype not in (x.dtype, torch.float32):
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    base, a, b, scale = found
    if type(base) is not nn.Linear or base.weight.dtype != x.dtype:
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    return LowRankLinear.apply(x, base.weight, base.bias, a, b, scale)  # type: ignore[no-any-return]


def _rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return transformers' `apply_rotary_pos_emb` with one kernel for a tensor on a GPU."""

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = not args and not kwargs and q.ndim == k.ndim == 4 and cos.ndim == sin.ndim == 3
        plain = plain and q.is_cuda and q.shape[0] == cos.shape[0] == 1 and q.stride(-1) == k.stride(-1) == 1
        plain = plain and cos.shape[1:] == (q.shape[2], q.shape[3]) and not cos.requires_grad and bool(q.numel())
        if not plain or not _takes(q, k, cos, sin):
            return original(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos.contiguous(), sin.contiguous()
        return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)

    apply_rotary_pos_emb.before = original  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def _fuse_rotary(attention: nn.Module, like: Tensor) -> bool:
    """Replace the function where the attention's own module of transformers looks it up, if it computes the same."""
    home = sys.modules[type(attention).__module__]
    original = getattr(home, "apply_rotary_pos_emb", None)
    if original is None or hasattr(original, "before"):
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 3, heads, 8, generator=generator).to(like).transpose(1, 2) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 8, generator=generator).to(like) for _ in range(2))
    fused, sides = _rotary(original), []
    try:
        for function in (original, fused):
            leaves = [x.clone().requires_grad_() for x in (q, k)]
            with torch.enable_grad():
                turned = list(function(*leaves, cos, sin))
                turned += torch.autograd.grad([x.float().square().sum() for x in turned], leaves)
            sides.append([x.detach().float() for x in turned])
    except (TypeError, RuntimeError, ValueError):
        return False  # another kind of rotation, with other arguments
    tolerance = TOLERANCES[like.dtype]
    if any(a.shape != b.shape or (a - b).abs().max() > tolerance * a.abs().max() for a, b in zip(*sides, strict=True)):
        return False
    home.apply_rotary_pos_emb = fused  # type: ignore[attr-defined]
    return True


def _same(module: Any, forward: Callable[..., Tensor], width: int) -> bool:
    """Check that the fused forward gives what the module's own gives on a few random rows, training and sampling."""
    weight = next(p for p in module.parameters() if p.is_floating_point())
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        own = type(module).forward(module, x).float()
    for training in (False, True):
        with torch.set_grad_enabled(training):
            fused = forward(module, x).detach().float()
        most = TOLERANCES[weight.dtype] * own.abs().max().clamp_min(1e-6)
        if fused.shape != own.shape or bool((fused - own).abs().max() > most):
            return False
    return True


def _candidates(module: Any) -> tuple[list[Callable[..., Tensor]], int]:
    """Return fused forwards that a module might be the same as, and the width of its input."""
    weight = getattr(module, "weight", None)
    has_eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and weight.ndim == 1 and has_eps:
        return ([_norm_forward(0.0), _norm_forward(1.0)], len(weight)) if len(weight) <= WIDEST_NORM else ([], 0)
    parts = [getattr(module, n, None) for n in ("gate_proj", "up_proj", "down_proj")]
    if all(isinstance(p, nn.Module) and hasattr(p, "in_features") for p in parts) and len(list(module.children())) <= 4:
        kind = activation_of(module)
        return ([] if kind is None else [_mlp_forward(kind)]), parts[0].in_features  # type: ignore[union-attr, return-value]
    base = low_rank_base(module)
    if type(base) is nn.Linear:  # below it bitsandbytes' layers compute faster themselves
        return [_lora_forward], base.in_features
    return [], 0


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Return what two modules must have in common for the comparison of one to hold for the other."""
    plain = (bool, int, float, str)
    return tuple(
        (type(m), *sorted((k, v) for k, v in vars(m).items() if isinstance(v, plain) and k != "layer_idx"))
        for m in module.modules()
    )


def fuse_forwards(model: nn.Module) -> dict[str, int]:
    """Replace what can be replaced, in place; returns how many modules of each type were."""
    done: dict[str, int] = {}
    known: dict[tuple[Any, ...], Callable[..., Tensor] | None] = {}
    for module in model.modules():
        first = next(module.parameters(), None)
        if first is None or first.dtype not in TOLERANCES:
            continue
        if type(module).__name__.endswith("Attention") and _fuse_rotary(module, first.detach()):
            done["apply_rotary_pos_emb"] = 1
        options, width = ([], 0) if "forward" in module.__dict__ else _candidates(module)
        if not options:
            continue
        key = width, first.dtype, *signature(module)
        if key not in known:
            known[key] = next((f for f in options if _same(module, f, width)), None)
        chosen = known[key]
        if chosen is not None:
            module.forward = MethodType(chosen, module)  # type: ignore[method-assign]
            done[type(module).__name__] = done.get(type(module).__name__, 0) + 1
    return done
