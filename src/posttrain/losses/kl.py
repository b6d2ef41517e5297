"""Divergence from a reference policy, estimated from the sampled tokens alone, for the loss or for the reward.

With d = log pi(y_t) - log pi_ref(y_t) and y drawn from pi, all three estimate KL(pi || pi_ref) of the next token's
distribution (Schulman 2020, "Approximating KL divergence"):

    estimator   value            in the loss, its expected gradient is          in the reward (a constant there)
    k1          d                0: a constant baseline, teaches nothing        that of KL(pi || pi_ref): right
    k2          d^2 / 2          that of KL(pi || pi_ref): right                biased
    k3          e^-d - 1 + d     that of KL(pi_ref || pi): the other direction  biased

The gradients per token are d log pi times 1, d and 1 - e^-d. As values k1 and k3 are unbiased (k3 is never negative
and varies less); k2 is biased, little while the policies are close. "Right" is meant per token, with the tokens
before it taken as given: in the loss no estimator sees that a token now leads to divergence later, k1 in the reward
(with rewards summed to the end) does. Where y was drawn from an older policy, `ratio * kl(...)` with a differentiable
ratio pi/pi_old has the right value and, for k1 and k3, the right gradient (arXiv 2512.02556, section 3.1).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from posttrain.losses.aggregation import sequence_sum

Estimator = Literal["k1", "k2", "k3"]

MAX_LOG = 20.0
"""Largest logarithm that is exponentiated: e^20 = 5e8 is far past any use, and e^89 is infinite in float32."""


def kl(logprobs_N: Tensor, reference_logprobs_N: Tensor, estimator: Estimator = "k3") -> Tensor:
    """Estimate KL(pi || pi_ref) at each sampled token, in nats, of shape N; formulas are in the module's docstring.

    For use in the reward, detach the result. If the reference exceeds the policy by more than 20 nats, k3 counts e^20
    with no gradient through that term; N = 0 gives an empty tensor.

    Args:
        logprobs_N: Log-probabilities under the policy, finite; gradients flow here.
        reference_logprobs_N: Those under the reference, finite, taken as constant.
        estimator: k1, k2 or k3.

    Raises:
        ValueError: The estimator is unknown.
    """
    d = logprobs_N - reference_logprobs_N.detach()
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.exp((-d).clamp(max=MAX_LOG)) - 1 + d
    raise ValueError(f"KL estimator must be k1, k2 or k3, and is {estimator!r}")


def sequence_kl(logprobs_N: Tensor, reference_logprobs_N: Tensor, sequence_N: Tensor, sequences: int) -> Tensor:
    """Estimate KL(pi || pi_ref) of whole completions, in nats, from each sampled one: KL_i = sum_t k3_t, of shape R.

    The divergence of a sequence is the sum of its tokens' divergences, each given the tokens before it (the chain
    rule), so that the mean over completions drawn from pi is unbiased; it is never negative, as a sum of k1 may be.

    Args:
        logprobs_N: As `kl` takes them.
        reference_logprobs_N: Likewise.
        sequence_N: Index of the completion of each token.
        sequences: R. A completion without tokens gives 0.
    """
    return sequence_sum(kl(logprobs_N, reference_logprobs_N, "k3"), sequence_N, sequences)


def token_rewards(rewards_R: Tensor, kl_N: Tensor, beta: float, sequence_N: Tensor) -> Tensor:
    """Put the KL into the reward, a token at a time: r_t = -beta kl_t, plus the sequence's reward at its last token.

    Shape N.

    Source: InstructGPT, arXiv 2203.02155 section 3.5; REINFORCE++, arXiv 2501.03262. The reward of an empty sequence
    has no token and is lost.

    Args:
        rewards_R: Rewards of sequences.
        kl_N: KL of tokens, detached here; k1 is the estimator that gives the right gradient.
        beta: Coefficient of the penalty.
        sequence_N: Index of the sequence of each token.
    """
    rewards_N = -beta * kl_N.detach()
    last = torch.ones_like(sequence_N, dtype=torch.bool)
    last[:-1] = sequence_N[1:] != sequence_N[:-1]
    return rewards_N + torch.where(last, rewards_R[sequence_N].to(rewards_N.dtype), 0.0)


def penalised_rewards(rewards_R: Tensor, kl_N: Tensor, beta: float, sequence_N: Tensor) -> Tensor:
    """Put the KL into the reward, a sequence at a time: r - beta sum_t kl_t, of shape R.

    Source: RLOO, arXiv 2402.14740. An empty sequence keeps its reward.

    Args:
        rewards_R: Rewards of sequences.
        kl_N: KL of tokens, detached here; k1 gives the right gradient.
        beta: Coefficient of the penalty.
        sequence_N: Index of the sequence of each token.
    """
    return rewards_R - beta * sequence_sum(kl_N.detach(), sequence_N, len(rewards_R)).to(rewards_R.dtype)
