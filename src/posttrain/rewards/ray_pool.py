"""Rewards that are called by actors on a Ray cluster; and the choice between these and processes of this machine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from posttrain.core import ray_cluster
from posttrain.core.errors import RewardError
from posttrain.rewards.outcome import RewardOutcome
from posttrain.rewards.reward_actor import RewardActor
from posttrain.rewards.reward_log import RewardLog
from posttrain.rewards.worker_pool import MEMORY_GIB, Pool, RewardCall, in_slots, not_sent

log = logging.getLogger("posttrain")
CALL_TRIES = 3
"""How often a call is repeated whose actor is lost."""


class RayPool:
    """Call rewards by this trainer's part of the cluster's reward actors. Like `Pool`, and with the same outcomes."""

    def __init__(
        self,
        room: ray_cluster.Workers,
        rewards: Sequence[dict[str, Any]],
        log: RewardLog,
        memory_gib: float = MEMORY_GIB,
    ) -> None:
        """Make the actors.

        Args:
            room: Where they run.
            rewards: Settings of the rewards as plain data.
            log: Where what they print goes.
            memory_gib: Memory of the process of each.

        Raises:
            RewardError: A reward can't be made.
        """
        self.room, self.rewards, self.log, self.memory_gib = room, list(rewards), log, memory_gib
        self.ray = ray_cluster.joined(room)
        self.actors: list[Any] = []
        self._open()

    def _open(self) -> None:
        from posttrain.core import distributed  # which imports torch: a recipe is checked without it

        path = [p or os.getcwd() for p in sys.path]
        bundles = self.room.bundles(distributed.rank(), distributed.world())
        arguments = (path, os.getcwd(), self.rewards, self.memory_gib)
        # Ray makes a lost actor again where there is room, and repeats its call.
        options = {"max_restarts": -1, "max_task_retries": CALL_TRIES}
        self.actors = ray_cluster.make_actors(self.room, RewardActor, bundles, arguments, **options)
        self.places: list[Any] = [None] * len(self.actors)
        if refused := self._wait(0, self.actors[0].open.remote()):
            self.close()
            raise RewardError(refused)

    def run(self, calls: Sequence[RewardCall]) -> list[list[RewardOutcome]]:
        """Return the outcomes of every call, in order."""
        if not self.actors:
            self._open()
        return in_slots(calls, len(self.actors), self._call)

    def _call(self, slot: int, call: RewardCall) -> list[RewardOutcome]:
        if (refused := not_sent(call)) is not None:
            return refused
        try:
            outcomes, lines, place = self._wait(slot, self.actors[slot].call.remote(call))
        except self.ray.exceptions.RayTaskError as error:
            raise RewardError(f"reward worker {slot + 1} failed: {error.cause}") from error
        except self.ray.exceptions.RayActorError as error:
            message = (
                f"the reward actor was lost {CALL_TRIES + 1} times in this call ({ray_cluster.line_of_error(error)})"
            )
            return [RewardOutcome(failure="died", message=message)] * (call.count or 1)
        if self.places[slot] not in (None, place):
            log.warning("reward worker %d was lost, and is replaced by one on %s", slot + 1, place[0])
        self.places[slot] = place
        for line in lines:
            self.log.write(line)
        return list(outcomes)

    def _wait(self, slot: int, ref: Any) -> Any:
        return ray_cluster.result_in_room(self.room, ref, lambda: log.warning("waiting for reward worker %d", slot + 1))

    def close(self) -> None:
        """End the actors. The pool can be used again: it makes new ones."""
        for actor in self.actors:
            self.ray.kill(actor)
        self.actors = []


def open_pool(rewards: Sequence[dict[str, Any]], log: RewardLog, workers: int) -> Pool | RayPool:
    """Open a pool: of the cluster's reward actors if the run has them, else of processes of this machine.

    Args:
        rewards: Settings of the rewards as plain data.
        log: Where what they print goes.
        workers: Number of processes on this machine.
    """
    room = ray_cluster.workers("rewards")
    return Pool(rewards, log, workers) if room is None else RayPool(room, rewards, log)
