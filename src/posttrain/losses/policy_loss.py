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

from posttrain.losses.aggregation import sequence_mean, sequence_sum
from posttrain.losses.kl import MAX_LOG, kl

Metrics = dict[str, Tensor]


def token_ratio(logprobs_N: Tensor, old_logprobs_N: Tensor) -> Tensor:
    """pi(y_t) / pi_old(y_t), of shape N, differentiable in logprobs_N.

    old_logprobs_N: under the policy at the start of the update, finite. On the first step, where both are the same,
    it is 1 and its gradient that of the log-probability. Past e^20 or below e^-20 it is held there, with no gradient.
    """
    return (logprobs_N - old_logprobs_N.detach()).clamp(-MAX_LOG, MAX_LOG).exp()


def sequence_ratio(
    logprobs_N: Tensor, old_logprobs_N: Tensor, sequence_N: Tensor, lengths_R: Tensor, mean: bool = True
) -> Tensor:
    """The sequence's ratio, at each of its tokens, of shape N; every token of a sequence must be there.

    mean: (pi(y) / pi_old(y))^(1 / |y|), GSPO, arXiv 2507.18071 eq. 7; else pi(y) / pi_old(y), RLOO's.
    With aggregation `sequence` the loss is the mean over sequences of that of the sequence. Held within e^-20 and e^20.
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
    """GSPO-token: sg[s_i] pi(y_t) / sg[pi(y_t)], of shape N; its value is the sequence's, its gradient the token's own.

    Source: arXiv 2507.18071 eq. 14. For advantages that differ within a sequence; where they don't, loss and gradient
    under aggregation `sequence` are those of `sequence_ratio`. mean false: the ratio of the whole sequence, RLOO's; its
    gradient under aggregation `constant` (1) is then that of `sequence_ratio` under `sequence`.
    """
    ratio_N = sequence_ratio(logprobs_N.detach(), old_logprobs_N, sequence_N, lengths_R, mean)
    return ratio_N * (logprobs_N - logprobs_N.detach()).exp()


def reinforce(logprobs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """-A_t log pi(y_t), of shape N. Source: Williams 1992; RLOO, arXiv 2402.14740; ReMax, arXiv 2310.10505.

    Right on the policy's own fresh samples only: nothing corrects for a policy that has moved since.
    """
    return -advantages_N.detach() * logprobs_N


def clipped(
    ratio_N: Tensor, advantages_N: Tensor, low: float = 0.2, high: float = 0.2, dual: float | None = None
) -> tuple[Tensor, Metrics]:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), of shape N.

    Source: PPO, arXiv 1707.06347 eq. 7; high > low is DAPO's clip higher, arXiv 2503.14476 eq. 10 (0.2, 0.28); GSPO
    takes 3e-4 and 4e-4 on its sequence ratio. dual: where A < 0, at most -dual A (arXiv 1912.09729; 3, say),
    so that one token whose ratio has run away can't own the step.
    Metrics: clip_low, clip_high: tokens whose gradient is cut at that side; clip_fraction: at either; clip_dual; and
    ratio_metrics. With A = 0 nothing is clipped and the gradient is 0.
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
    """-sg[clip(rho, low, high)] A log pi(y_t), of shape N: the weight is clipped, no token loses its gradient.

    Source: CISPO, arXiv 2506.13585 eq. 4 and 5. high, low: bounds on the weight itself, 1 + eps_high and 1 - eps_low
    in the paper, which leaves the lower one off. Metrics: clip_high, clip_low, clip_fraction: tokens whose weight was
    held at a bound, whatever the sign of A; and ratio_metrics.
    """
    weight_N = ratio_N.detach().clamp(low, high)
    over, under = (ratio_N > high).sum(), (ratio_N < low).sum()
    metrics = {"clip_low": under, "clip_high": over, "clip_fraction": over + under}
    return -weight_N * advantages_N.detach() * logprobs_N, metrics | ratio_metrics(ratio_N)


def ratio_metrics(ratio_N: Tensor) -> Metrics:
    """Sums of the ratio (its mean stays near 1), its square, and KL(pi_old || pi) as k3: rho - 1 - log rho."""
    ratio_N = ratio_N.detach()
    return {
        "ratio": ratio_N.sum(),
        "ratio_squared": ratio_N.square().sum(),
        "approx_kl": (ratio_N - 1 - ratio_N.log()).sum(),
    }


def entropy_bonus(entropies_N: Tensor, coefficient: float) -> Tensor:
    """-coefficient * H(pi(. | before)), of shape N, to add to a loss. Source: Williams and Peng 1991; A3C, 1602.01783.

    The exact entropy of each next-token distribution (`logprobs.linear_logprobs`), at the visited prefixes alone: that
    other tokens would lead to prefixes of other entropy is not seen. Weighted as the loss that it is added to.
    """
    return -coefficient * entropies_N


def value_loss(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, clip: float | None = 0.2
) -> tuple[Tensor, Metrics]:
    """1/2 max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2), of shape N; clip None: 1/2 (V - R)^2.

    Source: PPO's implementation (arXiv 2005.12729 section 3); InstructGPT. clip is in units of the reward.
    Metrics: value_clip: tokens whose gradient is cut; value_error_squared, return, return_squared, of which the
    explained variance is 1 - value_error_squared / (return_squared - return^2 / N).
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
) -> tuple[Tensor, Metrics]:
    """Weights min(pi_learner / pi_sampler, cap) that correct for a sampler whose numbers differ; shape N, constants.

    learner_logprobs_N: the learner's, at the weights that sampled. Multiply the policy loss by the weights. One a
    token, or, where sequence_N and lengths_R are given, that of the whole sequence (product over its tokens) at each.
    Source: Ionides 2008 (truncated importance sampling); IMPALA's rho and c, arXiv 1802.01561.
    Metrics: importance (the weights), importance_truncated (tokens held at the cap), mismatch (|log difference|,
    nats) and mismatch_kl (KL(sampler || learner), k3). Where both agree, weights are 1 and the others 0.
    """
    learner_N, sampler_N = learner_logprobs_N.detach(), sampler_logprobs_N.detach()
    log_ratio_N = learner_N - sampler_N
    if sequence_N is None or lengths_R is None:
        raw_N = token_ratio(learner_N, sampler_N)
    else:
        raw_N = sequence_ratio(learner_N, sampler_N, sequence_N, lengths_R, mean=False)
    weights_N = raw_N.clamp(max=cap)
    return weights_N, {
        "importance": weights_N.sum(),
        "importance_truncated": (raw_N > cap).sum(),
        "mismatch": log_ratio_N.abs().sum(),
        "mismatch_kl": kl(sampler_N, learner_N, "k3").sum(),
    }
