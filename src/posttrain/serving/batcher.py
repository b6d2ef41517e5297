"""The thread that computes for all clients of a server: their requests share one batch."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from posttrain.core.secrets import hide_secrets
from posttrain.core.visible_text import visible
from posttrain.models.row_adapters import RowAdapters
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.open_session import JoiningPrompt, OpenSession


class QueueFull(Exception):
    """Report that no more requests may wait."""


class Closing(Exception):
    """Report that the server is stopping and takes no more requests."""


@dataclass
class BatchJob:
    """The prompts of one HTTP request.

    Attributes:
        prompts: The prompts; their callbacks are called by the computing thread.
        on_failure: Called in their place if computing fails; what failed is on the server's standard error.
    """

    prompts: Sequence[JoiningPrompt]
    on_failure: Callable[[], None]

    def cancel(self) -> None:
        """Stop computing what has not ended."""
        for prompt in self.prompts:
            prompt.cancelled = True

    @property
    def ended(self) -> bool:
        """Return True if nothing of it is left to compute."""
        return all(p.cancelled or len(p.done) == p.request.n for p in self.prompts)


class Batcher:
    """Computes jobs of many threads in one of its own. most_waiting: prompts that may wait for room in the batch."""

    def __init__(self, sampler: LocalSampler, most_waiting: int = 256) -> None:
        self.sampler, self.most_waiting = sampler, most_waiting
        self.adapters = RowAdapters(sampler.model)
        with torch.inference_mode():
            self.session = OpenSession(sampler, self.adapters)
        self._changed = threading.Condition()
        self._incoming: list[BatchJob] = []
        self._jobs: list[BatchJob] = []
        self._closing = self._stop = False
        self._thread = threading.Thread(target=self._work, name="posttrain-batch", daemon=True)
        self._thread.start()

    def submit(self, job: BatchJob) -> None:
        """Let the prompts of a job join the batch.

        Raises:
            DataError: One of them could not be computed even alone.
            QueueFull: Too many prompts wait.
            Closing: The server is stopping.
        """
        for prompt in job.prompts:
            self.session.check(prompt)
        with self._changed:
            if self._closing:
                raise Closing
            waiting = len(self.session.waiting) + sum(len(j.prompts) for j in self._incoming)
            if waiting + len(job.prompts) > self.most_waiting:
                raise QueueFull
            self._incoming.append(job)
            self._changed.notify()

    def running(self) -> tuple[int, int]:
        """Return the numbers of completions that run and of prompts that wait."""
        with self._changed:
            incoming = sum(len(j.prompts) for j in self._incoming)
        return len(self.session.rows), len(self.session.waiting) + incoming

    def close(self, seconds: float) -> None:
        """Take no more jobs, finish those there are for at most so many seconds, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        self._stop = True
        self._thread.join()

    def _work(self) -> None:
        with torch.inference_mode():
            while self._take():
                try:
                    self.session.turn()
                except Exception:
                    self._fail()
                self._jobs = [job for job in self._jobs if not job.ended]
        for job in self._jobs:
            job.on_failure()

    def _take(self) -> bool:
        """Wait for work and take it in; False: the end."""
        with self._changed:
            while not (self._incoming or self.session.busy or self._closing):
                self._changed.wait()
            taken, self._incoming = self._incoming, []
            self._jobs += taken
            self.session.waiting += [prompt for job in taken for prompt in job.prompts]
        return not self._stop and (self.session.busy or not self._closing)

    def _fail(self) -> None:
        """Answer all jobs with an error and begin anew: one failure, such as memory that ran out, ends no server."""
        sys.stderr.write(visible(hide_secrets(traceback.format_exc())))
        for job in self._jobs:
            job.cancel()
            job.on_failure()
        self._jobs = []
        self.session = OpenSession(self.sampler, self.adapters)
