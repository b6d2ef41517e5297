"""Sampling of what is trained on, beside the policy: its weights by version, and how busy it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.core.types import RolloutGroup
from posttrain.sampling.protocol import OnDone, Request, Sampler


class Updated(Protocol):
    """A worker or workers: see `posttrain.sampling.worker_protocol.SamplerWorker`."""

    version: int

    def update(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Replace weights."""

    def close(self) -> None:
        """End what samples."""


class BehaviourSampler:
    """Sample in workers from several threads at once, and measure for how long there is anything to sample."""

    def __init__(self, sampler: Sampler, workers: Updated, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Make a sampler.

        Args:
            sampler: Asks the workers; several threads may call it.
            workers: Get the weights. They were opened with version 0, those of the stage's beginning.
            weights: Returns the policy's present weights as the workers name them.
        """
        self.sampler, self.workers, self.weights = sampler, workers, weights
        self._guard = threading.Lock()
        self._calls, self._asked = 0, 0
        self._busy, self._since = 0.0, 0.0

    def publish(self, version: int) -> None:
        """Hand the policy's weights to the workers; nothing must train it meanwhile."""
        if version != self.workers.version:
            self.workers.update(version, self.weights())

    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        """Complete every request; order is kept.

        Args:
            requests: The prompts.
            params: How tokens are drawn.
            on_done: Called as completions end, in any thread.
        """
        count = sum(r.n for r in requests)
        self._count(1, count)
        try:
            return self.sampler.sample(requests, params, on_done)
        finally:
            self._count(-1, -count)

    def _count(self, calls: int, completions: int) -> None:
        with self._guard:
            now = time.perf_counter()
            if not self._calls:
                self._since = now
            self._calls += calls
            self._asked += completions
            if not self._calls:
                self._busy += now - self._since

    def measured(self) -> tuple[float, int]:
        """Return (seconds so far in which something was asked for, completions that are asked for now)."""
        with self._guard:
            running = time.perf_counter() - self._since if self._calls else 0.0
            return self._busy + running, self._asked

    def close(self) -> None:
        """End the workers."""
        self.workers.close()
