"""Merges of task vectors: what fine-tuning changed in each model is thinned out, agreed on, and added to the base.

With d_i = x_i - base, every algorithm is base + scale * sum_i w_i s_i(d_i), where s_i thins out (`keep_largest`,
`drop_outliers`, `drop_random`, `della_probabilities`) and the sum is over all models or over those that agree on the sign
of a weight (`combine`). Pure functions of tensors of one shape; shares are of the entries of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """Set all but the largest entries to zero (the trimming of TIES, arXiv 2306.01708).

    Args:
        delta: A task vector.
        density: Share of the entries that stay, at least one entry. 1: all.
    """
    count = max(int(density * delta.numel()), 1)
    if count >= delta.numel():
        return delta
    order = delta.abs().flatten().topk(count).indices
    out = torch.zeros_like(delta).flatten()
    out[order] = delta.flatten()[order]
    return out.view_as(delta)


def drop_outliers(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Set the largest and the smallest entries to zero (breadcrumbs, arXiv 2312.06795).

    Args:
        delta: A task vector.
        density: Share of the entries that stay.
        gamma: Share of the entries that are dropped for being the largest. The smallest 1 - density - gamma go too; if
            that is negative, fewer of the largest are dropped.
    """
    total = delta.numel()
    count = int(density * total)
    largest = max(min(int(gamma * total), total - count), 0)
    order = delta.abs().flatten().argsort(descending=True)[largest : largest + count]
    out = torch.zeros_like(delta).flatten()
    out[order] = delta.flatten()[order]
    return out.view_as(delta)


def drop_random(delta: Tensor, keep: Tensor, probabilities: Tensor | float) -> Tensor:
    """Set entries to zero by a random mask, and divide the others by the probability to stay (DARE, arXiv 2311.03099).

    The expected result is `delta`. With a probability of 1 it is `delta` itself.

    Args:
        delta: A task vector.
        keep: Entries that stay: True, or 1.
        probabilities: Probability of each to stay.
    """
    return delta * keep.to(delta.dtype) / torch.as_tensor(probabilities, dtype=delta.dtype).clamp_min(1e-6)


def draw_mask(delta: Tensor, probabilities: Tensor | float, generator: torch.Generator) -> Tensor:
    """Draw the mask of `drop_random`: True with the given probability, each entry independent of the others.

    Args:
        delta: A task vector.
        probabilities: Probability of each entry to stay.
        generator: Source of random numbers.
    """
    return torch.rand(delta.shape, generator=generator) < probabilities


def della_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return probabilities to stay that rise with an entry's size among its row (MagPrune of DELLA, arXiv 2406.11617).

    Entries of a row of n are ranked by size, 0 the smallest; the probability is
    density - epsilon + 2 epsilon rank / (n - 1), so `density` on average. A vector is one row; of more dimensions the
    last is the row.

    Args:
        delta: A task vector.
        density: Mean probability.
        epsilon: Distance of the smallest and of the largest probability from it; they must lie in 0 .. 1.

    Raises:
        ValueError: They don't.
    """
    if density - epsilon < 0 or density + epsilon > 1:
        raise ValueError(f"density {density} -+ epsilon {epsilon} must lie between 0 and 1: choose a smaller epsilon")
    row = delta.abs().reshape(-1, delta.shape[-1] if delta.ndim else 1)
    size = row.shape[1]
    if size == 1:
        return torch.full_like(delta, density)
    ranks = row.argsort(dim=1).argsort(dim=1).to(delta.dtype)
    return (density - epsilon + ranks * (2 * epsilon / (size - 1))).view_as(delta)


def combine(
    deltas: Sequence[Tensor], weights: Sequence[float], elect_signs: bool = False, normalize: bool = False
) -> Tensor:
    """Sum weighted task vectors, of each entry those that agree with the elected sign if `elect_signs` (TIES).

    The sign of an entry is that of sum_i w_i d_i; d_i takes part where w_i d_i has that sign (arXiv 2306.01708, with
    weights; of zero it is positive). With `normalize` the sum is divided by the sum of the weights that took part: the disjoint mean. A zero
    does not take part.

    Args:
        deltas: Task vectors d_i, thinned out.
        weights: The weights w_i.
        elect_signs: Leave out what has the other sign.
        normalize: Divide by the weights that took part; without `elect_signs` by the sum of all.
    """
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    if not elect_signs:
        return total / _away_from_zero(sum(weights)) if normalize else total
    sign = torch.where(total >= 0, 1.0, -1.0).to(total.dtype)
    out, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = ((delta * weight) * sign > 0).to(total.dtype)
        out += delta * agrees * weight
        divisor += weight * agrees
    if not normalize:
        return out
    return out / torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor)


def _away_from_zero(value: float) -> float:
    return value if abs(value) > 1e-8 else 1.0
