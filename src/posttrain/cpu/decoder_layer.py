"""A decoder layer of a decoding step in one call of the compiled kernels, where it is the layer of most model types.

    h = x + o(attention(q(norm x), k(norm x), v(norm x)))
    y = h + down(silu(gate(norm h)) up(norm h))

with RMSNorms, rotary positions, biases where there are any, and norms of each query's and key's head or none (Llama,
Mistral, Qwen 2 and 3, and their like). Such a layer has ten small operations beside its products, and calling each of
them from Python takes a fifth of a step of few rows. A layer is taken for one of these if its parts are; at its first
step both ways are computed, and if they differ in a single bit it keeps its own for good. LoRA's adapters are computed
along, and weights in few bits are read as they are packed (`quantized_matmul`); a layer with other adapters, with
hooks, or with weights of another kind, or sharded ones, keeps its own while it has them.
"""

from __future__ import annotations

import ctypes
import inspect
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from posttrain.core.low_rank_linear import low_rank
from posttrain.cpu import library as native
from posttrain.cpu import matmul as cpu
from posttrain.cpu.fused_modules import adapted
from posttrain.cpu.quantized_matmul import is_placeholder, packed_of

PROJECTIONS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
NORMS = ("input_layernorm", "post_attention_layernorm")
GIVEN = {"self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "cache", "kwargs"}
"""What attention may take. Another argument is another computation: positions, say, that scale queries far out."""


class Places(Protocol):
    """Inputs of a layer in a decoding step; see `posttrain.sampling.kv_cache.Step`."""

    layer: int
    known: dict[int, native.Layer | None]
    """By layer; for as long as no weight changes."""

    def places(self, key: Tensor, value: Tensor) -> tuple[Any, Any, Tensor, Any]:
        """Return (own, shared, columns, prompts) of the next layer, as `Kernels.attend` takes them."""


def speed_up(model: nn.Module) -> int:
    """Let every layer that may be such a one try; returns how many."""
    layers = [m for m in model.modules() if _looks_right(m) and "forward" not in m.__dict__]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
        layer.in_one_call = None  # type: ignore[assignment]
    return len(layers)


def _looks_right(layer: nn.Module) -> bool:
    children = dict(layer.named_children())
    if set(children) != {*PROJECTIONS, *NORMS}:
        return False
    attention, mlp = children["self_attn"], children["mlp"]
    inside = {n for n, _ in attention.named_children()}
    config = getattr(attention, "config", None)
    window = getattr(attention, "sliding_window", None) or getattr(config, "sliding_window", None)
    return (
        set(inspect.signature(type(attention).forward).parameters) <= GIVEN
        and getattr(attention, "use_rope", True)
        and set(PROJECTIONS["self_attn"]) <= inside <= {*PROJECTIONS["self_attn"], "q_norm", "k_norm"}
        and ("q_norm" in inside) == ("k_norm" in inside)
        and set(PROJECTIONS["mlp"]) <= {n for n, _ in mlp.named_children()}
        and window is None
        and hasattr(attention, "head_dim")
        and hasattr(attention, "scaling")
    )


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    step: Places | None = kwargs.get("ragged")
    positions = kwargs.get("position_embeddings")
    wanted = self.in_one_call is not False and positions and hasattr(step, "places") and cpu.few_rows(hidden_states)
    kernels = native.kernels() if wanted and not torch.compiler.is_compiling() else None
    if kernels is None or not hidden_states.is_contiguous():
        return type(self).forward(self, hidden_states, *args, **kwargs)
    assert step is not None and positions is not None
    if step.layer not in step.known:
        step.known[step.layer] = _described(self)
    layer = step.known[step.layer]
    if layer is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    cosine, sine = (x[0].contiguous() for x in positions)
    if any(x.shape != (hidden_states.shape[1], layer.size) or not native.is_plain(x) for x in (cosine, sine)):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    if self.in_one_call is None:
        number, expected = step.layer, type(self).forward(self, hidden_states, *args, **kwargs)
        step.layer = number
        y = _computed(kernels, layer, step, hidden_states, cosine, sine)
        if isinstance(expected, Tensor) and torch.equal(expected, hidden_states):
            return expected  # a layer that does nothing yet is like any other
        self.in_one_call = isinstance(expected, Tensor) and torch.equal(y, expected)
        if self.in_one_call:
            return y
        step.layer = number  # what went into the cache is written once more, by the layer itself
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return _computed(kernels, layer, step, hidden_states, cosine, sine)


def _computed(
    kernels: native.Kernels, layer: native.Layer, step: Places, x: Tensor, cosine: Tensor, sine: Tensor
) -> Tensor:
    own, shared, columns, prompts = step.places(*(x.new_empty(layer.kv, 0, layer.size) for _ in range(2)))
    return kernels.layer(layer, x[0], cosine, sine, own, shared, columns, prompts)[None]


def _described(layer: Any) -> native.Layer | None:
    """Its weights for the kernel, kept alive; None if a part is not, or no longer, what it was taken for."""
    attention, mlp = layer.self_attn, layer.mlp
    homes = [(getattr(layer, home), name) for home, names in PROJECTIONS.items() for name in names]
    linears: list[Any] = [getattr(home, name, None) for home, name in homes]
    norms = [getattr(layer, n) for n in NORMS] + [getattr(attention, n, None) for n in ("q_norm", "k_norm")]
    # Parts with a fused forward (`models.fused`) are of a known kind; what else is put in their place has none.
    parts = [mlp, *linears, *(n for n in norms if n is not None)]
    if any(p is None or "forward" not in vars(p) for p in parts):
        return None
    if any(p._forward_hooks or p._forward_pre_hooks for p in (layer, attention, *parts)):
        return None
    matrices = [_matrix(x) for x in linears]
    if any(m is None for m in matrices):
        return None
    tensors = [t for m in matrices if m is not None for t in m[2]] + [n.weight for n in norms if n is not None]
    if not all(map(native.is_plain, tensors)):
        return None
    described = native.Layer(**dict(zip(native.Layer.MATRICES, (m[0] for m in matrices if m is not None), strict=True)))
    size, hidden, inner = int(attention.head_dim), len(norms[0].weight), described.gate.n
    wide, narrow = described.q.n, described.k.n
    inputs = [m[1] for m in matrices if m is not None]
    if inputs != [hidden, hidden, hidden, wide, hidden, hidden, inner]:
        return None
    if (described.v.n, described.up.n, described.o.n, described.down.n) != (narrow, inner, hidden, hidden):
        return None
    if wide % size or narrow % size or (wide // size) % (narrow // size):
        return None
    lengths = (hidden, hidden, size, size)
    if any(n is not None and n.weight.shape != (length,) for n, length in zip(norms, lengths, strict=True)):
        return None
    described.norm, described.after, described.q_norm, described.k_norm = (
        None if n is None else n.weight.data_ptr() for n in norms
    )
    described.eps, described.after_eps = _eps(norms[0]), _eps(norms[1])
    described.head_eps = 0.0 if norms[2] is None else _eps(norms[2])
    described.hidden, described.heads, described.kv = hidden, wide // size, narrow // size
    described.size, described.inner, described.scale = size, inner, float(attention.scaling)
    described.rank = max(getattr(described, n).rank for n in native.Layer.MATRICES)
    described.kept = tensors
    return described


def _matrix(linear: Any) -> tuple[native.Matrix, int, list[Tensor]] | None:
    """Return a projection for the kernel, its input features and its tensors; None if it is of another kind."""
    a = b = None
    scale = 0.0
    if adapted(linear):
        found = low_rank(linear)
        if found is None:
            return None
        linear, a, b, scale = found
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
        return None
    low = [] if a is None or b is None else [a, b]
    packed = packed_of(linear.weight)
    alone = packed is not None and is_placeholder(linear.weight)
    if not all(map(native.fits, low if alone else [linear.weight, *low])):
        return None
    matrix = native.Matrix(
        w=linear.weight.data_ptr(), n=len(linear.weight), rank=0 if a is None else len(a), scale=scale
    )
    if packed is not None:
        matrix.packed = ctypes.pointer(packed)
    if linear.bias is not None:
        matrix.bias = linear.bias.data_ptr()
    if a is not None and b is not None:
        matrix.a, matrix.b = a.data_ptr(), b.data_ptr()
    dense = [] if alone else [linear.weight]
    return matrix, linear.weight.shape[1], [*dense, *low, *([] if linear.bias is None else [linear.bias])]


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 0.0)
