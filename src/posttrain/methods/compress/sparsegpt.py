"""SparseGPT (arXiv 2301.00774): set weights of one linear layer to zero, and let the others make up for it.

With the Hessian H = sum x x^T of the layer's inputs and U the upper Cholesky factor of H^-1, columns are taken from left
to right (Algorithm 1). Removing w_i costs w_i^2 / U_ii^2; the error w_i / U_ii is spread over the columns to the right by
row i of U. Masks are chosen for 128 columns at a time, over all rows together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.methods.compress.sparse_masks import lowest, lowest_of_groups

MASK_BLOCK = 128
"""Columns for which a mask is chosen at once."""
DAMPENING = 0.01
"""Added to the diagonal of the Hessian, relative to its mean."""


def inverse_factor(hessian_I_I: Tensor, dampening: float = DAMPENING) -> Tensor:
    """Return the upper triangular U with U^T U = (H + dampening mean(diag H) I)^-1, in float64.

    Inputs that are always zero get 1 on the diagonal of H.

    Args:
        hessian_I_I: H.
        dampening: Relative to the mean of the diagonal.

    Raises:
        ModelError: H is not finite or not positive definite.
    """
    hessian = hessian_I_I.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += dampening * float(diagonal.mean())
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed) or not bool(factor.isfinite().all()):
        raise ModelError(
            "the inputs of a layer have no finite, positive definite Hessian: the model computes values that are not "
            "finite on the calibration rows, or its weights are damaged"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)


def sparsegpt(
    weight_O_I: Tensor,
    hessian_I_I: Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    block: int = MASK_BLOCK,
    dampening: float = DAMPENING,
) -> tuple[Tensor, Tensor]:
    """Return the sparse weight, in the weight's dtype, and the mask of what is zero in it.

    Args:
        weight_O_I: The weight; it is not changed.
        hessian_I_I: Sum of x x^T of its inputs.
        sparsity: Share of the weights of each block that become zero.
        pattern: (n, m): in every m inputs n weights stay, in place of the sparsity.
        block: Columns of a block; with a pattern a multiple of m.
        dampening: See `inverse_factor`.

    Raises:
        ModelError: See `inverse_factor`.
    """
    factor = inverse_factor(hessian_I_I, dampening)
    weight = weight_O_I.detach().double().clone()
    weight[:, hessian_I_I.diagonal() == 0] = 0
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        part, own, chosen = weight[:, start:end], factor[start:end, start:end], mask[:, start:end]
        diagonal = own.diagonal()
        if pattern is None:
            chosen.copy_(lowest(part.square() / diagonal.square(), sparsity, "matrix"))
        errors = torch.zeros_like(part)
        for i in range(end - start):
            if pattern is not None and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                chosen[:, group] = lowest_of_groups(part[:, group].square() / diagonal[group].square(), *pattern)
            errors[:, i] = torch.where(chosen[:, i], part[:, i], 0.0) / diagonal[i]
            part[:, i:].sub_(torch.outer(errors[:, i], own[i, i:]))
            part[:, i].masked_fill_(chosen[:, i], 0.0)
        weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return weight.to(weight_O_I.dtype), mask
