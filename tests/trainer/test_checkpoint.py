"""Checkpoints: whole or not at all, damage noticed, a full disk survived, two ranks' opened by one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from posttrain.config import AdapterConfig, OptimizerConfig, SystemsConfig
from posttrain.core import distributed
from posttrain.core.errors import CheckpointError
from posttrain.models.adapters import attach
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from posttrain.trainer import checkpoint
from posttrain.trainer.train_step import Learner
from tests import warm
from tests.conftest import random_samples


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"weight.a": torch.full((4, 3), value), "step.a": torch.tensor(value)}


def test_round_trip_and_keep(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tensors(float(step)), {"steps_done": step}, keep=2)
    assert checkpoint.found(tmp_path) == [2, 3]
    into = tensors(0.0)
    assert checkpoint.load_newest(tmp_path, into) == {"step": 3, "steps_done": 3}
    assert all(bool((t == 3).all()) for t in into.values())
    assert checkpoint.load_newest(tmp_path / "none", into) is None


@pytest.mark.parametrize("how", ["flip", "missing", "no checksums"])
def test_a_damaged_one_is_noticed_and_the_one_before_used(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(float(step)), {}, keep=2)
    newest = tmp_path / "step-000002"
    data = next(newest.glob("*.distcp"))
    if how == "flip":
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 1
        data.write_bytes(bytes(raw))
    elif how == "missing":
        data.unlink()
    else:
        (newest / "checksums.json").unlink()
    into = tensors(0.0)
    numbers = checkpoint.load_newest(tmp_path, into)
    assert numbers is not None and numbers["step"] == 1
    assert bool((into["weight.a"] == 1).all())
    assert "damaged" in caplog.text
    assert checkpoint.found(tmp_path) == [1] and (tmp_path / "damaged-step-000002").is_dir()


def test_a_half_written_one_does_not_count(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, tensors(1.0), {}, keep=2)
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".step-000002.writing")
    assert checkpoint.found(tmp_path) == [1]
    checkpoint.save(tmp_path, 2, tensors(2.0), {}, keep=2)
    assert checkpoint.found(tmp_path) == [1, 2] and not (tmp_path / ".step-000002.writing").exists()


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, tensors(1.0), {}, keep=2)
    with pytest.raises(CheckpointError, match="another model or recipe"):
        checkpoint.load_newest(tmp_path, {"weight.a": torch.zeros(4, 3), "step.b": torch.tensor(0.0)})
    with pytest.raises(CheckpointError, match="another model or recipe"):
        checkpoint.load_newest(tmp_path, {"weight.a": torch.zeros(5, 3), "step.a": torch.tensor(0.0)})


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((4, 3), value)}


def test_the_weights_of_the_best_step_stay_as_long_as_a_checkpoint_names_them(tmp_path: Path) -> None:
    """Whatever the checkpoint that a run is resumed from: the weights that it names are there."""

    def best() -> list[str]:
        return sorted(p.name for p in tmp_path.glob("best-*"))

    checkpoint.save_best(tmp_path, 2, weights(2.0))
    for step in (3, 4, 5):
        checkpoint.save(tmp_path, step, tensors(0.0), {"best_step": 2}, keep=2)
    assert best() == ["best-000002"] and checkpoint.found(tmp_path) == [4, 5]  # not counted by `keep`
    checkpoint.save_best(tmp_path, 6, weights(6.0))
    assert best() == ["best-000002", "best-000006"]  # killed here, step 5 is resumed, which names step 2
    checkpoint.save(tmp_path, 6, tensors(0.0), {"best_step": 6}, keep=2)
    assert best() == ["best-000002", "best-000006"]  # should step 6 be damaged, step 5 is resumed
    checkpoint.save(tmp_path, 7, tensors(0.0), {"best_step": 6}, keep=2)
    assert best() == ["best-000006"]
    into = weights(0.0)
    assert checkpoint.load_best(tmp_path, 6, into) is None and bool((into["a"] == 6).all())
    data = next((tmp_path / "best-000006").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    assert "checksum differs" in str(checkpoint.load_best(tmp_path, 6, into))
    assert "No such file" in str(checkpoint.load_best(tmp_path, 8, into)) and bool((into["a"] == 6).all())


def fill(disk: Path) -> None:
    """Save a checkpoint that fits, and one that does not."""
    checkpoint.save(disk, 1, {"w": torch.ones(1000)}, {}, keep=2)
    with pytest.raises(CheckpointError, match="the disk is full.*go on from step 1"):
        checkpoint.save(disk, 2, {"w": torch.ones(3_000_000)}, {}, keep=2)
    into = {"w": torch.zeros(1000)}
    assert checkpoint.found(disk) == [1] and checkpoint.load_newest(disk, into) == {"step": 1}
    assert float(into["w"].sum()) == 1000 and sorted(p.name for p in disk.iterdir()) == ["step-000001"]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount a small file system")
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A real file system of 4 MiB: the second checkpoint (12 MB) does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this system lets root mount nothing")
    try:
        warm.run(fill, disk, folder=tmp_path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


KINDS = ("full", "lora")
Trained = dict[str, tuple[int, list[float], dict[str, torch.Tensor]]]


def train(folder: Path, jobs: list[tuple[str, str, int, int]], replicas: int) -> None:
    """Train a model of each kind from step to step and write (ranks, losses, weights) of each.

    With several replicas of the weights, as many ranks compute each micro-batch together.
    """
    distributed.start(torch.device("cpu"), replicas, sequence_parallel=replicas)
    assert distributed.shards() * replicas == distributed.world()
    found = {}
    for name, kind, first, last in jobs:
        checkpoints, hf = folder / name / kind, tiny_model("llama")
        hf = attach(hf, AdapterConfig(r=4), 0) if kind == "lora" else hf
        learner = Learner(LanguageModel(hf), OptimizerConfig(lr=1e-4), SystemsConfig(tokens_per_micro_batch=80), 4)
        state = learner.state_dict()
        numbers = checkpoint.load_newest(checkpoints, state["tensors"])
        assert (numbers is None) == (first == 0)
        if numbers:
            learner.load_state_dict(numbers)
        losses = [learner.step(random_samples(7, seed=s)).metrics["loss"] for s in range(first, last)]
        state = learner.state_dict()
        checkpoint.save(checkpoints, last, state["tensors"], state["numbers"], keep=2)
        trained = [(n, p.detach()) for n, p in learner.model.named_parameters() if p.requires_grad]
        weights = {n: distributed.full_tensor(p) for n, p in trained}
        found[f"{name} {kind}"] = distributed.world(), losses, weights
    if distributed.is_main():
        torch.save(found, folder / "found.pt")
    distributed.stop()


def go(processes: int, folder: Path, jobs: list[tuple[str, int, int]], replicas: int = 1) -> Trained:
    """Train each kind from step to step of each job, in one launch: {"job kind": (ranks, losses, weights)}."""
    wanted = [(name, kind, first, last) for name, first, last in jobs for kind in KINDS]
    warm.run(train, folder, wanted, replicas, folder=folder, ranks=processes)
    return torch.load(folder / "found.pt")


def test_two_ranks_equal_one_and_their_checkpoint_opens_in_one(tmp_path: Path) -> None:
    """Four steps on one rank; four on two; two on two with whole copies, which share micro-batches, and two on one."""
    by_two = go(2, tmp_path, [("two", 0, 4)]) | go(2, tmp_path, [("mixed", 0, 2)], replicas=2)
    for kind in KINDS:
        assert len(list((tmp_path / "two" / kind / "step-000004").glob("*.distcp"))) == 2
    by_one = go(1, tmp_path, [("one", 0, 4), ("mixed", 2, 4)])
    for kind in KINDS:
        world, losses, weights = by_one[f"one {kind}"]
        again, two_losses, two_weights = by_two[f"two {kind}"]
        assert (world, again) == (1, 2)
        _, first, _ = by_two[f"mixed {kind}"]
        _, rest, mixed_weights = by_one[f"mixed {kind}"]
        for other in (two_losses, first + rest):
            assert other == pytest.approx(losses, abs=1e-5)
        for found in (two_weights, mixed_weights):
            assert found.keys() == weights.keys()
            for name, w in weights.items():
                assert float((found[name] - w).abs().max()) < 1e-5, name
