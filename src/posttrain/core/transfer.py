"""Copy tensors between host and device without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device; to a GPU through pinned memory, so that the host does not wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # torch keeps the pinned block until the copy is done.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def all_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy vectors of one dtype to a device, to a GPU in a single copy; the results are views of one tensor there."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return list(to_device(torch.cat(list(tensors)), device).split([len(tensor) for tensor in tensors]))
