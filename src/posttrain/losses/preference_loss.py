"""Preference losses: what the log-probabilities of whole answers, better and worse ones, come to.

Let h = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x), y_w the better answer, y_l the other, n their tokens.

    method       loss of a pair                                                        reference  what is normalised
    DPO          -log sigma(beta h)                                                    yes
    cDPO         (1-e) DPO(h) + e DPO(-h)                                              yes
    robust DPO   ((1-e) DPO(h) - e DPO(-h)) / (1-2e)                                   yes
    DPO-norm     -log sigma(beta h)                                                    yes        log ratios, by n
    IPO          (h - 1/(2 beta))^2                                                    yes        log ratios, by n
    CPO          -log sigma(beta (log pi(y_w) - log pi(y_l)))            + NLL(y_w)    no
    SimPO        -log sigma(beta (log pi(y_w) - log pi(y_l)) - gamma)                  no         log pi, by n
    ORPO         -beta log sigma(log odds(y_w) - log odds(y_l))          + NLL(y_w)    no         log pi, by n

and KTO, whose answers are single ones, good or bad. NLL(y) = -log pi(y) / n, `nll`, is added by the caller.

Every function takes log-probabilities of whole answers (sums over their tokens, the end-of-turn token included, nats,
differentiable for the policy and constant for the reference) and gives one loss an answer or pair, to be summed and
divided by their number in the global batch. A soft label p, the probability that y_w is the better one, makes each the
expectation over which one it is: p loss(w, l) + (1 - p) loss(l, w). Metrics are sums over the pairs, as losses are.

Shapes: P pairs of answers, U answers that come singly. P = 0 and U = 0 give empty losses and sums of 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.losses.aggregation import Metrics
from posttrain.losses.argument_checks import require_probabilities, require_vectors

LOG_HALF = -0.6931471805599453


def expected(loss: Callable[[Tensor], Tensor], h_P: Tensor, probability_P: Tensor | None) -> Tensor:
    """Compute p loss(h) + (1 - p) loss(-h), of shape P: the loss of a pair whose label is uncertain.

    At p = 1/2 both answers have the same weight, and what is left pulls h towards 0.

    Args:
        loss: Loss of h.
        h_P: Differences of the two answers.
        probability_P: p, in [0, 1]. None: 1, the plain loss.

    Raises:
        ValueError: Shapes differ, or a number is out of range.
    """
    if probability_P is None:
        return loss(h_P)
    if probability_P.shape != h_P.shape:
        raise ValueError(f"{tuple(probability_P.shape)} probabilities for {tuple(h_P.shape)} pairs")
    require_probabilities(probability_P, "probability_P")
    return probability_P * loss(h_P) + (1 - probability_P) * loss(-h_P)


def log_ratio(logprobs: Tensor, reference: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Compute log pi(y|x) / pi_ref(y|x), of the shape of both. Differentiable in logprobs.

    Args:
        logprobs: Under the policy.
        reference: Under the reference. Where both are the same: 0.
        lengths: If given, the ratios are divided by them.

    Raises:
        ValueError: Shapes differ.
    """
    require_vectors(logprobs, reference)
    difference = logprobs - reference.detach()
    return difference if lengths is None else per_token(difference, lengths)


def per_token(values: Tensor, lengths: Tensor) -> Tensor:
    """Divide sums over answers' tokens by their number; an answer without tokens keeps its 0."""
    require_vectors(values, lengths)
    return values / lengths.clamp(min=1)


def dpo(h_P: Tensor, beta: float = 0.1, probability_P: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Compute -log sigma(beta h), of shape P. Source: DPO, arXiv 2305.18290 eq. 7.

    With log-probabilities in place of log ratios it is CPO's (arXiv 2401.08417), with per-token log ratios
    length-normalised DPO, Tulu 3, arXiv 2411.15124 section 5.1 (there beta is 5). h = 0: log 2, whatever beta, p and e
    are.

    Args:
        h_P: Difference of the two log ratios, nats.
        beta: Positive, per nat: the strength of the KL constraint that it stands for.
        probability_P: See `expected`; with smoothing, p(1-e) + (1-p)e takes the place of p.
        smoothing: e in [0, 1/2), the share of labels that are wrong; e > 0 is conservative DPO (cDPO), Mitchell 2023
            eq. 3: -(1-e) log sigma(beta h) - e log sigma(-beta h), least at sigma(beta h) = 1 - e.
    """
    _positive(beta)
    if smoothing:
        _share(smoothing)
        p = torch.ones_like(h_P) if probability_P is None else probability_P
        probability_P = p * (1 - smoothing) + (1 - p) * smoothing
    return expected(lambda h: -F.logsigmoid(beta * h), h_P, probability_P)


def robust_dpo(h_P: Tensor, beta: float = 0.1, smoothing: float = 0.1, probability_P: Tensor | None = None) -> Tensor:
    """Compute ((1-e) dpo(h) - e dpo(-h)) / (1 - 2e), of shape P. Source: robust DPO, arXiv 2403.00409 section 3.

    Its expectation over labels of which a share e is flipped is DPO's loss on the true ones. e = 0 is DPO. It can be
    negative and has no lower bound: for large h, -e dpo(-h) keeps falling. h = 0: log 2.

    Args:
        h_P: As for `dpo`.
        beta: As for `dpo`.
        smoothing: e.
        probability_P: See `expected`.
    """
    _positive(beta)
    _share(smoothing)
    e = smoothing

    def loss(h: Tensor) -> Tensor:
        return (-(1 - e) * F.logsigmoid(beta * h) + e * F.logsigmoid(-beta * h)) / (1 - 2 * e)

    return expected(loss, h_P, probability_P)


def ipo(h_P: Tensor, beta: float = 0.1, probability_P: Tensor | None = None) -> Tensor:
    """Compute (h - 1 / (2 beta))^2, of shape P. Source: IPO, arXiv 2310.12036 eq. 17, where beta is called tau.

    h is pulled to 1 / (2 beta) and no further, even if all labels agree. h = 0: 1 / (4 beta^2).

    Args:
        h_P: Difference of the two log ratios, nats.
        beta: Positive.
        probability_P: See `expected`.
    """
    _positive(beta)
    return expected(lambda h: (h - 1 / (2 * beta)).square(), h_P, probability_P)


def hinge(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1) -> Tensor:
    """Return the hinge losses of pairs: max(0, 1 - beta (chosen - rejected)).

    Source: SLiC-HF, arXiv 2305.10425, equation 3; with log ratios to a reference as in arXiv 2309.06657, table 1.

    Args:
        chosen_P: Scores of the chosen answers, in nats.
        rejected_P: Scores of the rejected answers, in nats.
        beta: Weight of the difference; the loss is 0 from a difference of 1 / beta.
    """
    return torch.relu(1 - beta * (chosen_P - rejected_P))


def simpo(h_P: Tensor, beta: float = 2.0, gamma: float = 1.0, probability_P: Tensor | None = None) -> Tensor:
    """Compute -log sigma(beta h - gamma), of shape P. Source: SimPO, arXiv 2405.14734 eq. 6.

    h = 0: log(1 + e^gamma).

    Args:
        h_P: log pi(y_w)/n_w - log pi(y_l)/n_l, nats a token: no reference.
        beta: Positive.
        gamma: By how much the better answer's reward, beta log pi / n, is to exceed the other's; 0 or more.
        probability_P: See `expected`.
    """
    _positive(beta)
    return expected(lambda h: -F.logsigmoid(beta * h - gamma), h_P, probability_P)


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """Compute log(P / (1 - P)) of P = exp(log pi(y) / n), of the same shape. Source: ORPO, arXiv 2403.07691 eq.

    2 and 4.

    mean_logprobs: nats a token, below 0. At 0 or above, as rounding may have it, P is taken as 1 - 1e-6.
    """
    x = mean_logprobs.clamp(max=-1e-6)
    # log(1 - e^x): one form keeps its digits near 0, the other far from it. Both get a gradient, so both stay finite.
    near = torch.log(-torch.expm1(x.clamp(min=LOG_HALF)))
    far = torch.log1p(-x.clamp(max=LOG_HALF).exp())
    return x - torch.where(x > LOG_HALF, near, far)


def orpo(h_P: Tensor, beta: float = 0.1, probability_P: Tensor | None = None) -> Tensor:
    """Compute -beta log sigma(log odds(y_w) - log odds(y_l)), of shape P. Source: ORPO, arXiv 2403.07691 eq. 6 and 7.

    h = 0: beta log 2.

    Args:
        h_P: Difference of the two `log_odds`.
        beta: The paper's lambda, the weight of this part beside `nll`.
        probability_P: See `expected`.
    """
    _positive(beta)
    return expected(lambda h: -beta * F.logsigmoid(h), h_P, probability_P)


def nll(logprobs: Tensor, lengths: Tensor) -> Tensor:
    """Compute -log pi(y) / n, of the same shape.

    The mean over an answer's tokens, so that long answers count as short ones.

    Source: ORPO, arXiv 2403.07691 eq. 2; added to DPO, arXiv 2404.19733 eq. 1. An answer without tokens: 0.
    """
    return -per_token(logprobs, lengths)


def kl_estimate(log_ratios_U: Tensor) -> Tensor:
    """Compute max(0, mean of log pi(y'|x) / pi_ref(y'|x)), a scalar constant. Source: KTO, arXiv 2402.01306 section 4.

    log_ratios_U: of answers to *other* prompts, put after these ones, over the whole global batch. It is a baseline,
    rather than an unbiased estimate of the KL divergence, and gets no gradient. U = 0: 0.
    """
    if not log_ratios_U.numel():
        return log_ratios_U.new_zeros(())
    return log_ratios_U.detach().mean().clamp(min=0)


def kto(
    log_ratios_U: Tensor,
    desirable_U: Tensor,
    kl: Tensor | float,
    beta: float = 0.1,
    good: float = 1.0,
    bad: float = 1.0,
) -> Tensor:
    """Compute good (1 - sigma(beta (r - z))) of good answers, bad (1 - sigma(beta (z - r))) of others; shape U.

    Source: KTO, arXiv 2402.01306 section 4, lambda - v(x, y). r = z: half of the weight.

    Args:
        log_ratios_U: r, nats.
        desirable_U: Whether each answer is a good one, bool.
        kl: z, of `kl_estimate`.
        beta: Positive.
        good: lambda_D; the paper keeps good n_good / (bad n_bad) within 1 and 4/3.
        bad: lambda_U.

    Raises:
        ValueError: desirable_U is not bool or has another shape.
    """
    _positive(beta)
    if desirable_U.dtype != torch.bool or desirable_U.shape != log_ratios_U.shape:
        raise ValueError(f"desirable is {desirable_U.dtype} of {tuple(desirable_U.shape)}: expected one bool an answer")
    over_U = log_ratios_U - (kl.detach() if isinstance(kl, Tensor) else kl)
    sign_U = torch.where(desirable_U, 1.0, -1.0).to(over_U.dtype)
    weight_U = torch.where(desirable_U, good, bad).to(over_U.dtype)
    return weight_U * torch.sigmoid(-beta * sign_U * over_U)  # 1 - sigma(x) = sigma(-x)


def pair_metrics(rewards_chosen_P: Tensor, rewards_rejected_P: Tensor) -> Metrics:
    """Sum over pairs of implicit rewards: each answer's, their difference, and how often the better one's is higher.

    rewards: beta times an answer's side of h: beta log pi/pi_ref for DPO (arXiv 2305.18290 eq. 5, less a number of the
    prompt's own), beta log pi (/ n) if there is no reference. Equal rewards count as half right.
    """
    require_vectors(rewards_chosen_P, rewards_rejected_P)
    better, worse = rewards_chosen_P.detach(), rewards_rejected_P.detach()
    right = (better > worse).to(better.dtype) + 0.5 * (better == worse).to(better.dtype)
    return {
        "reward_chosen": better.sum(),
        "reward_rejected": worse.sum(),
        "margin": (better - worse).sum(),
        "accuracy": right.sum(),
    }


def _positive(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be positive, and is {beta}")


def _share(smoothing: float) -> None:
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing is the share of wrong labels, from 0 to below 0.5, and is {smoothing}")
