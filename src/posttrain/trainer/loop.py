"""The loop around the learner: batches by step number, metrics, checkpoints, progress, stopping on request."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from posttrain.config.settings import MeasuredConfig
from posttrain.core import distributed
from posttrain.core.epoch_order import RowWeights, epoch_order, epoch_size
from posttrain.core.errors import CheckpointError
from posttrain.core.files import Lines
from posttrain.core.progress import Track
from posttrain.core.types import Sample
from posttrain.trainer import checkpoint
from posttrain.trainer.best_step import HELD_OUT_LOSS, BestStep, measured_every
from posttrain.trainer.train_step import Learner, LossFunction, StepResult

BatchAt = Callable[[int], Sequence[Sample]]
"""The global batch of a step: a pure function of its number, so that the data position is the step."""
Measure = Callable[[int, Track], dict[str, float]]
"""(steps done, progress) -> numbers for metrics.jsonl."""
OnStep = Callable[[int, dict[str, float], dict[str, float]], None]


class Stopped(KeyboardInterrupt):
    """Report that the run was asked to stop, has written a checkpoint, and can be resumed.

    Attributes:
        step: Steps that are done. None: not told.
        asked: A signal asked for it, rather than `stop_at`.
    """

    def __init__(self, message: str, step: int | None = None, asked: bool = True) -> None:
        super().__init__(message)
        self.step, self.asked = step, asked


STOP_AT: ContextVar[tuple[str, float] | None] = ContextVar("STOP_AT", default=None)


@contextmanager
def stop_at(stage: str, fraction: float) -> Iterator[None]:
    """Stop runs inside the context as SIGTERM would, once a stage has taken a part of its steps.

    Args:
        stage: Name of the stage.
        fraction: The part: the stage stops after ceil(fraction * steps) steps, unless it is finished then.
    """
    token = STOP_AT.set((stage, fraction))
    try:
        yield
    finally:
        STOP_AT.reset(token)


def _planned_stop(folder: Path, steps: int) -> int:
    """Return the step after which the stage in `folder` is to stop; its last one if none was set."""
    stage, fraction = STOP_AT.get() or ("", 1.0)
    return math.ceil(fraction * steps) if folder.name.partition("-")[2] == stage else steps


@dataclass(frozen=True)
class LoopResult:
    """Hold the totals of a finished loop (over every process that worked on it).

    Attributes:
        more: What the trainer adds to the stage's entry in the manifest.
    """

    steps: int
    skipped: int
    seconds: float
    tokens: int
    peak_memory_mb: float
    more: dict[str, Any] = field(default_factory=dict)


def steps_for(count: int, batch_size: int, epochs: float, max_steps: int | None = None) -> tuple[int, int]:
    """Count the steps, and the samples drawn in total: `max_steps` steps, or `epochs` passes over `count` samples.

    Args:
        count: Number of samples.
        batch_size: Samples a step.
        epochs: Passes, if `max_steps` is None.
        max_steps: Number of steps, whatever `epochs` is. None: what `epochs` needs.

    Returns:
        (steps, samples drawn in total).
    """
    drawn = max(1, round(count * epochs)) if max_steps is None else max_steps * batch_size
    return -(-drawn // batch_size), drawn


def permutation_batches(
    samples: Sequence[Sample],
    batch_size: int,
    epochs: float,
    seed: int,
    max_steps: int | None = None,
    weights: RowWeights | None = None,
) -> tuple[BatchAt, int]:
    """Draw batches: every epoch a fresh permutation, from (seed, epoch) alone.

    Batches run over the boundary between epochs; the last one is smaller if the samples don't fill it.

    Args:
        samples: All samples.
        batch_size: Samples a step.
        epochs: Passes, if `max_steps` is None.
        seed: Seed of the permutations.
        max_steps: Number of steps, in as many passes as they take. None: what `epochs` needs.
        weights: How often each sample is drawn in an epoch. None: each once.

    Returns:
        (batch_at, total steps).
    """
    count = epoch_size(len(samples), weights)
    steps, wanted = steps_for(count, batch_size, epochs, max_steps)
    orders: dict[int, np.ndarray] = {}

    def order(epoch: int) -> np.ndarray:
        if epoch not in orders:
            orders.clear()
            orders[epoch] = epoch_order(seed, epoch, len(samples), weights)
        return orders[epoch]

    def batch_at(step: int) -> Sequence[Sample]:
        places = range(step * batch_size, min((step + 1) * batch_size, wanted))
        return [samples[int(order(p // count)[p % count])] for p in places]

    return batch_at, steps


class Trainer(Protocol):
    """Take the optimizer steps of a stage. All state that the next step depends on is in the learner and `state_dict`.

    Subclass it to inherit the defaults: no initial record, no state besides the learner's.

    Attributes:
        steps: Number of steps in total.
        stopped: True if the stage is to end after the step that was taken last.
    """

    learner: Learner
    steps: int
    stopped: bool = False

    def step(self, step: int, track: Track) -> StepResult:
        """Take step number `step`, counted from 0."""

    def initial_record(self, track: Track) -> dict[str, Any] | None:
        """Return a record for metrics.jsonl from before the first step; None for every run of a recipe without one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state besides the learner's, as plain values for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        return None

    def finish(self, done: int) -> dict[str, Any]:
        """Bring the model into its final state after `done` steps; return what the stage's manifest entry gets."""
        return {}


class BatchTrainer(Trainer):
    """Take one optimizer step on each global batch, a pure function of the step's number, and measure in between."""

    def __init__(
        self,
        learner: Learner,
        batch_at: BatchAt,
        loss: LossFunction | None = None,
        measure: Measure | None = None,
        every: int = 0,
        settings: MeasuredConfig | None = None,
        folder: Path | None = None,
    ) -> None:
        """Make a trainer.

        Args:
            learner: Model and optimizer.
            batch_at: Batch of each step.
            loss: Loss of a micro-batch. None: cross-entropy.
            measure: Measures held-out data before the first step and after the last. None: nothing is measured.
            every: Steps between further measurements. 0: none.
            settings: When to measure (in place of `every`) and to stop, and whether the model gets the weights of the
                step that measured best. None: those of the last step.
            folder: The stage's folder, for these weights.
        """
        self.learner, self.batch_at, self.loss = learner, batch_at, loss
        self.measure, self.every, self.steps = measure, every, learner.total_steps
        self.best: BestStep | None = None
        if measure is not None and settings is not None and folder is not None:
            keep, stopping = settings.keep_best, settings.early_stopping
            self.best = BestStep(learner.model, folder, self.steps, keep=keep, stopping=stopping)
            self.every = measured_every(settings, self.steps)
        self.held_out_seconds = 0.0

    def step(self, step: int, track: Track) -> StepResult:
        result, done = self.update(step), step + 1
        if self.measure is not None and self._due(done):
            before = self.held_out_seconds
            result.metrics.update(self._measured(self.measure, done, track))
            result.timing["held_out_seconds"] = self.held_out_seconds - before
        return result

    def update(self, step: int) -> StepResult:
        """Take one optimizer step."""
        return self.learner.step(self.batch_at(step), self.loss)

    def _due(self, done: int) -> bool:
        """Return True if held-out data are measured after `done` steps."""
        return done == self.steps or bool(self.every and done % self.every == 0)

    def _measured(self, measure: Measure, done: int, track: Track) -> dict[str, float]:
        """Measure, and keep the time apart from that of the steps, in the estimate of the time left too."""
        began = time.perf_counter()
        numbers = measure(done, track)
        if self.best is not None:
            self.best.note(done, numbers.get(HELD_OUT_LOSS, math.nan))
        seconds = time.perf_counter() - began
        self.held_out_seconds += seconds
        regular = self.steps // self.every - done // self.every if self.every else 0
        at_the_end = done < self.steps and not (self.every and self.steps % self.every == 0)
        track.set_aside(seconds, seconds * (regular + at_the_end))
        return numbers

    @property
    def stopped(self) -> bool:  # type: ignore[override]
        return self.best is not None and self.best.stopped

    def initial_record(self, track: Track) -> dict[str, Any] | None:
        return self._measured(self.measure, 0, track) if self.measure is not None else None

    def state_dict(self) -> dict[str, Any]:
        if self.measure is None:
            return {}
        return {"held_out_seconds": self.held_out_seconds, **(self.best.state_dict() if self.best else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.measure is not None:
            self.held_out_seconds = float(state.get("held_out_seconds", 0.0))
        if self.best is not None:
            self.best.load_state_dict(state)

    def finish(self, done: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if self.measure is not None:
            out["held_out_seconds"] = round(self.held_out_seconds, 2)
        if self.best is not None:
            self.best.restore(done)
            out |= self.best.summary(done)
        return out


def train(
    learner: Learner,
    trainer: Trainer,
    folder: Path,
    *,
    checkpoint_every: int,
    keep: int,
    title: str,
    on_step: OnStep | None = None,
    epoch_of: Callable[[int], float | None] | None = None,
    shown: Sequence[str] = ("loss",),
    plan: str = "",
) -> LoopResult:
    """Run the trainer from the newest checkpoint in `folder` to its last step, or to the one after which it stops.

    metrics.jsonl gets one record a step (and one before the first, if the trainer has one), the same in every run of
    the same recipe; timings.jsonl gets what differs from run to run. Records after the checkpoint that is resumed are
    cut off, since their steps are repeated.

    Args:
        learner: Its state goes into the checkpoints.
        trainer: Takes the steps.
        folder: The stage's folder.
        checkpoint_every: Steps between checkpoints.
        keep: How many checkpoints to keep.
        title: Title of the progress bar.
        on_step: Called with (step, metrics, timings) after each step.
        epoch_of: Gives the epoch after a number of steps, for the metrics.
        shown: Metrics that progress shows.
        plan: Line on the steps to come, shown before the first.
    """
    checkpoints = folder / "checkpoints"
    numbers = _resume(learner, trainer, checkpoints)
    totals = {"seconds": 0.0, "tokens": 0, "peak_memory_mb": 0.0, **(numbers or {}).get("totals", {})}
    done = 0 if numbers is None else int(numbers["step"])
    main, total = distributed.is_main(), trainer.steps
    planned = _planned_stop(folder, total)

    with Track(title, total, done, shown=main) as track, stop_requests(_say_stopping) as asked:
        if plan:
            track.say(plan)
        first = trainer.initial_record(track) if numbers is None else None
        before = int((numbers or {}).get("before", first is not None))
        files = _open(folder, done, before, numbers or {}) if main else None
        if files and first is not None:
            files[0].add({"step": 0, **first})

        def save() -> None:
            learner.check_weights()  # here, where the weights are copied anyway, and not in each step
            counted = {"totals": totals, "before": before, "records": [f.sync() for f in files or ()]}
            state = learner.state_dict()
            values = {**state["numbers"], **trainer.state_dict(), **counted}
            checkpoint.save(checkpoints, done, state["tensors"], values, keep)

        saved = done if numbers is not None else -1
        while done < total and not trainer.stopped:
            result = trainer.step(done, track)
            done += 1
            record, timing = _records(done, result, learner, totals, epoch_of)
            if files:
                files[0].add(record)
                files[1].add(timing)
                if on_step is not None:
                    on_step(done, record, timing)
            track.total = done if trainer.stopped else total
            values = {name.replace("/", " "): record[name] for name in shown if name in record}
            track.update(done, **values, tokens_per_s=float(timing["tokens_per_second"]), lr=record["lr"])
            stopping = bool(distributed.from_main(bool(asked))) or done >= planned
            if done % checkpoint_every == 0 or done == total or stopping or trainer.stopped:
                save()
                saved = done
            if stopping and done < total and not trainer.stopped:
                raise Stopped(f"stopped at step {done} of {total}, checkpoint written", done, bool(asked))
        if saved != done:
            save()
    for f in files or ():
        f.close()
    more = trainer.finish(done)
    return LoopResult(done, learner.skipped, totals["seconds"], int(totals["tokens"]), totals["peak_memory_mb"], more)


def _resume(learner: Learner, trainer: Trainer, checkpoints: Path) -> dict[str, Any] | None:
    """Load the newest checkpoint; return its plain values, or None if there is none."""
    numbers = checkpoint.load_newest(checkpoints, learner.state_dict()["tensors"])
    if numbers is not None:
        learner.load_state_dict(numbers)
        trainer.load_state_dict(numbers)
    return numbers


def _records(
    step: int,
    result: StepResult,
    learner: Learner,
    totals: dict[str, Any],
    epoch_of: Callable[[int], float | None] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (metrics, timings) of a step, and add it to the stage's totals."""
    memory = memory_mb(learner.device)
    totals["seconds"] += result.seconds
    totals["tokens"] += result.tokens
    totals["peak_memory_mb"] = max(totals["peak_memory_mb"], memory)
    timing = {"step": step, "seconds": result.seconds, "tokens_per_second": result.tokens / result.seconds}
    timing.update(memory_mb=memory, computed_tokens=result.computed_tokens, micro_batches=result.micro_batches)
    epoch = epoch_of(step) if epoch_of is not None else None
    of_epoch = {} if epoch is None else {"epoch": round(epoch, 4)}
    return {"step": step, **result.metrics, **of_epoch}, {**timing, **result.timing}


def _open(folder: Path, done: int, before: int, numbers: dict[str, Any]) -> tuple[Lines, Lines]:
    """Open metrics.jsonl and timings.jsonl after the records that a checkpoint counts on.

    Args:
        folder: Folder of the stage.
        done: Steps that are done.
        before: Records of metrics.jsonl from before the first step.
        numbers: Values of the checkpoint, if there is one.
    """
    counts, digests = (done + before if numbers else 0, done), numbers.get("records", [None, None])
    try:
        metrics, timings = (
            Lines(folder / name, count, digest)
            for name, count, digest in zip(("metrics.jsonl", "timings.jsonl"), counts, digests, strict=True)
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}: the checkpoint counts on these records. Put the file back, or start over with --fresh"
        ) from error
    return metrics, timings


@contextmanager
def stop_requests(on_first: Callable[[], object]) -> Iterator[list[int]]:
    """Let SIGINT and SIGTERM ask for a stop; a second one raises KeyboardInterrupt.

    Yields the signals that came. `on_first` is called at the first one.
    """
    asked: list[int] = []
    before: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        on_first()

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


def _say_stopping() -> None:
    print("\nstopping after this step, with a checkpoint (once more: at once)", file=sys.stderr, flush=True)


def memory_mb(device: torch.device) -> float:
    """Return the peak memory in MiB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def now() -> str:
    """Return the time, for manifests."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
