"""Trainers on a Ray cluster: the numbers of one process, whatever is killed, and errors that are not tried again."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file

import posttrain
from posttrain.config import PlacementConfig, Recipe
from posttrain.core import ray_cluster
from posttrain.core.errors import CheckpointError, DataError, PosttrainError, RecipeError
from posttrain.core.ray_cluster import ClusterError
from posttrain.recipe import machine_checks
from posttrain.runs import trainer_process
from posttrain.runs.ray_trainers import TrainerEnd, TrainerLost, _await_release, _end_noted, _result
from posttrain.runs.run_folder import Manifest, is_worked_on
from posttrain.sampling.rollout_store import read_rollouts
from tests.ray.test_ray_machines import parent, processes


def recipe(engine: dict[str, Any], **data: Any) -> Recipe:
    rows = {"source": "packaged:movie_reviews.tsv", "rows": [0, 60], "shuffle_seed": 1}
    text = {"prompt": "Rate: {text}", "completion": "{mean_rating}"}
    stage = {"method": "sft", "data": rows | text | data, "batch_size": 8, "max_steps": 24, "checkpoint_every": 4}
    stage["optimizer"] = {"lr": 0.01}
    plain = {"name": "run", "model": {"source": "tiny:llama", "device": "cpu"}, "stages": [stage], "systems": engine}
    return Recipe.model_validate(plain)


def checkpoint(folder: Path, step: int) -> bool:
    """Return True if a checkpoint of this step or a later one is there."""
    return any(int(p.name[5:]) >= step for p in folder.glob("stages/*/checkpoints/step-??????"))


def trainer(rank: int) -> int:
    """Return the process of a trainer that works in this folder; 0: there is none now."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"trainer_process" in (process / "cmdline").read_bytes() and (process / "cwd").samefile("."):
                if f"\0RANK={rank}\0".encode() in b"\0" + (process / "environ").read_bytes():
                    return int(process.name)
        except OSError:
            continue
    return 0


def when(condition: Callable[[], Any], then: Callable[[Any], None]) -> threading.Thread:
    """Call `then` with the first true value of the condition, in a thread."""

    def watch() -> None:
        for _ in range(12_000):
            if found := condition():
                return then(found)
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def numbers(folder: Path) -> tuple[list[float], dict[str, Any]]:
    lines = next(folder.glob("stages/*/metrics.jsonl")).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], load_file(folder / "model" / "model.safetensors")


@pytest.mark.long  # 30 s of processor time
@pytest.mark.timeout(1500)
def test_a_killed_trainer_changes_nothing(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process; two trainers: one is killed, the actor of another, then Ctrl-C; and resumed by one process."""
    monkeypatch.chdir(tmp_path)
    with open("log", "w") as log:
        console = Console(file=log)
        posttrain.run(recipe({}), folder="alone", console=console)
        folder = Path("ray")
        kill = when(lambda: checkpoint(folder, 4) and trainer(1), lambda process: os.kill(process, signal.SIGKILL))
        lose = when(
            lambda: not kill.is_alive() and checkpoint(folder, 8) and trainer(0),
            lambda process: os.kill(parent(process), signal.SIGKILL),
        )
        stop = when(
            lambda: not lose.is_alive() and checkpoint(folder, 12), lambda _: os.kill(os.getpid(), signal.SIGINT)
        )
        with pytest.raises(KeyboardInterrupt):
            posttrain.run(recipe({"engine": "ray", "trainers": 2}), folder=folder, console=console)
        stop.join()
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["status"] == "stopped" and not checkpoint(folder, 24)
        assert sum(manifest["systems"]["nodes"].values()) == 2 and manifest["systems"]["engine"] == "ray"
        killed, lost = (restart["reason"] for restart in manifest["systems"]["restarts"])
        assert "trainer 1 was lost (signal 9" in killed and "trainer 0 was lost (The actor died" in lost
        posttrain.run(recipe({}), folder=folder, console=console)
    losses, weights = numbers(Path("alone"))
    again, other = numbers(folder)
    assert len(again) == 24 and again == pytest.approx(losses, abs=1e-5)
    assert other.keys() == weights.keys()
    assert all(float((other[name] - w).abs().max()) < 1e-5 for name, w in weights.items())
    text = Path("log").read_text()
    assert text.count("start again from the last checkpoint (restart 1 of at most 3)") == 1
    assert "sft 0/24" in text  # rank 0's progress


@pytest.mark.long  # 15 s
@pytest.mark.timeout(1500)
def test_errors_of_the_recipe_come_through_once(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no column.*'nothing'|nothing"):
        posttrain.run(recipe({"engine": "ray"}, prompt="{nothing}"), folder="wrong")
    manifest = json.loads(Path("wrong/manifest.json").read_text())
    assert manifest["status"] == "failed" and manifest["systems"]["restarts"] == []
    assert "start again" not in capsys.readouterr().out
    with pytest.raises(ClusterError, match=r"no room for 3 x .*'CPU': 1000"):
        posttrain.run(recipe({"engine": "ray", "trainers": 3, "cpus": 1000, "wait": 1}), folder="large")


@pytest.mark.long  # 20 s
@pytest.mark.timeout(1500)
def test_coming_steps_are_sampled_on_the_cluster(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a staleness of 0 the tokens and losses are those of the synchronous run in one process; else within it."""
    monkeypatch.chdir(tmp_path)
    stage = {"method": "grpo", "name": "rl", "problems": {"kind": "lab"}, "rewards": [{"kind": "exact"}], "steps": 4}
    stage |= {"prompts_per_step": 4, "group_size": 4, "sampler": {"max_tokens": 12}, "optimizer": {"lr": 0.003}}
    plain = {"name": "run", "model": {"source": "tiny:llama", "device": "cpu"}}
    posttrain.run(Recipe.model_validate({**plain, "stages": [stage]}), folder="alone")
    on_ray = {**plain, "systems": {"engine": "ray", "trainers": 1, "samplers": 2}}

    found: list[list[int]] = []
    for staleness in (0, 2):
        watch = when(lambda: processes("ray::Sampler"), found.append)
        stages = [{**stage, "asynchronous": {"max_staleness": staleness}}]
        posttrain.run(Recipe.model_validate({**on_ray, "stages": stages}), folder=f"ray{staleness}")
        watch.join(10)
    assert len(found) == 2
    runs = [
        [[(r["tokens"], r["pieces"]) for r in read_rollouts(file)] for file in sorted(Path(name).rglob("*.parquet"))]
        for name in ("alone", "ray0", "ray2")
    ]
    assert runs[1] == runs[0] and len(runs[2]) == 4
    assert all(p[1] >= s - 2 for s, of in enumerate(runs[2]) for _, pieces in of for p in pieces)


def ending(rank: int, kind: str, message: str = "") -> TrainerEnd:
    return TrainerEnd(
        rank, None if kind == "lost" else {"kind": kind, "message": message, "class": DataError}, "signal 9"
    )


def test_what_ended_a_run() -> None:
    """A message of ours wins over a lost process, that over any other exception, and that over a group that broke."""
    done = TrainerEnd(0, {"kind": "done", "value": 7}, "exit code 0")
    assert _result([ending(1, "done"), done]) == 7
    for stopping in ([ending(0, "peer", "Connection closed"), ending(1, "lost")], [ending(0, "peer")]):
        with pytest.raises(KeyboardInterrupt, match="resumes from its last checkpoint"):  # after Ctrl-C: no restart
            _result(stopping, stopping=True)
    for endings, error, text in [
        ([ending(0, "peer"), ending(1, "lost"), ending(2, "error", "bad row")], DataError, "bad row"),
        ([ending(0, "failed"), ending(1, "lost")], TrainerLost, r"trainer 1 was lost \(signal 9\)"),
        ([ending(0, "peer"), ending(2, "failed", "ZeroDivisionError")], PosttrainError, "trainer 2.*ZeroDivision"),
        ([ending(0, "peer", "Connection closed by peer")], TrainerLost, "lost their connection"),
        ([ending(0, "stopped"), ending(1, "peer")], KeyboardInterrupt, ""),
    ]:
        with pytest.raises(error, match=text):
            _result(endings)


def test_a_restart_waits_for_a_trainer_that_still_has_the_folder(tmp_path: Path) -> None:
    """Which is on a machine out of reach, and may write; after `systems.wait` seconds it is tried all the same."""
    said: list[str] = []
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        _await_release(tmp_path, 0, said.append)
        assert not said
        threading.Timer(0.3, lambda: fcntl.flock(held, fcntl.LOCK_UN)).start()
        _await_release(tmp_path, 60, said.append)
        assert not is_worked_on(tmp_path)
    assert said == [f"waiting until the lost trainer has released {tmp_path}, at most 60 s (systems.wait)"]


def test_a_signal_that_ray_had_blocked_is_a_stop() -> None:
    """It would end the process without a word, as if lost, if it were delivered anywhere else."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # not to a thread in which it is not blocked
        assert trainer_process._carry_out({})["kind"] == "stopped"
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_manifest_has_how_a_run_ended_that_rank_0_could_not_tell(tmp_path: Path) -> None:
    for error, values in (
        (DataError("row 7 of another rank"), ("failed", "row 7 of another rank")),
        (KeyboardInterrupt(), ("stopped", None)),
    ):
        Manifest(tmp_path).update(status="running", error=None)
        with pytest.raises(type(error)), _end_noted(tmp_path):
            raise error
        found = Manifest(tmp_path).values
        assert (found["status"], found["error"]) == values
    Manifest(tmp_path).update(status="running", error=None)
    with pytest.raises(CheckpointError), _end_noted(tmp_path):
        raise CheckpointError("the folder holds a run of another recipe")
    assert Manifest(tmp_path).values["status"] == "running"
    Manifest(tmp_path).update(status="failed", error="of rank 0")
    with pytest.raises(DataError), _end_noted(tmp_path):
        raise DataError("the same, in other words")
    assert Manifest(tmp_path).values["error"] == "of rank 0"


def test_room_that_is_lost_is_waited_for_no_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call may take any time while its actor has room."""
    answers = iter([[], [], ["ref"]])
    ray = SimpleNamespace(wait=lambda refs, timeout: (next(answers), []), get=lambda ref: 5, nodes=list)
    monkeypatch.setattr(ray_cluster, "joined", lambda room: ray)
    monkeypatch.setattr(ray_cluster, "_is_whole", lambda room: True)
    room = ray_cluster.Workers("", "", "", 1, 1, 0.0, wait=0.0)
    assert ray_cluster.result_in_room(room, "ref") == 5
    answers = iter([[]] * 9)
    monkeypatch.setattr(ray_cluster, "_is_whole", lambda room: False)
    with pytest.raises(ClusterError, match=r"no room for them for 0 s \(systems.wait\); it has no machine"):
        ray_cluster.result_in_room(room, "ref")


def test_an_exception_of_ray_s_is_told_by_its_first_line_and_its_cause() -> None:
    text = "The actor died, \x1b[36mray::Actor\x1b[39m (pid=1)\n  File a.py\n\nValueError: no such folder\n"
    assert ray_cluster.line_of_error(Exception(text)) == "The actor died, ray::Actor (pid=1) ValueError: no such folder"
    assert ray_cluster.line_of_error(Exception("one line")) == "one line"
    assert ray_cluster.line_of_error(ValueError()) == "ValueError"


def test_placements_that_can_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, message in [
        ({"trainers": 2}, "trainers is for engine: ray.*nproc-per-node"),
        ({"engine": "ray", "trainers": 3, "nodes": 2}, "spread evenly over 2 nodes"),
        ({"engine": "ray", "trainers": 4, "replicas": 3}, "divided into 3 replicas"),
        ({"engine": "ray", "trainers": 4, "sequence_parallel": 3}, r"divided into groups of 3 \(sequence_parallel\)"),
    ]:
        with pytest.raises(ValidationError, match=message):
            PlacementConfig.model_validate(settings)
    assert PlacementConfig(trainers=1).trainers == 1  # as a dumped recipe has it
    monkeypatch.setattr(machine_checks, "is_installed", lambda package: package != "ray")
    with pytest.raises(RecipeError, match=r"systems.engine: needs ray.*posttrain\[ray\]"):
        machine_checks.check_machine(recipe({"engine": "ray"}))


def test_a_head_that_does_not_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only after a while; the run asks nothing more of it."""
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        context = SimpleNamespace(gcs_address=address)
        watch = ray_cluster.HeadWatch(SimpleNamespace(get_runtime_context=lambda: context))
        watch.check(wait=True)
    watch.check()
    ray_cluster.release(SimpleNamespace(get_runtime_context=lambda: context), "no group of Ray's")
    monkeypatch.setattr(ray_cluster, "HEAD_SECONDS", 0)
    with pytest.raises(ClusterError, match=f"head of the Ray cluster at {address} is gone.*same command resumes"):
        watch.check(wait=True)


def test_what_works_in_one_process_is_refused_when_a_recipe_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On Ray and under torchrun."""
    prompts = {"problems": {"kind": "lab"}, "rewards": [{"kind": "exact"}]}
    whole = recipe({}).model_dump(mode="json", exclude_unset=True)
    monkeypatch.setattr(machine_checks, "is_installed", lambda package: True)
    for changes, key in (
        ({"optimizer": {"kind": "muon"}}, "optimizer.kind: muon"),
        ({"keep_zeros": True}, "keep_zeros: keep_zeros"),
        ({"method": "grpo", **prompts, "steps": 1, "asynchronous": {}}, "asynchronous: asynchronous"),
        ({"method": "rejection_sampling", **prompts}, "method: rejection_sampling"),
        ({"method": "merge", "algorithm": "linear", "models": [{"source": "tiny:llama"}]}, "method: merge"),
    ):
        stage = {} if "method" in changes else whole["stages"][0]
        plain = {**whole, "stages": [{**stage, "name": "s", **changes}]}
        machine_checks.check_machine(Recipe.model_validate({**plain, "systems": {}}))
        ray = {**plain, "systems": {"engine": "ray", "trainers": 2}}
        with pytest.raises(RecipeError, match=f"stages.s.{key} works in one process, and systems.trainers is 2"):
            machine_checks.check_machine(Recipe.model_validate(ray))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match="method: merge works in one process, and torchrun starts 3"):
        posttrain.run(Recipe.model_validate({**plain, "systems": {}}), tmp_path / "run")  # from Python too
    assert not (tmp_path / "run").exists()
