"""Carry a recipe out by trainers on a Ray cluster: place them, show rank 0's progress, start them again after a loss.

Each trainer is a process with torchrun's environment that an actor keeps, so that a run is the same program as in one
process. When one is lost (its process was killed, its machine is gone) all are ended and started again, and resume
from the last checkpoint. What a recipe, its data or its functions do wrong ends the run at once.
"""

from __future__ import annotations

import codecs
import os
import pickle
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import posttrain
from posttrain.config import PlacementConfig, Recipe
from posttrain.core import ray_cluster
from posttrain.core.errors import CheckpointError, PosttrainError, RewardError
from posttrain.core.imports import import_folders
from posttrain.core.ray_cluster import Bundle, ClusterError
from posttrain.core.secrets import hide_secrets
from posttrain.core.visible_text import visible
from posttrain.runs import trainer_actor
from posttrain.runs.run_folder import Manifest, is_worked_on, set_aside
from posttrain.trainer.loop import now, stop_requests

END_GRACE = 10.0
"""Seconds for which the endings of other trainers are awaited after the first that failed."""
PASSED_ON = ("HF_", "POSTTRAIN_", "TORCH_", "NCCL_", "GLOO_")
"""Beginnings of the names of variables that trainers get from the process that started the run (no tokens)."""


class TrainerLost(Exception):
    """Report that a trainer is gone without any fault of the recipe."""


@dataclass(frozen=True)
class TrainerEnd:
    """Hold how a trainer ended.

    Attributes:
        rank: Its number.
        reply: Its reply; None: it ended without one, or its machine is gone.
        how: How its process ended, with the last lines that it printed.
    """

    rank: int
    reply: dict[str, Any] | None
    how: str

    @property
    def kind(self) -> str:
        """Return done, stopped, error, failed, peer or lost."""
        return self.reply["kind"] if self.reply is not None else "lost"


def run_on_ray(
    recipe: Recipe,
    path: Path,
    fresh: bool,
    console: Console,
    functions: Mapping[str, Callable[..., Any]],
    accept_changed_data: bool,
) -> Any:
    """Carry a recipe through on a Ray cluster and return its RunResult.

    Args:
        recipe: The recipe, with `systems.engine: ray`.
        path: Folder of the run, on a file system that all machines share.
        fresh: Set an earlier run in the folder aside and start over.
        console: Shows rank 0's output, and what happens to trainers.
        functions: Functions by the names that the recipe uses for them.
        accept_changed_data: Resume although inputs have changed.

    Raises:
        ClusterError: The cluster can't be joined or has no room, or trainers were lost more often than allowed.
        PosttrainError: What a trainer raised.
        KeyboardInterrupt: The run was stopped; it has written a checkpoint.
    """
    systems = recipe.systems
    if fresh and path.exists():
        set_aside(path)
    say = _printer(console)
    restarts: list[dict[str, str]] = []
    cores = (systems.trainers + systems.samplers) * systems.cpus + systems.rewards
    with _end_noted(path), ray_cluster.session(systems.address, cores) as ray:
        frame = _frame(ray, recipe, path, functions, accept_changed_data)
        watch = ray_cluster.HeadWatch(ray)
        while True:
            try:
                with _workers(ray, recipe, say) as rooms, _trainers(ray, recipe, say) as trainers:
                    placed = {"engine": "ray", "nodes": trainers.nodes, "replicas": systems.replicas}
                    placed["sequence_parallel"] = systems.sequence_parallel
                    placed |= {name: room["count"] for name, room in rooms.items()}
                    trainers.start({**frame, "rooms": rooms, "placed": {**placed, "restarts": restarts}})
                    return _result(trainers.endings(console, watch), trainers.stopping)
            except TrainerLost as lost:
                watch.check(wait=True)
                if len(restarts) == systems.restarts:
                    raise ClusterError(
                        f"{lost}. {systems.restarts} restarts are allowed (systems.restarts), and all were made. The "
                        f"run resumes from its last checkpoint with: posttrain run {path}"
                    ) from None
                restarts.append({"time": now(), "reason": str(lost)})
                say(
                    f"! {lost}; all {systems.trainers} trainers start again from the last checkpoint (restart "
                    f"{len(restarts)} of at most {systems.restarts})"
                )
                _await_release(path, systems.wait, say)


@contextmanager
def _end_noted(path: Path) -> Iterator[None]:
    """Write into the manifest how a run ended of which rank 0 could not tell: by another rank's fault, a lost head.

    A CheckpointError may be of a folder that holds another run, and is not noted there.
    """
    try:
        yield
    except (KeyboardInterrupt, PosttrainError) as error:
        failed = {"status": "failed", "error": hide_secrets(str(error))}
        mine = (path / "manifest.json").is_file() and not isinstance(error, CheckpointError)
        if mine and not is_worked_on(path):
            with suppress(OSError, PosttrainError):  # a full disk does not hide the error that ended it
                manifest = Manifest(path)
                if manifest.values.get("status") == "running":
                    manifest.update(**({"status": "stopped"} if isinstance(error, KeyboardInterrupt) else failed))
        raise


def _await_release(path: Path, seconds: float, say: Callable[[str], None]) -> None:
    """Wait until a lost rank 0, which nothing may reach any more, has released the folder: it could still write.

    A machine that comes back ends its trainers; a file system releases the locks of one that does not.
    """
    deadline, said = time.monotonic() + seconds, False
    while is_worked_on(path) and time.monotonic() < deadline:
        if not said:
            say(f"waiting until the lost trainer has released {path}, at most {seconds:g} s (systems.wait)")
        said = True
        time.sleep(1)


def _frame(
    ray: Any, recipe: Recipe, path: Path, functions: Mapping[str, Callable[..., Any]], accept: bool
) -> dict[str, Any]:
    """Return what a trainer's process reads first."""
    try:
        pickled = ray.cloudpickle.dumps(dict(functions)) if functions else b""
    except Exception as error:
        raise RewardError(f"functions given from Python can't be sent to a Ray cluster: {error}") from error
    return {
        "version": posttrain.__version__,
        "recipe": recipe.model_dump(mode="json"),
        "folder": path,
        "functions": pickled,
        "accept": accept,
        "import_folders": import_folders(),
    }


class Trainers:
    """The actors of one attempt, sorted by machine, so that neighbouring ranks share one.

    Attributes:
        nodes: Address of each machine and the number of its trainers.
        stopping: A signal has asked for a stop.
    """

    def __init__(self, ray: Any, systems: PlacementConfig, actors: Sequence[Any]) -> None:
        self.ray, self.systems = ray, systems
        places = _fetched(ray, [a.place.remote() for a in actors])
        order = sorted(range(len(actors)), key=lambda i: (places[i][1], places[i][0], i))
        self.actors, self.places = [actors[i] for i in order], [places[i] for i in order]
        self.stopping = False
        self.nodes = dict(Counter(address for _, address, _ in self.places))
        counts = Counter(node for node, _, _ in self.places)
        if systems.nodes is not None and (len(counts), len(set(counts.values()))) != (systems.nodes, 1):
            raise ClusterError(f"the trainers came to be on machines in numbers {sorted(counts.values())}")

    def start(self, frame: Mapping[str, Any]) -> None:
        """Start the processes; they form one process group."""
        world, (_, address, port) = len(self.actors), self.places[0]
        counts, seen = Counter(node for node, _, _ in self.places), Counter[str]()
        started = []
        for rank, (actor, (node, _, _)) in enumerate(zip(self.actors, self.places, strict=True)):
            values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": seen[node], "LOCAL_WORLD_SIZE": counts[node]}
            values |= {"MASTER_ADDR": address, "MASTER_PORT": port}
            seen[node] += 1
            environment = {name: str(value) for name, value in values.items()} if world > 1 else {}
            environment |= {n: v for n, v in os.environ.items() if n.startswith(PASSED_ON) and "TOKEN" not in n}
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(self.systems.cpus))
            environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
            started.append(actor.start.remote(pickle.dumps(dict(frame)), environment, os.getcwd(), rank == 0))
        _fetched(self.ray, started)

    def endings(self, console: Console, watch: ray_cluster.HeadWatch) -> list[TrainerEnd]:
        """Show rank 0's output until all trainers have ended, or until one has failed and the others had time to."""
        ray, main = self.ray, self.actors[0]
        waiting = {actor.ending.remote(): rank for rank, actor in enumerate(self.actors)}
        streams = _Streams(console)
        output = [main.output.remote()]
        found: list[TrainerEnd] = []
        deadline = float("inf")

        # Rank 0 stops after its step; a second signal ends all trainers at once.
        def stop() -> None:
            self.stopping = True
            main.signal.remote(signal.SIGINT)

        with stop_requests(stop):
            while waiting and time.monotonic() < deadline:
                watch.check()
                # Ray returns the first that is ready, and the output of a lost rank 0 is ready forever.
                ready, _ = ray.wait([*waiting, *output], timeout=1.0)
                for ref in ready:
                    if ref in waiting:
                        found.append(_ending(ray, ref, waiting.pop(ref)))
                        if found[-1].kind not in ("done", "stopped"):  # after a stop rank 0 writes the report
                            deadline = min(deadline, time.monotonic() + END_GRACE)
                        continue
                    output = []
                    with suppress(ray.exceptions.RayError):
                        streams.show(ray.get(ref))
                        output = [main.output.remote()]
            with suppress(ray.exceptions.RayError):
                for chunks in ray.get([*output, main.output.remote()], timeout=10):
                    streams.show(chunks)
        return found


@contextmanager
def _workers(ray: Any, recipe: Recipe, say: Callable[[str], None]) -> Iterator[dict[str, dict[str, Any]]]:
    """Reserve room for the workers of trainers; they are made, and replaced, by the trainers."""
    systems, one = recipe.systems, _resources(ray, recipe)
    with ExitStack() as stack:
        rooms = {}
        for name, count, bundle in (("samplers", systems.samplers, one), ("rewards", systems.rewards, {"CPU": 1.0})):
            if count:
                group, rooms[name] = ray_cluster.reserve_workers(ray, [bundle] * count, systems.wait, say)
                stack.callback(ray_cluster.release, ray, group)
        yield rooms


def _resources(ray: Any, recipe: Recipe) -> Bundle:
    """Return what a trainer or a sampler takes."""
    device, cpus = recipe.model.device, float(recipe.systems.cpus)
    gpu = device.startswith("cuda") or (device == "auto" and ray_cluster.has_gpus(ray))
    return {"CPU": cpus, "GPU": 1.0} if gpu else {"CPU": cpus}


@contextmanager
def _trainers(ray: Any, recipe: Recipe, say: Callable[[str], None]) -> Iterator[Trainers]:
    """Reserve room and make the actors; at the end their processes are ended and the room is given back."""
    systems, one = recipe.systems, _resources(ray, recipe)
    each = systems.trainers // (systems.nodes or systems.trainers)
    bundles = [{name: n * each for name, n in one.items()}] * (systems.nodes or systems.trainers)
    strategy = "PACK" if systems.nodes is None else "STRICT_SPREAD"
    ray.cloudpickle.register_pickle_by_value(trainer_actor)  # machines need posttrain in the processes alone
    with ExitStack() as stack:
        group = ray_cluster.reserve(ray, bundles, strategy, systems.wait, say)
        stack.callback(ray_cluster.release, ray, group)
        made = ray.remote(trainer_actor.TrainerActor)
        options = {"num_cpus": one["CPU"], "num_gpus": one.get("GPU", 0), "max_concurrency": 4, "max_restarts": 0}
        places = [ray_cluster.placed_in(group, i // each) for i in range(systems.trainers)]
        actors = [made.options(scheduling_strategy=place, **options).remote() for place in places]
        stack.callback(_end, ray, actors)
        yield Trainers(ray, systems, actors)


def _end(ray: Any, actors: Sequence[Any]) -> None:
    """End the processes and their actors, and wait until they are gone: they hold the lock of the run's folder."""
    with suppress(Exception):
        ray.wait([a.kill.remote() for a in actors], num_returns=len(actors), timeout=10)
    for actor in actors:
        with suppress(Exception):
            ray.kill(actor)


def _fetched(ray: Any, refs: Sequence[Any]) -> list[Any]:
    """Return the results of actors' methods; TrainerLost if an actor is gone."""
    try:
        return ray.get(list(refs))  # type: ignore[no-any-return]
    except ray.exceptions.RayTaskError as error:
        raise ClusterError(f"a trainer could not be started: {error.cause}") from error
    except ray.exceptions.RayError as error:
        raise TrainerLost(f"a trainer was lost before it started ({ray_cluster.line_of_error(error)})") from error


def _ending(ray: Any, ref: Any, rank: int) -> TrainerEnd:
    try:
        reply, how = ray.get(ref)
    except ray.exceptions.RayError as error:
        return TrainerEnd(rank, None, ray_cluster.line_of_error(error))
    return TrainerEnd(rank, pickle.loads(reply) if reply else None, how)


def _result(endings: Sequence[TrainerEnd], stopping: bool = False) -> Any:
    """Return rank 0's result, or raise what ended the run.

    A message of ours (a fault of the recipe, its data or rewards) comes before a lost process, since one may be the
    cause of the other; any other exception after it; a group that fell apart without either counts as a loss.
    """
    of = {kind: [e for e in endings if e.kind == kind] for kind in ("error", "stopped", "lost", "failed", "peer")}
    for e in of["error"]:
        assert e.reply is not None
        raise e.reply["class"](e.reply["message"])
    if of["stopped"]:
        raise KeyboardInterrupt(of["stopped"][0].reply["message"])  # type: ignore[index]
    lost = [f"trainer {e.rank} was lost ({e.how})" for e in of["lost"]]
    if stopping and (lost or of["peer"]):
        reason = "; ".join(lost) or "the trainers lost their connection"
        raise KeyboardInterrupt(f"{reason}; the run resumes from its last checkpoint")
    if lost:
        raise TrainerLost("; ".join(lost))
    for e in of["failed"]:
        assert e.reply is not None
        raise PosttrainError(f"trainer {e.rank} failed: {e.reply['message']}" + (f" ({e.how})" if e.rank else ""))
    if of["peer"]:
        raise TrainerLost(f"the trainers lost their connection ({of['peer'][0].reply['message'][:300]})")  # type: ignore[index]
    return next(e.reply["value"] for e in endings if e.rank == 0 and e.reply is not None)


class _Streams:
    """Write what a process prints to this one's console and standard error, a character at a time whole."""

    def __init__(self, console: Console) -> None:
        make = codecs.getincrementaldecoder("utf-8")
        self.decoders, self.console = {1: make("replace"), 2: make("replace")}, console

    def show(self, chunks: Sequence[tuple[int, bytes]]) -> None:
        """Write chunks of (1 or 2 for the stream, bytes)."""
        for number, chunk in chunks:
            file = self.console.file if number == 1 else sys.stderr
            if number == 2 or not self.console.quiet:
                file.write(self.decoders[number].decode(chunk))
                file.flush()


def _printer(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(visible(line), highlight=False, markup=False, soft_wrap=True)
