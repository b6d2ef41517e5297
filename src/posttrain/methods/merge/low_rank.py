"""Low-rank matrices: the nearest of a rank, and sums of products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NEGLIGIBLE = 1e-6
"""Singular values below this part of the largest are rounding errors in float32: a factor for them is none."""


def nearest_of_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return B, A of the nearest matrix of a rank, and the squared distance to it (Eckart and Young 1936).

    With M = U S V', B = U_r S_r^(1/2) and A = S_r^(1/2) V_r', and the squared distance is the sum of the other S^2.

    Args:
        matrix: M, (outputs, inputs).
        rank: Most columns of B; fewer if the others would hold rounding errors alone.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return _cut(u, s, v, rank)


def _cut(u: Tensor, s: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    kept = max(1, min(rank, int((s > NEGLIGIBLE * s[0]).sum())))
    root = s[:kept].sqrt()
    return u[:, :kept] * root, root[:, None] * v[:kept], float(s[kept:].double().square().sum())


def sum_of_products(terms: Sequence[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return B, A with B A = sum_i c_i B_i A_i: the factors side by side, their ranks added up.

    The size of c_i goes into both factors in equal parts, its sign into B.

    Args:
        terms: (c_i, B_i, A_i).
    """
    roots = [abs(c) ** 0.5 for c, _, _ in terms]
    left = [b * (root if c >= 0 else -root) for (c, b, _), root in zip(terms, roots, strict=True)]
    right = [a * root for (_, _, a), root in zip(terms, roots, strict=True)]
    return torch.cat(left, dim=1), torch.cat(right, dim=0)


def nearest_of_sum(terms: Sequence[tuple[float, Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor, float]:
    """Return `nearest_of_rank` of a sum of products, from the factors alone.

    B = Q_b R_b and A' = Q_a R_a make B A = Q_b (R_b R_a') Q_a', whose inner matrix is as small as the sum of ranks.

    Args:
        terms: (c_i, B_i, A_i).
        rank: As above.
    """
    b, a = sum_of_products(terms)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _cut(q_b @ u, s, v @ q_a.T, rank)
