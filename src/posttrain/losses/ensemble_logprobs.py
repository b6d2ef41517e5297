"""The distribution of an ensemble: the next-token distributions of several models, pooled into one.

With p_i the distribution of model i over the V tokens that all have, and a_i its weight:

    arithmetic    p(v) = sum_i w_i p_i(v)                        linear opinion pool (Stone 1961)
    geometric     p(v) = prod_i p_i(v)^w_i / sum_u prod_i p_i(u)^w_i    logarithmic opinion pool (Genest 1984)

The w_i sum to 1 at every token, and w_i is proportional to

    without confidence      a_i
    entropy                 a_i exp(-H(p_i)),  H(p) = -sum_v p(v) log p(v):  the inverse of the model's perplexity there
    max_probability         a_i max_v p_i(v)

The last two are exp(-H_1) and exp(-H_inf) of Rényi's entropies (1961): both are 1 for a model that is certain, and 1/V
for one that knows nothing. A geometric pool may have negative weights: of (1, 1, -1) it is z_1 + z_2 - z_3 in logits,
which moves a model by the difference of two others (DExperts, arXiv 2105.03023; proxy-tuning, 2401.08565).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.losses.linear_logprobs import Head, chunk_rows


def pool_logprobs(
    logprobs_K_N_V: Tensor, weights: Sequence[float], pool: str = "arithmetic", confidence: str | None = None
) -> Tensor:
    """Compute the pooled log-probabilities of the module's docstring, (N, V).

    Args:
        logprobs_K_N_V: Normalised log-probabilities of K models, float32.
        weights: K weights with a positive sum; negative ones in a geometric pool without confidence alone.
        pool: arithmetic or geometric.
        confidence: entropy, max_probability or None.
    """
    given = torch.tensor(weights, dtype=torch.float32, device=logprobs_K_N_V.device)
    weights_K_N = (given / given.sum())[:, None].expand(logprobs_K_N_V.shape[:2])
    if confidence is not None:
        if confidence == "entropy":
            log_confidence = -torch.special.entr(logprobs_K_N_V.exp()).sum(-1)
        else:
            log_confidence = logprobs_K_N_V.amax(-1)
        weights_K_N = (weights_K_N.log() + log_confidence).softmax(0)
    if pool == "arithmetic":
        return (logprobs_K_N_V + weights_K_N.log()[..., None]).logsumexp(0)
    finite = logprobs_K_N_V.clamp_min(torch.finfo(torch.float32).min)  # 0 times minus infinity is no number
    return (finite * weights_K_N[..., None]).sum(0).log_softmax(-1)


@dataclass(frozen=True)
class EnsembleHead:
    """Hold the output heads of an ensemble's members, which take their hidden states side by side.

    Attributes:
        heads: The heads.
        widths: Width of each member's hidden states.
        rows: Number of tokens that are pooled: logits beyond are left out before a member's are normalised.
        weights: As `pool_logprobs` takes them, and so the others.
        pool: Likewise.
        confidence: Likewise.
    """

    heads: tuple[Head, ...]
    widths: tuple[int, ...]
    rows: int
    weights: tuple[float, ...]
    pool: str
    confidence: str | None

    def logits(
        self, hidden_N_H: Tensor, temperature: float = 1.0, product: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> Tensor:
        """Compute the ensemble's log-probabilities, divided by the temperature, (N, V) float32.

        Args:
            hidden_N_H: Hidden states of all members side by side.
            temperature: Divides the log-probabilities of the ensemble, not those of its members.
            product: Computes h W^T.
        """
        out = torch.empty(len(hidden_N_H), self.rows, dtype=torch.float32, device=hidden_N_H.device)
        rows = chunk_rows(self.rows * len(self.heads), hidden_N_H.device)
        for start in range(0, len(out), rows):  # the logits of all members are larger than those of a model
            parts = zip(self.heads, hidden_N_H[start : start + rows].split(self.widths, -1), strict=True)
            logits = [head.logits(hidden.contiguous(), 1.0, product)[:, : self.rows] for head, hidden in parts]
            logprobs = torch.stack(logits).log_softmax(-1)
            out[start : start + rows] = pool_logprobs(logprobs, self.weights, self.pool, self.confidence)
        return out if temperature == 1.0 else out.div_(temperature)

    def logprobs(
        self, hidden_N_H: Tensor, targets_N: Tensor, temperature: float | Tensor = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute the log-probability of each target and, on request, the entropies: as `linear_logprobs` does.

        Args:
            hidden_N_H: Hidden states of all members side by side.
            targets_N: Token ids.
            temperature: One number, or one for each target.
            entropy: Compute the entropies; they are zeros otherwise.
        """
        logprobs = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_N_H.device)
        entropies = torch.zeros_like(logprobs)
        rows = chunk_rows(self.rows * len(self.heads), hidden_N_H.device)
        for start in range(0, len(targets_N), rows):
            s = slice(start, start + rows)
            t = temperature[s, None] if isinstance(temperature, Tensor) else temperature
            z = (self.logits(hidden_N_H[s]) / t).log_softmax(-1)
            logprobs[s] = z.gather(1, targets_N[s, None]).squeeze(1)
            if entropy:
                entropies[s] = torch.special.entr(z.exp()).sum(-1)
        return logprobs, entropies
