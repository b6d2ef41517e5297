"""Log-probabilities without logits: never a T by V matrix.

Only the N positions asked for go through the output head, a chunk at a time. `linear_logprobs` serves losses whose
derivative is known only afterwards (policy gradients, preferences): it keeps exponentials for backward where they are
few, and makes a chunk again where they are many;
`linear_cross_entropy` serves a weighted sum that is known beforehand (SFT) and so makes its gradients at once.

Let z = cap(scale * (W h + b)) / temperature, with cap(z) = c tanh(z / c) where a soft cap c is given. Then

    log p(y) = z_y - logsumexp(z)          entropy = logsumexp(z) - sum_v p_v z_v
    d log p(y) / d z = onehot(y) - p       d entropy / d z_v = -p_v (log p_v + entropy)

The temperature is one number, or one for each position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.losses.argument_checks import require_all
from posttrain.losses.gradient_accumulation import place_of

CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}
"""Size of one chunk of logits: on a CPU what stays in its cache, on a GPU what keeps its units busy."""

KEPT_BYTES = {"cpu": 256 << 20}
"""Up to so much, exponentials of logits wait for backward: a quarter of the head's work less, for no more memory than
the layers' activations of as many tokens take."""


@dataclass(frozen=True)
class Head:
    """Hold an output head: weight_V_H, optional bias_V, a scale on the logits, and a tanh soft cap (None: none)."""

    weight_V_H: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Return how many positions go through the head at a time."""
    return max(1, CHUNK_BYTES.get(device.type, 64 << 20) // (4 * vocabulary))


def _of_rows(temperature: float | Tensor, s: slice) -> float | Tensor:
    """Return the temperature of a chunk's positions, in a shape that divides their logits."""
    return temperature[s, None] if isinstance(temperature, Tensor) else temperature


def _logits(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    t: float | Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Compute float32 logits of a chunk, temperature applied, in `out` or fresh memory that may be overwritten."""
    return _finished(torch.mm(h, weight.t(), out=out).float(), bias, scale, softcap, t)


def _finished(z: Tensor, bias: Tensor | None, scale: float, softcap: float | None, t: float | Tensor) -> Tensor:
    """Apply what follows the product, in place."""
    if bias is not None:
        z += bias
    if scale != 1.0:
        z *= scale
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    if isinstance(t, Tensor) or t != 1.0:
        z /= t
    return z


def _through_cap(d: Tensor, z: Tensor | None, scale: float, softcap: float | None, t: float | Tensor) -> Tensor:
    """Turn d loss / d z, in place, into d loss / d (W h + b)."""
    if softcap is not None and z is not None:
        d *= 1.0 - (z * (t / softcap)).square_()
    factor = scale / t
    return d.mul_(factor) if isinstance(factor, Tensor) or factor != 1.0 else d


def head_logits(
    hidden_N_H: Tensor, head: Head, temperature: float = 1.0, product: Callable[[Tensor, Tensor], Tensor] = F.linear
) -> Tensor:
    """Compute z of the module's docstring, (N, V) float32, for the few positions that are sampled from.

    Not for training.

    Args:
        hidden_N_H: Hidden states.
        head: The output head.
        temperature: Divides the logits.
        product: Computes h W^T.
    """
    z = product(hidden_N_H, head.weight_V_H).float().contiguous()
    return _finished(z, head.bias_V, head.scale, head.softcap, temperature)


class _LinearLogprobs(torch.autograd.Function):
    """(hidden, weight, bias, targets) -> (log-probabilities, entropies). Backward takes the exponentials that forward
    kept, if they are few enough; else it makes each chunk again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, temperature, entropy):  # type: ignore[no-untyped-def]
        rows = chunk_rows(weight.shape[0], hidden.device)
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        top, total = torch.empty_like(logprobs), torch.empty_like(logprobs)
        entropies = torch.zeros_like(logprobs)
        wanted = any(ctx.needs_input_grad[:3]) and softcap is None
        kept = _room(hidden, weight) if wanted else None
        for i in range(0, len(hidden), rows):
            s = slice(i, i + rows)
            out = kept[s] if kept is not None and not entropy and kept.dtype == hidden.dtype else None
            z = _logits(hidden[s], weight, bias, scale, softcap, _of_rows(temperature, s), out)
            torch.amax(z, -1, out=top[s])
            logprobs[s] = z.gather(1, targets[s, None]).squeeze(1)
            if entropy:
                p = torch.sub(z, top[s, None], out=None if kept is None else kept[s]).exp_()
            else:
                p = z.sub_(top[s, None]).exp_()
                if kept is not None and out is None:
                    kept[s] = p
            torch.sum(p, -1, out=total[s])
            if entropy:
                entropies[s] = top[s] + total[s].log() - z.mul_(p).sum(-1) / total[s]
        lse = top + total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, lse, total, entropies)
        ctx.settings = scale, softcap, temperature
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        return logprobs.sub_(lse), entropies

    @staticmethod
    def backward(ctx, d_logprobs, d_entropies):  # type: ignore[no-untyped-def]
        hidden, weight, bias, targets, lse, total, entropies = ctx.saved_tensors
        scale, softcap, temperature = ctx.settings
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        kept, ctx.kept = ctx.kept, None  # it is overwritten: a second backward pass makes it again
        d_logprobs = torch.zeros_like(lse) if d_logprobs is None else d_logprobs
        rows = chunk_rows(weight.shape[0], hidden.device)
        d_hidden = torch.empty_like(hidden) if need_h else None
        place = place_of(weight) if need_w else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_w and place is None else place
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_b and bias is not None else None
        for i in range(0, len(hidden), rows):
            s = slice(i, i + rows)
            if kept is not None and d_entropies is None:
                z, d = None, kept[s].mul_((-d_logprobs[s] / total[s])[:, None])
            else:
                z = _logits(hidden[s], weight, bias, scale, softcap, _of_rows(temperature, s))
                # As few chunks of logits as what comes after needs: z itself only where there is a cap.
                logp = z.sub(lse[s, None]) if softcap is not None else z.sub_(lse[s, None])
                if d_entropies is not None:
                    d = logp.exp()
                    d.mul_(logp.add_(entropies[s, None]).mul_(-d_entropies[s, None]).sub_(d_logprobs[s, None]))
                else:
                    d = logp.exp_().mul_(-d_logprobs[s, None])
            d.scatter_add_(1, targets[s, None], d_logprobs[s, None].to(d.dtype))
            d = _through_cap(d, z, scale, softcap, _of_rows(temperature, s))
            _push(d, hidden, weight, s, d_hidden, d_weight, d_bias)
        return (
            d_hidden,
            None if d_weight is None or place is not None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _room(hidden: Tensor, weight: Tensor) -> Tensor | None:
    """Return memory for the exponentials of all positions' logits, float32, if they may be kept; else None."""
    kept_bytes = 4 * len(hidden) * weight.shape[0]
    if kept_bytes > KEPT_BYTES.get(hidden.device.type, 0):
        return None
    return torch.empty(len(hidden), weight.shape[0], dtype=torch.float32, device=hidden.device)


def _push(
    d: Tensor, hidden: Tensor, weight: Tensor, s: slice, d_h: Tensor | None, d_w: Tensor | None, d_b: Tensor | None
) -> None:
    """Carry a chunk's d loss / d logits back to hidden states, weight and bias."""
    low = d.to(hidden.dtype)
    if d_h is not None:
        torch.mm(low, weight, out=d_h[s])
    if d_w is not None:
        if d_w.dtype == hidden.dtype:
            d_w.addmm_(low.t(), hidden[s])
        else:
            d_w += torch.mm(low.t(), hidden[s])
    if d_b is not None:
        d_b += d.sum(0)


def linear_logprobs(
    hidden_N_H: Tensor, head: Head, targets_N: Tensor, temperature: float | Tensor = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each target, and on request the entropy of its distribution, in nats.

    Both are differentiable in the hidden states, the head's weight and its bias. Peak memory beyond the arguments and
    their gradients: one chunk of logits, whatever N is; on a CPU, with gradients, all logits if they take no more than
    `KEPT_BYTES`. N = 0 gives empty tensors.

    Args:
        hidden_N_H: The hidden states that predict the targets.
        head: The output head.
        targets_N: Token ids, int64.
        temperature: As it was when sampling: one number, or one for each target (shape N, a constant).
        entropy: Compute the entropies; they are zeros otherwise.

    Returns:
        (logprobs_N, entropies_N), float32.

    Raises:
        ValueError: A temperature is not positive, or there is not one for each target.
    """
    if isinstance(temperature, Tensor):
        if temperature.shape != targets_N.shape:
            raise ValueError(f"{len(targets_N)} targets, but temperatures of shape {tuple(temperature.shape)}")
        given, temperature = temperature, temperature.detach().float()
        require_all(given > 0, lambda: _not_positive(float(given.min())))
    elif not temperature > 0:
        raise ValueError(_not_positive(temperature))
    return _LinearLogprobs.apply(  # type: ignore[no-any-return]
        hidden_N_H, head.weight_V_H, head.bias_V, targets_N, head.scale, head.softcap, temperature, entropy
    )


def _not_positive(temperature: float) -> str:
    return f"temperature must be positive, and is {temperature}; for greedy decoding take 1"


class _LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, bias, targets, coefficients) -> (sum of coefficients * nll, nll); gradients made in forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, coefficients, scale, softcap):  # type: ignore[no-untyped-def]
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        rows = chunk_rows(weight.shape[0], hidden.device)
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        hits = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_h else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_w else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_b and bias is not None else None
        for i in range(0, len(hidden), rows):
            s = slice(i, i + rows)
            z = _logits(hidden[s], weight, bias, scale, softcap, 1.0)
            top, best = z.max(-1)
            target = z.gather(1, targets[s, None]).squeeze(1)
            raw = z.clone() if softcap is not None else z
            p = z.sub_(top[:, None]).exp_()
            total = p.sum(-1)
            nll[s] = top + total.log() - target
            hits[s] = best == targets[s]
            if need_h or need_w:
                c = coefficients[s].float()
                p.mul_((c / total)[:, None])
                p.scatter_add_(1, targets[s, None], -c[:, None])
                _push(_through_cap(p, raw, scale, softcap, 1.0), hidden, weight, s, d_hidden, d_weight, d_bias)
        ctx.gradients = d_hidden, d_weight, d_bias
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll, hits)
        return (nll.double() * coefficients.double()).sum().float(), nll, hits

    @staticmethod
    def backward(ctx, d_loss, _nll, _hits):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy keeps its gradients for one backward pass; call it again")
        d_hidden, d_weight, d_bias = ctx.gradients
        weight, ctx.weight, ctx.gradients = ctx.weight, None, None
        place = None if d_weight is None else place_of(weight)
        if place is not None:
            place.addcmul_(d_weight, d_loss)  # `alpha=float(d_loss)` would read a tensor
            d_weight = None
        for d in (d_hidden, d_weight, d_bias):
            if d is not None:
                d.mul_(d_loss)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(ctx.bias_dtype),
            *(None,) * 4,
        )


def linear_cross_entropy(
    hidden_N_H: Tensor, head: Head, targets_N: Tensor, coefficients_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute sum_n c_n * -log p(y_n), with its gradients chunk by chunk on the way (the head costs 3 products, not 4).

    N = 0 gives loss 0. One backward pass only.

    Args:
        hidden_N_H: The hidden states that predict the targets.
        head: The output head.
        targets_N: Token ids, int64.
        coefficients_N: What each token's negative log-likelihood counts, its share of the global denominator included.

    Returns:
        (loss, nll_N, hits_N): the scalar; for metrics the negative log-likelihood of each target, and whether it was
            the
        likeliest token (not differentiable).
    """
    return _LinearCrossEntropy.apply(  # type: ignore[no-any-return]
        hidden_N_H, head.weight_V_H, head.bias_V, targets_N, coefficients_N, head.scale, head.softcap
    )
