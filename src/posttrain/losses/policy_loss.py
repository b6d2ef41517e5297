"""Policy losses: a ratio, what is done to it, and what it multiplies. A method is a choice of each.

    method            ratio                       loss        aggregation (`reduce`)   advantages
    REINFORCE, ReMax  none                        reinforce   constant 1               reinforce, remax
    RLOO              none, or sequence_ratio     either      constant 1, or sequence  leave_one_out
    REINFORCE++       token_ratio                 clipped     token                    reinforce_plus_plus
    PPO               token_ratio                 clipped     token                    gae, whiten; and value_loss
    GRPO              token_ratio                 clipped     sequence                 group_relative
    Dr. GRPO          token_ratio                 clipped     constant                 group_relative, scale none
    DAPO              token_ratio                 clipped     token                    group_relative
    GSPO              sequence_ratio, or _token_  clipped     sequence                 group_relative
    CISPO             token_ratio                 cispo       token                    group_relative

Losses are per token (shape N), to be minimised, not yet weighted. Metrics are sums over the N tokens: add them up over
micro-batches and ranks and divide by the number of tokens of the batch. N = 0 gives empty losses and sums of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.losses.aggregation import Metrics, sequence_mean, sequence_sum
from posttrain.losses.kl import MAX_LOG, kl


def token_ratio(logprobs_N: Tensor, old_logprobs_N: Tensor) -> Tensor:
    """Compute pi(y_t) / pi_old(y_t), of shape N, differentiable in logprobs_N.

    old_logprobs_N: under the policy at the start of the update, finite. On the first step, where both are the same,
    it is 1 and its gradient that of the log-probability. Past e^20 or below e^-20 it is held there, with no gradient.
    """
    return (logprobs_N - old_logprobs_N.detach()).clamp(-MAX_LOG, MAX_LOG).exp()


def sequence_ratio(
    logprobs_N: Tensor, old_logprobs_N: Tensor, sequence_N: Tensor, lengths_R: Tensor, mean: bool = True
) -> Tensor:
    """Compute the sequence's ratio, at each of its tokens, of shape N; every token of a sequence must be there.

    With aggregation `sequence` the loss is the mean over sequences of that of the sequence. Held within e^-20 and e^20.

    Args:
        logprobs_N: Under the policy.
        old_logprobs_N: Under the policy at the start of the update.
        sequence_N: Index of the sequence of each token.
        lengths_R: Tokens of each sequence.
        mean: True: (pi(y) / pi_old(y))^(1 / |y|), GSPO, arXiv 2507.18071 eq. 7. False: pi(y) / pi_old(y), RLOO's.
    """
    log_ratio_N = logprobs_N - old_logprobs_N.detach()
    if mean:
        log_ratio_R = sequence_mean(log_ratio_N, sequence_N, lengths_R)
    else:
        log_ratio_R = sequence_sum(log_ratio_N, sequence_N, len(lengths_R))
    return log_ratio_R.clamp(-MAX_LOG, MAX_LOG).exp()[sequence_N]


def sequence_token_ratio(
    logprobs_N: Tensor, old_logprobs_N: Tensor, sequence_N: Tensor, lengths_R: Tensor, mean: bool = True
) -> Tensor:
    """Compute GSPO-token's ratio: sg[s_i] pi(y_t) / sg[pi(y_t)], of shape N.

    The sequence's value, the token's gradient.

    Source: arXiv 2507.18071 eq. 14. For advantages that differ within a sequence; where they don't, loss and gradient
    under aggregation `sequence` are those of `sequence_ratio`. With `mean` false, its gradient under aggregation
    `constant` (1) is that of `sequence_ratio` under `sequence`.

    Args:
        logprobs_N: As `sequence_ratio` takes them, and so the others.
        old_logprobs_N: Likewise.
        sequence_N: Likewise.
        lengths_R: Likewise.
        mean: Likewise.
    """
    ratio_N = sequence_ratio(logprobs_N.detach(), old_logprobs_N, sequence_N, lengths_R, mean)
    return ratio_N * (logprobs_N - logprobs_N.detach()).exp()


def reinforce_loss(logprobs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """Compute -A_t log pi(y_t), of shape N.

    Source: Williams 1992; RLOO, arXiv 2402.14740; ReMax, arXiv 2310.10505. Right on the policy's own fresh samples
    only: nothing corrects for a policy that has moved since.
    """
    return -advantages_N.detach() * logprobs_N


def clipped(
    ratio_N: Tensor, advantages_N: Tensor, low: float = 0.2, high: float = 0.2, dual: float | None = None
) -> tuple[Tensor, Metrics]:
    """Compute -min(rho A, clip(rho, 1 - low, 1 + high) A), of shape N.

    Source: PPO, arXiv 1707.06347 eq. 7; high > low is DAPO's clip higher, arXiv 2503.14476 eq. 10 (0.2, 0.28); GSPO
    takes 3e-4 and 4e-4 on its sequence ratio. With A = 0 nothing is clipped and the gradient is 0.

    Args:
        ratio_N: rho.
        advantages_N: A.
        low: Clip below 1.
        high: Clip above 1.
        dual: If given, the loss where A < 0 is at most -dual A (arXiv 1912.09729; 3, for example), so that one token
            with an extreme ratio can't dominate the step.

    Returns:
        (losses_N, metrics): clip_low and clip_high, tokens whose gradient is cut at that side; clip_fraction, at
            either;
        clip_dual; and `ratio_metrics`.
    """
    advantages_N = advantages_N.detach()
    objective = torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - low, 1 + high) * advantages_N)
    clip_low = (ratio_N < 1 - low) & (advantages_N < 0)
    clip_high = (ratio_N > 1 + high) & (advantages_N > 0)
    metrics = {"clip_low": clip_low.sum(), "clip_high": clip_high.sum(), "clip_fraction": (clip_low | clip_high).sum()}
    if dual is not None:
        objective = torch.where(advantages_N < 0, torch.maximum(objective, dual * advantages_N), objective)
        metrics["clip_dual"] = ((ratio_N > dual) & (advantages_N < 0)).sum()
    return -objective, metrics | ratio_metrics(ratio_N)


def cispo(
    ratio_N: Tensor, logprobs_N: Tensor, advantages_N: Tensor, high: float = 5.0, low: float = 0.0
) -> tuple[Tensor, Metrics]:
    """Compute -sg[clip(rho, low, high)] A log pi(y_t), of shape N: the weight is clipped, no token loses its gradient.

    Source: CISPO, arXiv 2506.13585 eq. 4 and 5.

    Args:
        ratio_N: rho.
        logprobs_N: log pi(y_t).
        advantages_N: A.
        high: Upper bound of the weight itself: 1 + eps_high in the paper.
        low: Lower bound of the weight itself: 1 - eps_low in the paper, which has none.

    Returns:
        (losses_N, metrics): clip_high, clip_low and clip_fraction, tokens whose weight was held at a bound, whatever
            the
        sign of A; and `ratio_metrics`.
    """
    weight_N = ratio_N.detach().clamp(low, high)
    over, under = (ratio_N > high).sum(), (ratio_N < low).sum()
    metrics = {"clip_low": under, "clip_high": over, "clip_fraction": over + under}
    return -weight_N * advantages_N.detach() * logprobs_N, metrics | ratio_metrics(ratio_N)


def ratio_metrics(ratio_N: Tensor) -> Metrics:
    """Sum the ratio (its mean stays near 1), its square, and KL(pi_old || pi) as k3: rho - 1 - log rho."""
    ratio_N = ratio_N.detach()
    return {
        "ratio": ratio_N.sum(),
        "ratio_squared": ratio_N.square().sum(),
        "approx_kl": (ratio_N - 1 - ratio_N.log()).sum(),
    }


def entropy_bonus(entropies_N: Tensor, coefficient: float) -> Tensor:
    """Compute -coefficient * H(pi(. | before)), of shape N, to add to a loss.

    Source: Williams and Peng 1991; A3C, 1602.01783. The exact entropy of each next-token distribution
    (`linear_logprobs`), at the visited prefixes alone: that other tokens would lead to prefixes of other entropy has no
    part in it. Weighted as the loss that it is added to.
    """
    return -coefficient * entropies_N


def value_loss(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, clip: float | None = 0.2
) -> tuple[Tensor, Metrics]:
    """Compute 1/2 max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2), of shape N.

    Source: PPO's implementation (arXiv 2005.12729 section 3); InstructGPT.

    Args:
        values_N: V.
        old_values_N: V at the start of the update.
        returns_N: R.
        clip: In units of the reward. None: 1/2 (V - R)^2.

    Returns:
        (losses_N, metrics): value_clip, tokens whose gradient is cut; value_error_squared, return, return_squared, of
            which
        the explained variance is 1 - value_error_squared / (return_squared - return^2 / N).
    """
    returns_N, old_values_N = returns_N.detach(), old_values_N.detach()
    error_N = (values_N - returns_N).square()
    metrics = {
        "value_error_squared": error_N.detach().sum(),
        "return": returns_N.sum(),
        "return_squared": returns_N.square().sum(),
    }
    if clip is None:
        return 0.5 * error_N, metrics
    held_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
    held_error_N = (held_N - returns_N).square()
    metrics["value_clip"] = ((held_error_N > error_N) & (held_N != values_N)).sum()
    return 0.5 * torch.maximum(error_N, held_error_N), metrics


def truncated_importance(
    learner_logprobs_N: Tensor,
    sampler_logprobs_N: Tensor,
    cap: float = 2.0,
    sequence_N: Tensor | None = None,
    lengths_R: Tensor | None = None,
    *,
    mask: bool = False,
) -> tuple[Tensor, Metrics]:
    """Compute weights min(pi_learner / pi_sampler, cap), which correct for a sampler with other numbers.

    Shape N, constants. With `mask` a weight above the cap is 0 instead: the token, or the sequence, has no gradient.

    Multiply the policy loss by the weights. Source: Ionides 2008 (truncated importance sampling); IMPALA's rho and c,
    arXiv 1802.01561; masked: IcePop, arXiv 2510.18855 (which has a lower bound too). Where both agree, weights
    are 1 and the other metrics 0.

    Args:
        learner_logprobs_N: The learner's, at the weights that sampled.
        sampler_logprobs_N: The sampler's.
        cap: Largest weight.
        sequence_N: If this and lengths_R are given, each token gets the weight of its whole sequence (product over
            tokens).
        lengths_R: Tokens of each sequence.
        mask: Leave out what exceeds the cap, rather than hold it there.

    Returns:
        (weights_N, metrics): importance (the weights), importance_truncated (tokens above the cap), mismatch (|log
        difference|, nats) and mismatch_kl (KL(sampler || learner), k3).
    """
    learner_N, sampler_N = learner_logprobs_N.detach(), sampler_logprobs_N.detach()
    log_ratio_N = learner_N - sampler_N
    if sequence_N is None or lengths_R is None:
        raw_N = token_ratio(learner_N, sampler_N)
    else:
        raw_N = sequence_ratio(learner_N, sampler_N, sequence_N, lengths_R, mean=False)
    weights_N = raw_N.masked_fill(raw_N > cap, 0.0) if mask else raw_N.clamp(max=cap)
    return weights_N, {
        "importance": weights_N.sum(),
        "importance_truncated": (raw_N > cap).sum(),
        "mismatch": log_ratio_N.abs().sum(),
        "mismatch_kl": kl(sampler_N, learner_N, "k3").sum(),
    }
