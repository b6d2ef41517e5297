"""Gradients of large weights added where they are kept, rather than made, carried along and added.

A vocabulary's weights get gradients twice in a pass where it is tied: first from the output head, last from the
embedding. By itself autograd holds the first until the second is there, through all of backward, when memory is at
its fullest, and moves each of them three times. Whoever keeps gradients in a place of their own (the learner does)
says so for the time of `backward`; functions that can then add to that place and return nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

_places: dict[int, tuple[nn.Parameter, Tensor]] = {}
"""By the address of the parameter's memory: what backward gets to see may be another tensor object over it."""


@contextmanager
def added_in_place(places: Iterable[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Let gradients of these parameters be added, within the context, to the tensors beside them, each of its shape.

    Such a gradient never passes a hook on the parameter, nor `torch.autograd.grad`.
    """
    global _places
    before, _places = _places, {p.data_ptr(): (p, place) for p, place in places}
    try:
        yield
    finally:
        _places = before


def place_of(weight: Tensor) -> Tensor | None:
    """Return the tensor to add a gradient of `weight` to, which holds the sum so far; None if it is to be returned."""
    found = _places.get(weight.data_ptr())
    if found is None or found[1].shape != weight.shape or found[1].dtype != weight.dtype:
        return None
    parameter, place = found
    if parameter.grad is None:
        parameter.grad = place.zero_()
    return parameter.grad if parameter.grad is place else None
