"""Attention over a ragged batch, for every decoder model that transformers can load.

transformers calls the function registered under `posttrain` in its `AttentionInterface` with (1, heads, T, head size)
queries, keys and values, and hands on the extra keyword argument `ragged`, which carries the batch's plan.

Three ways to the same numbers:

- CPU: the compiled kernels of `models.tree`, a tile of queries over the keys of its whole chain of segments. Where they
  can't be had: batched products, tiles of queries over their own segment, and over each ancestor's keys (the
  descendants of a segment are one contiguous run of queries), merged by their log-sum-exps. No copy of a prefix and no
  T by T matrix is ever made.
- CUDA: one `torch.nn.attention.varlen` call, keys and values gathered per segment behind those of its ancestors.
- Anything else (soft caps, attention sinks, other devices): plain softmax, a segment at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.core.ragged import RaggedBatch
from posttrain.cpu import tree_attention as tree

NAME = "posttrain"
TILE = 256
"""Queries a CPU tile: their scores over some hundred keys stay in cache, and half of a long segment's are skipped."""
ROUND = 16
"""Tiles take a few neighbouring tokens along to a multiple of this, masked: oneDNN compiles a kernel for every new
shape (a millisecond each), and lengths hardly ever repeat."""


class Decoding(Protocol):
    """Attention of one new token a sequence, over keys and values that a sampler keeps."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """(1, heads, M, size) in, (1, M, heads, size) out; called once a layer, in their order."""


@dataclass(frozen=True)
class Call:
    """Queries q0..q1 over keys k0..k1. `mask` (queries, m) is added to the scores of the last m keys.

    `q_end` and `k_end`: where the rounded tile ends. Keys from k1 on are masked, queries from q1 on count for nothing.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    q_end: int
    k_end: int
    alone: bool
    """Whether these queries see no other keys, so that nothing needs merging."""
    mask: Tensor | None = None
    blind: Tensor | None = None
    """Which queries see none of the keys (a window has passed them all)."""


@dataclass
class Plan:
    """What attention needs to know of a batch; made once a batch, used by every layer."""

    batch: RaggedBatch
    calls: dict[int | None, list[Call]] = field(default_factory=dict)
    varlen: tuple[Tensor, Tensor, Tensor, int, int] | None = None
    segments: Tensor | None = None
    keep: Callable[[Tensor, Tensor], None] | None = None
    """Gets every layer's keys and values, (heads, T, size), positions applied: how a sampler fills its cache."""

    def calls_for(self, window: int | None) -> list[Call]:
        """The calls that cover the batch, for one sliding window (None: none)."""
        if window not in self.calls:
            self.calls[window] = _calls(self.batch, window)
        return self.calls[window]

    def segments_for(self) -> Tensor:
        """The segments as the compiled kernels read them."""
        if self.segments is None:
            self.segments = tree.table(self.batch)
        return self.segments

    def varlen_for(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """(gather_K, cu_q, cu_k, longest q, longest k) for a varlen kernel aligned to the bottom right."""
        if self.varlen is None:
            self.varlen = _varlen(self.batch)
        return self.varlen


@lru_cache(maxsize=1)
def _largest_mask() -> Tensor:
    return torch.full((TILE, TILE + ROUND), -torch.inf).triu_(1)


def _causal_mask(length: int, extra: int) -> Tensor:
    """(length, length + extra): a query sees keys up to itself, and none of the extra ones behind."""
    return _largest_mask()[:length, : length + extra]


@lru_cache(maxsize=64)
def _none_of(extra: int) -> Tensor:
    return torch.full((1, extra), -torch.inf)


def _calls(batch: RaggedBatch, window: int | None) -> list[Call]:
    """Every segment over itself in tiles of queries, and every parent's keys for its descendants' queries."""
    calls = []
    position, limit = batch.positions_T, batch.total

    def end_of(low: int, high: int) -> int:
        return min(limit, low - (low - high) // ROUND * ROUND)

    for i, (start, end) in enumerate(zip(batch.starts, batch.ends, strict=True)):
        alone = batch.parents[i] < 0
        for q0 in range(start, end, TILE):
            q1 = min(q0 + TILE, end)
            k0 = start if window is None else max(start, q0 - window + 1)
            k_end = end_of(k0, q1)
            hidden = None if window is None else _window_mask(position[q0:q1], position[k0:q1], window, causal=True)
            mask = _causal_mask(q1 - q0, k_end - q1) if hidden is None else _with_extra(hidden, k_end - q1)
            calls.append(Call(q0, q1, k0, q1, end_of(q0, q1), k_end, alone, mask))
        for q0 in range(end, batch.subtree_ends[i], TILE):
            q1 = min(q0 + TILE, batch.subtree_ends[i])
            mask = None if window is None else _window_mask(position[q0:q1], position[start:end], window, causal=False)
            blind = None if mask is None else (mask == -torch.inf).all(1)
            if blind is None or not bool(blind.all()):
                k_end = end_of(start, end)
                mask = _with_extra(mask, k_end - end)
                calls.append(Call(q0, q1, start, end, end_of(q0, q1), k_end, False, mask, blind))
    return calls


def _with_extra(mask: Tensor | None, extra: int) -> Tensor | None:
    """The mask with `extra` keys behind it that nobody sees."""
    if not extra:
        return mask
    if mask is None:
        return _none_of(extra)
    return torch.nn.functional.pad(mask, (0, extra), value=-torch.inf)


def _window_mask(query: Tensor, key: Tensor, window: int, causal: bool) -> Tensor | None:
    """0 where a query sees a key and -inf elsewhere, or None where the window hides nothing."""
    if int(query.max() - key.min()) < window:
        return None
    distance = query[:, None] - key[None, :]
    hidden = distance >= window
    if causal:
        hidden |= distance < 0
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _varlen(batch: RaggedBatch) -> tuple[Tensor, Tensor, Tensor, int, int]:
    device = batch.tokens_T.device
    gather: list[Tensor] = []
    cu_q, cu_k = [0], [0]
    for i in range(len(batch.starts)):
        chain = batch.chain(i)
        gather.extend(torch.arange(batch.starts[s], batch.ends[s]) for s in chain)
        cu_q.append(batch.ends[i])
        cu_k.append(cu_k[-1] + sum(batch.ends[s] - batch.starts[s] for s in chain))
    longest_q = max(b - a for a, b in zip(cu_q, cu_q[1:], strict=False))
    longest_k = max(b - a for a, b in zip(cu_k, cu_k[1:], strict=False))
    as_int = {"dtype": torch.int32, "device": device}
    return (
        torch.cat(gather).to(device),
        torch.tensor(cu_q, **as_int),  # type: ignore[arg-type]
        torch.tensor(cu_k, **as_int),  # type: ignore[arg-type]
        longest_q,
        longest_k,
    )


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(heads, L, size) -> (kv heads, heads / kv heads * L, size): the queries of one key head as rows of one matrix."""
    return x.reshape(kv_heads, -1, x.shape[-1])


def _scores(c: Call, q: Tensor, k: Tensor) -> Tensor:
    """q k^T, masked; (kv heads, groups * queries, keys), fresh memory. q carries the scale already."""
    s = torch.bmm(q, k.transpose(1, 2))
    if c.mask is not None:
        queries, masked = c.mask.shape
        rows = s.view(s.shape[0], -1, c.q_end - c.q0, s.shape[-1])
        rows[:, :, : c.q1 - c.q0, s.shape[-1] - masked :] += c.mask if queries > 1 else c.mask[0]
    return s


class _TreeAttention(torch.autograd.Function):
    """float32 (heads, T, size) in, (heads, T, size) out: the compiled kernels, or tiles merged by log-sum-exp.

    Backward gives each tile the merged output and log-sum-exp, so that its probabilities are the whole softmax's.
    Without kernels of our own plain batched products beat torch's fused one: they go through the fast route of
    `models.cpu`.
    """

    @staticmethod
    def forward(ctx, query, key, value, plan, window, scale):  # type: ignore[no-untyped-def]
        ctx.plan, ctx.window, ctx.scale = plan, window, scale
        ctx.kernels = tree.kernels_for(query, key, value)
        if ctx.kernels is not None:
            out, lse = tree.forward(ctx.kernels, query, key, value, plan.segments_for(), window, scale)
            ctx.save_for_backward(query, key, value, out, lse)
            return out
        calls, heads, kv = plan.calls_for(window), len(query), len(key)
        # In memory (T, heads, size): what comes after reads it so, and keeps it without a copy.
        out = torch.zeros(query.shape[1], heads, value.shape[-1]).transpose(0, 1)
        lse = torch.full(query.shape[:2], -torch.inf)
        for c in calls:
            p = _scores(c, _grouped(query[:, c.q0 : c.q_end] * scale, kv), key[:, c.k0 : c.k_end])
            top = p.amax(-1, keepdim=True)
            if c.blind is not None:
                top = top.clamp_min(-1e30)  # -inf minus -inf is not a number; a blind row's weights are 0 all the same
            total = p.sub_(top).exp_().sum(-1, keepdim=True)
            part = torch.bmm(p, value[:, c.k0 : c.k_end]).div_(total.clamp_min(1e-30))
            shape, n = (heads, c.q_end - c.q0), c.q1 - c.q0
            _merge(out, lse, c, part.view(*shape, -1)[:, :n], (total.log() + top).view(shape)[:, :n])
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):  # type: ignore[no-untyped-def]
        query, key, value, out, lse = ctx.saved_tensors
        if ctx.kernels is not None:
            given = query, key, value, ctx.plan.segments_for(), ctx.window, ctx.scale, out, lse, d_out
            return *tree.backward(ctx.kernels, *given), None, None, None
        kv = len(key)
        d_query, d_key, d_value = (torch.zeros(x.shape) for x in (query, key, value))
        delta = (d_out * out).sum(-1)
        for c in ctx.plan.calls_for(ctx.window):
            qs, ks, n = slice(c.q0, c.q_end), slice(c.k0, c.k_end), c.q1 - c.q0
            q, k, do = _grouped(query[:, qs] * ctx.scale, kv), key[:, ks], _grouped(d_out[:, qs], kv)
            p = _scores(c, q, k).sub_(lse[:, qs].reshape(kv, -1, 1)).exp_()
            p.view(len(query), -1, p.shape[-1])[:, n:] = 0.0
            d_value[:, ks] += torch.bmm(p.transpose(1, 2), do)
            ds = torch.bmm(do, value[:, ks].transpose(1, 2)).sub_(delta[:, qs].reshape(kv, -1, 1)).mul_(p)
            dq = torch.bmm(ds, k).view(len(query), c.q_end - c.q0, -1)[:, :n]
            d_query[:, c.q0 : c.q1].add_(dq, alpha=ctx.scale)
            d_key[:, ks] += torch.bmm(ds.transpose(1, 2), q)
        return d_query, d_key, d_value, None, None, None


def _merge(out: Tensor, lse: Tensor, c: Call, part: Tensor, part_lse: Tensor) -> None:
    """Fold one call's output into what its queries have so far, in place."""
    out, lse = out[:, c.q0 : c.q1], lse[:, c.q0 : c.q1]
    if c.alone:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    if c.blind is not None:
        part_lse = part_lse.masked_fill(c.blind, -torch.inf)
    total = torch.logaddexp(lse, part_lse)
    # Where neither side has seen a key yet both are -inf, and their difference is not a number: weight 0.
    old, new = (torch.nan_to_num(torch.exp(x - total), nan=0.0)[..., None] for x in (lse, part_lse))
    out.mul_(old).addcmul_(part, new)
    lse.copy_(total)


@lru_cache(maxsize=1)
def _varlen_parameters() -> frozenset[str]:
    """Which arguments this torch's varlen attention takes (they grew over its releases); empty: there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _can_varlen(query: Tensor, value: Tensor, window: int | None) -> bool:
    parameters = _varlen_parameters()
    half = query.dtype in (torch.bfloat16, torch.float16)
    shape = query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return query.is_cuda and half and shape and bool(parameters) and (window is None or "window_size" in parameters)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, window: int | None, scale: float
) -> Tensor:
    """One kernel call; (1, heads, T, size) in, (1, T, heads, size) out."""
    from torch.nn.attention.varlen import varlen_attn

    gather, cu_q, cu_k, longest_q, longest_k = plan.varlen_for()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if any(p >= 0 for p in plan.batch.parents):
        # Gradients of a key that many see are added up in float32, and in the same order every time.
        k, v = (torch.nn.functional.embedding(gather, x.flatten(1)).view(-1, *x.shape[1:]) for x in (k, v))
    options: dict[str, Any] = {"scale": scale}
    parameters = _varlen_parameters()
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if "window_size" in parameters:
        # The kernel counts the keys to the left of a query, transformers' window counts the query's own too.
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    out: Any = varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, **options)
    return out[None]  # type: ignore[no-any-return]


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    window: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v a segment at a time, keys of all ancestors in front; any device, differentiable.

    softcap: scores become c tanh(score / c). sinks: one learnt score a head that takes part in the softmax and
    carries no value. (1, heads, T, size) in, (1, T, heads, size) out; zeros for tokens behind the last segment.
    """
    batch, repeat = plan.batch, query.shape[1] // key.shape[1]
    outs = []
    for i, (start, end) in enumerate(zip(batch.starts, batch.ends, strict=True)):
        index = torch.cat([torch.arange(batch.starts[s], batch.ends[s]) for s in batch.chain(i)]).to(query.device)
        k, v = (x[:, :, index].repeat_interleave(repeat, dim=1) for x in (key, value))
        scores = torch.matmul(query[:, :, start:end], k.transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = batch.positions_T[start:end, None] - batch.positions_T[index][None]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            sink = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            probabilities = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            probabilities = scores.softmax(-1)
        outs.append(torch.matmul(probabilities.to(v.dtype), v))
    out = torch.cat(outs, dim=2)
    return torch.nn.functional.pad(out, (0, 0, 0, query.shape[2] - out.shape[2])).transpose(1, 2)


@torch.compiler.disable  # the plan is Python; what lies between attention calls is what compiling helps
def ragged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    ragged: Plan | Decoding | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls; see the module's text. Returns ((1, T, heads, size), None)."""
    if ragged is None:
        raise RuntimeError("posttrain attention was called without a ragged batch; use LanguageModel, not its .hf")
    if dropout:
        raise RuntimeError(
            f"attention dropout is {dropout}; posttrain switches dropout off, since with it the step "
            "would depend on how a batch is split"
        )
    if attention_mask is not None:
        raise RuntimeError("the model made an attention mask of its own, which the ragged batch can't honour")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not isinstance(ragged, Plan):
        return ragged.attend(query, key, value, sliding_window, scale, softcap, s_aux), None
    if ragged.keep is not None:
        ragged.keep(key[0], value[0])
    if softcap is not None or s_aux is not None:
        return plain_attention(query, key, value, ragged, sliding_window, scale, softcap, s_aux), None
    if _can_varlen(query, value, sliding_window):
        return _varlen_attention(query, key, value, ragged, sliding_window, scale), None
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        heads = _TreeAttention.apply(*(x[0].float() for x in (query, key, value)), ragged, sliding_window, scale)
        return heads.transpose(0, 1)[None].to(query.dtype), None
    return plain_attention(query, key, value, ragged, sliding_window, scale), None


def register() -> None:
    """Make the function known to transformers under NAME. No mask function is registered, so no mask is made."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, ragged_attention)
