"""A full disk, wherever it happens: a message that says so, everything finished kept, and the same bits in the end."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import posttrain
from posttrain.core.errors import CheckpointError
from posttrain.core.files import is_full

RATED = {
    "source": "packaged:movie_reviews.tsv",
    "prompt": "Rate: {text}",
    "completion": "{mean_rating}",
    "shuffle_seed": 1,
}


def recipe() -> posttrain.Recipe:
    """Adapters, so that the merged model is larger than all checkpoints together."""
    stage = {"data": {**RATED, "rows": [0, 24]}, "adapter": {"r": 1, "target": ["q_proj"]}, "batch_size": 8}
    task = {"name": "ppl", "kind": "perplexity", "data": {**RATED, "rows": [1000, 1040]}}
    return posttrain.Recipe.model_validate(
        {"name": "full", "model": {"source": "tiny:llama"}, "stages": [stage], "evaluate": [task]}
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mount point; what a test mounts there is taken down, also while the failed run's files are still open here."""
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert not folder.is_mount()


def resize(disk: Path, kib: int, *, again: bool = False) -> None:
    options = f"{'remount,' if again else ''}size={kib}k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this system lets root mount nothing")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount small file systems")
@pytest.mark.parametrize(
    ("kib", "there"),
    [pytest.param(8, "recipe.yaml", marks=pytest.mark.long), (180, "stages/0-sft/checkpoints/step-000003")],
    ids=["evaluation", "model"],
)
def test_a_full_disk_is_said_wherever_it_happens_and_the_run_goes_on(
    disk: Path, tmp_path: Path, kib: int, there: str
) -> None:
    """Where the first evaluation is written, and where the model is (a checkpoint: tests/train/test_checkpoint.py)."""
    resize(disk, kib)
    with pytest.raises(CheckpointError, match="the disk is full"):
        posttrain.run(recipe(), disk / "run")
    assert (disk / "run" / there).exists()
    assert not (disk / "run" / "stages" / "0-sft" / "model").exists()
    resize(disk, 50_000, again=True)
    weights = [posttrain.run(recipe(), f / "run").model / "model.safetensors" for f in (disk, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_is_no_full_disk_is_not_taken_for_one() -> None:
    assert is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_full(PermissionError(13, "Permission denied")) and not is_full(ValueError("size"))
    wrapped = RuntimeError("could not write")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert is_full(wrapped)
