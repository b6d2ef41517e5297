"""RL by trainers, samplers and rewards on three Ray nodes of this machine: the run of one process, whatever is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from posttrain.core.ray_cluster import OF_STARTED
from posttrain.sampling.rollout_store import read_rollouts

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

STEPS = 10
HOLD = "hold"
"""While a file with this name is there, no reward comes: what is killed meanwhile is lost within a step."""
REWARD = """
import time
from pathlib import Path

def vowels(text, example):
    time.sleep(0.03)  # a step takes long enough for something to be killed in it
    while Path(HOLD).exists():
        time.sleep(0.02)
    return sum(c in "aeiou0123456789ABCDEFGHIJKLM" for c in text) / 12
"""
CHILD = "import sys; from posttrain.cli.main import main; main()"


def recipe() -> dict[str, Any]:
    term = {"kind": "function", "name": "vowels", "function": "vowels:vowels", "timeout": 60}
    stage = {"method": "grpo", "name": "rl", "problems": {"kind": "lab"}, "rewards": [term], "steps": STEPS}
    stage |= {"prompts_per_step": 4, "group_size": 4, "mini_batches": 2, "checkpoint_every": 1}
    stage |= {"sampler": {"max_tokens": 12}, "optimizer": {"lr": 0.003}}
    return {"name": "run", "model": {"source": "tiny:llama", "device": "cpu"}, "stages": [stage]}


def metrics(folder: str) -> list[dict[str, Any]]:
    file = Path(folder) / "stages" / "0-rl" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def completions(folder: str) -> list[list[Any]]:
    files = sorted(Path(folder).glob("stages/0-rl/rollouts/*.parquet"))
    return [[(r["problem"], r["tokens"]) for r in read_rollouts(file)] for file in files]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[dict[str, Any]], list[list[Any]]]]:
    """The run in one process, in the folder that the other runs are in too."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in OF_STARTED.items():  # few processes; else nodes start too slowly on a busy machine
            patch.setenv(name, os.environ.get(name, value))
        Path("vowels.py").write_text(REWARD.replace("HOLD", repr(str(folder / HOLD))))
        Path("recipe.yaml").write_text(json.dumps(recipe()))
        assert command("alone", "alone.log").wait(300) == 0, Path("alone.log").read_text()
        yield metrics("alone"), completions("alone")


@contextmanager
def nodes(count: int) -> Iterator[Any]:
    """Ray nodes on this machine, each with four cores by its own count."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs Ray: pip install 'posttrain[ray]'")
    options = {"num_cpus": 4, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = cluster_utils.Cluster()
    try:
        for _ in range(4):
            with suppress(Exception):  # Ray gives a node 30 seconds to start, which a busy machine exceeds
                while len(cluster.worker_nodes) < count - 1:
                    cluster.add_node(**options)
                break
        assert len(cluster.worker_nodes) == count - 1
        yield cluster
    finally:
        cluster.shutdown()


def command(folder: str, log: str, address: str = "") -> subprocess.Popen[bytes]:
    """Start the run, on the cluster at this address if one is given."""
    systems = {"engine": "ray", "address": address, "trainers": 2, "nodes": 2, "samplers": 2, "rewards": 2}
    changes = [f"systems.{name}={value}" for name, value in systems.items() if address]
    arguments = ["run", "recipe.yaml", "--folder", folder, *changes]
    with open(log, "wb") as file:
        return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=file, stderr=subprocess.STDOUT)


def processes(part: str) -> list[int]:
    """Return the processes whose command line has this part, but for those that start trainers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if part.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return sorted(found)


def trainers() -> dict[int, int]:
    """Return the processes of trainers by rank."""
    found = {}
    for pid in processes("trainer_process"):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {int(v.removeprefix(b"RANK=")): pid for v in environment if v.startswith(b"RANK=")}
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_for(condition: Callable[[], Any], running: subprocess.Popen[bytes], seconds: float = 900) -> Any:
    """Return the first true value of the condition, which the command must not end before."""
    for _ in range(int(seconds / 0.05)):
        if found := condition():
            return found
        assert running.poll() is None
        time.sleep(0.05)
    raise TimeoutError


def same(folder: str, expected: tuple[list[dict[str, Any]], list[list[Any]]]) -> None:
    """Check that a run is the one in one process: the same tokens, and losses but for the order of sums."""
    found = metrics(folder)
    assert [m["step"] for m in found] == [m["step"] for m in expected[0]] == list(range(1, STEPS + 1))
    for name in ("loss", "reward", "entropy"):
        assert [m[name] for m in found] == pytest.approx([m[name] for m in expected[0]], abs=1e-5)
    assert completions(folder) == expected[1]


def test_a_lost_sampler_reward_trainer_and_node_change_nothing(alone: Any) -> None:
    with nodes(3) as cluster:
        head = cluster.head_node.all_processes["raylet"][0].process.pid
        run = command("three", "three.log", cluster.address)
        for step, kind in enumerate(("SamplerActor", "RewardActor"), 1):
            wait_for(lambda step=step: len(metrics("three")) >= step, run)
            os.kill(processes(f"ray::{kind}")[0], signal.SIGKILL)
        wait_for(lambda: len(metrics("three")) >= 4, run)
        os.kill(trainers()[1], signal.SIGKILL)
        wait_for(lambda: len(metrics("three")) >= 6, run)
        Path(HOLD).touch()
        places = [parent(parent(pid)) for _, pid in sorted(trainers().items())]
        assert len(set(places)) == 2 and set(places) <= set(processes("raylet/raylet"))
        lost = next(place for place in places if place != head)  # rank 0's, but where that is the head
        of_node = {pid for pid in trainers().values() if parent(parent(pid)) == lost}
        os.kill(lost, signal.SIGKILL)  # a node: its trainer, samplers and rewards go with it, after some seconds
        wait_for(lambda: not of_node & set(trainers().values()), run, 120)
        Path(HOLD).unlink()
        assert run.wait(600) == 0, Path("three.log").read_text()[-3000:]
    same("three", alone)
    systems = json.loads(Path("three/manifest.json").read_text())["systems"]
    assert len(systems["restarts"]) == 2 and (systems["samplers"], systems["rewards"]) == (2, 2)
    text = Path("three.log").read_text()
    assert "sampler worker" in text and "is replaced" in text and "restart 2 of at most 3" in text


def test_a_lost_head_ends_the_run_and_the_same_command_resumes_it(alone: Any) -> None:
    with nodes(2) as cluster:
        run = command("head", "head.log", cluster.address)
        wait_for(lambda: len(metrics("head")) >= 2, run)
        Path(HOLD).touch()
        os.kill(cluster.head_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
        assert run.wait(300) == 1
        Path(HOLD).unlink()
        text = Path("head.log").read_text()
        assert "the head of the Ray cluster" in text and "same command" in text, text[-3000:]
        done = len(metrics("head"))
        assert done < STEPS and not trainers()
    with nodes(2) as cluster:
        assert command("head", "again.log", cluster.address).wait(600) == 0, Path("again.log").read_text()[-3000:]
    same("head", alone)
