"""A linear layer's weight in a few bits: integers, a scale for each group of columns, and the floats they stand for.

Shapes: O output features, I input features, G groups of input features in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.models.weight_matrices import LayerMatrix, expert_matrix

ATTRIBUTE = "quantized"
"""Attribute of a module whose dense `weight` is what its `QuantizedWeight` stands for."""
OF_EXPERTS = "quantized_experts"
"""Attribute of a module with parameters that hold all experts: {(parameter, expert): its `QuantizedWeight`}."""


@dataclass(frozen=True)
class QuantizedWeight:
    """Hold a weight as integers: ``w[o, i] = (values[o, i] - zero[o, g]) * scale[o, g]``, g the group of column i.

    Attributes:
        values_O_I: int8. In -8..7 with 4 bits, in -128..127 with 8.
        scale_O_G: float32, positive.
        zero_O_G: int8, in the same range as the values. None: symmetric, the zero is 0.
        group: Columns of a group; I for one scale a row.
        bits: Bits of a value.
        order_I: int64, the group of each column (act-order). None: column i is in group i // group.
        activation_bits: Bits of the layer's inputs, which are rounded when it runs, token by token. None: in full.
    """

    values_O_I: Tensor
    scale_O_G: Tensor
    zero_O_G: Tensor | None
    group: int
    bits: Literal[4, 8]
    order_I: Tensor | None = None
    activation_bits: Literal[8] | None = None

    def __post_init__(self) -> None:
        rows, columns = self.values_O_I.shape
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}: expected 4 or 8")
        if self.group < 1 or columns % self.group:
            raise ValueError(f"groups of {self.group} do not divide {columns} columns")
        groups = (rows, columns // self.group)
        if self.scale_O_G.shape != groups or (self.zero_O_G is not None and self.zero_O_G.shape != groups):
            raise ValueError(f"expected scales and zeros of shape {groups}, and got {tuple(self.scale_O_G.shape)}")
        if self.order_I is not None and self.order_I.shape != (columns,):
            raise ValueError(f"expected the group of each of {columns} columns, got {tuple(self.order_I.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """Return (output features, input features)."""
        return self.values_O_I.shape[0], self.values_O_I.shape[1]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the weight as it is stored: packed values, float32 scales, zeros and the order."""
        (rows, columns), groups = self.shape, self.scale_O_G.numel()
        zeros = 0 if self.zero_O_G is None else (groups * self.bits + 7) // 8
        return rows * columns * self.bits // 8 + 4 * groups + zeros + (0 if self.order_I is None else 4 * columns)

    def dense(self) -> Tensor:
        """Return the weight as float32, of shape (O, I)."""
        values = self.values_O_I.float()
        if self.order_I is not None:
            if self.zero_O_G is not None:
                values = values - self.zero_O_G.float()[:, self.order_I]
            return values * self.scale_O_G[:, self.order_I]
        grouped = values.view(values.shape[0], -1, self.group)
        if self.zero_O_G is not None:
            grouped = grouped - self.zero_O_G.float()[..., None]
        return (grouped * self.scale_O_G[..., None]).view_as(values)


class RoundedInputLinear(nn.Linear):
    """A linear layer whose inputs are rounded to int8 when it runs, token by token."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(rounded_inputs(input), self.weight, self.bias)


def rounded_inputs(x: Tensor) -> Tensor:
    """Return inputs rounded to int8: symmetric, one scale for each token, as compressed-tensors' strategy "token"."""
    scale = x.detach().abs().amax(-1, keepdim=True) / 127.5
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / scale).round().clamp(-128, 127) * scale


def attach_quantized(module: Any, weight: QuantizedWeight) -> None:
    """Give a module the dense weight that a quantised one stands for, and the quantised one as `module.quantized`.

    Args:
        module: A linear layer or an embedding; its `weight` keeps its dtype and device.
        weight: The quantised weight.
    """
    with torch.no_grad():
        module.weight.copy_(weight.dense())
    setattr(module, ATTRIBUTE, weight)
    if weight.activation_bits is not None:
        vars(module).pop("forward", None)  # a faster forward of the same numbers, which are others now
        module.__class__ = RoundedInputLinear


def attach_to_matrix(matrix: LayerMatrix, weight: QuantizedWeight) -> None:
    """Give a matrix the dense weight that a quantised one stands for, and its module the quantised one.

    Args:
        matrix: A linear layer or an embedding, for which `attach_quantized` is called, or one expert.
        weight: The quantised weight.

    Raises:
        ValueError: The inputs of an expert are to be rounded.
    """
    if matrix.expert is None:
        attach_quantized(matrix.module, weight)
        return
    if weight.activation_bits is not None:
        raise ValueError(f"{matrix.name}: the inputs of experts that lie in one parameter can't be rounded")
    matrix.weight_O_I.copy_(weight.dense())
    vars(matrix.module).setdefault(OF_EXPERTS, {})[matrix.parameter, matrix.expert] = weight


def quantized_of(module: Any) -> QuantizedWeight | None:
    """Return the quantised weight of a module; None: it has none."""
    return getattr(module, ATTRIBUTE, None)


def quantized_modules(model: Any) -> Iterator[tuple[str, Any, QuantizedWeight]]:
    """Yield (name, module, weight) of each module of a model that has a quantised weight; tied modules once."""
    seen = set()
    for name, module in model.named_modules():
        weight = quantized_of(module)
        if weight is not None and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield name, module, weight


def quantized_matrices(model: Any) -> Iterator[tuple[LayerMatrix, QuantizedWeight]]:
    """Yield each matrix of a model that has a quantised weight, with it: of modules, tied ones once, and of experts."""
    for name, module, weight in quantized_modules(model):
        yield LayerMatrix(name, module), weight
    for name, module in model.named_modules():
        for (parameter, expert), weight in vars(module).get(OF_EXPERTS, {}).items():
            yield expert_matrix(name, module, parameter, expert), weight


def unchanged_weights(model: Any) -> dict[str, QuantizedWeight]:
    """Return, by matrix, the quantised weights that a model still has: whose dense weight was not changed since."""
    return {
        matrix.name: weight
        for matrix, weight in quantized_matrices(model)
        if weight.shape == tuple((dense := matrix.weight_O_I).shape) and torch.equal(dense, weight.dense().to(dense))
    }


def forget_integers(model: Any) -> None:
    """Let the quantised weights of a model know their sizes alone: nothing will compute with them, or save them."""
    for matrix, weight in list(quantized_matrices(model)):
        tensors: dict[str, Any] = {
            f.name: t for f in fields(weight) if isinstance(t := getattr(weight, f.name), Tensor)
        }
        alone = replace(weight, **{name: t.to("meta") for name, t in tensors.items()})
        if matrix.expert is None:
            setattr(matrix.module, ATTRIBUTE, alone)
        else:
            vars(matrix.module)[OF_EXPERTS][matrix.parameter, matrix.expert] = alone


def forget_quantized(model: Any) -> None:
    """Remove the quantised weights of a model, whose dense ones are to be changed; inputs are no longer rounded."""
    for module in model.modules():
        vars(module).pop(OF_EXPERTS, None)
        if quantized_of(module) is not None:
            delattr(module, ATTRIBUTE)
            if type(module) is RoundedInputLinear:
                setattr(module, "__class__", nn.Linear)  # noqa: B010
