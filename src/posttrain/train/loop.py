"""The loop around the learner: batches by step number, metrics, checkpoints, progress, stopping on request."""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.distributed import ranks
from posttrain.errors import CheckpointError
from posttrain.files import Lines
from posttrain.progress import Track
from posttrain.train import checkpoint
from posttrain.train.learner import Learner, LossFunction
from posttrain.types import Sample

BatchAt = Callable[[int], Sequence[Sample]]
"""The global batch of a step: a pure function of its number, so that the data position is the step."""
OnStep = Callable[[int, dict[str, float], dict[str, float]], None]


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, has written a checkpoint, and can go on."""


@dataclass(frozen=True)
class LoopResult:
    """What a finished loop did in all (over every process that worked on it)."""

    steps: int
    skipped: int
    seconds: float
    tokens: int
    peak_memory_mb: float


def steps_for(count: int, batch_size: int, epochs: float, max_steps: int | None = None) -> tuple[int, int]:
    """(steps, samples drawn in all): as many as `epochs` passes over `count` samples need, capped by `max_steps`."""
    drawn = max(1, round(count * epochs))
    steps = -(-drawn // batch_size)
    return min(steps, max_steps or steps), drawn


def permutation_batches(
    samples: Sequence[Sample], batch_size: int, epochs: float, seed: int, max_steps: int | None = None
) -> tuple[BatchAt, int]:
    """(batch_at, total steps): every epoch a fresh permutation, drawn from (seed, epoch) alone.

    Batches run over the seam between epochs; the last one is smaller where the samples don't fill it.
    """
    count = len(samples)
    steps, wanted = steps_for(count, batch_size, epochs, max_steps)
    orders: dict[int, np.ndarray] = {}

    def order(epoch: int) -> np.ndarray:
        if epoch not in orders:
            orders.clear()
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(count)
        return orders[epoch]

    def batch_at(step: int) -> Sequence[Sample]:
        places = range(step * batch_size, min((step + 1) * batch_size, wanted))
        return [samples[int(order(p // count)[p % count])] for p in places]

    return batch_at, steps


def train(
    learner: Learner,
    batch_at: BatchAt,
    folder: Path,
    *,
    checkpoint_every: int,
    keep: int,
    title: str,
    loss: LossFunction | None = None,
    on_step: OnStep | None = None,
    epoch_of: Callable[[int], float] | None = None,
) -> LoopResult:
    """Run the learner to its last step from wherever the newest checkpoint in `folder` left it.

    metrics.jsonl gets one record a step, the same in every run of the same recipe; timings.jsonl what differs from
    run to run. Records beyond the checkpoint that is gone on from are cut off, since their steps are made again.
    """
    checkpoints = folder / "checkpoints"
    state = learner.state()
    numbers = checkpoint.load_newest(checkpoints, state["tensors"])
    if numbers is not None:
        learner.load(numbers)
    totals = {"seconds": 0.0, "tokens": 0, "peak_memory_mb": 0.0, **(numbers or {}).get("totals", {})}
    main, total = ranks.is_main(), learner.total_steps
    files = _open(folder, learner.steps_done) if main else None

    def save() -> None:
        if files:
            for f in files:
                f.sync()
        state = learner.state()
        checkpoint.save(checkpoints, learner.steps_done, state["tensors"], {**state["numbers"], "totals": totals}, keep)

    with Track(title, total, learner.steps_done, shown=main) as track, _stop_requests() as asked:
        saved = learner.steps_done if numbers is not None else -1
        while learner.steps_done < total:
            batch = batch_at(learner.steps_done)
            result = learner.step(batch, loss)
            step = learner.steps_done
            memory = memory_mb(learner.device)
            totals["seconds"] += result.seconds
            totals["tokens"] += result.tokens
            totals["peak_memory_mb"] = max(totals["peak_memory_mb"], memory)
            record: dict[str, float] = {"step": step, **result.metrics}
            if epoch_of is not None:
                record["epoch"] = round(epoch_of(step), 4)
            rate = result.tokens / result.seconds
            timing = {"step": step, "seconds": result.seconds, "tokens_per_second": rate, "memory_mb": memory}
            timing.update(computed_tokens=result.computed_tokens, micro_batches=result.micro_batches)
            if files:
                files[0].add(record)
                files[1].add(timing)
                if on_step is not None:
                    on_step(step, record, timing)
            track.update(step, loss=record.get("loss", 0.0), tokens_per_s=float(rate), lr=record["lr"])
            stopping = bool(ranks.from_main(bool(asked)))
            if step % checkpoint_every == 0 or step == total or stopping:
                save()
                saved = step
            if stopping and step < total:
                raise Stopped(f"stopped at step {step} of {total}, checkpoint written")
        if saved != learner.steps_done:
            save()
    if files:
        for f in files:
            f.close()
    return LoopResult(
        learner.steps_done, learner.skipped, totals["seconds"], int(totals["tokens"]), totals["peak_memory_mb"]
    )


def _open(folder: Path, steps: int) -> tuple[Lines, Lines]:
    try:
        return Lines(folder / "metrics.jsonl", steps), Lines(folder / "timings.jsonl", steps)
    except OSError as error:
        raise CheckpointError(
            f"{error}: the checkpoint counts on records that are gone. Put the file back, or start over with --fresh"
        ) from error


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """SIGINT and SIGTERM ask for a stop after this step; a second one stops at once."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this step, with a checkpoint (once more: at once)", file=sys.stderr, flush=True)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: signals are the caller's affair
        pass
    try:
        yield asked
    finally:
        for restored, old in before.items():
            signal.signal(restored, old)


def memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def now() -> str:
    """The time, for manifests."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
