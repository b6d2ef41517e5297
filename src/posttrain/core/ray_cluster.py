"""Ray: a session with a cluster, and room on it. Nothing here is imported, and no ray, unless a recipe asks for it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    options: dict[str, Any] = {"address": address} if address else {"num_cpus": max(os.cpu_count() or 1, cores)}
    options |= {} if address else {"include_dashboard": False}
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


def has_gpus(ray: Any) -> bool:
    """Return True if a machine of the cluster has a GPU."""
    return bool(ray.cluster_resources().get("GPU"))


def reserve(
    ray: Any, bundles: Sequence[Bundle], strategy: str, seconds: float, say: Callable[[str], None] = print
) -> Any:
    """Return a placement group that has all of these bundles, or none of them.

    Args:
        ray: The module, in a session.
        bundles: Resources, each on one machine.
        strategy: Ray's: PACK (few machines), SPREAD, STRICT_SPREAD (a machine for each).
        seconds: How long to wait for room.
        say: Called with a line if it has to wait.

    Raises:
        ClusterError: There was no room in time.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([dict(b) for b in bundles], strategy=strategy)
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


def release(group: Any) -> None:
    """Give the resources of a placement group back; what runs in it is ended."""
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)


def placed_in(group: Any, bundle: int) -> Any:
    """Return the scheduling strategy that places an actor into a bundle of a group."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)


def _room(ray: Any) -> str:
    """Return the machines of the cluster that are alive, as text."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    counts = Counter((r.get("CPU", 0), r.get("GPU", 0)) for r in alive)
    return ", ".join(f"{n} with {c:g} CPUs and {g:g} GPUs" for (c, g), n in counts.items()) or "no machine"
