"""Ray: a session with a cluster, and room on it. Nothing here is imported, and no ray, unless a recipe asks for it."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from posttrain.core.errors import MissingExtraError, PosttrainError

Bundle = dict[str, float]
"""Resources on one machine, such as {"CPU": 1, "GPU": 1}."""

OF_STARTED = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns that it may change its mind on GPUs
    "RAY_worker_niceness": "0",  # 15 by default: trainers would give way to everything else on the machine
    "RAY_prestart_worker_first_driver": "0",  # else a Python process for each core, and trainers are few
    "RAY_enable_worker_prestart": "0",
}
"""Variables for a cluster that is started here, where they are not set."""


class ClusterError(PosttrainError, RuntimeError):
    """A Ray cluster that can't be reached, has no room, or was lost."""


@contextmanager
def session(address: str | None, cores: int) -> Iterator[Any]:
    """Join a cluster, or start one on this machine, and leave it at the end; yields the module `ray`.

    A session that this process began already is used, and left as it is.

    Args:
        address: HOST:PORT, or auto. None: start one.
        cores: Processor cores that a started cluster must have at least (Ray counts them, and holds nobody to them).

    Raises:
        MissingExtraError: Ray is not installed.
        ClusterError: There is no such cluster.
    """
    for name, value in OF_STARTED.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("engine: ray needs Ray: pip install 'posttrain[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    # "local": without an address Ray looks for a cluster on this machine, also for one that has ended long ago.
    options: dict[str, Any] = {"address": address or "local"}
    options |= {} if address else {"num_cpus": max(os.cpu_count() or 1, cores), "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:
        raise ClusterError(
            f"the Ray cluster at {address} can't be joined ({error}): is `ray start` running there, with the same "
            "versions of Ray and Python?"
            if address
            else f"Ray can't be started on this machine: {error}"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


ANSI = re.compile(r"\x1b\[[0-9;]*m")
"""Colours in Ray's messages."""
ROOM_POLL = 10.0
"""Seconds between looks whether an actor still has room."""
HEAD_SECONDS = 20.0
"""How long the head of a cluster may be away. After a minute Ray ends the processes that wait for it without a word."""


class HeadWatch:
    """Notice that the head of the cluster is lost, which Ray itself does not report."""

    def __init__(self, ray: Any) -> None:
        self.address = str(ray.get_runtime_context().gcs_address)
        self.seen = time.monotonic()

    def answers(self) -> bool:
        """Return True if the head accepts a connection."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            return False
        self.seen = time.monotonic()
        return True

    def check(self, wait: bool = False) -> None:
        """Raise ClusterError if the head has been away for too long; with `wait` this is decided before it returns."""
        while not self.answers():
            if time.monotonic() - self.seen < HEAD_SECONDS:
                if not wait:
                    return
                time.sleep(1)
                continue
            raise ClusterError(
                f"the head of the Ray cluster at {self.address} is gone, and its trainers have been ended. When the "
                "cluster is up again, the same command resumes the run from its last checkpoint"
            )


def line_of_error(error: BaseException) -> str:
    """Return an exception of Ray's in one line: its first line and its last, which has the cause."""
    lines = [line.strip() for line in ANSI.sub("", str(error)).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1][:300]}"


def has_gpus(ray: Any) -> bool:
    """Return True if a machine of the cluster has a GPU."""
    return bool(ray.cluster_resources().get("GPU"))


def reserve(
    ray: Any, bundles: Sequence[Bundle], strategy: str, seconds: float, say: Callable[[str], None], name: str = ""
) -> Any:
    """Return a placement group that has all of these bundles, or none of them.

    Args:
        ray: The module, in a session.
        bundles: Resources, each on one machine.
        strategy: Ray's: PACK (few machines), SPREAD, STRICT_SPREAD (a machine for each).
        seconds: How long to wait for room.
        say: Called with a line if it has to wait.
        name: Name by which other processes find the group.

    Raises:
        ClusterError: There was no room in time.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([dict(b) for b in bundles], strategy=strategy, name=name)
    deadline = time.monotonic() + seconds
    if not group.wait(min(5.0, seconds)):
        need = " and ".join(f"{n} x {dict(b)}" for b, n in Counter(tuple(sorted(b.items())) for b in bundles).items())
        need += ", each on a machine of its own" if strategy == "STRICT_SPREAD" and len(bundles) > 1 else ""
        say(f"waiting for room on the Ray cluster: {need}; it has {_room(ray)}")
        while not group.wait(2):
            if time.monotonic() > deadline:
                remove_placement_group(group)
                raise ClusterError(
                    f"the Ray cluster has no room for {need} after {seconds:g} s; it has {_room(ray)}. Add machines ("
                    "ray start --address=HOST:PORT) or ask for less, and run the same command again: it resumes"
                )
    return group


def release(ray: Any, group: Any) -> None:
    """Give the resources of a placement group back; what runs in it is ended. A lost head is not asked."""
    if HeadWatch(ray).answers():
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(group)


def placed_in(group: Any, bundle: int) -> Any:
    """Return the scheduling strategy that places an actor into a bundle of a group."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)


@dataclass(frozen=True)
class Workers:
    """Room for actors that work for trainers: bundles of a placement group.

    Attributes:
        address: Of the cluster.
        namespace: Of the session that reserved the room.
        group: Name of the placement group.
        count: Number of its bundles.
        cpus: Processor cores of each bundle.
        gpus: GPUs of each bundle.
        wait: Seconds to wait for room after a machine was lost.
    """

    address: str
    namespace: str
    group: str
    count: int
    cpus: int
    gpus: float
    wait: float

    def bundles(self, rank: int, world: int) -> range:
        """Return the bundles of a trainer: an equal part."""
        return range(rank, self.count, world)


_workers: dict[str, Workers] = {}


def reserve_workers(ray: Any, bundles: Sequence[Bundle], seconds: float, say: Callable[[str], None]) -> Any:
    """Reserve room for workers on any machines; see `reserve`.

    Args:
        ray: The module, in a session.
        bundles: Resources of each worker.
        seconds: How long to wait for room.
        say: Called with a line if it has to wait.

    Returns:
        The placement group, and its `Workers` as plain values for the trainers.
    """
    context, name = ray.get_runtime_context(), f"posttrain-{uuid.uuid4().hex}"
    group = reserve(ray, bundles, "PACK", seconds, say, name)
    cpus, gpus = int(bundles[0]["CPU"]), bundles[0].get("GPU", 0.0)
    room = Workers(context.gcs_address, context.namespace, name, len(bundles), cpus, gpus, seconds)
    return group, asdict(room)


def set_workers(rooms: dict[str, dict[str, Any]]) -> None:
    """Note in a trainer's process where its workers run, by what they are (rewards, samplers)."""
    _workers.clear()
    _workers.update({name: Workers(**values) for name, values in rooms.items()})


def workers(name: str) -> Workers | None:
    """Return where workers of this kind run; None: on this machine."""
    return _workers.get(name)


def joined(room: Workers) -> Any:
    """Return the module `ray` in a session of this process, which is begun at the first call."""
    import ray

    if not ray.is_initialized():
        ray.init(room.address, namespace=room.namespace, log_to_driver=False, logging_level="ERROR")
    return ray


def make_actors(
    room: Workers, kind: type, bundles: Sequence[int], arguments: Sequence[Any], **options: Any
) -> list[Any]:
    """Make an actor in each of these bundles of the room.

    Args:
        room: The room.
        kind: Class of the actors. Its module travels by value and may import the standard library alone at its top.
        bundles: Numbers of the bundles.
        arguments: Arguments of each actor.
        options: Further options of Ray's.
    """
    ray = joined(room)
    from ray.util import get_placement_group

    ray.cloudpickle.register_pickle_by_value(sys.modules[kind.__module__])
    group = get_placement_group(room.group)
    made = ray.remote(kind)
    # Without cores of their own: several stacks of rewards use the same bundle.
    options = {"num_cpus": 0, "num_gpus": room.gpus, **options}
    return [
        made.options(scheduling_strategy=placed_in(group, bundle), **options).remote(*arguments) for bundle in bundles
    ]


def result_in_room(room: Workers, ref: Any, say: Callable[[], None] | None = None) -> Any:
    """Return the result of a method of an actor in a room, however long it takes while the room is there.

    Args:
        room: The room.
        ref: Ray's reference to the result.
        say: Called each minute.

    Raises:
        ClusterError: A machine with a part of the room was lost, and none had room in `room.wait` seconds.
    """
    ray = joined(room)
    whole = said = time.monotonic()
    while not ray.wait([ref], timeout=ROOM_POLL)[0]:
        now = time.monotonic()
        whole = now if _is_whole(room) else whole
        if now - whole > room.wait:
            raise ClusterError(
                f"a machine with samplers or reward actors is lost, and the Ray cluster has had no room for them for "
                f"{room.wait:g} s (systems.wait); it has {_room(ray)}. Add machines (ray start --address=HOST:PORT) or "
                "ask for less, and run the same command again: it resumes"
            )
        if say is not None and now - said >= 60:
            said = now
            say()
    return ray.get(ref)


def _is_whole(room: Workers) -> bool:
    """Return True if every bundle of a room is on a machine."""
    from ray.util import get_placement_group, placement_group_table

    return bool(placement_group_table(get_placement_group(room.group))["state"] == "CREATED")


def _room(ray: Any) -> str:
    """Return the machines of the cluster that are alive, as text."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    counts = Counter((r.get("CPU", 0), r.get("GPU", 0)) for r in alive)
    return ", ".join(f"{n} with {c:g} CPUs and {g:g} GPUs" for (c, g), n in counts.items()) or "no machine"
