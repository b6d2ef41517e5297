"""Results that are cheap to make again are not kept for backward, whoever asks for them.

A norm's output goes into several linear layers, and autograd keeps it for their weights' gradients; what it was made
from is kept anyway. Whoever makes such a tensor says how (`made`); where autograd then wants to keep that very memory,
it gets the way to make it instead. What backward sees is the same to the last bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SLACK = 64
"""Numbers more than needed; what aligning takes is at most 96 bytes."""


@dataclass
class _Way:
    """Recipe of a tensor that several consumers were promised; computed once for all of them."""

    make: Callable[[], Tensor]
    waiting: int = 0
    again: Tensor | None = None

    def take(self) -> Tensor:
        # What was promised is contiguous; made of a transposed input, it may come out transposed.
        out = self.make().contiguous() if self.again is None else self.again
        self.waiting -= 1
        self.again = out if self.waiting > 0 else None
        return out


class _Known(threading.local):
    """Hold the tensors of a thread's forward pass that is on its way: another thread may sample meanwhile.

    Attributes:
        ways: By the address of the storage's record; None: nobody asks.
    """

    ways: dict[int, tuple[StorageWeakRef, torch.Size, _Way]] | None = None


_known = _Known()


def asked() -> bool:
    """Return True if ways to recompute tensors are collected.

    Never while layers are compiled: nothing is known there.
    """
    return _known.ways is not None and not torch.compiler.is_compiling()


def made(out: Tensor, make: Callable[[], Tensor]) -> None:
    """Say that `make` gives `out` again: a tensor of the same shape, whose strides may differ."""
    if _known.ways is not None and out.is_contiguous():
        reference = StorageWeakRef(out.untyped_storage())  # holds the record, not the memory: no other gets its address
        _known.ways[reference.cdata] = reference, out.shape, _Way(make)


def roomy(like: Tensor) -> Tensor:
    """Fresh memory for a tensor that will soon be gone, with a little more than it needs.

    glibc gives aligned memory out of a block that is larger by the alignment, and the rest of that block to whoever
    wants little. A hole as large as a tensor is therefore too small for the next one of the same size.
    """
    storage = torch.empty(like.numel() + SLACK, dtype=like.dtype).untyped_storage()
    return torch.empty(0, dtype=like.dtype).set_(storage, 0, like.shape)  # type: ignore[no-any-return, call-overload]


@contextmanager
def cheap_results() -> Iterator[None]:
    """Within it autograd keeps no tensor that was said to be `made`."""

    def pack(tensor: Tensor) -> Tensor | tuple[_Way, torch.Size]:
        found = (_known.ways or {}).get(tensor.untyped_storage()._cdata)
        if found is None or tensor.numel() != found[1].numel() or not tensor.is_contiguous():
            return tensor
        found[2].waiting += 1
        return found[2], tensor.shape

    def unpack(kept: Tensor | tuple[_Way, torch.Size]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].take().view(kept[1])

    before, _known.ways = _known.ways, {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _known.ways = before
