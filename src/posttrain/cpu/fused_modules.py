"""Modules that are the same in most model types, computed in fewer passes and with fewer tensors kept for backward.

Norms, gated MLPs and low-rank adapters spend their time moving memory and keep what is cheap to make again. Each is
replaced only after its own forward and the fused one were compared on the module itself; a module that differs in
anything keeps its own forward. What comes out is the same up to the order of rounding. Adapters on bitsandbytes' layers
in 4 bit (QLoRA, arXiv 2305.14314) are among them: one layer's weight at a time is dense, in either pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.core.low_rank_linear import (
    LowRankLinear,
    activation_of,
    dense_weight,
    in_4_bit,
    low_rank,
    low_rank_base,
    makes_dense,
)
from posttrain.cpu import library as native
from posttrain.cpu import matmul as cpu
from posttrain.cpu import recompute as remake
from posttrain.cpu.quantized_matmul import is_placeholder, packed_of
from posttrain.losses import gradient_accumulation as gradients

TOLERANCE = 2e-5
"""Largest difference, relative to the largest output, at which a fused forward counts as the module's own."""


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * (weight + shift), rms(x) = sqrt(mean(x^2) + eps) (arXiv 1910.07467); keeps x, and without the
    compiled kernels (of frozen weights in float32) 1 / rms."""

    @staticmethod
    def forward(ctx, x, weight, eps, shift):  # type: ignore[no-untyped-def]
        ctx.kernels = None if ctx.needs_input_grad[1] else _kernels_for(x, weight)
        ctx.eps, ctx.shift = float(eps), shift
        if ctx.kernels is not None:
            ctx.save_for_backward(x, weight)
            given, compute = (x.detach(), weight.detach(), ctx.eps, shift), ctx.kernels.rms_norm
            if not remake.asked():
                return compute(*given)
            y = compute(*given, out=remake.roomy(x))
            remake.made(y, lambda: compute(*given))
            return y
        x32 = x.float()
        rstd = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        y = _normed(x, weight, rstd, shift)
        if remake.asked():
            parts = x.detach(), weight.detach(), rstd
            remake.made(y, lambda: _normed(*parts, shift))
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        if ctx.kernels is not None:
            x, weight = ctx.saved_tensors
            return ctx.kernels.rms_norm_back(x, weight, dy.contiguous(), ctx.eps, ctx.shift), None, None, None
        x, weight, rstd = ctx.saved_tensors
        x32, dy32 = x.float(), dy.float()
        normed = x32 * rstd
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (dy32 * normed).flatten(0, -2).sum(0).to(weight.dtype)
        g = dy32 * (weight.float() + ctx.shift if ctx.shift else weight.float())
        inner = torch.linalg.vecdot(g, normed).unsqueeze(-1).div_(-x.shape[-1])
        return g.addcmul_(normed, inner).mul_(rstd).to(x.dtype), d_weight, None, None


def _normed(x: Tensor, weight: Tensor, rstd: Tensor, shift: float) -> Tensor:
    x32 = x.float()
    y = torch.mul(x32, rstd, out=remake.roomy(x32)) if remake.asked() else x32 * rstd
    return y.mul_(weight.float() + shift if shift else weight.float()).to(x.dtype)


def _kernels_for(*tensors: Tensor) -> native.Kernels | None:
    """Return the compiled kernels, if they can read these tensors."""
    if torch.compiler.is_compiling():  # torch.compile fuses the operations itself, and can't look into the kernels
        return None
    return native.kernels() if all(map(native.is_plain, tensors)) else None


def _gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Compute act(gate) * up; with the compiled kernel if it has this activation."""
    kernels = _kernels_for(gate, up) if kind == "silu" else None
    return ACTIVATIONS[kind][0](gate).mul_(up) if kernels is None else kernels.gated(gate, up)


def _gated_back(gate: Tensor, up: Tensor, d: Tensor, kind: str, in_place: bool) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up from `d`, that of act(gate) * up, whose memory may be used if `in_place`."""
    kernels = _kernels_for(gate, up, d) if kind == "silu" else None
    if kernels is not None:
        return kernels.gated_back(gate, up, d, in_place)
    act, act_backward = ACTIVATIONS[kind]
    d_up = act(gate).mul_(d)
    return act_backward(d.mul_(up) if in_place else d * up, gate), d_up


class _Gated(torch.autograd.Function):
    """act(gate) * up; act(gate) is made again in backward."""

    @staticmethod
    def forward(ctx, gate, up, kind):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _gated(gate, up, kind)

    @staticmethod
    def backward(ctx, d_product):  # type: ignore[no-untyped-def]
        return *_gated_back(*ctx.saved_tensors, d_product, ctx.kind, in_place=False), None


class _GatedDown(torch.autograd.Function):
    """act(gate) * up, then the down projection; the product and act(gate) are made again in backward."""

    @staticmethod
    def forward(ctx, gate, up, weight, kind):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up, weight)
        ctx.kind = kind
        return F.linear(_gated(gate, up, kind), weight)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        gate, up, weight = ctx.saved_tensors
        d_weight = None
        if ctx.needs_input_grad[2]:
            d_weight = torch.mm(dy.flatten(0, -2).t(), _gated(gate, up, ctx.kind).flatten(0, -2))
        return *_gated_back(gate, up, torch.matmul(dy, weight), ctx.kind, in_place=True), d_weight, None


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_backward(d: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(d, x, approximate="tanh")  # type: ignore[no-any-return]


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_backward),
}


class _Embedding(torch.autograd.Function):
    """weight[tokens]; its gradient goes row by row to where the weight's is kept, no matrix of zeros around it."""

    @staticmethod
    def forward(ctx, tokens, weight, padding):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tokens, weight)
        ctx.padding = padding
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        tokens, weight = ctx.saved_tensors
        place = gradients.place_of(weight)
        if place is None:
            padding = -1 if ctx.padding is None else ctx.padding
            d = torch.ops.aten.embedding_dense_backward(dy, tokens, len(weight), padding, False)
            return None, d, None
        tokens, rows = tokens.flatten(), dy.flatten(0, -2)
        if ctx.padding is not None:
            learnt = tokens != ctx.padding
            tokens, rows = tokens[learnt], rows[learnt]
        place.index_add_(0, tokens, rows)
        return None, None, None


def _norm_forward(shift: float) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        eps: Any = getattr(self, "variance_epsilon", None) or getattr(self, "eps", None)
        tokens = hidden_states.flatten(-2) if hidden_states.ndim == 4 else hidden_states  # norms of heads: as many rows
        if cpu.few_rows(tokens) and hidden_states.is_contiguous() and native.is_plain(self.weight):
            kernels = native.kernels()
            if kernels is not None:
                return kernels.rms_norm(hidden_states, self.weight, float(eps), shift)
        # needs_input_grad is that of the tensor, whether gradients are enabled or not: a measurement needs none
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return _RMSNorm.apply(hidden_states, weight, eps, shift)  # type: ignore[no-any-return]

    return forward


def _mlp_forward(kind: str) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        down = self.down_proj
        if not torch.is_grad_enabled():
            return down(_gated(self.gate_proj(x), self.up_proj(x), kind))  # type: ignore[no-any-return]
        # An adapter sits on it, or its weight is held packed only.
        if type(down) is not nn.Linear or down.bias is not None or is_placeholder(down.weight):
            return down(_Gated.apply(self.gate_proj(x), self.up_proj(x), kind))  # type: ignore[no-any-return]
        return _GatedDown.apply(self.gate_proj(x), self.up_proj(x), down.weight, kind)  # type: ignore[no-any-return]

    return forward


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found = None if args or kwargs else low_rank(self)
    if found is None or found[1].dtype not in (x.dtype, torch.float32):
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    base, a, b, scale = found
    if in_4_bit(base):
        if not (torch.is_grad_enabled() and makes_dense(base, x.dtype)):
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        return LowRankLinear.apply(x, lambda: dense_weight(base), base.bias, a, b, scale)  # type: ignore[no-any-return]
    if cpu.few_rows(x):
        return cpu.linear(x, base.weight, base.bias).add_(cpu.linear(cpu.linear(x, a), b), alpha=scale)
    return LowRankLinear.apply(x, base.weight, base.bias, a, b, scale)  # type: ignore[no-any-return]


def adapted(module: Any) -> bool:
    """Return True if a module is peft's linear one with the forward of this file."""
    return getattr(vars(module).get("forward"), "__func__", None) is _lora_forward


def _embedding_forward(self: Any, input: Tensor) -> Tensor:
    packed = packed_of(self.weight) if is_placeholder(self.weight) else None
    kernels = None if packed is None else native.kernels()
    if packed is not None and kernels is not None:
        return kernels.dequantize(packed, input)
    if not (torch.is_grad_enabled() and self.weight.requires_grad):
        return F.embedding(input, self.weight)
    return _Embedding.apply(input, self.weight, self.padding_idx)  # type: ignore[no-any-return]


def _linear_forward(self: Any, input: Tensor) -> Tensor:
    return cpu.linear(input, self.weight, self.bias)


def _same(module: Any, forward: Callable[..., Tensor], width: int) -> bool:
    """Check that the fused forward gives what the module's own gives, on a few random rows, training and sampling."""
    weight = next(p for p in module.parameters() if p.is_floating_point())
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).to(weight)
    if isinstance(module, nn.Embedding):
        x = torch.arange(3)[None] % width
    tolerance = TOLERANCE if weight.dtype == torch.float32 else 2e-2
    with torch.no_grad():
        own = type(module).forward(module, x)
    for training in (False, True):
        with torch.set_grad_enabled(training):
            fused = forward(module, x).detach()
        if fused.shape != own.shape or bool((fused - own).abs().max() > tolerance * own.abs().max().clamp_min(1e-6)):
            return False
    return True


def _candidates(module: Any) -> tuple[list[Callable[..., Tensor]], int]:
    """Fused forwards that a module might be the same as, and the width of its input."""
    name = type(module).__name__
    if not _readable(module):
        return [], 0
    weight = getattr(module, "weight", None)
    has_eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if name.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and weight.ndim == 1 and has_eps:
        return [_norm_forward(0.0), _norm_forward(1.0)], len(weight)
    parts = [getattr(module, n, None) for n in ("gate_proj", "up_proj", "down_proj")]
    if all(isinstance(p, nn.Module) and hasattr(p, "in_features") for p in parts) and len(list(module.children())) <= 4:
        kind = activation_of(module)
        return ([] if kind is None else [_mlp_forward(kind)]), parts[0].in_features  # type: ignore[union-attr, return-value]
    if type(module) is nn.Linear and weight is not None and weight.device.type == "cpu":
        return [_linear_forward], module.in_features
    if type(module) is nn.Embedding and weight is not None and weight.device.type == "cpu":
        plain = module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
        return ([_embedding_forward] if plain else []), module.num_embeddings
    base = low_rank_base(module)
    if base is not None:
        return [_lora_forward], base.in_features
    return [], 0


def _readable(module: nn.Module) -> bool:
    """Return True if the weights of a module are plain floats, but for those in 4 bit below adapters of peft."""
    of_bits = {id(m.weight) for m in module.modules() if in_4_bit(m)}
    others = [p for p in module.parameters() if id(p) not in of_bits]
    plain = all(type(p) is nn.Parameter and p.is_floating_point() for p in others)
    return plain and (bool(others) or not of_bits)


class _Rotation(torch.autograd.Function):
    """x cos + rotate_half(x) sin (arXiv 2104.09864), (..., T, size); keeps cos and sin, and makes no rotated copy.
    Backward turns the other way."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return _turned(dy, cos, torch.cat((second, first), -1).neg_()), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute x cos + (-x2, x1) sin of (1, heads, T, size), in fresh memory without gaps."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels = _kernels_for(cos, sin, out) if x.stride(-1) == 1 else None
    if kernels is not None:
        kernels.rotate(x[0], cos[0, 0], sin[0, 0], out[0])
        return out
    torch.mul(x, cos, out=out)
    (x1, x2), (y1, y2) = x.chunk(2, -1), out.chunk(2, -1)
    (s1, s2) = sin.chunk(2, -1)
    y1.addcmul_(x2, s1, value=-1)
    y2.addcmul_(x1, s2)
    return out


def _rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `apply_rotary_pos_emb` in one pass on a CPU; a decoding step's few rows by the compiled kernel."""

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = not args and not kwargs and q.ndim == k.ndim == 4 and q.shape[0] == cos.shape[0] == 1
        plain = plain and q.dtype == k.dtype == cos.dtype == sin.dtype == torch.float32 and q.device.type == "cpu"
        if not plain or cos.shape[1:] != (q.shape[2], q.shape[3]) or cos.requires_grad:
            return original(q, k, cos, sin, *args, **kwargs)
        kernels = native.kernels() if cpu.few_rows(cos) and q.stride(-1) == k.stride(-1) == 1 else None
        if kernels is not None:
            c, s = cos[0].contiguous(), sin[0].contiguous()
            return kernels.rotate(q[0], c, s)[None], kernels.rotate(k[0], c, s)[None]
        return tuple(_Rotation.apply(x, cos[:, None], sin[:, None]) for x in (q, k))

    apply_rotary_pos_emb.original = original  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def _fuse_rotary(attention: nn.Module) -> bool:
    """Replace the function where the attention's own module of transformers looks it up, if it computes the same."""
    home = sys.modules[type(attention).__module__]
    original = getattr(home, "apply_rotary_pos_emb", None)
    if original is None or hasattr(original, "original"):
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 3, heads, 8, generator=generator).transpose(1, 2) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 8, generator=generator) for _ in range(2))
    fused = _rotary(original)
    try:
        for training in (False, True):
            with torch.set_grad_enabled(training):
                sides = []
                for function in (original, fused):
                    leaves = [x.clone().requires_grad_(training) for x in (q, k)]
                    turned = list(function(*leaves, cos, sin))
                    turned += torch.autograd.grad([(x * x).sum() for x in turned], leaves) if training else []
                    sides.append([x.detach() for x in turned])
            if any(a.shape != b.shape or (a - b).abs().max() > TOLERANCE for a, b in zip(*sides, strict=True)):
                return False
    except (TypeError, RuntimeError, ValueError):
        return False  # another kind of rotation, with other arguments
    home.apply_rotary_pos_emb = fused  # type: ignore[attr-defined]
    return True


def compute_packed(module: nn.Module) -> None:
    """Give a linear layer or an embedding the forward that reads a weight which is held packed only."""
    forward = _embedding_forward if isinstance(module, nn.Embedding) else _linear_forward
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """Return what two modules must have in common for the comparison of one to hold for the other.

    Classes of all parts and their plain attributes: layers of one model may differ in an activation or a sparsity.
    """
    if type(module) in (nn.Linear, nn.Embedding):
        return (type(module),)
    plain = (bool, int, float, str)
    return tuple(
        (
            type(m),
            *sorted((k, v) for k, v in vars(m).items() if isinstance(v, plain) and k not in ("training", "layer_idx")),
        )
        for m in module.modules()
    )


def fuse(model: nn.Module) -> dict[str, int]:
    """Replace what can be replaced, in place; returns how many modules of each type were (adapted ones as "LoRA")."""
    done: dict[str, int] = {}
    known: dict[tuple[Any, ...], Callable[..., Tensor] | None] = {}
    for module in model.modules():
        if type(module).__name__.endswith("Attention") and _fuse_rotary(module):
            done["apply_rotary_pos_emb"] = 1
        if "forward" in module.__dict__:
            continue
        options, width = _candidates(module)
        if not options:
            continue
        key = width, *_signature(module)
        if key not in known:
            known[key] = next((f for f in options if _same(module, f, width)), None)
        chosen = known[key]
        if chosen is not None:
            module.forward = MethodType(chosen, module)  # type: ignore[method-assign]
            name = "LoRA" if chosen is _lora_forward else type(module).__name__
            done[name] = done.get(name, 0) + 1
    return done
