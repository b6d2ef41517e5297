"""Keep zeros of a pruned model at zero while it is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.core import distributed
from posttrain.core.errors import ModelError
from posttrain.models.language_model import LanguageModel

ZERO_MARK = "kept_zeros"
"""Attribute of a parameter: True where it is zero and stays so."""


def mark_zeros(policy: LanguageModel) -> float:
    """Mark the zeros in matrices other than the embeddings; the optimizer gives marked weights no gradient.

    Returns:
        The share of zeros among the weights of these matrices.

    Raises:
        ModelError: There are none, or several processes train: their shards have lost the marks.
    """
    if distributed.world() > 1:
        raise ModelError("keep_zeros works in one process so far; start it without torchrun")
    embedding = policy.base.get_input_embeddings().weight
    zeros = weights = 0
    for name, parameter in policy.hf.named_parameters():
        scores = "score." in name or "classifier." in name  # a new head may begin with zeros
        if parameter.ndim < 2 or parameter is embedding or scores or not parameter.requires_grad:
            continue
        mask = parameter.detach() == 0
        count, weights = int(mask.sum()), weights + mask.numel()
        if count:
            setattr(parameter, ZERO_MARK, mask)
        zeros += count
    if not zeros:
        raise ModelError(
            "keep_zeros: no weight of the model is zero. Start the stage from a model that was pruned (method: prune, "
            "weights), or leave keep_zeros out"
        )
    return zeros / weights


def clear_marked(parameter: Tensor, gradient: Tensor | None) -> None:
    """Set the gradient of marked weights to zero: AdamW then leaves a zero where it is, decay and moments included."""
    mask: Tensor | None = getattr(parameter, ZERO_MARK, None)
    if mask is not None and gradient is not None:
        with torch.no_grad():
            gradient.masked_fill_(mask, 0.0)
