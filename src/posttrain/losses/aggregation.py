"""From per-token values to a loss: what each token counts, and by what the sum is divided.

Every policy-gradient objective is sum_t w_t l_t / D. The weights w depend on a token's own sequence alone and D is a
number of the whole global batch, so that a split into micro-batches or ranks (of whole sequences) changes nothing:

    kind        w_t                       D                       objective
    token       1                         tokens of the batch     token mean: DAPO, CISPO, PPO
    sequence    1 / length of sequence    sequences of the batch  mean of sequence means: GRPO, GSPO
    constant    1 / constant              sequences of the batch  Dr. GRPO; with 1: sums over tokens (RLOO)

Shapes: N tokens that carry loss, end to end, those of one sequence next to one another and in order; R sequences;
sequence_N the index of the sequence each token belongs to; lengths_R how many of the N tokens each sequence has.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
"""Sums over tokens, pairs or steps, by name."""
Aggregation = Literal["token", "sequence", "constant"]


def token_weights(kind: Aggregation, sequence_N: Tensor, lengths_R: Tensor, constant: float | None = None) -> Tensor:
    """Compute what each token counts in the sum, float32 of shape N: the column w_t above.

    Sources: token: DAPO, arXiv 2503.14476 section 3.3; sequence: GRPO, arXiv 2402.03300 eq. 3; constant: Dr. GRPO,
    arXiv 2503.20783 section 3.2. To leave sequences out of the loss (truncated ones, for example), multiply by
    keep_R[sequence_N]; whether D counts them is the caller's choice. An empty sequence has no token and so no weight.

    Args:
        kind: Kind of aggregation.
        sequence_N: Index of the sequence of each token, int64.
        lengths_R: Tokens of each whole sequence, int64.
        constant: For kind constant: the longest length that a completion may have.

    Raises:
        ValueError: The kind is unknown, or the constant is missing or not positive.
    """
    weights = torch.ones(len(sequence_N), dtype=torch.float32, device=sequence_N.device)
    if kind == "token":
        return weights
    if kind == "sequence":
        return weights / lengths_R[sequence_N]
    if kind == "constant":
        if constant is None or not constant > 0:
            raise ValueError(f"kind 'constant' needs a positive constant (the longest completion) and got {constant}")
        return weights / constant
    raise ValueError(f"kind of aggregation must be token, sequence or constant, and is {kind!r}")


def denominator(kind: Aggregation, lengths_R: Tensor) -> float:
    """Compute D of the global batch: its tokens for kind token, else its sequences, empty ones included. At least 1.

    lengths_R: of *every* sequence of the global batch, also of those without signal that are never computed: they
    are zeros of the mean, and leaving them out would make the step larger the fewer groups have a gradient.
    """
    return max(1.0, float(lengths_R.sum()) if kind == "token" else float(len(lengths_R)))


def reduce(values_N: Tensor, weights_N: Tensor, denominator: float) -> Tensor:
    """Compute sum_t w_t l_t / D, a scalar: this micro-batch's share of the loss.

    Args:
        values_N: Losses l_t of tokens; N = 0 gives 0, and gradients of 0.
        weights_N: Weights w_t (`token_weights`).
        denominator: D of the global batch.
    """
    return (values_N * weights_N).sum() / denominator


def sequence_index(lengths_R: Tensor, tokens: int | None = None) -> Tensor:
    """Return sequence_N of sequences that lie end to end in order: lengths 2, 0, 1 give 0, 0, 2.

    tokens: sum of the lengths, if known; a GPU has to be waited for otherwise.
    """
    places = torch.arange(len(lengths_R), device=lengths_R.device)
    return torch.repeat_interleave(places, lengths_R, output_size=tokens)


def sequence_sum(values_N: Tensor, sequence_N: Tensor, sequences: int) -> Tensor:
    """Sum over each sequence's tokens, of shape R; an empty sequence gives 0. Differentiable.

    Args:
        values_N: Values of tokens.
        sequence_N: Index of the sequence of each token.
        sequences: R.
    """
    return values_N.new_zeros(sequences).index_add(0, sequence_N, values_N)


def sequence_mean(values_N: Tensor, sequence_N: Tensor, lengths_R: Tensor) -> Tensor:
    """Average over each sequence's tokens, of shape R; an empty sequence gives 0. Differentiable.

    Args:
        values_N: Values of tokens.
        sequence_N: Index of the sequence of each token.
        lengths_R: Tokens of each sequence.
    """
    return sequence_sum(values_N, sequence_N, len(lengths_R)) / lengths_R.clamp(min=1)
