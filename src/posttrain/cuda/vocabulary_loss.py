"""`losses.linear_logprobs` on a GPU in fewer passes over the logits.

A chunk of logits stays in the dtype of the weights: one kernel reads it for log-probabilities, entropies and hits, and
one overwrites it with the derivative, which the products of backward take. The formulas, and the order of chunks, are
those of `losses.linear_logprobs`. Heads with a bias, a soft cap, adapters, or weights of another dtype than the hidden
states go through that module itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from posttrain.cuda import triton_kernels as kernels
from posttrain.losses.linear_logprobs import (
    CHUNK_BYTES,
    Head,
    checked_temperature,
    linear_cross_entropy,
    linear_logprobs,
)


def takes(hidden_N_H: Tensor, head: Head) -> bool:
    """Return True if the kernels compute this head."""
    plain = type(head.weight_V_H.data) is Tensor and hidden_N_H.dtype == head.weight_V_H.dtype
    return plain and head.bias_V is None and head.softcap is None and not head.adapted and len(hidden_N_H) > 0


def fused_logprobs(
    hidden_N_H: Tensor, head: Head, targets_N: Tensor, temperature: float | Tensor = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute `linear_logprobs`; the same results and errors.

    Args:
        hidden_N_H: As there, and so the others.
        head: Likewise.
        targets_N: Likewise.
        temperature: Likewise.
        entropy: Likewise.
    """
    if not takes(hidden_N_H, head):
        return linear_logprobs(hidden_N_H, head, targets_N, temperature, entropy)
    factors = _factors(hidden_N_H, head, checked_temperature(temperature, targets_N))
    return _FusedLogprobs.apply(hidden_N_H, head.weight_V_H, targets_N, factors, entropy)  # type: ignore[no-any-return]


def fused_cross_entropy(
    hidden_N_H: Tensor, head: Head, targets_N: Tensor, coefficients_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `linear_cross_entropy`; the same results.

    Args:
        hidden_N_H: As there, and so the others.
        head: Likewise.
        targets_N: Likewise.
        coefficients_N: Likewise.
    """
    if not takes(hidden_N_H, head):
        return linear_cross_entropy(hidden_N_H, head, targets_N, coefficients_N)
    factors = _factors(hidden_N_H, head, 1.0)
    return _FusedCrossEntropy.apply(hidden_N_H, head.weight_V_H, targets_N, coefficients_N, factors)  # type: ignore[no-any-return]


def _factors(hidden: Tensor, head: Head, temperature: float | Tensor) -> Tensor:
    """Return what turns the products of each position into logits, (N) float32."""
    scale = torch.full((len(hidden),), head.scale, dtype=torch.float32, device=hidden.device)
    return scale / temperature


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (positions, products W h of these), in memory that may be overwritten, and is by the next."""
    rows = max(1, CHUNK_BYTES["cuda"] // (weight.element_size() * len(weight)))
    room = hidden.new_empty(min(rows, len(hidden)), len(weight))
    for i in range(0, len(hidden), rows):
        part = hidden[i : i + rows]
        yield slice(i, i + rows), torch.mm(part, weight.t(), out=room[: len(part)])


def _statistics(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return room for what `vocabulary_statistics` computes."""
    logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    return (
        logprobs,
        torch.empty_like(logprobs),
        torch.zeros_like(logprobs),
        torch.empty_like(logprobs, dtype=torch.bool),
    )


def _push(d: Tensor, s: slice, hidden: Tensor, weight: Tensor, gradients: tuple[Tensor | None, Tensor | None]) -> None:
    """Carry the derivative in a chunk's products back to hidden states and weight, whose sum is in float32."""
    d_hidden, d_weight = gradients
    if d_hidden is not None:
        torch.mm(d, weight, out=d_hidden[s])
    if d_weight is not None and d_weight.dtype == d.dtype:
        d_weight.addmm_(d.t(), hidden[s])
    elif d_weight is not None:
        d, part = d.t(), hidden[s]
        if d.is_cuda:
            torch.addmm(d_weight, d, part, out_dtype=torch.float32, out=d_weight)  # the sum never loses bits
        else:
            d_weight += torch.mm(d, part)


def _room(hidden: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Return room for the gradients of hidden states and weight, as far as they are needed."""
    d_hidden = torch.empty_like(hidden) if needed[0] else None
    return d_hidden, torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None


class _FusedLogprobs(torch.autograd.Function):
    """(hidden, weight, targets, factors, entropy) -> (log-probabilities, entropies); backward makes logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, factors, entropy):  # type: ignore[no-untyped-def]
        out = _statistics(hidden)
        for s, z in _chunks(hidden, weight):
            kernels.vocabulary_statistics(z, targets[s], factors[s], entropy, tuple(x[s] for x in out))
        logprobs, lse, entropies, _ = out
        ctx.save_for_backward(hidden, weight, targets, factors, lse, entropies)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, d_logprobs, d_entropies):  # type: ignore[no-untyped-def]
        hidden, weight, targets, factors, lse, entropies = ctx.saved_tensors
        known = [lse, torch.zeros_like(lse) if d_logprobs is None else d_logprobs.contiguous()]
        known += [] if d_entropies is None else [entropies, d_entropies.contiguous()]
        gradients = _room(hidden, weight, ctx.needs_input_grad)
        for s, z in _chunks(hidden, weight):
            kernels.vocabulary_derivative(z, targets[s], factors[s], tuple(x[s] for x in known))
            _push(z, s, hidden, weight, gradients)
        d_hidden, d_weight = gradients
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


class _FusedCrossEntropy(torch.autograd.Function):
    """(hidden, weight, targets, coefficients, factors) -> (sum of coefficients * nll, nll, hits); gradients are made in
    forward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, coefficients, factors):  # type: ignore[no-untyped-def]
        out, gradients = _statistics(hidden), _room(hidden, weight, ctx.needs_input_grad)
        d_logprobs = coefficients.float().neg()
        for s, z in _chunks(hidden, weight):
            kernels.vocabulary_statistics(z, targets[s], factors[s], False, tuple(x[s] for x in out))
            if any(ctx.needs_input_grad[:2]):
                kernels.vocabulary_derivative(z, targets[s], factors[s], (out[1][s], d_logprobs[s]))
                _push(z, s, hidden, weight, gradients)
        logprobs, _, _, hits = out
        ctx.gradients, ctx.dtype = gradients, weight.dtype
        nll = logprobs.neg_()
        ctx.mark_non_differentiable(nll, hits)
        return (nll.double() * coefficients.double()).sum().float(), nll, hits

    @staticmethod
    def backward(ctx, d_loss, _nll, _hits):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError("fused_cross_entropy keeps its gradients for one backward pass; call it again")
        gradients, ctx.gradients = ctx.gradients, None
        d_hidden, d_weight = (None if d is None else d.mul_(d_loss) for d in gradients)
        return d_hidden, None if d_weight is None else d_weight.to(ctx.dtype), None, None, None
