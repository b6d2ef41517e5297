"""Advantages: how much better a completion, or a token, did than was to be expected.

Shapes: R sequences (completions) of the whole global batch, rewards_R; group_R the index of the group (prompt) each
belongs to, any order, groups of any size; P groups, counted to the largest index. N tokens and sequence_N as in
`reduce`. Every function takes the whole batch, before it is split, and returns the (floating) dtype of the rewards;
sums are made in float64. Equal rewards in a group give exactly 0, so that "no signal" is a comparison with zero.
To hand a sequence's advantage to its tokens, index: advantages_R[sequence_N].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]


def _group_sum(values_R: Tensor, group_R: Tensor) -> Tensor:
    """Sum the values of each group: float64, of shape P."""
    groups = int(group_R.max()) + 1 if len(group_R) else 0
    return torch.zeros(groups, dtype=torch.float64, device=values_R.device).index_add(0, group_R, values_R.double())


def _counts(group_R: Tensor) -> Tensor:
    """Count the sequences of each group: float64, of shape P; at least 1, for division."""
    return _group_sum(torch.ones_like(group_R, dtype=torch.float64), group_R).clamp(min=1)


def _centred(rewards_R: Tensor, group_R: Tensor) -> Tensor:
    """Compute r - mean of its group, float64; exactly 0 where the group's rewards are equal, whatever rounding does."""
    mean_P = _group_sum(rewards_R, group_R) / _counts(group_R)
    return torch.where(mixed_groups(rewards_R, group_R)[group_R], rewards_R.double() - mean_P[group_R], 0.0)


def mixed_groups(rewards_R: Tensor, group_R: Tensor) -> Tensor:
    """Find the groups whose rewards differ: bool of shape P.

    Dynamic sampling keeps these and draws again for the others.

    Source: DAPO, arXiv 2503.14476 eq. 11, 0 < number of correct ones < G, for rewards of any value. A group of one, or
    an index that no sequence has, is not mixed.
    """
    groups = int(group_R.max()) + 1 if len(group_R) else 0
    low = rewards_R.new_full((groups,), torch.inf).scatter_reduce(0, group_R, rewards_R, "amin")
    high = rewards_R.new_full((groups,), -torch.inf).scatter_reduce(0, group_R, rewards_R, "amax")
    return low < high


def reinforce(rewards_R: Tensor, baseline: Tensor | float | None = None) -> Tensor:
    """Compute REINFORCE's advantages with a baseline: A = r - b, of shape R.

    Source: Williams 1992. baseline: None for the batch's mean (slightly biased: each reward is in its own baseline,
    which shrinks the gradient by (R-1)/R; `leave_one_out` with every group index 0 is the unbiased one), a number,
    such as a `moving_average` of rewards *before* this batch, or a tensor of shape R. A batch of one reward with its
    own mean gives 0.
    """
    if baseline is None:
        return _centred(rewards_R, torch.zeros(len(rewards_R), dtype=torch.long, device=rewards_R.device)).to(
            rewards_R.dtype
        )
    return rewards_R - baseline


def moving_average(previous: float | None, rewards_R: Tensor, decay: float = 0.9) -> float:
    """Compute the baseline for the *next* batch: b' = decay b + (1 - decay) mean(r).

    Args:
        previous: The baseline b so far. None: the result is the mean.
        rewards_R: Rewards of this batch. If it is empty, b stays (0 if missing).
        decay: Weight of the baseline so far.
    """
    if not len(rewards_R):
        return previous or 0.0
    mean = float(rewards_R.double().mean())
    return mean if previous is None else decay * previous + (1 - decay) * mean


def leave_one_out(rewards_R: Tensor, group_R: Tensor) -> Tensor:
    """Compute RLOO's advantages: A_i = r_i - mean of the other rewards of its group, of shape R.

        A_i = n / (n - 1) (r_i - mean of the group)

    Source: arXiv 2402.14740 (Kool et al. 2019). Unbiased: no reward is in its own baseline. A group of one has no
    others: 0.
    """
    counts_P = _counts(group_R)
    factor_P = counts_P / (counts_P - 1).clamp(min=1)
    return (_centred(rewards_R, group_R) * factor_P[group_R]).to(rewards_R.dtype)


def remax(rewards_R: Tensor, greedy_rewards_P: Tensor, group_R: Tensor) -> Tensor:
    """Compute ReMax's advantages: A = r - reward of the greedy completion of the same prompt, of shape R.

    Source: arXiv 2310.10505. A group of one is as good as any here: the baseline isn't made from it.

    Args:
        rewards_R: Rewards of the sampled completions.
        greedy_rewards_P: Reward of the greedy completion of each prompt.
        group_R: Index of the prompt of each completion.
    """
    return rewards_R - greedy_rewards_P[group_R]


def group_relative(rewards_R: Tensor, group_R: Tensor, scale: Scale = "group", epsilon: float = 1e-4) -> Tensor:
    """Compute GRPO's advantages: A = (r - mean of the group) / (s + epsilon), of shape R; s by `scale`.

    A group of one, or of equal rewards, gives 0.

    Args:
        rewards_R: Rewards.
        group_R: Index of the group of each reward.
        scale: group: the standard deviation within the group (GRPO, arXiv 2402.03300 section 4.1.2). batch: that of all
            rewards of the batch. none: no division (Dr. GRPO, arXiv 2503.20783: dividing gives very easy and very hard
            prompts more weight). Standard deviations with n - 1.
        epsilon: Added to the standard deviation.

    Raises:
        ValueError: The scale is unknown.
    """
    centred_R = _centred(rewards_R, group_R)
    if scale == "group":
        variance_P = _group_sum(centred_R.square(), group_R) / (_counts(group_R) - 1).clamp(min=1)
        centred_R = centred_R / (variance_P.sqrt()[group_R] + epsilon)
    elif scale == "batch":
        centred_R = centred_R / (_deviation(rewards_R) + epsilon)
    elif scale != "none":
        raise ValueError(f"scale must be group, batch or none, and is {scale!r}")
    return centred_R.to(rewards_R.dtype)


def _deviation(values: Tensor) -> Tensor:
    """Compute the standard deviation with n - 1, float64; 0 for less than two values."""
    return values.double().std() if len(values) > 1 else torch.zeros((), dtype=torch.float64, device=values.device)


def whiten(values_N: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Compute (v - mean) / (s + epsilon) over the whole batch, s with n - 1.

    Values that are all equal, or one alone, give 0. Source: PPO's advantage normalisation (arXiv 2006.05990 section 3);
    the global normalisation of REINFORCE++.
    """
    if not len(values_N) or bool(values_N.min() == values_N.max()):
        return torch.zeros_like(values_N)
    exact = values_N.double()
    return ((exact - exact.mean()) / (_deviation(exact) + epsilon)).to(values_N.dtype)


def returns(rewards_N: Tensor, sequence_N: Tensor, gamma: float = 1.0) -> Tensor:
    """Compute the discounted rewards to go within each sequence: G_t = sum_{k >= 0} gamma^k r_{t+k}, of shape N.

    By doubling: after k rounds each token holds the sum over the 2^k tokens from itself on, so that a batch costs
    log2(longest) passes and no loop over tokens.

    Args:
        rewards_N: Rewards of tokens; those of a sequence lie next to one another, in order.
        sequence_N: Index of the sequence of each token.
        gamma: Discount.
    """
    total_N = rewards_N
    longest = int(sequence_N.bincount().max()) if len(sequence_N) else 0
    step, factor = 1, gamma
    while step < longest:
        same = sequence_N[step:] == sequence_N[:-step]
        ahead = torch.where(same, factor * total_N[step:], 0.0)
        total_N = torch.cat([total_N[:-step] + ahead, total_N[-step:]])
        step, factor = 2 * step, factor * factor
    return total_N


def gae(
    rewards_N: Tensor, values_N: Tensor, sequence_N: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimates over ragged sequences.

        delta_t = r_t + gamma V_{t+1} - V_t      A_t = sum_{k >= 0} (gamma lam)^k delta_{t+k}

    Source: arXiv 1506.02438 eq. 16; for language models arXiv 2203.02155. V after a sequence's last token is 0, however
    it ended. N = 0 gives empty tensors.

    Args:
        rewards_N: Rewards of tokens.
        values_N: V before each token is sampled; taken as constant.
        sequence_N: Index of the sequence of each token.
        gamma: Discount.
        lam: 1: return minus value; 0: delta alone.

    Returns:
        (advantages_N, returns_N = advantages + values).
    """
    values_N = values_N.detach()
    next_N = torch.zeros_like(values_N)
    next_N[:-1] = torch.where(sequence_N[1:] == sequence_N[:-1], values_N[1:], 0.0)
    advantages_N = returns(rewards_N + gamma * next_N - values_N, sequence_N, gamma * lam)
    return advantages_N, advantages_N + values_N


def reinforce_plus_plus(rewards_N: Tensor, sequence_N: Tensor, gamma: float = 1.0) -> Tensor:
    """Compute REINFORCE++'s advantages: rewards to go, whitened over all tokens of the global batch; shape N.

    Source: arXiv 2501.03262. A batch whose returns are all equal gives 0.

    Args:
        rewards_N: `kl.token_rewards` with k1, the penalty a token at a time.
        sequence_N: Index of the sequence of each token.
        gamma: Discount.
    """
    return whiten(returns(rewards_N, sequence_N, gamma))
