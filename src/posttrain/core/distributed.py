"""Ranks: one process is the case of one. Under torchrun there are as many as it started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.core.errors import RecipeError

PEER_WAIT = timedelta(hours=12)
"""How long a process waits for the others: rank 0 alone evaluates, and NCCL's own limit is 10 minutes."""
_replicas = 1
_sequence_parallel = 1
_sequence_group: dist.ProcessGroup | None = None
X = TypeVar("X")
Y = TypeVar("Y")


def start(device: torch.device, replicas: int = 1, sequence_parallel: int = 1) -> None:
    """Join the process group that torchrun set up (gloo on a CPU, NCCL on GPUs); nothing to do for one process.

    Args:
        device: Device of this process.
        replicas: Copies of the weights that `shard` makes.
        sequence_parallel: Neighbouring processes that compute each micro-batch together.

    Raises:
        RecipeError: The processes can't be divided into as many copies, or into such groups.
    """
    global _replicas, _sequence_parallel
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes % replicas:
        raise RecipeError(f"systems.replicas is {replicas}, and {processes} processes can't be divided into as many")
    if processes % sequence_parallel:
        raise RecipeError(
            f"systems.sequence_parallel is {sequence_parallel}, and {processes} process{'es' * (processes > 1)} can't "
            f"be divided into groups of as many: start a multiple of {sequence_parallel} (torchrun --nproc-per-node "
            f"{sequence_parallel} -m posttrain run RECIPE, or systems: {{engine: ray, trainers: {sequence_parallel}}})"
        )
    if processes > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PEER_WAIT)
        _replicas, _sequence_parallel = replicas, sequence_parallel
        _make_sequence_groups()


def _make_sequence_groups() -> None:
    """Make a process group of each run of `sequence_parallel()` neighbouring ranks, and keep this rank's."""
    global _sequence_group
    n = sequence_parallel()
    for first in range(0, world() if n > 1 else 0, n):  # every rank has to make all of them
        group = dist.new_group(range(first, first + n), timeout=PEER_WAIT)
        if first <= rank() < first + n:
            _sequence_group = group


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shards() -> int:
    """Return the number of processes that hold one copy of the weights together."""
    return world() // _replicas if dist.is_initialized() else 1


def sequence_parallel() -> int:
    """Return the number of processes that compute a micro-batch together; 1: each computes its own."""
    return _sequence_parallel if dist.is_initialized() else 1


def sequence_group() -> dist.ProcessGroup | None:
    """Return the process group of those that compute a micro-batch together with this one."""
    return _sequence_group


def is_main() -> bool:
    """Return True on the rank that writes files and shows progress."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def from_main(value: Any) -> Any:
    """Return rank 0's value, on every rank (any picklable object)."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value: Any) -> list[Any]:
    """Return every rank's value, in the order of ranks, on every rank (picklable objects; every rank must call)."""
    if world() == 1:
        return [value]
    box = [None] * world()
    dist.all_gather_object(box, value)
    return box


def map_over_ranks(items: Sequence[X], work: Callable[[list[X]], Sequence[Y]]) -> list[Y]:
    """Apply `work` to all items, an equal part of them on each rank, and return all results in order on every rank.

    work: a list of items -> one result each, picklable; the list may be empty. Every rank must call.
    """
    n = world()
    out: dict[int, Y] = {}
    for r, part in enumerate(all_gather_object(list(work(list(items[rank() % n :: n]))))):
        out |= zip(range(r, len(items), n), part, strict=True)
    return [out[i] for i in range(len(items))]


@contextmanager
def summon_full_params(model: nn.Module) -> Iterator[None]:
    """Make the weights of a sharded model whole on each rank within the context.

    Each rank may then run forward passes of its own, any number. Nothing is trained meanwhile. Every rank must enter
    and leave.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


class Sealed(Generic[X]):
    """Hold an argument of a module that may be sharded.

    FSDP looks for tensors in an argument's lists and dataclasses, casts them and passes on copies. In a batch that is a
    call of Python for each token id, and loss weights in bfloat16. Other objects it leaves alone.
    """

    def __init__(self, value: X) -> None:
        self.value = value


def shard(
    model: nn.Module,
    layers: Sequence[nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    exact: Sequence[nn.Module] = (),
) -> None:
    """Shard a model with FSDP2 over all ranks, a layer at a time and then the rest; in place.

    Parameters stay float32 at rest. With several replicas (HSDP) each is sharded over neighbouring ranks, and gradients
    are summed over the replicas.

    Args:
        model: The model.
        layers: Its repeated layers.
        dtype: Compute dtype; all-gathers carry it, gradients are summed in float32.
        device: Device of this rank.
        exact: Modules that compute in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape, names = ((_replicas, shards()), ("replicate", "shard")) if _replicas > 1 else ((world(),), ("shard",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # Inputs stay as they are: a layer's have the dtype of the one before, a loss's coefficients are float32.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh}
    for module in exact:
        fully_shard(module, **options)
    if dtype != torch.float32:
        options["mp_policy"] = policy
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, reshard_after_forward=False, **options)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded over ranks (every rank must call)."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor that may be sharded over ranks; it may be empty."""
    part = getattr(tensor, "to_local", None)
    return part() if part is not None else tensor
