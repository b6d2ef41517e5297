"""Experts that lie in one parameter, computed with weights in 8 or 4 bits as they are packed.

transformers' plain forward of such a module takes an expert's matrix out of the parameter (`self.down_proj[expert]`)
and multiplies inputs with it. Here something else stands in the parameter's place, whose matrices multiply as
`matmul.linear` does: few rows read the packed weight, for many rows that one expert is dequantised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.cpu import library as native
from posttrain.cpu.matmul import linear
from posttrain.cpu.quantized_matmul import hold, packed_for, placeholder

EXPERTS_HOME = "packed_experts"
"""Attribute of a placeholder that holds the experts it stands for."""
MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class PackedMatrix:
    """Stand for the matrix of one expert in a product.

    Attributes:
        weight: A placeholder (O, I) with its packed weight.
        transposed: The parameter has it as (I, O).
    """

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        self.weight, self.transposed = weight, transposed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        matrix = args[1] if len(args) > 1 and not isinstance(args[0], cls) else None
        bias = {**dict(zip(("bias",), args[2:], strict=False)), **(kwargs or {})}
        if func is nn.functional.linear and isinstance(matrix, cls) and not matrix.transposed and set(bias) <= {"bias"}:
            return linear(args[0], matrix.weight, **bias)
        if func in MATMULS and isinstance(matrix, cls) and matrix.transposed and not bias:
            return linear(args[0], matrix.weight)
        raise NotImplementedError(f"{getattr(func, '__name__', func)} of experts that are held packed only")


class PackedExperts:
    """Stand in place of a parameter that holds the matrices of all experts.

    Attributes:
        weights: Packed weights by expert.
        transposed: The parameter has the matrices as (I, O).
    """

    def __init__(self, weights: list[native.Packed], transposed: bool) -> None:
        self.weights, self.transposed = weights, transposed
        self._matrices = [PackedMatrix(hold(placeholder(w.n, w.k), w), transposed) for w in weights]

    def __getitem__(self, expert: Any) -> PackedMatrix:
        return self._matrices[int(expert)]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all experts."""
        return sum(t.nbytes for w in self.weights for t in w.kept)


def pack_experts(module: nn.Module, parameter: str, quantized: list[Any]) -> PackedExperts | None:
    """Return what can stand in place of a parameter; None if the module needs it dense.

    Args:
        module: A module like the one that will hold it; its parameter may be on the device "meta".
        parameter: Name of the parameter.
        quantized: The `QuantizedWeight` of each expert.
    """
    if plain_forward(module) is None and not type(module).__name__.endswith("ParallelExperts"):
        return None
    transposed = bool(getattr(module, "is_transposed", False))
    shape = tuple(getattr(module, parameter).shape[1:])
    packed = [packed_for(q, shape[::-1] if transposed else shape) for q in quantized]
    return None if any(w is None for w in packed) else PackedExperts(packed, transposed)  # type: ignore[arg-type]


def experts_placeholder(experts: PackedExperts) -> Tensor:
    """Return a parameter's value without memory, for the time before `compute_packed_experts`."""
    n, k = experts.weights[0].n, experts.weights[0].k
    return placeholder(len(experts.weights), *((k, n) if experts.transposed else (n, k)))


def compute_packed_experts(module: nn.Module, parameter: str, experts: PackedExperts) -> None:
    """Let a module compute with experts that are held packed only.

    Args:
        module: The module; its parameter is `experts_placeholder`.
        parameter: Name of the parameter.
        experts: What stands in its place.
    """
    setattr(getattr(module, parameter).requires_grad_(False), EXPERTS_HOME, experts)
    vars(module)[parameter] = experts  # is found before the parameter, which the module keeps
    eager = plain_forward(module)
    if eager is not None and "forward" not in vars(module):
        module.forward = eager.__get__(module)  # type: ignore[method-assign]


def plain_forward(module: nn.Module) -> Any:
    """Return the forward that goes from expert to expert, which transformers may replace by one over all at once."""
    return getattr(type(module).forward, "__wrapped__", None)
