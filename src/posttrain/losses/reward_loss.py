"""Losses of reward models: of pairs of answers (Bradley-Terry), and of the steps of a chain (process reward models).

Shapes: P pairs, N step ends. Losses are per pair or per step, to be minimised, not yet weighted; metrics are sums over
them: add them up over micro-batches and ranks and divide by the number of pairs or steps of the batch. P = 0 or N = 0
gives empty losses and sums of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from posttrain.losses.aggregation import Metrics
from posttrain.losses.argument_checks import require_probabilities, require_vectors


def bradley_terry(
    chosen_P: Tensor, rejected_P: Tensor, margins_P: Tensor | None = None, probabilities_P: Tensor | None = None
) -> Tensor:
    """Compute how badly two rewards explain which answer was preferred, in nats, of shape P.

        d = r_chosen - r_rejected - margin;    -p log sigma(d) - (1 - p) log sigma(-d)

    Source: Bradley & Terry 1952; Stiennon et al., arXiv 2009.01325, section 3.4; margins: Llama 2, arXiv 2307.09288
    eq. 2; soft labels: RLAIF, arXiv 2309.00267, section 2 (cross-entropy with the judge's distribution).
    The loss is least where r_chosen - r_rejected = logit(p) + margin. Degenerate: equal rewards, no margin: log 2
    whatever p is. p = 1/2 and no margin pulls the two rewards together.

    Args:
        chosen_P: Rewards of the chosen answers.
        rejected_P: Rewards of the rejected answers.
        margins_P: By how much the chosen answer's reward is to be ahead. None: 0.
        probabilities_P: p, that `chosen` is the better one, in [0, 1]. None: 1.

    Raises:
        ValueError: Shapes differ, or a probability lies outside [0, 1].
    """
    require_vectors(chosen_P, rejected_P, *(t for t in (margins_P, probabilities_P) if t is not None))
    d_P = chosen_P - rejected_P
    if margins_P is not None:
        d_P = d_P - margins_P
    if probabilities_P is None:
        return -F.logsigmoid(d_P)
    require_probabilities(probabilities_P, "probabilities_P")
    return -(probabilities_P * F.logsigmoid(d_P) + (1 - probabilities_P) * F.logsigmoid(-d_P))


def centring(chosen_P: Tensor, rejected_P: Tensor, coefficient: float) -> Tensor:
    """Compute coefficient (r_chosen + r_rejected)^2, of shape P: keeps rewards around 0, which pairs alone leave open.

    Source: Eisenstein et al., arXiv 2312.09244.

    Args:
        chosen_P: Rewards of the chosen answers.
        rejected_P: Rewards of the rejected answers.
        coefficient: 0.01 is usual; 0 gives zeros.

    Raises:
        ValueError: Shapes differ, or the coefficient is negative.
    """
    require_vectors(chosen_P, rejected_P)
    if coefficient < 0:
        raise ValueError(f"expected a coefficient of 0 or more, got {coefficient}")
    return coefficient * (chosen_P + rejected_P) ** 2


def bradley_terry_metrics(chosen_P: Tensor, rejected_P: Tensor) -> Metrics:
    """Sum over pairs: accuracy (chosen above rejected; a tie counts 1/2), margin r_chosen - r_rejected, and reward.

    reward: the mean of the two. Raises ValueError if shapes differ.
    """
    require_vectors(chosen_P, rejected_P)
    d_P = (chosen_P - rejected_P).detach()
    right_P = (d_P > 0).to(d_P.dtype) + 0.5 * (d_P == 0).to(d_P.dtype)
    return {"accuracy": right_P.sum(), "margin": d_P.sum(), "reward": (chosen_P + rejected_P).detach().sum() / 2}


def step_loss(logits_N: Tensor, targets_N: Tensor) -> Tensor:
    """Compute the cross-entropy of a step being right, in nats, of shape N: -t log sigma(l) - (1 - t) log sigma(-l).

    Source: Math-Shepherd, arXiv 2312.08935 eq. 2, at the end of each step. targets_N: the share of completions from
    there that end right (soft, eq. 4), or 0 or 1 (hard, eq. 3).

    Degenerate: l = 0 gives log 2 whatever the target. Raises ValueError if shapes differ or a target lies outside [0,
    1].
    """
    require_vectors(logits_N, targets_N)
    require_probabilities(targets_N, "targets_N")
    return F.binary_cross_entropy_with_logits(logits_N, targets_N.to(logits_N.dtype), reduction="none")


def step_logits(scores_N_L: Tensor) -> Tensor:
    """Compute log odds that a step is right, of shape N, from a head of one label (its score) or two.

    With two labels, (wrong, right), they are the difference: softmax(l)_1 = sigma(l_1 - l_0).
    Raises ValueError for another number of labels.
    """
    if scores_N_L.ndim != 2 or scores_N_L.shape[1] not in (1, 2):
        raise ValueError(f"expected scores of shape (N, 1) or (N, 2), got {tuple(scores_N_L.shape)}")
    return scores_N_L[:, -1] - scores_N_L[:, 0] if scores_N_L.shape[1] == 2 else scores_N_L[:, 0]


def step_metrics(logits_N: Tensor, targets_N: Tensor) -> Metrics:
    """Sum over steps: accuracy (sigma(l) and the target on the same side of 1/2), and score, sigma(l).

    A target of 1/2 counts as right. Raises ValueError if shapes differ.
    """
    require_vectors(logits_N, targets_N)
    scores_N = logits_N.detach().sigmoid()
    return {"accuracy": ((scores_N >= 0.5) == (targets_N >= 0.5)).to(scores_N.dtype).sum(), "score": scores_N.sum()}


def combine_members(scores_K_N: Tensor, kind: str = "mean", spread: float = 1.0) -> Tensor:
    """Combine K members' rewards of N answers into one reward each, of shape N.

    Source: Coste et al., arXiv 2310.02743, section 3.2 (worst-case and uncertainty-weighted optimisation, there with
    the variance). K = 1 gives the member's own whatever the kind.

    Args:
        scores_K_N: Rewards.
        kind: mean; min: the lowest, K members' worst case; conservative: mean - spread * standard deviation over the
            members (of the K, not an estimate from them).
        spread: See conservative.

    Raises:
        ValueError: The kind is another, there are no members, or the shape is not (K, N).
    """
    if scores_K_N.ndim != 2 or not len(scores_K_N):
        raise ValueError(f"expected scores of shape (members, answers), got {tuple(scores_K_N.shape)}")
    if kind == "min":
        return scores_K_N.min(0).values
    if kind == "conservative":
        return scores_K_N.mean(0) - spread * scores_K_N.std(0, correction=0)
    if kind != "mean":
        raise ValueError(f"expected mean, min or conservative, got {kind!r}")
    return scores_K_N.mean(0)


def combine_steps(scores: Sequence[float], kind: str = "min") -> float:
    """Combine the scores of a chain's steps into one number. No steps: 0. Raises ValueError for another kind.

    kind: min (arXiv 2312.08935, section 3.4), product (arXiv 2305.20050, section 2.4), last or mean.
    """
    if kind not in ("min", "product", "last", "mean"):
        raise ValueError(f"expected min, product, last or mean, got {kind!r}")
    if not scores:
        return 0.0
    if kind == "product":
        return math.prod(scores)
    if kind == "last":
        return scores[-1]
    return min(scores) if kind == "min" else sum(scores) / len(scores)
