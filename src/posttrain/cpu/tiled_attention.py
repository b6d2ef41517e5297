"""Attention over a ragged batch on a CPU: compiled kernels, or tiles of batched products.

The compiled kernels (`tree_attention`) take a tile of queries over the keys of its whole chain of segments. Without
them, tiles of queries go over their own segment and over each ancestor's keys (the descendants of a segment are one
contiguous run of queries), merged by their log-sum-exps. No copy of a prefix and no T by T matrix is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from posttrain.core.ragged import RaggedBatch
from posttrain.cpu import tree_attention as tree

TILE = 256
"""Queries a CPU tile: their scores over some hundred keys stay in cache, and half of a long segment's are skipped."""
ROUND = 16
"""Tiles take a few neighbouring tokens along to a multiple of this, masked: oneDNN compiles a kernel for every new
shape (a millisecond each), and lengths hardly ever repeat."""


@dataclass(frozen=True)
class AttentionCall:
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


def calls_for(plan: Any, window: int | None) -> list[AttentionCall]:
    """Return the calls that cover a plan's batch, for one sliding window (None: none)."""
    if window not in plan.cache:
        plan.cache[window] = _calls(plan.batch, window)
    return plan.cache[window]  # type: ignore[no-any-return]


def _segments(plan: Any) -> Tensor:
    """Return the segments as the compiled kernels read them."""
    if "segments" not in plan.cache:
        plan.cache["segments"] = tree.table(plan.batch)
    return plan.cache["segments"]  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _largest_mask() -> Tensor:
    return torch.full((TILE, TILE + ROUND), -torch.inf).triu_(1)


def _causal_mask(length: int, extra: int) -> Tensor:
    """(length, length + extra): a query sees keys up to itself, and none of the extra ones behind."""
    return _largest_mask()[:length, : length + extra]


@lru_cache(maxsize=64)
def _none_of(extra: int) -> Tensor:
    return torch.full((1, extra), -torch.inf)


def _calls(batch: RaggedBatch, window: int | None) -> list[AttentionCall]:
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
            calls.append(AttentionCall(q0, q1, k0, q1, end_of(q0, q1), k_end, alone, mask))
        for q0 in range(end, batch.subtree_ends[i], TILE):
            q1 = min(q0 + TILE, batch.subtree_ends[i])
            mask = None if window is None else _window_mask(position[q0:q1], position[start:end], window, causal=False)
            blind = None if mask is None else (mask == -torch.inf).all(1)
            if blind is None or not bool(blind.all()):
                k_end = end_of(start, end)
                mask = _with_extra(mask, k_end - end)
                calls.append(AttentionCall(q0, q1, start, end, end_of(q0, q1), k_end, False, mask, blind))
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


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(heads, L, size) -> (kv heads, heads / kv heads * L, size): the queries of one key head as rows of one matrix."""
    return x.reshape(kv_heads, -1, x.shape[-1])


def _scores(c: AttentionCall, q: Tensor, k: Tensor) -> Tensor:
    """q k^T, masked; (kv heads, groups * queries, keys), fresh memory. q carries the scale already."""
    s = torch.bmm(q, k.transpose(1, 2))
    if c.mask is not None:
        queries, masked = c.mask.shape
        rows = s.view(s.shape[0], -1, c.q_end - c.q0, s.shape[-1])
        rows[:, :, : c.q1 - c.q0, s.shape[-1] - masked :] += c.mask if queries > 1 else c.mask[0]
    return s


class TreeAttention(torch.autograd.Function):
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
            out, lse = tree.forward(ctx.kernels, query, key, value, _segments(plan), window, scale)
            ctx.save_for_backward(query, key, value, out, lse)
            return out
        calls, heads, kv = calls_for(plan, window), len(query), len(key)
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
            given = query, key, value, _segments(ctx.plan), ctx.window, ctx.scale, out, lse, d_out
            return *tree.backward(ctx.kernels, *given), None, None, None
        kv = len(key)
        d_query, d_key, d_value = (torch.zeros(x.shape) for x in (query, key, value))
        delta = (d_out * out).sum(-1)
        for c in calls_for(ctx.plan, ctx.window):
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


def _merge(out: Tensor, lse: Tensor, c: AttentionCall, part: Tensor, part_lse: Tensor) -> None:
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
