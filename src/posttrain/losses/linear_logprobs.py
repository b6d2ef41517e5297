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

from collections.abc import Callable, Sequence
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
    """Hold an output head.

    Attributes:
        weight_V_H: W.
        bias_V: b. None: none.
        scale: Multiplies the logits.
        softcap: Of tanh. None: none.
        low_rank: (A of shape R H, B of shape V R, factor) of each low-rank adapter: W + factor B A takes the place of
            W, which is never made.
        rows: (token ids, weights of shape K H) that take the place of these tokens' rows of W. None: none.
    """

    weight_V_H: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    low_rank: tuple[tuple[Tensor, Tensor, float], ...] = ()
    rows: tuple[Tensor, Tensor] | None = None

    @property
    def adapted(self) -> bool:
        """Return True if adapters change the weight."""
        return bool(self.low_rank) or self.rows is not None

    def logits(
        self, hidden_N_H: Tensor, temperature: float = 1.0, product: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> Tensor:
        """Compute `head_logits`.

        Args:
            hidden_N_H: As there, and so the others.
            temperature: Likewise.
            product: Likewise.
        """
        return head_logits(hidden_N_H, self, temperature, product)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Return how many positions go through the head at a time."""
    return max(1, CHUNK_BYTES.get(device.type, 64 << 20) // (4 * vocabulary))


def _of_rows(temperature: float | Tensor, s: slice) -> float | Tensor:
    """Return the temperature of a chunk's positions, in a shape that divides their logits."""
    return temperature[s, None] if isinstance(temperature, Tensor) else temperature


@dataclass
class HeadTerms:
    """Tensors whose products are the logits of N positions, and their gradients: W h + s B (A h) + b, rows replaced.

    `low` (N, R) holds s A h of all adapters side by side and `low_b` (V, R) their B; `rows` (N, K) the logits of the
    tokens `ids`, whose rows of W are replaced. Both are made outside, by autograd.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    low: Tensor | None
    low_b: Tensor | None
    rows: Tensor | None
    ids: Tensor | None

    def logits(self, s: slice, scale: float, softcap: float | None, t: float | Tensor, out: Tensor | None) -> Tensor:
        """Compute float32 logits of a chunk, temperature applied, in memory that may be overwritten.

        Args:
            s: The chunk's positions.
            scale: Multiplies the logits.
            softcap: Of tanh. None: none.
            t: The temperature.
            out: Memory for the product. None: fresh.
        """
        z = torch.mm(self.hidden[s], self.weight.t(), out=out).float()
        low, rows = (None if x is None else x[s] for x in (self.low, self.rows))
        return _finished(_adapted(z, low, self.low_b, rows, self.ids), self.bias, scale, softcap, t)

    def gradients(self, needed: Sequence[bool], whole: Tensor | None = None) -> list[Tensor | None]:
        """Return room for the gradients of all but `ids`, float32 where they are sums; `whole` for the weight's."""
        sums = (False, True, True, False, True, False)
        out: list[Tensor | None] = []
        for x, need, is_sum in zip(self._given, needed, sums, strict=True):
            dtype = torch.float32 if is_sum and x is not None else None
            out.append(None if x is None or not need else torch.zeros_like(x, dtype=dtype))
        if whole is not None:
            out[1] = whole
        return out

    def finished(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return gradients in the dtypes of what they belong to."""
        pairs = zip(gradients, self._given, strict=True)
        return [None if d is None or x is None else d.to(x.dtype) for d, x in pairs]

    @property
    def _given(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias, self.low, self.low_b, self.rows

    def push(self, d: Tensor, s: slice, gradients: Sequence[Tensor | None]) -> None:
        """Carry a chunk's derivative back to everything that needs it.

        Args:
            d: d loss / d (W h + b); it is overwritten.
            s: The chunk's positions.
            gradients: What `gradients` returned.
        """
        d_hidden, d_weight, d_bias, d_low, d_low_b, d_rows = gradients
        if d_bias is not None:
            d_bias += d.sum(0)
        if self.ids is not None:
            if d_rows is not None:
                d_rows[s] = d[:, self.ids].to(d_rows.dtype)
            d.index_fill_(1, self.ids, 0.0)
        if self.low is not None and self.low_b is not None:
            if d_low is not None:
                torch.mm(d, self.low_b.to(d.dtype), out=d_low[s])
            if d_low_b is not None:
                d_low_b.addmm_(d.t(), self.low[s])
        low = d.to(self.hidden.dtype)
        if d_hidden is not None:
            torch.mm(low, self.weight, out=d_hidden[s])
        if d_weight is not None:
            if d_weight.dtype == self.hidden.dtype:
                d_weight.addmm_(low.t(), self.hidden[s])
            else:
                d_weight += torch.mm(low.t(), self.hidden[s])


def _adapted(z: Tensor, low: Tensor | None, low_b: Tensor | None, rows: Tensor | None, ids: Tensor | None) -> Tensor:
    """Add to the products what adapters change, in place."""
    if low is not None and low_b is not None:
        z.addmm_(low, low_b.t().to(z.dtype))
    if rows is not None and ids is not None:
        z.index_copy_(1, ids, rows.to(z.dtype))
    return z


def adapter_terms(hidden: Tensor, head: Head) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return (low, low_b, rows, ids) of `HeadTerms`, in float32 but for the ids."""
    low = low_b = rows = ids = None
    if head.low_rank:
        low = torch.cat([factor * F.linear(hidden.to(a.dtype), a).float() for a, _, factor in head.low_rank], -1)
        low_b = torch.cat([b.float() for _, b, _ in head.low_rank], -1)
    if head.rows is not None:
        ids, weights = head.rows
        rows = F.linear(hidden.to(weights.dtype), weights).float()
    return low, low_b, rows, ids


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


def through_cap(d: Tensor, z: Tensor | None, scale: float, softcap: float | None, t: float | Tensor) -> Tensor:
    """Turn d loss / d z, in place, into d loss / d (W h + b).

    Args:
        d: d loss / d z.
        z: The logits, temperature applied; needed with a soft cap.
        scale: As `HeadTerms.logits` takes it, and so the others.
        softcap: Likewise.
        t: Likewise.
    """
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
    if head.adapted:
        z = _adapted(z, *adapter_terms(hidden_N_H, head))
    return _finished(z, head.bias_V, head.scale, head.softcap, temperature)


class _LinearLogprobs(torch.autograd.Function):
    """(those of `HeadTerms`, targets) -> (log-probabilities, entropies). Backward takes the exponentials that forward
    kept, if they are few enough; else it makes each chunk again."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        terms, (targets, scale, softcap, temperature, entropy) = HeadTerms(*inputs[:7]), inputs[7:]
        hidden, weight = terms.hidden, terms.weight
        rows = chunk_rows(weight.shape[0], hidden.device)
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        top, total = torch.empty_like(logprobs), torch.empty_like(logprobs)
        entropies = torch.zeros_like(logprobs)
        wanted = any(ctx.needs_input_grad[:6]) and softcap is None
        kept = _room(hidden, weight) if wanted else None
        for i in range(0, len(hidden), rows):
            s = slice(i, i + rows)
            out = kept[s] if kept is not None and not entropy and kept.dtype == hidden.dtype else None
            z = terms.logits(s, scale, softcap, _of_rows(temperature, s), out)
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
        ctx.save_for_backward(*inputs[:8], lse, total, entropies)
        ctx.settings = scale, softcap, temperature
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        return logprobs.sub_(lse), entropies

    @staticmethod
    def backward(ctx, d_logprobs, d_entropies):  # type: ignore[no-untyped-def]
        terms, (targets, lse, total, entropies) = HeadTerms(*ctx.saved_tensors[:7]), ctx.saved_tensors[7:]
        scale, softcap, temperature = ctx.settings
        kept, ctx.kept = ctx.kept, None  # it is overwritten: a second backward pass makes it again
        d_logprobs = torch.zeros_like(lse) if d_logprobs is None else d_logprobs
        rows = chunk_rows(terms.weight.shape[0], terms.hidden.device)
        place = place_of(terms.weight) if ctx.needs_input_grad[1] else None
        gradients = terms.gradients(ctx.needs_input_grad[:6], place)
        for i in range(0, len(terms.hidden), rows):
            s = slice(i, i + rows)
            if kept is not None and d_entropies is None:
                z, d = None, kept[s].mul_((-d_logprobs[s] / total[s])[:, None])
            else:
                z = terms.logits(s, scale, softcap, _of_rows(temperature, s), None)
                # As few chunks of logits as what comes after needs: z itself only where there is a cap.
                logp = z.sub(lse[s, None]) if softcap is not None else z.sub_(lse[s, None])
                if d_entropies is not None:
                    d = logp.exp()
                    d.mul_(logp.add_(entropies[s, None]).mul_(-d_entropies[s, None]).sub_(d_logprobs[s, None]))
                else:
                    d = logp.exp_().mul_(-d_logprobs[s, None])
            d.scatter_add_(1, targets[s, None], d_logprobs[s, None].to(d.dtype))
            terms.push(through_cap(d, z, scale, softcap, _of_rows(temperature, s)), s, gradients)
        if place is not None:
            gradients[1] = None
        return *terms.finished(gradients), *(None,) * 6


def _room(hidden: Tensor, weight: Tensor) -> Tensor | None:
    """Return memory for the exponentials of all positions' logits, float32, if they may be kept; else None."""
    kept_bytes = 4 * len(hidden) * weight.shape[0]
    if kept_bytes > KEPT_BYTES.get(hidden.device.type, 0):
        return None
    return torch.empty(len(hidden), weight.shape[0], dtype=torch.float32, device=hidden.device)


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
    temperature = checked_temperature(temperature, targets_N)
    terms = hidden_N_H, head.weight_V_H, head.bias_V, *adapter_terms(hidden_N_H, head)
    return _LinearLogprobs.apply(*terms, targets_N, head.scale, head.softcap, temperature, entropy)  # type: ignore[no-any-return]


def checked_temperature(temperature: float | Tensor, targets_N: Tensor) -> float | Tensor:
    """Return the temperature as a constant.

    Raises:
        ValueError: It is not positive, or there is not one for each target.
    """
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(_not_positive(temperature))
        return temperature
    if temperature.shape != targets_N.shape:
        raise ValueError(f"{len(targets_N)} targets, but temperatures of shape {tuple(temperature.shape)}")
    require_all(temperature > 0, lambda: _not_positive(float(temperature.min())))
    return temperature.detach().float()


def _not_positive(temperature: float) -> str:
    return f"temperature must be positive, and is {temperature}; for greedy decoding take 1"


class _LinearCrossEntropy(torch.autograd.Function):
    """(those of `HeadTerms`, targets, coefficients) -> (sum of coefficients * nll, nll); gradients made in forward."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        terms, (targets, coefficients, scale, softcap) = HeadTerms(*inputs[:7]), inputs[7:]
        hidden, weight, needed = terms.hidden, terms.weight, ctx.needs_input_grad[:6]
        rows = chunk_rows(weight.shape[0], hidden.device)
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        hits = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        gradients = terms.gradients(needed)
        for i in range(0, len(hidden), rows):
            s = slice(i, i + rows)
            z = terms.logits(s, scale, softcap, 1.0, None)
            top, best = z.max(-1)
            target = z.gather(1, targets[s, None]).squeeze(1)
            raw = z.clone() if softcap is not None else z
            p = z.sub_(top[:, None]).exp_()
            total = p.sum(-1)
            nll[s] = top + total.log() - target
            hits[s] = best == targets[s]
            if any(needed):
                c = coefficients[s].float()
                p.mul_((c / total)[:, None])
                p.scatter_add_(1, targets[s, None], -c[:, None])
                terms.push(through_cap(p, raw, scale, softcap, 1.0), s, gradients)
        ctx.gradients, ctx.weight = gradients, weight
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:6]]
        ctx.mark_non_differentiable(nll, hits)
        return (nll.double() * coefficients.double()).sum().float(), nll, hits

    @staticmethod
    def backward(ctx, d_loss, _nll, _hits):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy keeps its gradients for one backward pass; call it again")
        gradients, ctx.gradients, weight, ctx.weight = ctx.gradients, None, ctx.weight, None
        place = None if gradients[1] is None else place_of(weight)
        if place is not None:
            place.addcmul_(gradients[1], d_loss)  # `alpha=float(d_loss)` would read a tensor
            gradients[1] = None
        for d in gradients:
            if d is not None:
                d.mul_(d_loss)
        finished = (None if d is None else d.to(dtype) for d, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *finished, *(None,) * 5


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
    terms = hidden_N_H, head.weight_V_H, head.bias_V, *adapter_terms(hidden_N_H, head)
    return _LinearCrossEntropy.apply(*terms, targets_N, coefficients_N, head.scale, head.softcap)  # type: ignore[no-any-return]
