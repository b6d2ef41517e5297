"""Products of few rows with weights in 8 or 4 bits, read as they are packed; see `csrc/quantized.c`.

A weight is packed once, before a model samples, from the `QuantizedWeight` of its module; what it was packed to hangs
on the dense weight, and counts for as long as nothing writes into that. So whoever multiplies a few rows by the dense
weight (a linear layer, the output head, a whole layer in one call) reads the packed one in its place. Activations stay
float32: results are those of the dense weight up to the order of rounding.

A model that is opened for inference holds such weights packed only. The module's weight is then a placeholder of the
right shape without memory, and products of many rows dequantise the packed one each time (`whole`), or some of its
rows (`rows_of`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from posttrain.cpu import library as native

LANES = 16
"""Rows of a tile; see `csrc/quantized.c`."""
HOME = "packed_weight"
"""Attribute of a dense weight that holds what it was packed to."""


@dataclass(frozen=True)
class PackedWeight:
    """Hold a packed weight beside the dense one.

    Attributes:
        packed: For the kernels.
        version: Version of the dense weight that it stands for; None: nobody counts.
        data: Where the dense weight's memory lies.
    """

    packed: native.Packed
    version: int | None
    data: int


def pack_weight(
    values_O_I: Tensor, scale_O_G: Tensor, zero_O_G: Tensor | None, bits: int, order_I: Tensor | None = None
) -> Any:
    """Pack a weight for the kernels; see `QuantizedWeight` for the arguments.

    Args:
        values_O_I: int8.
        scale_O_G: float32.
        zero_O_G: int8, or None.
        bits: 4 or 8. Values of 4 bits in groups that are no multiple of 8 are packed as 8.
        order_I: Group of each column, or None.

    Returns:
        A `library.Packed`; None if groups of `order_I` differ in size.
    """
    (rows, columns), groups = values_O_I.shape, scale_O_G.shape[1]
    group, order = columns // groups, None
    if order_I is not None:
        if not bool((torch.bincount(order_I, minlength=groups) == group).all()):
            return None
        order = order_I.argsort(stable=True)
        values_O_I = values_O_I[:, order]
    tiles = (rows + LANES - 1) // LANES
    bits = bits if group % 8 == 0 else 8

    def tiled(x: Tensor) -> Tensor:
        """(O, any) -> (tiles, any, 16); rows that are not there are 0."""
        padded = torch.nn.functional.pad(x, (0, 0, 0, tiles * LANES - rows))
        return padded.view(tiles, LANES, -1).transpose(1, 2)

    values = tiled(values_O_I).reshape(tiles, groups, group, LANES)
    if bits == 4:
        words = torch.zeros(tiles, groups, group // 8, LANES, dtype=torch.int32)
        for i in range(8):
            words |= (values[:, :, i::8].int() & 15) << (4 * i)
        values = words.view(torch.uint8)
    scales = tiled(scale_O_G.float()).contiguous().view(torch.uint8)
    data = torch.cat([scales.flatten(2), values.view(torch.uint8).flatten(2)], -1)
    zero = None if zero_O_G is None else tiled(zero_O_G).contiguous()
    packed = native.Packed(values=data.data_ptr(), n=rows, k=columns, group=group, bits=bits)
    packed.kept = [data, *(t for t in (zero, order) if t is not None)]
    packed.zero = None if zero is None else zero.data_ptr()
    packed.order = None if order is None else order.data_ptr()
    return packed


def pack_modules(modules: list[tuple[Any, Any]]) -> int:
    """Pack the weights of modules that are not packed yet; return how many are.

    Args:
        modules: (module, its `QuantizedWeight`).
    """
    count = 0
    for module, quantized in modules:
        weight = module.weight
        if packed_of(weight) is None and native.is_plain(weight) and quantized.activation_bits is None:
            # What was trained since is no longer what the integers stand for.
            if not reads_packed() or not torch.equal(quantized.dense(), weight.detach()):
                continue
            packed = pack_weight(
                quantized.values_O_I, quantized.scale_O_G, quantized.zero_O_G, quantized.bits, quantized.order_I
            )
            if packed is not None:
                setattr(weight, HOME, PackedWeight(packed, _version(weight), weight.data_ptr()))
        count += packed_of(weight) is not None
    return count


def packed_of(weight: Tensor) -> native.Packed | None:
    """Return what a dense weight was packed to; None if it was not, or was changed since."""
    found: PackedWeight | None = getattr(weight, HOME, None)
    if found is None or found.version != _version(weight) or found.data != weight.data_ptr():
        return None
    return found.packed


def placeholder(*shape: int) -> Tensor:
    """Return a weight without memory: NaN everywhere, so that whoever reads it for the packed one is found out."""
    return torch.full((1,) * len(shape), torch.nan).expand(shape)


def is_placeholder(weight: Tensor) -> bool:
    """Return True for a weight that is held packed only."""
    return weight.ndim > 1 and not any(weight.stride())


def whole(weight: Tensor) -> Tensor:
    """Return a weight as floats: the tensor itself, or the dequantised one if it is held packed only.

    Raises:
        RuntimeError: A placeholder has lost what it stands for.
    """
    return _dequantized(weight, None) if is_placeholder(weight) else weight


def rows_of(weight: Tensor, rows: slice) -> Tensor:
    """Return consecutive rows of a weight as floats, dequantised if it is held packed only.

    Raises:
        RuntimeError: A placeholder has lost what it stands for.
    """
    if not is_placeholder(weight):
        return weight[rows]
    return _dequantized(weight, torch.arange(rows.start, rows.stop))


def _dequantized(weight: Tensor, rows: Tensor | None) -> Tensor:
    packed, kernels = packed_of(weight), native.kernels()
    if packed is None or kernels is None:
        raise RuntimeError("a weight that is held packed only was copied or moved: open the model again")
    return kernels.dequantize(packed, rows)


def pack_alone(module: Any, quantized: Any) -> native.Packed | None:
    """Return what a module can hold in place of its dense weight; None if it needs the dense one.

    Args:
        module: A plain linear layer or embedding.
        quantized: Its `QuantizedWeight`.
    """
    linear = type(module) is torch.nn.Linear and len(module.weight) >= native.LEAST_COLUMNS
    embedding = type(module) is torch.nn.Embedding and module.max_norm is None
    return packed_for(quantized, tuple(module.weight.shape)) if linear or embedding else None


def packed_for(quantized: Any, shape: tuple[int, ...]) -> native.Packed | None:
    """Return a packed weight for a place of a shape; None if it does not fit, or can't be computed with alone.

    Args:
        quantized: The `QuantizedWeight`.
        shape: (output features, input features).
    """
    q = quantized
    if q.shape != shape or q.activation_bits is not None or not reads_packed():
        return None
    return pack_weight(q.values_O_I, q.scale_O_G, q.zero_O_G, q.bits, q.order_I)  # type: ignore[no-any-return]


def packed_bytes(weight: Tensor) -> int:
    """Return the bytes of a weight that is held packed only; 0 for any other."""
    packed = packed_of(weight) if is_placeholder(weight) else None
    return 0 if packed is None else sum(t.nbytes for t in packed.kept)


def hold(weight: Tensor, packed: native.Packed) -> Tensor:
    """Return a `placeholder` that stands for a packed weight from now on."""
    setattr(weight, HOME, PackedWeight(packed, _version(weight), weight.data_ptr()))
    return weight


def hold_packed(module: Any, packed: native.Packed) -> None:
    """Let a module compute with a packed weight alone.

    Args:
        module: A linear layer or an embedding whose weight is a `placeholder`.
        packed: Its weight.
    """
    hold(module.weight.requires_grad_(False), packed)


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version


@lru_cache
def reads_packed() -> bool:
    """Return True if the kernels read weights in 4 and 8 bits as what they stand for, by rows and in products."""
    k = native.kernels()
    numbers = torch.arange(50 * 32, dtype=torch.int64, device="cpu").view(50, 32)
    x = (torch.arange(13 * 32, device="cpu").view(13, 32) * 7 % 11).float()
    for bits in (4, 8):
        half = 2 ** (bits - 1)
        values, scale = (numbers * 5 % (2 * half) - half).to(torch.int8), (numbers[:, :2] % 3 + 1).float() / 4
        zero = (numbers[:, :2] % 5 - 2).to(torch.int8)
        dense = ((values.float().view(50, 2, 16) - zero[..., None]) * scale[..., None]).view(50, 32)
        packed = pack_weight(values, scale, zero, bits)
        if k is None or not torch.equal(k.dequantize(packed), dense):
            return False
        if not torch.allclose(k.quantized_linear(x, packed), x @ dense.t(), rtol=1e-5, atol=1e-2):
            return False
    return True
