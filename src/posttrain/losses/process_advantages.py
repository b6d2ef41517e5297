"""Process supervision: scores of a completion's steps become advantages of its tokens.

Shapes: K steps of the whole global batch that have a score, in any order, none where a step has none; scores_K;
group_K and completion_K the group (prompt) and the completion that each belongs to; last_K the place of its last
token among the N tokens. N tokens and sequence_N as in `reduce`. A step is credited to the tokens that led to it: its
own, and those before it in the same completion. A turn, whose reward is for its tokens alone, is a step that is
credited to its own tokens (`within_steps`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from posttrain.losses.advantages import group_relative, mixed_groups, reinforce, returns

Relative = Literal["group", "centred", "leave_one_out", "batch"]


def relative_steps(scores_K: Tensor, group_K: Tensor, completion_K: Tensor, kind: Relative) -> Tensor:
    """Compute how much better each step did than expected of a step of that prompt; shape K, dtype of the scores.

        group          (s - mean) / (deviation + 1e-4), over all steps of the group
        centred        s - mean over all steps of the group
        leave_one_out  s - mean over the steps of the group's other completions
        batch          s - mean over all steps of the batch

    Source: group, arXiv 2402.03300 section 4.1.3 (deviation with n - 1, as in `group_relative`); the others are the
    same with the baseline of Dr. GRPO, RLOO and REINFORCE. A long completion has more steps and a larger weight in the
    mean. Equal scores give exactly 0 (batch: to rounding, unless all of the batch are equal), and so does a completion
    whose group has no other with steps (leave_one_out), or a step alone. K = 0 gives an empty tensor.

    Args:
        scores_K: Scores of steps.
        group_K: Index of the prompt of each step.
        completion_K: Index of the completion of each step.
        kind: See above.
    """
    if scores_K.dim() != 1 or not len(scores_K) == len(group_K) == len(completion_K):
        raise ValueError(
            f"one score, group and completion a step: {scores_K.shape}, {group_K.shape}, {completion_K.shape}"
        )
    if kind == "batch":
        return reinforce(scores_K)
    if kind != "leave_one_out":
        return group_relative(scores_K, group_K, "group" if kind == "group" else "none")
    if not len(scores_K):
        return scores_K
    exact_K, one_K = scores_K.double(), torch.ones(len(scores_K), dtype=torch.float64, device=scores_K.device)

    def total(values_K: Tensor, index_K: Tensor) -> Tensor:
        size = int(index_K.max()) + 1
        return torch.zeros(size, dtype=torch.float64, device=index_K.device).index_add(0, index_K, values_K)[index_K]

    others_K = total(one_K, group_K) - total(one_K, completion_K)
    mean_K = (total(exact_K, group_K) - total(exact_K, completion_K)) / others_K.clamp(min=1)
    known_K = (others_K > 0) & mixed_groups(scores_K, group_K)[group_K]
    return torch.where(known_K, exact_K - mean_K, 0.0).to(scores_K.dtype)


def at_last_tokens(values_K: Tensor, last_K: Tensor, sequence_N: Tensor) -> Tensor:
    """Compute token rewards: each step's value at its last token, 0 elsewhere; shape N. Steps that end together add up.

    Args:
        values_K: Values of steps.
        last_K: Place of each step's last token among the N tokens.
        sequence_N: Index of the sequence of each token.
    """
    if len(last_K) and not 0 <= int(last_K.min()) <= int(last_K.max()) < len(sequence_N):
        raise ValueError(f"last tokens must be from 0 to {len(sequence_N) - 1}, and are up to {int(last_K.max())}")
    return values_K.new_zeros(len(sequence_N)).index_add(0, last_K, values_K)


def from_steps_on(values_K: Tensor, last_K: Tensor, sequence_N: Tensor) -> Tensor:
    """Compute A_t = sum of the values of the steps of t's completion that end at t or later; shape N.

    Source: arXiv 2402.03300 section 4.1.3. Tokens after the last step with a score, and completions without one: 0.

    Args:
        values_K: Values of steps.
        last_K: Place of each step's last token among the N tokens.
        sequence_N: Index of the sequence of each token.
    """
    return returns(at_last_tokens(values_K, last_K, sequence_N), sequence_N)


def within_steps(values_K: Tensor, first_K: Tensor, last_K: Tensor, tokens: int) -> Tensor:
    """Compute A_t = sum of the values of the steps that t lies in; shape N. Tokens outside of all steps: 0.

    The credit of turns that are rewarded one by one: nothing flows back to an earlier turn.

    Args:
        values_K: Values of steps.
        first_K: Place of each step's first token among the N tokens.
        last_K: Place of its last token.
        tokens: N.
    """
    if len(last_K) and not 0 <= int(first_K.min()) <= int(last_K.max()) < tokens:
        raise ValueError(
            f"steps must lie within 0 to {tokens - 1}, and are in {int(first_K.min())} to {int(last_K.max())}"
        )
    lengths_K = last_K - first_K + 1
    ends_K = lengths_K.cumsum(0)
    # The tokens of all steps, one step after the other: places counted from each step's first token.
    offset = torch.arange(int(lengths_K.sum()), device=last_K.device) - (ends_K - lengths_K).repeat_interleave(
        lengths_K
    )
    places = first_K.repeat_interleave(lengths_K) + offset
    return values_K.new_zeros(tokens).index_add(0, places, values_K.repeat_interleave(lengths_K))


def turn_segments(sequence_N: Tensor, first_K: Tensor, last_K: Tensor) -> Tensor:
    """Cut sequences at the beginnings and ends of turns: number of the segment of each token, ascending; shape N.

    Rewards to go that are taken within segments stay within turns. Tokens between two turns are a segment too.

    Args:
        sequence_N: Index of the sequence of each token.
        first_K: Place of each turn's first token among the N tokens.
        last_K: Place of its last token.
    """
    begins_N = torch.ones_like(sequence_N, dtype=torch.bool)
    begins_N[1:] = sequence_N[1:] != sequence_N[:-1]
    begins_N[first_K] = True
    begins_N[(last_K + 1)[last_K + 1 < len(sequence_N)]] = True
    return begins_N.long().cumsum(0) - 1
