"""Averages of weights: linear, on the sphere (SLERP and its generalisations to several models), and model stock.

Pure functions of tensors of one shape and one dtype (float32 or float64). Each takes a tensor as one vector, whatever its
shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PARALLEL = 1e-6
"""Angle in radians below which two directions count as one: the formulas of the sphere would divide by its sine."""


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool = True) -> Tensor:
    """Compute a weighted sum (model soups, arXiv 2203.05482): sum_i w_i x_i, over sum_i w_i with `normalize`.

    Args:
        tensors: The values x_i, one of each model.
        weights: The weights w_i.
        normalize: Divide by the sum of the weights.

    Raises:
        ValueError: The weights sum to zero, and `normalize` is set.
    """
    total = sum(weights) if normalize else 1.0
    if abs(total) < 1e-12:
        raise ValueError(f"weights {list(weights)} sum to zero, so they can't be normalised")
    out = tensors[0] * (weights[0] / total)
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        out.add_(tensor, alpha=weight / total)
    return out


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Interpolate along the arc between two directions (Shoemake 1985).

    x(t) = sin((1 - t) a) / sin(a) * x_0 + sin(t a) / sin(a) * x_1, with a the angle between x_0 and x_1. The vectors
    keep their lengths. Of zero, parallel and opposite vectors (no arc, or no single one) it is the straight line.

    Args:
        first: x_0, the result for t = 0.
        second: x_1, the result for t = 1.
        t: Place between them.
    """
    angle = angle_between(first, second)
    sine = math.sin(angle)
    if sine < PARALLEL or not float(first.norm()) or not float(second.norm()):
        return weighted_mean([first, second], [1 - t, t], normalize=False)
    return first * (math.sin((1 - t) * angle) / sine) + second * (math.sin(t * angle) / sine)


def angle_between(first: Tensor, second: Tensor) -> float:
    """Return the angle between two tensors as vectors, in radians; 0 if one is zero.

    By Kahan's formula, 2 atan2(|u - v|, |u + v|) of the unit vectors: the arc cosine has no digits near 0 and pi.
    """
    norms = first.norm(), second.norm()
    if not float(norms[0]) or not float(norms[1]):
        return 0.0
    u, v = (x.double() / norm.double() for x, norm in ((first, norms[0]), (second, norms[1])))
    return 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))


def multi_slerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Average the directions of several tensors, and give the result their average length.

    With unit vectors u_i and weights that sum to 1, the result is the unit vector of sum_i w_i u_i, times
    sum_i w_i |x_i|: the first step of `karcher_mean`, from which it differs in the third order of the angles. Of two
    vectors of one length with equal weights it is `slerp` at 1/2. Of directions that cancel out it is `weighted_mean`.

    Args:
        tensors: The values x_i.
        weights: The weights w_i, at least 0; their scale does not matter.
    """
    return _mean_on_sphere(tensors, weights, steps=0, tolerance=0.0)


def karcher_mean(
    tensors: Sequence[Tensor], weights: Sequence[float], steps: int = 100, tolerance: float = 1e-8
) -> Tensor:
    """Compute the mean on the sphere: the direction with the least weighted sum of squared angles to all.

    m <- exp_m(sum_i w_i log_m(u_i)) until it moves by less than `tolerance` (Karcher 1977), times sum_i w_i |x_i|.
    Of two vectors of one length with weights (1 - t, t) it is `slerp` at t. Of directions that cancel out it is `weighted_mean`.

    Args:
        tensors: The values x_i.
        weights: The weights w_i, at least 0; their scale does not matter.
        steps: Most iterations.
        tolerance: Angle in radians by which the last iteration may move the direction.
    """
    return _mean_on_sphere(tensors, weights, steps, tolerance)


def _mean_on_sphere(tensors: Sequence[Tensor], weights: Sequence[float], steps: int, tolerance: float) -> Tensor:
    total = sum(weights)
    if min(weights) < 0 or total <= 0:
        raise ValueError(f"weights on the sphere are at least 0 and not all 0, got {list(weights)}")
    norms = [float(x.double().norm()) for x in tensors]
    shares = [weight / total for weight in weights]
    units = [(x.double().flatten() / norm, w) for x, norm, w in zip(tensors, norms, shares, strict=True) if norm]
    if not units:
        return torch.zeros_like(tensors[0])
    mean = units[0][0] * units[0][1]
    for unit, weight in units[1:]:
        mean.add_(unit, alpha=weight)
    if float(mean.norm()) < PARALLEL:
        return weighted_mean(tensors, weights)
    mean /= mean.norm()
    for _ in range(steps):
        tangent = torch.zeros_like(mean)
        for unit, weight in units:
            across = unit - (unit @ mean) * mean
            size = float(across.norm())
            if size > 1e-12:
                tangent.add_(across, alpha=weight * angle_between(unit, mean) / size)
        moved = float(tangent.norm())
        if moved <= max(tolerance, 1e-15):
            break
        mean = mean * math.cos(moved) + tangent * (math.sin(moved) / moved)
        mean /= mean.norm()
    length = sum(norm * share for norm, share in zip(norms, shares, strict=True))
    return (mean * length).to(tensors[0].dtype).view_as(tensors[0])


def model_stock(base: Tensor, tensors: Sequence[Tensor], by_rows: bool = False) -> Tensor:
    """Move the average of fine-tuned models towards the base by the angle between them (arXiv 2403.19522).

    With deltas d_i = x_i - base of k models and c the mean cosine of their pairs,
    t = k c / (1 + (k - 1) c), and the result is base + t * mean_i d_i. Parallel deltas (c = 1) give their average,
    orthogonal ones (c = 0) the base, and so do deltas of one length that cancel out (c = -1 / (k - 1), where the formula
    has no value). Any other negative t is taken as it comes, as in the formula.

    Args:
        base: The model before fine-tuning.
        tensors: At least two fine-tuned ones.
        by_rows: Choose t for each row of a matrix instead of once.
    """
    rows = by_rows and base.ndim > 1
    deltas = [(x - base).reshape(len(base) if rows else 1, -1) for x in tensors]
    count = len(deltas)
    norms = [d.norm(dim=1).clamp_min(1e-15) for d in deltas]  # whose products are still above zero in float32
    pairs = [(i, j) for i in range(count) for j in range(i)]
    cosines = [((deltas[i] * deltas[j]).sum(1) / (norms[i] * norms[j])).clamp(-1, 1) for i, j in pairs]
    cosine = torch.stack(cosines).mean(0)
    below = 1 + (count - 1) * cosine  # |sum of unit deltas|^2 / k
    t = torch.where(below > 1e-6, count * cosine / below.clamp_min(1e-6), 0.0)
    mean = torch.stack(deltas).mean(0)
    return base + (t[:, None] * mean).view_as(base)
