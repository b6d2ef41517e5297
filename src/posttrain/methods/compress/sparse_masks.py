"""Choose the weights of one linear layer that are set to zero, by a score of each.

Magnitude: |w|. Wanda (arXiv 2306.11695, equation 1): |w_oi| ||x_i||, ||x_i|| the norm of input i over all calibration
tokens; weights are compared within a row, that is, among the inputs of one output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

ROWS_AT_ONCE = 1 << 24
"""Scores that are sorted at once, about."""


def wanda_scores(weight_O_I: Tensor, squares_I: Tensor) -> Tensor:
    """Return |w_oi| ||x_i||.

    Args:
        weight_O_I: The weight.
        squares_I: Sum of the squares of each input over all calibration tokens.
    """
    return weight_O_I.detach().abs().float() * squares_I.sqrt().float()


def lowest(scores_O_I: Tensor, sparsity: float, compare: Literal["row", "matrix"]) -> Tensor:
    """Return a mask of the weights with the lowest scores, which are to be zero.

    Of equal scores those that come first are taken, so that the number is exact: round(sparsity * n).

    Args:
        scores_O_I: Scores.
        sparsity: Share of the weights that the mask has, of each row or of the matrix.
        compare: Weights are compared within a row, or in the whole matrix.
    """
    mask = torch.zeros_like(scores_O_I, dtype=torch.bool, memory_format=torch.contiguous_format)
    if compare == "matrix":
        count, flat = round(sparsity * scores_O_I.numel()), scores_O_I.flatten()
        if count:
            bound = flat.kthvalue(count).values  # a tenth of the time of sorting
            mask.view(-1).copy_(flat < bound)
            ties = (flat == bound).nonzero()[:, 0]
            mask.view(-1)[ties[: count - int(mask.sum())]] = True
        return mask
    count = round(sparsity * scores_O_I.shape[1])
    rows = max(1, ROWS_AT_ONCE // scores_O_I.shape[1])
    for part, chosen in zip(scores_O_I.split(rows), mask.split(rows), strict=True):
        chosen.scatter_(1, part.argsort(dim=1, stable=True)[:, :count], True)
    return mask


def lowest_of_groups(scores_O_I: Tensor, kept: int, of: int) -> Tensor:
    """Return the mask of n:m sparsity: in every `of` inputs in a row of an output, all but the best `kept` are zero.

    Args:
        scores_O_I: Scores.
        kept: Weights that stay of a group.
        of: Inputs of a group; their number must divide by it.
    """
    groups = scores_O_I.unflatten(1, (-1, of))
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=groups.device)
    mask.scatter_(2, groups.argsort(dim=2, stable=True)[..., : of - kept], True)
    return mask.flatten(1)


def threshold_of_all(scores: Sequence[Callable[[], Tensor]], sparsity: float) -> float:
    """Return the score up to which weights are zero if the weights of all matrices are compared with each other.

    It is found by halving the range of float32's bit patterns, which are in the order of the (non-negative) numbers:
    no copy of all scores is made.

    Args:
        scores: Make the float32 scores of each matrix.
        sparsity: Share of all weights together.

    Returns:
        The smallest score such that at least round(sparsity * n) weights have it or less; -1 for none.
    """
    count = round(sparsity * sum(make().numel() for make in scores))
    low, high = -1, 0x7F800000  # at most `low` is too few, at most `high` is enough
    while count and high - low > 1:
        middle = (low + high) // 2
        bound = torch.tensor(middle, dtype=torch.int32).view(torch.float32)
        enough = sum(int((make() <= float(bound)).sum()) for make in scores) >= count
        low, high = (low, middle) if enough else (middle, high)
    return float(torch.tensor(high, dtype=torch.int32).view(torch.float32)) if count else -1.0
