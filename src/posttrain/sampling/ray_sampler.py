"""Sampler workers that are actors on a Ray cluster; weights go through its object store."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from safetensors.torch import save
from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.core import distributed, ray_cluster
from posttrain.core.errors import DataError
from posttrain.core.types import PartialRollout, RolloutGroup
from posttrain.sampling.protocol import Request
from posttrain.sampling.sampler_actor import SamplerActor
from posttrain.sampling.worker_protocol import WorkerError, WorkerLost


class RaySamplers:
    """Open this trainer's part of the cluster's samplers, and keep the newest weights for all of them.

    Attributes:
        count: Number of samplers of this trainer.
    """

    def __init__(self, room: ray_cluster.Workers, settings: Mapping[str, Any]) -> None:
        """Join the cluster.

        Args:
            room: Where the samplers run.
            settings: What each opens, and how: see `posttrain.sampling.open_workers.WorkerSource.settings`.
        """
        self.room, self.ray = room, ray_cluster.joined(room)
        self.bundles = room.bundles(distributed.rank(), distributed.world())
        self.count = len(self.bundles)
        path = [p or os.getcwd() for p in sys.path]
        self.arguments = (path, os.getcwd(), dict(settings), room.cpus)
        self._guard = threading.Lock()
        self._newest: tuple[int, Any] = (0, None)

    def open(self, number: int) -> RaySampler:
        """Open sampler `number` of this trainer, or another one in its place."""
        return RaySampler(self, self.bundles[number])

    def stored(self, version: int, weights: Mapping[str, Tensor]) -> Any:
        """Return where the object store has weights; they are put there once, and the version before is released.

        Args:
            version: Number of the weights.
            weights: By name; not read if the version is there.
        """
        with self._guard:
            if self._newest[0] != version:
                tensors = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
                self._newest = (version, self.ray.put(save(tensors)))
            return self._newest[1]


class RaySampler:
    """A sampler on a Ray cluster. See `posttrain.sampling.worker_protocol.SamplerWorker`."""

    def __init__(self, samplers: RaySamplers, bundle: int) -> None:
        """Start the actor; it opens the model while this process goes on.

        Args:
            samplers: Has the room and the weights.
            bundle: Bundle of the room that it runs in.
        """
        self.samplers, self.ray, self.version = samplers, samplers.ray, 0
        (self.actor,) = ray_cluster.make_actors(
            samplers.room, SamplerActor, [bundle], samplers.arguments, max_restarts=0
        )
        self._context = 0

    @property
    def context(self) -> int:
        """Return the most tokens of a prompt and its completion, once the model is open."""
        self._context = self._context or int(self._done(self.actor.context.remote()))
        return self._context

    def update(self, version: int, weights: Mapping[str, Tensor]) -> None:
        if version <= self.version:
            raise WorkerError(f"weights of version {version} come after version {self.version}: versions must rise")
        self._done(self.actor.update.remote(self.samplers.stored(version, weights)))
        self.version = version

    def submit(self, requests: Sequence[Request], params: SamplingConfig) -> Future[list[RolloutGroup]]:
        out: Future[list[RolloutGroup]] = Future()
        version, temperature = self.version, params.temperature
        sent = [replace(r, tokens=list(r.tokens), example={}) for r in requests]  # the row stays here

        def finish(done: Future[list[RolloutGroup]]) -> None:
            try:
                groups = done.result()
            except BaseException as error:
                out.set_exception(self._meaning(error))
                return
            out.set_result(
                [
                    RolloutGroup(
                        request.tokens,
                        request.example,
                        [
                            replace(r, pieces=(PartialRollout(len(r.tokens), version, temperature),))
                            for r in group.rollouts
                        ],
                    )
                    for request, group in zip(requests, groups, strict=True)
                ]
            )

        try:
            self.actor.sample.remote(sent, params).future().add_done_callback(finish)
        except self.ray.exceptions.RayError as error:
            out.set_exception(self._meaning(error))
        return out

    def close(self) -> None:
        self.ray.kill(self.actor)

    def _done(self, ref: Any) -> Any:
        try:
            return ray_cluster.result_in_room(self.samplers.room, ref)
        except self.ray.exceptions.RayError as error:
            raise self._meaning(error) from error

    def _meaning(self, error: BaseException) -> BaseException:
        """Return what an exception of Ray's means for a sampler."""
        if isinstance(error, self.ray.exceptions.RayTaskError):
            cause = error.cause
            return cause if isinstance(cause, DataError) else WorkerError(f"the sampler refused: {cause}")
        if isinstance(error, self.ray.exceptions.RayError):
            return WorkerLost(f"the sampler's actor is gone: {ray_cluster.line_of_error(error)}")
        return error
