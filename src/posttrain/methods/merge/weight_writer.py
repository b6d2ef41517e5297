"""Write a model's weights as safetensors shards, tensor by tensor, without holding a shard in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.core.files import write_json

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of dtypes in the format."""


@dataclass(frozen=True)
class PlannedTensor:
    """Hold what is known of a tensor before it is computed.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: Its dtype in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return self.numbers * self.dtype.itemsize


def shards_of(tensors: Sequence[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    """Return tensors in groups of at most `max_bytes`, in their order; a larger tensor has a group of its own."""
    shards: list[list[PlannedTensor]] = [[]]
    total = 0
    for tensor in tensors:
        if shards[-1] and total + tensor.size > max_bytes:
            shards.append([])
            total = 0
        shards[-1].append(tensor)
        total += tensor.size
    return shards


def write_weights(
    folder: Path,
    tensors: Sequence[PlannedTensor],
    compute: Callable[[str], Tensor],
    max_bytes: int,
    on_tensor: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Write tensors in the layout of transformers: model.safetensors, or shards with an index.

    Args:
        folder: Where to write.
        tensors: The tensors, in the order in which they are computed.
        compute: Returns the values of a tensor by its name; they are cast to its dtype.
        max_bytes: Largest shard.
        on_tensor: Called with the number of tensors that are written.

    Returns:
        The files of weights.
    """
    shards = shards_of(tensors, max_bytes)
    many, done, files = len(shards) > 1, 0, []
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = folder / (f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors")
        with file.open("wb") as out:
            out.write(_header(shard))
            for tensor in shard:
                out.write(_bytes(compute(tensor.name), tensor))
                where[tensor.name] = file.name
                done += 1
                on_tensor(done)
            out.flush()
            os.fsync(out.fileno())
        files.append(file)
    if many:
        total = {"total_size": sum(t.size for t in tensors), "total_parameters": sum(t.numbers for t in tensors)}
        write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": where})
    return files


def _header(shard: Sequence[PlannedTensor]) -> bytes:
    """Return the beginning of a file: the length of a JSON object, and the object, padded to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.size
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(value: Tensor, planned: PlannedTensor) -> Any:
    if tuple(value.shape) != planned.shape:
        raise ValueError(f"{planned.name}: computed {tuple(value.shape)}, expected {planned.shape}")
    cast = value.to(planned.dtype).contiguous()
    return cast.reshape(-1).view(torch.uint8).numpy() if cast.numel() else b""
