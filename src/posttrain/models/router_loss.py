"""The load-balancing loss of mixtures of experts, over all tokens of a step, however they are split.

transformers adds it to the loss if the model's configuration says `output_router_logits: true`. With the experts e of
E, the k experts that a token is sent to, and means over all tokens and all layers with a router:

    f_e = mean of [e is among the token's k experts]     P_e = mean of softmax(router logits)_e
    loss = coefficient * E * sum_e f_e P_e

(arXiv 2101.03961, equations 4 to 6; `load_balancing_loss_func` of transformers). f carries no gradient. It is not
linear in the batch: the mean of two micro-batches' losses is another number than the loss of both. So f is counted over
the whole step first, and each micro-batch adds its share of P. A token that several samples share counts for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.core.ragged import RaggedBatch


@dataclass(frozen=True)
class Routing:
    """Hold what the loss needs of one forward pass.

    Attributes:
        counts_E: How many times each expert was among a token's k, over tokens and layers.
        probabilities_E: Sums of the routers' probabilities, likewise; they carry the gradient.
        rows_: Number of tokens times layers, a scalar.
    """

    counts_E: Tensor
    probabilities_E: Tensor
    rows_: Tensor


@dataclass(frozen=True)
class RouterLoss:
    """Hold the settings that a model's configuration gives the loss.

    Attributes:
        coefficient: Factor of the loss.
        per_token: Number k of experts that a token is sent to.
    """

    coefficient: float
    per_token: int

    @staticmethod
    def of(base: Any) -> RouterLoss | None:
        """Return the settings if transformers would add the loss for this model; else None."""
        config = base.config.get_text_config()
        if not getattr(config, "output_router_logits", False):
            return None
        found = [getattr(base, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef")]
        coefficient = next((float(c) for c in found if c is not None), 0.0)
        per_token = getattr(base, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
        return RouterLoss(coefficient, int(per_token)) if coefficient and per_token else None

    def share(self, routing: Routing, whole: Routing) -> Tensor:
        """Compute a micro-batch's share of the loss of the step, without the coefficient.

        Args:
            routing: Routing of the micro-batch.
            whole: Routing of all tokens of the step; its counts are used.
        """
        fractions_E = whole.counts_E / whole.rows_
        return len(fractions_E) * (fractions_E * routing.probabilities_E).sum() / whole.rows_


def multiplicity(batch: RaggedBatch) -> Tensor:
    """Return (T,) how many samples with loss each token is a part of."""
    counts = torch.zeros(batch.total, device=batch.tokens_T.device)
    for row, sample in zip(batch.rows, batch.samples, strict=True):
        if any(sample.weights):
            counts[row] += 1.0
    return counts


def routing_of(router_logits: Sequence[Tensor], multiplicity_T: Tensor, per_token: int) -> Routing:
    """Add up what the routers of all layers say of a batch's tokens.

    Args:
        router_logits: Of each layer with a router, (tokens, E); tokens after the batch's T are left out.
        multiplicity_T: How much each token counts.
        per_token: Number of experts that a token is sent to.
    """
    counts_E = probabilities_E = None
    for logits in router_logits:
        logits = logits.reshape(-1, logits.shape[-1])[: len(multiplicity_T)]
        probabilities = logits.softmax(-1).float()
        chosen = probabilities.detach().topk(per_token, -1).indices
        counts = torch.zeros_like(probabilities[0], requires_grad=False).index_add_(
            0, chosen.flatten(), multiplicity_T.repeat_interleave(per_token, output_size=chosen.numel())
        )
        sums = multiplicity_T @ probabilities
        counts_E = counts if counts_E is None else counts_E + counts
        probabilities_E = sums if probabilities_E is None else probabilities_E + sums
    if counts_E is None or probabilities_E is None:
        raise ValueError("no layer of the model returned router logits")
    return Routing(counts_E, probabilities_E, multiplicity_T.sum() * len(router_logits))


def add_up(routings: Sequence[Routing]) -> Routing:
    """Return the routing of several batches together, without gradients."""
    counts = torch.stack([r.counts_E for r in routings]).sum(0)
    probabilities = torch.stack([r.probabilities_E.detach() for r in routings]).sum(0)
    return Routing(counts, probabilities, torch.stack([r.rows_ for r in routings]).sum())
