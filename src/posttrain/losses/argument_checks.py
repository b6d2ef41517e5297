"""Checks of what losses are given. None waits for a GPU: there a condition on values is a device-side assertion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def require_all(condition: Tensor, message: Callable[[], str]) -> None:
    """Raise ValueError unless every value of `condition` is true.

    On a GPU the check runs on the device and the host does not wait for it: a false value is reported at the next
    synchronisation as a device-side assertion, without the message.

    Args:
        condition: Tensor of bool, of any shape.
        message: Returns the text of the error; called only on a CPU, where values can be read.
    """
    holds, kind = condition.all(), condition.device.type
    if kind == "cuda":
        torch._assert_async(holds, "an argument is out of its range; run on a CPU to see which")
        return
    try:
        torch._assert_async(holds if kind == "cpu" else holds.cpu())  # other devices have no such assertion
    except RuntimeError:
        raise ValueError(message()) from None


def require_vectors(*tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are vectors of one length."""
    shapes = [tuple(t.shape) for t in tensors]
    if any(t.ndim != 1 for t in tensors) or len(set(shapes)) != 1:
        raise ValueError(f"expected vectors of one length, got shapes {shapes}")


def require_probabilities(values: Tensor, name: str) -> None:
    """Raise ValueError unless all values lie in [0, 1]."""
    require_all(
        (values >= 0) & (values <= 1),
        lambda: f"{name} must lie in [0, 1], and go from {values.min():g} to {values.max():g}",
    )
