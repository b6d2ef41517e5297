"""Linear layers with low-rank adapters of peft (LoRA, arXiv 2106.09685) in one function that keeps little for backward,
and what is asked of a module before a forward of another kind takes its place.

A linear layer below the adapter may be bitsandbytes' in 4 bit (QLoRA, arXiv 2305.14314): one layer's weight at a time
is dense, in either pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOW_RANK_MODULES = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit")


class LowRankLinear(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T with the adapter's product added in place; keeps x and x A^T.

    `weight` is W, or a function that makes it: then backward makes it again. A and B may be float32 beside inputs in 16
    bit: their product is computed in float32, from copies of inputs and gradients that are not kept.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):  # type: ignore[no-untyped-def]
        flat = x.flatten(0, -2)
        low = torch.mm(flat.to(a.dtype), a.t())
        kept, ctx.dense = (weight, None) if isinstance(weight, Tensor) else (None, weight)
        y = _add_product(F.linear(flat, kept if ctx.dense is None else ctx.dense(), bias), low, b.t(), scale)
        ctx.save_for_backward(flat, kept, a, b, low)
        ctx.scale, ctx.shape = scale, x.shape
        # No view: the model may write into it (Llama 4 adds its experts' output to that of the shared expert).
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        flat, weight, a, b, low = ctx.saved_tensors
        dy = dy.flatten(0, -2)
        full = dy.to(a.dtype)
        d_low = torch.mm(full, b).mul_(ctx.scale)
        d_b = torch.mm(full.t(), low).mul_(ctx.scale)
        d_x = None
        if ctx.needs_input_grad[0]:
            weight = weight if ctx.dense is None else ctx.dense()
            d_x = _add_product(torch.mm(dy, weight), d_low, a, 1.0).view(ctx.shape)
        return d_x, None, None, torch.mm(d_low.t(), flat.to(a.dtype)), d_b, None


def _add_product(y: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Add scale * left right to y, in place; y may have fewer digits."""
    return y.addmm_(left, right, alpha=scale) if y.dtype == left.dtype else y.add_(left @ right, alpha=scale)


def low_rank(module: Any) -> tuple[Any, Tensor, Tensor, float] | None:
    """Return (linear, A, B, scale) of peft's linear module: x W^T + b + scale (x A^T) B^T with W frozen.

    None if its adapters are off, merged, several or of another kind.
    """
    names = module.active_adapters
    if len(names) != 1 or module.disable_adapters or module.merged or module.base_layer.weight.requires_grad:
        return None
    if names[0] not in module.lora_A or names[0] not in module.lora_B:
        return None
    a, b = module.lora_A[names[0]].weight, module.lora_B[names[0]].weight
    return module.base_layer, a, b, module.scaling[names[0]]


def low_rank_base(module: Any) -> Any | None:
    """Return the linear layer below a module of peft that `LowRankLinear` may compute; None for any other module."""
    if f"{type(module).__module__}.{type(module).__name__}" not in LOW_RANK_MODULES:
        return None
    base = module.base_layer
    dropout = any(getattr(d, "p", 0) for d in module.lora_dropout.values())
    variant = any(getattr(module, "use_dora", {}).values()) or bool(getattr(module, "lora_variant", None))
    return base if (type(base) is nn.Linear or in_4_bit(base)) and not dropout and not variant else None


def in_4_bit(module: Any) -> bool:
    """Return True if a module is bitsandbytes' linear layer in 4 bit."""
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes.")


def makes_dense(base: Any, dtype: torch.dtype) -> bool:
    """Return True if `dense_weight` gives the weight with which bitsandbytes computes inputs of a dtype."""
    state, bias = base.weight.quant_state, base.bias
    computes = base.compute_dtype in (None, dtype) and (bias is None or bias.dtype == dtype)
    shape = (base.out_features, base.in_features)
    return computes and state is not None and state.dtype == dtype and tuple(state.shape) == shape


def dense_weight(base: Any) -> Tensor:
    """Return the dense weight of bitsandbytes' linear layer in 4 bit."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data.view(-1, 1), base.weight.quant_state)  # type: ignore[no-any-return]


def activation_of(mlp: Any) -> str | None:
    """Return a gated MLP's activation (silu, gelu or gelu_tanh); None for another one.

    Compared in float64: at most 5e-4 lie between the two GELUs, which a comparison in bfloat16 does not see.
    """
    function, x = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None)), torch.linspace(-4, 4, 65).double()
    try:
        y = function(x) if callable(function) else x
    except (TypeError, RuntimeError):  # another number of arguments
        return None
    known = {"silu": F.silu(x), "gelu": F.gelu(x), "gelu_tanh": F.gelu(x, approximate="tanh")}
    return next((name for name, z in known.items() if torch.allclose(y, z, rtol=0, atol=1e-6)), None)
