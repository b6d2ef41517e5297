"""A sampler worker in a thread of this process: it samples with a copy of the policy while the policy is trained."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.core.types import PartialRollout, Rollout, RolloutGroup
from posttrain.models.language_model import LanguageModel
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import OnDone, Request
from posttrain.sampling.worker_protocol import WorkerLost

CLOSED = "the sampler was closed"


def frozen_copy(policy: LanguageModel) -> LanguageModel:
    """Return a copy of a model to sample with; weights that are not trained, and buffers, are the policy's own."""
    shared = [*(p for p in policy.parameters() if not p.requires_grad), *policy.buffers()]
    copied = copy.deepcopy(policy, {id(tensor): tensor for tensor in shared})
    copied.value = None
    return copied.eval().requires_grad_(False)


def trained_weights(policy: LanguageModel) -> dict[str, Tensor]:
    """Return what `frozen_copy` has a copy of, by the policy's own names: adapters stay apart from what they change."""
    named = policy.named_parameters()
    return {name: p.detach() for name, p in named if p.requires_grad and not name.startswith("value.")}


@dataclass
class _Submitted:
    """Requests that were submitted together, with what has been sampled of them."""

    requests: list[Request]
    params: SamplingConfig
    version: int
    on_done: OnDone | None
    future: Future[list[RolloutGroup]] = field(default_factory=Future)
    done: list[dict[int, Rollout]] = field(default_factory=list)

    def take(self, i: int, j: int, rollout: Rollout) -> None:
        """Keep a completion; the future has its result with the last one."""
        piece = PartialRollout(len(rollout.tokens), self.version, self.params.temperature)
        self.done[i][j] = replace(rollout, pieces=(piece,))
        if self.on_done is not None:
            self.on_done(i, j, self.done[i][j])
        if all(len(of) == r.n for r, of in zip(self.requests, self.done, strict=True)):
            groups = zip(self.requests, self.done, strict=True)
            self.future.set_result([RolloutGroup(r.tokens, r.example, [of[k] for k in range(r.n)]) for r, of in groups])


class _Closed(Exception):
    """End a call of the sampler whose results nobody waits for."""


class ThreadWorker:
    """Sample in a thread; a `SamplerWorker` whose weights have the policy's own names (`trained_weights`).

    Everything is done in order. Requests that wait for the same weights, with the same settings, are sampled in one
    call: completions of several steps then share the decoding steps. Each token depends on its request's seed and the
    weights alone, but for the last bits of rounding, which may change with the number of rows in a product.
    """

    def __init__(self, policy: LanguageModel, tokenizer: Any, **options: Any) -> None:
        """Copy the policy and start the thread.

        Args:
            policy: The model as it is now.
            tokenizer: Its tokenizer.
            options: Further arguments of `LocalSampler`.
        """
        self.model = frozen_copy(policy)
        self.sampler = LocalSampler(self.model, tokenizer, **options)
        self.version, self.context = 0, self.sampler.context
        self._tasks = deque[_Submitted | dict[str, Tensor]]()
        self._running: list[_Submitted] = []
        self._changed, self._closed = threading.Condition(), False
        self._failure: BaseException = WorkerLost(CLOSED)
        # Another number of threads would round some products differently.
        self._thread = threading.Thread(target=self._work, args=(torch.get_num_threads(),), daemon=True)
        self._thread.start()

    def update(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Replace weights for the requests to come; the tensors may be changed once this returns.

        Args:
            version: Their number.
            weights: As `trained_weights` returns them.
        """
        copies = {name: tensor.clone() for name, tensor in weights.items()}
        with self._changed:
            if self._tasks and isinstance(self._tasks[-1], dict):  # nobody asks for the version in between
                self._tasks.pop()
            self.version = version
            self._tasks.append(copies)
            self._changed.notify()

    def submit(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> Future[list[RolloutGroup]]:
        """Start sampling and return at once.

        Args:
            requests: The prompts.
            params: How tokens are drawn.
            on_done: Called in the worker's thread as each completion ends.
        """
        with self._changed:
            task = _Submitted(list(requests), params, self.version, on_done, done=[{} for _ in requests])
            if self._closed:
                task.future.set_exception(self._failure)
            elif not task.requests:
                task.future.set_result([])
            else:
                self._tasks.append(task)
                self._changed.notify()
        return task.future

    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        """Complete every request; order is kept. Any number of threads may call it at once.

        Args:
            requests: The prompts.
            params: How tokens are drawn.
            on_done: Called in the worker's thread as each completion ends.
        """
        return self.submit(requests, params, on_done).result()

    def close(self) -> None:
        """End the thread, at the next completion that ends if it is sampling; futures that are not done fail."""
        with self._changed:
            self._closed = True
            unfinished = [t for t in (*self._running, *self._tasks) if isinstance(t, _Submitted)]
            self._tasks.clear()
            self._changed.notify()
        self._thread.join()
        _fail(unfinished, WorkerLost(CLOSED))

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while True:
            with self._changed:
                self._running = []
                self._changed.wait_for(lambda: self._closed or bool(self._tasks))
                if self._closed:
                    return
                first = self._tasks.popleft()
                if isinstance(first, _Submitted):
                    self._running = [first, *self._alike(first.params)]
            try:
                if isinstance(first, _Submitted):
                    self._sample(self._running)
                else:
                    self._set_weights(first)
            except _Closed:
                return
            except BaseException as error:  # whoever waits for a result gets it
                _fail(self._running or self._abandon(error), error)

    def _alike(self, params: SamplingConfig) -> list[_Submitted]:
        """Take what waits and is sampled with the same weights and settings out of the queue."""
        found = []
        while self._tasks and isinstance(task := self._tasks[0], _Submitted) and task.params == params:
            found.append(task)
            self._tasks.popleft()
        return found

    def _abandon(self, error: BaseException) -> list[_Submitted]:
        """Close the worker, whose weights are not whole, and return everything that was asked of it."""
        with self._changed:
            self._closed, self._failure = True, error
            waiting = [t for t in self._tasks if isinstance(t, _Submitted)]
            self._tasks.clear()
        return waiting

    def _sample(self, together: Sequence[_Submitted]) -> None:
        places = [(task, i) for task in together for i in range(len(task.requests))]

        def ended(index: int, number: int, rollout: Rollout) -> None:
            if self._closed:
                raise _Closed
            task, i = places[index]
            task.take(i, number, rollout)

        self.sampler.sample([task.requests[i] for task, i in places], together[0].params, ended)

    @torch.no_grad()
    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def _fail(tasks: Sequence[_Submitted], error: BaseException) -> None:
    for task in tasks:
        if not task.future.done():
            task.future.set_exception(error)
