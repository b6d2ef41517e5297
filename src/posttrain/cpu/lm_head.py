"""Log-probabilities on a CPU, a tile of the vocabulary at a time: `losses.linear_logprobs` in fewer passes.

All N positions go over a thousand or two tokens' weights, whose logits stay in the processor's cache; a compiled kernel
adds a tile to each position's softmax in one pass, in terms of the largest logit so far. So the weights and their
gradient, which are larger than any cache, are read and written once and not once for every few positions. A weight that
is held packed only (`quantized_matmul`) is dequantised a tile at a time. The formulas are those of
`losses.linear_logprobs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from posttrain.cpu import library as native
from posttrain.cpu.quantized_matmul import is_placeholder, rows_of, whole
from posttrain.losses import linear_logprobs as logprobs
from posttrain.losses.gradient_accumulation import place_of
from posttrain.losses.linear_logprobs import Head, linear_cross_entropy, linear_logprobs

TILE_BYTES = 4 << 20
"""Of logits: what stays in a processor's last cache, beside the weights that they are made of."""
LEAST, STEP = 512, 256
"""Tokens of a tile: at least, and in multiples of."""
NOTHING = -1e30
"""The largest logit before there is one."""


def head_logprobs(
    hidden_N_H: Tensor, head: Head, targets_N: Tensor, temperature: float | Tensor = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute `linear_logprobs`, in tiles of the vocabulary if possible: float32, compiled kernels, no soft cap.

    The same results and errors.

    Args:
        hidden_N_H: As there, and so the others.
        head: Likewise.
        targets_N: Likewise.
        temperature: Likewise.
        entropy: Likewise.
    """
    t = temperature
    positive = bool((t > 0).all()) if isinstance(t, Tensor) else t > 0
    kernels = _kernels(hidden_N_H, head) if positive else None
    if kernels is None or (isinstance(t, Tensor) and t.shape != targets_N.shape):
        return linear_logprobs(hidden_N_H, _in_full(head), targets_N, temperature, entropy)
    factor = None
    if isinstance(t, Tensor) or t != 1.0 or head.scale != 1.0:
        factor = head.scale / (t.detach().float() if isinstance(t, Tensor) else torch.full((len(targets_N),), float(t)))
    given = hidden_N_H, head.weight_V_H, head.bias_V, targets_N, factor, kernels, entropy
    return _TiledLogprobs.apply(*given)[:2]  # type: ignore[no-any-return]


def head_cross_entropy(
    hidden_N_H: Tensor, head: Head, targets_N: Tensor, coefficients_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `linear_cross_entropy` in such tiles, if all exponentials may be kept: three products here as there.

    The same results, except that of several likeliest tokens each counts as a hit.

    Args:
        hidden_N_H: As there, and so the others.
        head: Likewise.
        targets_N: Likewise.
        coefficients_N: Likewise.
    """
    few = 4 * len(targets_N) * len(head.weight_V_H) <= logprobs.KEPT_BYTES["cpu"]
    kernels = _kernels(hidden_N_H, head) if few else None
    if kernels is None:
        return linear_cross_entropy(hidden_N_H, _in_full(head), targets_N, coefficients_N)
    factor = torch.full((len(targets_N),), head.scale) if head.scale != 1.0 else None
    given = hidden_N_H, head.weight_V_H, head.bias_V, targets_N, factor, kernels, False
    found, _, hits = _TiledLogprobs.apply(*given)
    loss = -(found.double() * coefficients_N.double()).sum().float()
    return loss, -found.detach(), hits


def _in_full(head: Head) -> Head:
    return replace(head, weight_V_H=whole(head.weight_V_H))


def _kernels(hidden: Tensor, head: Head) -> native.Kernels | None:
    """The compiled kernels, where they take this head and there is anything for them to do; else None."""
    weight, bias = head.weight_V_H, head.bias_V
    read = native.is_plain(weight) or is_placeholder(weight)
    plain = read and (bias is None or native.is_plain(bias)) and head.softcap is None
    fits = (
        plain and not head.adapted and weight.device.type == "cpu" and hidden.dtype == torch.float32 and len(hidden) > 0
    )
    return native.kernels() if fits else None


class _Tiles:
    """Tiles of a vocabulary for N positions: their tokens, and which positions' targets lie in each.

    A tile has at most as many logits as fit into `TILE_BYTES`; of a weight that is dequantised, as many numbers too.
    """

    def __init__(self, targets: Tensor, weight: Tensor) -> None:
        vocabulary, columns = weight.shape
        row = max(len(targets), columns) if is_placeholder(weight) else len(targets)
        wide = max(LEAST, TILE_BYTES // (4 * row) // STEP * STEP)
        self.edges = [*range(0, vocabulary, wide), vocabulary]
        order = targets.argsort()
        cuts = torch.searchsorted(targets[order], torch.tensor(self.edges)).tolist()
        if cuts[0] != 0 or cuts[-1] != len(targets):  # they would lie in no tile
            raise IndexError(
                f"targets are {int(targets.min())} to {int(targets.max())}, and must be 0 to {vocabulary - 1}"
            )
        self.rows = [order[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]

    def __iter__(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """(number, first token, one past the last, positions whose target is among them)."""
        for i, rows in enumerate(self.rows):
            yield i, self.edges[i], self.edges[i + 1], rows


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor | None, v: slice, room: Tensor
) -> Tensor:
    """A tile of logits, (N, tokens), in the first part of `room`."""
    z = room[: len(hidden) * (v.stop - v.start)].view(len(hidden), -1)
    torch.mm(hidden, rows_of(weight, v).t(), out=z)
    if bias is not None:
        z += bias[v]
    return z if factor is None else z.mul_(factor[:, None])


class _TiledLogprobs(torch.autograd.Function):
    """(hidden, weight, bias, targets, scale over temperature) -> (log-probabilities, entropies, whether likeliest)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, factor, kernels, entropy):  # type: ignore[no-untyped-def]
        hidden, n, vocabulary = hidden.contiguous(), len(hidden), len(weight)
        tiles = _Tiles(targets, weight)
        top, total, weighted = torch.full((n,), NOTHING), torch.zeros(n), torch.zeros(n)
        keep = any(ctx.needs_input_grad[:3]) and 4 * n * vocabulary <= logprobs.KEPT_BYTES["cpu"]
        room = torch.empty(n * (vocabulary if keep else tiles.edges[1]))
        tops, picked = [], torch.empty(n)
        for _, a, b, rows in tiles:
            z = _logits(hidden, weight, bias, factor, slice(a, b), room[n * a :] if keep else room)
            picked[rows] = z[rows, targets[rows] - a]
            kernels.absorb(z, top, total, weighted if entropy else None, keep)
            if keep:
                tops.append(top.clone())
        lse = top + total.log()
        # H = lse - E[z] = log(total) - E[z - top]; and what is taken off in two parts keeps large logits' digits.
        entropies = total.log() - weighted / total if entropy else torch.zeros(n)
        ctx.save_for_backward(hidden, weight, bias, targets, factor, lse, entropies)
        ctx.tiles, ctx.kept = tiles, (room, tops) if keep else None
        ctx.set_materialize_grads(False)
        picked.sub_(top)
        hits = picked == 0
        ctx.mark_non_differentiable(hits)
        return picked.sub_(total.log()), entropies, hits

    @staticmethod
    def backward(ctx, d_logprobs, d_entropies, _hits):  # type: ignore[no-untyped-def]
        hidden, weight, bias, targets, factor, lse, entropies = ctx.saved_tensors
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        n, kept, ctx.kept = len(hidden), ctx.kept, None  # it is overwritten: a second backward pass makes it again
        d_logprobs = torch.zeros(n) if d_logprobs is None else d_logprobs
        d_target = d_logprobs if factor is None else d_logprobs * factor
        kept = kept if d_entropies is None else None
        room = kept[0] if kept is not None else torch.empty(n * ctx.tiles.edges[1])
        d_hidden = torch.zeros_like(hidden) if need_h else None
        place = place_of(weight) if need_w else None
        d_weight = torch.empty_like(weight) if need_w and place is None else place
        d_bias = torch.zeros_like(bias) if need_b and bias is not None else None
        for i, a, b, rows in ctx.tiles:
            if kept is not None:
                d = room[n * a : n * b].view(n, -1).mul_((-d_target * (kept[1][i] - lse).exp_())[:, None])
            else:
                logp = _logits(hidden, weight, bias, factor, slice(a, b), room).sub_(lse[:, None])
                if d_entropies is None:
                    d = logp.exp_().mul_(-d_target[:, None])
                else:
                    d = logp.exp()
                    d.mul_(logp.add_(entropies[:, None]).mul_(-d_entropies[:, None]).sub_(d_logprobs[:, None]))
                    d = d if factor is None else d.mul_(factor[:, None])
            d[rows, targets[rows] - a] += d_target[rows]
            if d_hidden is not None:
                d_hidden.addmm_(d, rows_of(weight, slice(a, b)))
            if d_weight is not None:
                d_weight[a:b].addmm_(d.t(), hidden, beta=0.0 if place is None else 1.0)
            if d_bias is not None:
                d_bias[a:b] = d.sum(0)
        return d_hidden, None if place is not None else d_weight, d_bias, None, None, None, None
