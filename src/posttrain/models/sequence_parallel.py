"""Sequence parallel: the processes of a group compute one micro-batch together, each a slice of its tokens.

Norms, projections, MLPs, experts and the output head look at one token at a time, and run on the slice. Attention looks
at all tokens, but at one head at a time: before it an all-to-all exchanges the slices of all heads for all tokens of
some heads, after it another one does the reverse (DeepSpeed-Ulysses, arXiv 2309.14509). So a batch's trees of shared
prefixes, windows, sinks and soft caps are what they are on one process.

Losses see the numbers of all targets, on every process of the group. The gradient of such a number goes back on the one
process that has computed it: gradients of the weights are parts, whose sum over all processes is the whole.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from posttrain.core import distributed
from posttrain.core.errors import ModelError
from posttrain.core.ragged import RaggedBatch, TokenSlice


def check_divisible(model_type: str, ragged: bool) -> None:
    """Raise ModelError if micro-batches are to be divided and the model's are computed one sequence at a time.

    Args:
        model_type: Type of the model.
        ragged: Its attention takes ragged batches.
    """
    if distributed.sequence_parallel() > 1 and not ragged:
        raise ModelError(
            f"{model_type}: sequences of this type are computed one at a time, by its own attention, which "
            "sequence_parallel can't divide between processes: set systems.sequence_parallel to 1"
        )


def sliced(batch: RaggedBatch, tile: int = 1) -> RaggedBatch:
    """Return a batch of which this process computes its slice; the batch itself without sequence parallel.

    Args:
        batch: The batch, the same on every process of the group.
        tile: A slice is a multiple of this many tokens.

    Raises:
        ModelError: The batch has pictures, or a soft prompt.
    """
    n = distributed.sequence_parallel()
    if n == 1:
        return batch
    if batch.images is not None or batch.virtual is not None:
        kind = "rows with images" if batch.virtual is None else "sequences with a soft prompt"
        raise ModelError(f"{kind} can't be divided between processes: set systems.sequence_parallel to 1")
    size = -(-batch.total // (n * tile)) * tile
    return replace(batch, part=TokenSlice(distributed.rank() % n, n, size))


class _Exchange(torch.autograd.Function):
    """(N, ...) in, (N, ...) out: part i goes to process i of the group, and comes back from there in backward."""

    @staticmethod
    def forward(ctx, x_N):  # type: ignore[no-untyped-def]
        out_N = torch.empty_like(x_N)
        dist.all_to_all_single(out_N, x_N, group=distributed.sequence_group())
        return out_N

    @staticmethod
    def backward(ctx, d_N):  # type: ignore[no-untyped-def]
        return _Exchange.forward(None, d_N.contiguous())


def all_tokens(
    part: TokenSlice, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Exchange this slice's queries, keys and values of all heads for those of all slices, of this process's heads.

    Key heads that can't be divided by N processes are repeated up to a multiple of N; query heads that can't be are
    filled up with zeros.

    Args:
        part: The slice.
        query: (1, heads, tokens of the slice, size).
        key: (1, key heads, tokens of the slice, size).
        value: (1, key heads, tokens of the slice, size).
        sinks: One number a head.

    Returns:
        The four of them, (1, heads / N, N * tokens of the slice, size) and (heads / N,).
    """
    n, heads, key_heads = part.count, query.shape[1], key.shape[1]
    repeated = heads if heads % n else math.lcm(key_heads, n)
    if repeated != key_heads:
        key, value = (x.repeat_interleave(repeated // key_heads, dim=1) for x in (key, value))
    if missing := -heads % n:
        query, key, value = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (query, key, value))
    given = [x[0].unflatten(0, (n, -1)) for x in (query, key, value)]
    received = _Exchange.apply(torch.cat([x.flatten(1) for x in given], 1))
    columns = received.split([x[0].numel() for x in given], 1)
    whole = [
        c.view(x.shape).transpose(0, 1).flatten(1, 2)[None].to(x.dtype) for c, x in zip(columns, given, strict=True)
    ]
    if sinks is not None:
        sinks = F.pad(sinks.flatten(), (0, missing)).unflatten(0, (n, -1))[part.number]
    return whole[0], whole[1], whole[2], sinks


def all_heads(part: TokenSlice, out: Tensor, heads: int) -> Tensor:
    """Exchange attention's results back: (1, N * tokens, heads / N, size) in, (1, tokens, heads, size) out.

    Args:
        part: The slice.
        out: Results for all tokens, of this process's heads.
        heads: Heads of the model; those that were filled up are left out.
    """
    received = _Exchange.apply(out[0].unflatten(0, (part.count, -1)).contiguous())
    return received.transpose(0, 1).flatten(1, 2)[None, :, :heads]  # type: ignore[no-any-return]


class _Joined(torch.autograd.Function):
    """Numbers of the targets at `own_M` in, those of all N targets of the group out; each process has all of them."""

    @staticmethod
    def forward(ctx, x_M, own_M, n):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(own_M)
        out_N = x_M.new_zeros(n, *x_M.shape[1:]).index_copy_(0, own_M, x_M)
        dist.all_reduce(out_N, group=distributed.sequence_group())
        return out_N

    @staticmethod
    def backward(ctx, d_N):  # type: ignore[no-untyped-def]
        return d_N[ctx.saved_tensors[0]], None, None


class _Summed(torch.autograd.Function):
    """A part of a sum in, the sum over the group out, on each process; the gradient is that of the sum."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        out = x.clone()
        dist.all_reduce(out, group=distributed.sequence_group())
        return out

    @staticmethod
    def backward(ctx, d):  # type: ignore[no-untyped-def]
        return d


def summed(part: TokenSlice | None, x: Tensor) -> Tensor:
    """Return the sum of `x` over the group's processes; `x` if the batch is not divided."""
    return x if part is None else _Summed.apply(x)  # type: ignore[no-any-return]


class OwnTargets:
    """Divide the targets of a batch: this process computes those whose hidden states are in its slice.

    Attributes:
        own_M: Their numbers among the N targets.
    """

    def __init__(self, part: TokenSlice, places_N: Tensor) -> None:
        """Divide the targets.

        Args:
            part: The slice.
            places_N: For each target, the T-index of the hidden state that its numbers are computed of.
        """
        self.count = len(places_N)
        self.own_M = (places_N // part.size == part.number).nonzero()[:, 0]

    def of(self, x: Any) -> Any:
        """Return the part of a tensor of N numbers; what is none (a number for all of them) stays as it is."""
        return x[self.own_M] if isinstance(x, Tensor) and x.dim() else x

    def joined(self, found: Any) -> Any:
        """Return what was computed of this process's targets, as if it were of all.

        Args:
            found: A tensor, or several: with a number or a row for each target, or a sum over them.
        """
        if not isinstance(found, Tensor):
            return tuple(self.joined(x) for x in found)
        if not found.dim():
            return _Summed.apply(found)
        if found.dtype == torch.bool:
            return _Joined.apply(found.to(torch.uint8), self.own_M, self.count).bool()
        return _Joined.apply(found, self.own_M, self.count)
