"""A decoder layer on a GPU in five products and six kernels around attention, where it is the layer of most models.

    h = x + o(attention(rotated q, k, v of norm x))
    y = h + down(act(gate(norm h)) up(norm h))

with RMSNorms, rotary positions, biases of q, k and v or none, and norms of each query's and key's head or none (Llama,
Mistral, Qwen 2 and 3, and their like). Queries, keys and values are one product, and so are gate and up: their weights
are moved next to each other in memory, and stay parameters of their own. A rotation is in place; a sum and the norm
after it are one pass. In training the whole is two functions with backward passes of their own: starting small kernels
from Python, and through autograd, takes longer than a part of them takes.

A layer is replaced only after results and gradients of its own forward and the fused one were compared, on one of its
kind. Whenever something is not as it was then (adapters, hooks, quantised weights, other arguments), the layer's own
forward computes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.core.low_rank_linear import activation_of
from posttrain.cuda import triton_kernels as kernels
from posttrain.cuda.fused_forwards import TOLERANCES, signature

TAKEN = {"self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "cache", "kwargs"}
"""What attention may take. Another argument is another computation."""
CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED_MLP = ("gate_proj", "up_proj", "down_proj")
FEW_TOKENS = 1024
"""With fewer, copying weights next to each other would take a good part of a pass."""

Attention = Callable[[Any, Tensor, Tensor, Tensor, float, Any], Tensor]
"""`models.attention.attend_rows`."""


@dataclass(frozen=True)
class LayerKind:
    """Hold what is the same in all layers that were found alike; `head_eps` is read where there are norms of heads."""

    gate: str
    shift: float
    heads: int
    key_heads: int
    size: int
    eps: tuple[float, float]
    head_eps: float
    scale: float
    attention: Attention


def joint(weights: Sequence[Tensor]) -> Tensor:
    """Return weights (rows, columns) or (rows) one below the other: without a copy if they lie so in memory."""
    if not _adjacent(weights):
        return torch.cat([w.detach() for w in weights])
    first, rows = weights[0].detach(), sum(w.shape[0] for w in weights)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _adjacent(weights: Sequence[Tensor]) -> bool:
    first, place = weights[0], weights[0].data_ptr()
    end = place
    for w in weights:
        if w.data_ptr() != end:
            return False
        end += w.nbytes
    storage = first.untyped_storage()  # two of them may lie side by side by chance
    return end - storage.data_ptr() <= storage.nbytes()


def _move_together(parameters: Sequence[nn.Parameter]) -> None:
    """Give parameters memory next to each other, in which their values are."""
    if _adjacent(parameters):
        return
    whole = joint(parameters)
    for p, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        p.data = part


def _split(x: Tensor, kind: LayerKind) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (T, heads, size) as parts of the joint product (T, columns)."""
    x = x.view(x.shape[0], -1, kind.size)
    return x.split([kind.heads, kind.key_heads, kind.key_heads], 1)  # type: ignore[return-value]


def _enter(
    x: Tensor, weights: tuple[Tensor | None, ...], cos: Tensor, sin: Tensor, kind: LayerKind
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Return (rotated queries, keys and values (T, heads, size), what backward needs)."""
    norm, q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm = weights
    assert norm is not None and q is not None and k is not None and v is not None
    n, rstd = kernels.norm(x, norm, kind.eps[0], kind.shift)
    bias = None if q_bias is None or k_bias is None or v_bias is None else joint((q_bias, k_bias, v_bias))
    product = F.linear(n, joint((q, k, v)), bias)
    if q_norm is None or k_norm is None:
        first = product.view(x.shape[0], -1, kind.size)[:, : kind.heads + kind.key_heads]
        kernels.rotate(first, cos, sin, False, first)
        return _split(product, kind), (n, rstd, None, None, None, None)
    raw_q, raw_k, value = _split(product, kind)
    raw_q, raw_k = raw_q.contiguous(), raw_k.contiguous()
    query, q_rstd = kernels.norm(raw_q, q_norm, kind.head_eps, kind.shift)
    key, k_rstd = kernels.norm(raw_k, k_norm, kind.head_eps, kind.shift)
    for turned in (query, key):
        kernels.rotate(turned, cos, sin, False, turned)
    return (query, key, value), (n, rstd, raw_q, q_rstd, raw_k, k_rstd)


class _Enter(torch.autograd.Function):
    """(x, weights of the norm, q, k, v, their biases and norms of heads, cos, sin, kind) -> rotated q, k and v."""

    @staticmethod
    def forward(ctx, x, norm, q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, cos, sin, kind):  # type: ignore[no-untyped-def]
        weights = norm, q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm
        out, known = _enter(x, weights, cos, sin, kind)
        ctx.save_for_backward(x, norm, q, k, v, q_norm, k_norm, cos, sin, *known)
        ctx.kind, ctx.biased = kind, q_bias is not None
        return out

    @staticmethod
    def backward(ctx, d_q, d_k, d_v):  # type: ignore[no-untyped-def]
        x, norm, q, k, v, q_norm, k_norm, cos, sin, n, rstd, raw_q, q_rstd, raw_k, k_rstd = ctx.saved_tensors
        kind, needed = ctx.kind, ctx.needs_input_grad
        d = x.new_empty(x.shape[0], (kind.heads + 2 * kind.key_heads) * kind.size)
        parts, d_norms = _split(d, kind), [None, None]
        heads = ((d_q, raw_q, q_norm, q_rstd), (d_k, raw_k, k_norm, k_rstd))
        for i, (given, raw, weight, each) in enumerate(heads):
            given = given if given.stride(-1) == 1 else given.contiguous()
            if raw is None:
                kernels.rotate(given, cos, sin, True, parts[i])
                continue
            turned = torch.empty_like(raw)
            kernels.rotate(given, cos, sin, True, turned)
            back, d_norms[i] = kernels.norm_back(raw, weight, each, turned, kind.shift, needed[8 + i])
            parts[i].copy_(back)
        parts[2].copy_(d_v)
        rows = len(q), len(k), len(v)
        d_weights = torch.mm(d.t(), n).split(rows) if any(needed[2:5]) else [None] * 3
        d_biases = d.sum(0).split(rows) if ctx.biased and any(needed[5:8]) else [None] * 3
        d_x, d_norm = kernels.norm_back(x, norm, rstd, torch.mm(d, joint((q, k, v))), kind.shift, needed[1])
        out = d_x, d_norm, *d_weights, *d_biases, *d_norms
        return *(g if wanted else None for g, wanted in zip(out, needed, strict=False)), None, None, None


def _leave(
    mixed: Tensor, x: Tensor, weights: tuple[Tensor, ...], kind: LayerKind
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (h, its norm, 1 / rms, product of gate and up (T, 2 columns), act(gate) up)."""
    o, norm, gate, up, _ = weights
    h, n, rstd = kernels.add_norm(F.linear(mixed, o), x, norm, kind.eps[1], kind.shift)
    both = F.linear(n, joint((gate, up)))
    first, second = both.chunk(2, 1)
    return h, n, rstd, both, kernels.gated(first, second, kind.gate)


class _Leave(torch.autograd.Function):
    """(what attention gives (T, columns), x, weights of o, the norm, gate, up and down, kind) -> the layer's output."""

    @staticmethod
    def forward(ctx, mixed, x, o, norm, gate, up, down, kind):  # type: ignore[no-untyped-def]
        h, n, rstd, both, product = _leave(mixed, x, (o, norm, gate, up, down), kind)
        ctx.save_for_backward(mixed, h, n, rstd, both, o, norm, gate, up, down)
        ctx.kind = kind
        return torch.addmm(h, product, down.t())

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        mixed, h, n, rstd, both, o, norm, gate, up, down = ctx.saved_tensors
        kind, (_, _, needs_o, needs_norm, needs_gate, needs_up, needs_down, _) = ctx.kind, ctx.needs_input_grad
        dy = dy.contiguous()
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, 1)
        product = kernels.gated_back(*both.chunk(2, 1), torch.mm(dy, down), (d_gate, d_up), kind.gate, needs_down)
        d_down = torch.mm(dy.t(), product) if product is not None else None
        d_pair = torch.mm(d_both.t(), n).split((len(gate), len(up))) if needs_gate or needs_up else (None, None)
        d_n = torch.mm(d_both, joint((gate, up)))
        d_h, d_norm = kernels.norm_back(h, norm, rstd, d_n, kind.shift, needs_norm, dy)
        d_o = torch.mm(d_h.t(), mixed) if needs_o else None
        d_pair = tuple(d if wanted else None for d, wanted in zip(d_pair, (needs_gate, needs_up), strict=True))
        return torch.mm(d_h, o), d_h, d_o, d_norm, *d_pair, d_down, None


def _computed(layer: Any, x: Tensor, positions: tuple[Tensor, Tensor], ragged: Any, kind: LayerKind) -> Tensor:
    """Return the layer's output for (T, H) hidden states."""
    first, last = _weights(layer)
    cos, sin = positions[0].contiguous(), positions[1].contiguous()
    learns = torch.is_grad_enabled()
    q, k, v = _Enter.apply(x, *first, cos, sin, kind) if learns else _enter(x, first, cos, sin, kind)[0]
    mixed = kind.attention(layer._modules["self_attn"], q, k, v, kind.scale, ragged).reshape(x.shape[0], -1)
    if learns:
        return _Leave.apply(mixed, x, *last, kind)  # type: ignore[no-any-return]
    h, *_, product = _leave(mixed, x, last, kind)
    return h.addmm_(product, last[-1].t())


def _weights(layer: Any) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
    """Return what `_enter` and `_leave` take. Looked up in the modules' dictionaries: attributes of modules are slow,
    and this is for every layer of every pass."""
    modules = layer._modules
    own, mlp = modules["self_attn"]._modules, modules["mlp"]._modules
    q, k, v = (own[n]._parameters for n in ATTENTION[:3])
    norms = (own[n]._parameters["weight"] if n in own else None for n in ("q_norm", "k_norm"))
    before, after = (modules[n]._parameters["weight"] for n in ("input_layernorm", "post_attention_layernorm"))
    gate, up, down = (mlp[n]._parameters["weight"] for n in GATED_MLP)
    biases = (x["bias"] for x in (q, k, v))
    first = before, q["weight"], k["weight"], v["weight"], *biases, *norms
    return first, (own["o_proj"]._parameters["weight"], after, gate, up, down)


def _linears(layer: Any) -> list[Any]:
    own, mlp = layer._modules["self_attn"]._modules, layer._modules["mlp"]._modules
    return [own[n] for n in ATTENTION] + [mlp[n] for n in GATED_MLP]


def _usual(layer: Any, x: Tensor, given: dict[str, Any]) -> bool:
    """Return True if the layer is what it was when it was compared, and its arguments are those of a ragged batch."""
    if torch.compiler.is_compiling() or given.get("ragged") is None or x.ndim != 3 or x.shape[0] != 1:
        return False
    positions = given.get("position_embeddings")
    if positions is None or any(given.get(n) is not None for n in ("attention_mask", "past_key_values", "cache")):
        return False
    shape = (1, x.shape[1], layer.fused_kind.size)
    if any(p.shape != shape or p.dtype != x.dtype or p.requires_grad for p in positions):
        return False
    if not x.is_contiguous() or not x.shape[1] or not _plain(layer, x):
        return False
    if torch.is_grad_enabled() or x.shape[1] >= FEW_TOKENS:
        return True
    (_, q, k, v, *_), (_, _, gate, up, _) = _weights(layer)
    return _adjacent([q, k, v]) and _adjacent([gate, up])  # type: ignore[list-item]


def _plain(layer: Any, like: Tensor) -> bool:
    """Return True if all parts are plain modules without hooks, with weights like `like`."""
    attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
    for module in (attention, mlp, *attention._modules.values(), *mlp._modules.values()):
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    for linear in _linears(layer):
        if type(linear) is not nn.Linear or "forward" in linear.__dict__:
            return False
    first, last = _weights(layer)
    dtype, device = like.dtype, like.device
    return all(
        w is None or (type(w) is nn.Parameter and w.dtype == dtype and w.device == device and w.is_contiguous())
        for w in (*first, *last)
    )


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or not _usual(self, hidden_states, kwargs):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return _computed(self, hidden_states[0], kwargs["position_embeddings"], kwargs["ragged"], self.fused_kind)[None]


def _looks_right(layer: nn.Module) -> bool:
    children = dict(layer.named_children())
    if set(children) != CHILDREN or "forward" in layer.__dict__:
        return False
    attention, mlp = children["self_attn"], children["mlp"]
    inside, config = dict(attention.named_children()), getattr(attention, "config", None)
    window = getattr(attention, "sliding_window", None) or getattr(config, "sliding_window", None)
    if window is not None or not set(inspect.signature(type(attention).forward).parameters) <= TAKEN:
        return False
    norms = set(inside) - set(ATTENTION)
    if not set(ATTENTION) <= set(inside) or norms not in (set(), {"q_norm", "k_norm"}):
        return False
    if not set(GATED_MLP) <= set(dict(mlp.named_children())):
        return False
    if not all(hasattr(attention, n) for n in ("head_dim", "scaling")):
        return False
    linears = _linears(layer)
    if any(type(x) is not nn.Linear for x in linears) or any(x.bias is not None for x in linears[3:]):
        return False
    biases = {x.bias is None for x in linears[:3]}
    first = linears[0].weight
    return len(biases) == 1 and first.dtype in TOLERANCES and _plain(layer, first)


def _kinds(layer: Any, attention: Attention) -> Iterator[LayerKind]:
    """Yield what a layer might be."""
    own, size = layer.self_attn, int(layer.self_attn.head_dim)
    heads, key_heads = (len(x.weight) // size for x in (own.q_proj, own.k_proj))
    eps = tuple(_eps(n) for n in (layer.input_layernorm, layer.post_attention_layernorm))
    head_eps = _eps(own.q_norm) if hasattr(own, "q_norm") else 0.0
    gate = activation_of(layer.mlp)
    if gate is None:
        return
    for shift in (0.0, 1.0):
        yield LayerKind(gate, shift, heads, key_heads, size, (eps[0], eps[1]), head_eps, float(own.scaling), attention)


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 0.0)


def _sides(layer: Any, x: Tensor, compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return what the layer adds to its input, and gradients of it in the input and in all weights that are trained."""
    x = x.clone().requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    with torch.enable_grad():
        out = compute(x)
        mix = torch.linspace(-1, 1, out.shape[-1], device=x.device)
        gradients = torch.autograd.grad((out.float() * mix).sum(), leaves)
    with torch.no_grad():
        sampled = compute(x.detach())
    return [y.detach().float() for y in (out - x, sampled - x, *gradients)]


def _same(layer: Any, kind: LayerKind, plan: Any, tokens: int) -> bool:
    """Compare the fused forward with the layer's own on small random inputs: results, and gradients in training."""
    like, generator = layer.self_attn.q_proj.weight, torch.Generator().manual_seed(0)
    # Small inputs, or rounding of what is added to them would hide what the layer computes.
    x = 0.01 * torch.randn(1, tokens, like.shape[1], generator=generator)
    angles = 2 * math.pi * torch.rand(1, tokens, kind.size // 2, generator=generator).repeat(1, 1, 2)
    x, cos, sin = (t.to(like) for t in (x, angles.cos(), angles.sin()))
    given: dict[str, Any] = {"position_embeddings": (cos, sin), "ragged": plan, "attention_mask": None}
    own = _sides(layer, x, lambda x: type(layer).forward(layer, x, **given))
    if not bool(own[0].abs().max()):
        return False  # a layer that adds nothing yet is like any other
    try:
        fused = _sides(layer, x, lambda x: _computed(layer, x[0], (cos, sin), plan, kind)[None])
    except Exception:  # other shapes; whatever Triton raises for a card that it does not know
        return False
    most = 2 * TOLERANCES[like.dtype]
    for a, b in zip(fused, own, strict=True):
        if a.shape != b.shape or bool((a - b).abs().max() > most * b.abs().max().clamp_min(1e-12)):
            return False
    return True


def fuse_layers(model: nn.Module, attention: Attention, plan: Any, tokens: int) -> int:
    """Replace the forwards of decoder layers that are the usual one, in place; returns how many.

    Args:
        model: A model whose attention takes ragged batches.
        attention: `models.attention.attend_rows`.
        plan: A plan of a batch, on which layers are compared.
        tokens: Its number of tokens.
    """
    known: dict[tuple[Any, ...], LayerKind | None] = {}
    count = 0
    for layer in model.modules():
        if not _looks_right(layer):
            continue
        parts: Any = layer
        shapes = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters())
        key = (*shapes, *signature(layer))
        if key not in known:
            known[key] = next((k for k in _kinds(layer, attention) if _same(layer, k, plan, tokens)), None)
        kind = known[key]
        if kind is None:
            continue
        own, mlp = parts.self_attn, parts.mlp
        together = [own.q_proj, own.k_proj, own.v_proj]
        _move_together([x.weight for x in together])
        _move_together([mlp.gate_proj.weight, mlp.up_proj.weight])
        if own.q_proj.bias is not None:
            _move_together([x.bias for x in together])
        layer.fused_kind = kind  # type: ignore[assignment]
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
        count += 1
    return count
