"""A sampler over workers: requests are spread over them, and a worker that is lost is replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Lock

from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.core.types import RolloutGroup
from posttrain.sampling.protocol import OnDone, Request
from posttrain.sampling.worker_protocol import SamplerWorker, WorkerError, WorkerLost

log = logging.getLogger("posttrain")


class WorkerSampler:
    """Complete requests with one or several workers. See `posttrain.sampling.protocol.Sampler`.

    A lost worker is replaced, gets the newest weights, and its requests are asked again. Random streams depend on a
    request's seed alone, so that the local engine gives the same completions whatever their number and losses. Several
    threads may call `sample` at once.
    """

    def __init__(self, open_worker: Callable[[int], SamplerWorker], count: int = 1, tries: int = 3) -> None:
        """Open the workers.

        Args:
            open_worker: Opens worker number i; called again to replace it.
            count: Number of workers.
            tries: Workers that may be lost in a row on the same requests; then the error is raised.
        """
        self.open_worker, self.tries, self.version = open_worker, tries, 0
        self.workers = [open_worker(i) for i in range(count)]
        self._weights: Mapping[str, Tensor] = {}
        self._replacing = Lock()
        self._closed = False
        self._context = 0

    @property
    def context(self) -> int:
        """Return the most tokens of a prompt and its completion; waits until all workers are ready."""
        if not self._context:
            for number in range(len(self.workers)):
                self._await_start(number)
            self._context = min(worker.context for worker in self.workers)
        return self._context

    def _await_start(self, number: int) -> None:
        worker = self.workers[number]
        try:
            _ = worker.context
        except WorkerLost as error:
            self._replace(number, worker, error)

    def update(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights of all workers; returns once they have them. See `SamplerWorker.update`.

        A worker that is lost later gets the same mapping: its tensors may have changed by then only if workers keep
        what a version was, as those of this machine do.
        """
        self.version, self._weights = version, weights
        with ThreadPoolExecutor(len(self.workers)) as pool:
            list(pool.map(self._update, range(len(self.workers))))

    def _update(self, number: int) -> None:
        while (worker := self.workers[number]).version != self.version:  # a thread that samples may replace it too
            try:
                worker.update(self.version, self._weights)
            except WorkerLost as error:
                self._replace(number, worker, error)

    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        """Complete every request; order is kept.

        Args:
            requests: The prompts.
            params: How tokens are drawn.
            on_done: Called as each worker has completed its part.

        Raises:
            DataError: A prompt does not fit into the context.
            WorkerError: Workers refuse the requests, or are lost again and again.
        """
        shares = split_by_work(requests, params, len(self.workers))
        out: dict[int, RolloutGroup] = {}
        lost = [0] * len(shares)
        running: dict[Future[list[RolloutGroup]], tuple[int, SamplerWorker]] = {}

        def submit(number: int) -> None:
            worker = self.workers[number]
            running[worker.submit([requests[i] for i in shares[number]], params)] = number, worker

        for number in range(len(shares)):
            submit(number)
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                number, worker = running.pop(future)
                try:
                    groups = future.result()
                except WorkerLost as error:
                    if self._closed:
                        raise
                    lost[number] += 1
                    if lost[number] >= self.tries:
                        raise WorkerError(f"{lost[number]} workers in a row were lost; the last: {error}") from error
                    self._replace(number, worker, error)
                    submit(number)
                    continue
                out |= zip(shares[number], groups, strict=True)
                if on_done is not None:
                    for i, group in zip(shares[number], groups, strict=True):
                        for j, rollout in enumerate(group.rollouts):
                            on_done(i, j, rollout)
        return [out[i] for i in range(len(requests))]

    def _replace(self, number: int, lost: SamplerWorker, error: Exception) -> None:
        """Open a worker in the place of a lost one, with the newest weights, unless another thread has.

        Args:
            number: Its number.
            lost: The worker.
            error: How it was lost.
        """
        with self._replacing:
            for tried in range(1, self.tries + 1):
                if self.workers[number] is not lost:
                    return
                if self._closed:
                    raise error
                log.warning("sampler worker %d is replaced: %s", number + 1, error)
                lost.close()
                new = self.open_worker(number)
                try:
                    _ = new.context  # it has started
                    if self.version:
                        new.update(self.version, self._weights)
                    self.workers[number] = new
                except WorkerLost as again:
                    new.close()
                    error = again
                    if tried == self.tries:
                        raise WorkerError(f"{tried} workers were lost as they started; the last: {error}") from error
                else:
                    if self._closed:  # while it was opened
                        new.close()
                        raise error

    def close(self) -> None:
        """End all workers; what threads wait for is lost, and none is replaced."""
        self._closed = True
        for worker in self.workers:
            worker.close()


def split_by_work(requests: Sequence[Request], params: SamplingConfig, parts: int) -> list[list[int]]:
    """Split requests into parts of about the same work: their numbers, ascending in each part.

    The longest come first, each to the part with the least so far. The work of a request is the most tokens that its
    completions may have.

    Args:
        requests: The requests.
        params: Has the most tokens.
        parts: Number of parts; some are empty if there are fewer requests.
    """
    work = [r.n * min(r.max_tokens or params.max_tokens, params.max_tokens) + len(r.tokens) for r in requests]
    out: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for i in sorted(range(len(requests)), key=lambda i: (-work[i], i)):
        lightest = loads.index(min(loads))
        out[lightest].append(i)
        loads[lightest] += work[i]
    return [sorted(part) for part in out]
