"""A byte of any file of a run is changed: each command ends in a message or in what it would have given."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import posttrain
from posttrain.cli import inspect_rollouts
from posttrain.core.console import VisibleConsole
from posttrain.core.errors import PosttrainError
from posttrain.core.progress import Track
from posttrain.models.loading import load_model
from posttrain.recipe.parsing import load_recipe
from posttrain.report import build_report

RECIPE = """
name: damaged
model: {source: "tiny:llama", device: cpu}
stages:
  - {name: first, data: {source: rows.jsonl}, batch_size: 4, max_steps: 3, checkpoint_every: 1}
  - method: grpo
    name: rl
    problems: {kind: rows, data: {source: problems.jsonl, rows: [0, 8], chat: false}}
    held_out: {every: 2, problems: {kind: rows, data: {source: problems.jsonl, rows: [8, 10], chat: false}}}
    rewards: [{kind: length, unit: characters, target: 6, width: 9}]
    sampler: {max_tokens: 5}
    prompts_per_step: 2
    group_size: 2
    steps: 3
    checkpoint_every: 1
evaluate: [{name: asked, kind: perplexity, data: {source: rows.jsonl}}]
"""
UNCHECKED = (".lock", "report.html")
"""Files that nothing is read from."""


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def resume(folder: Path) -> None:
    posttrain.run(load_recipe(folder), folder=folder, console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped in its second stage, `stopped`, and the same run finished, `done`."""
    place = tmp_path_factory.mktemp("damaged")
    (place / "rows.jsonl").write_text(lines([{"prompt": f"{i}?", "completion": f"{i}."} for i in range(9)]))
    (place / "problems.jsonl").write_text(lines([{"prompt": f"{i} =", "answer": str(i)} for i in range(10)]))
    (place / "damaged.yaml").write_text(RECIPE)
    update = Track.update

    def watched(self: Track, done: int, **values: Any) -> None:
        update(self, done, **values)
        if self.what == "rl" and done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        with patched.context() as stopping:
            stopping.setattr(Track, "update", watched)
            with pytest.raises(KeyboardInterrupt):
                posttrain.run("damaged.yaml", folder="stopped", console=Console(file=io.StringIO()))
        shutil.copytree("stopped", "done")
        resume(Path("done"))
    return place


def flips(folder: Path, count: int, seed: int) -> list[tuple[str, int, int]]:
    """Return (file, place, bits) of changes: every file once, then more of them, at random places."""
    rng = random.Random(seed)
    files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    files = [f for f in files if Path(f).name not in UNCHECKED and (folder / f).stat().st_size]
    rng.shuffle(files)
    chosen = [files[i % len(files)] for i in range(count)]
    return [(f, rng.randrange((folder / f).stat().st_size), 1 << rng.randrange(8)) for f in chosen]


def flip(folder: Path, change: tuple[str, int, int]) -> None:
    name, place, bits = change
    data = bytearray((folder / name).read_bytes())
    data[place] ^= bits
    (folder / name).unlink()  # the copies share no file
    (folder / name).write_bytes(bytes(data))


def outcome(folder: Path) -> dict[str, bytes]:
    """Return the weights and items that a run ends in."""
    kinds = ("model/model.safetensors", "stages/1-rl/metrics.jsonl", "evaluations/after/asked.jsonl")
    return {name: (folder / name).read_bytes() for name in kinds}


READERS: list[Callable[[Path], Any]] = [
    build_report,
    lambda folder: inspect_rollouts.print_rollouts(folder, VisibleConsole(file=io.StringIO())),
    lambda folder: inspect_rollouts.print_drift(folder, VisibleConsole(file=io.StringIO())),
    resume,
    lambda folder: load_model(posttrain.ModelConfig(source=str(folder), device="cpu")),
]


def check(runs: Path, kind: str, count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Damage the run at `count` places, one at a time, and read it; return how often that was a message."""
    monkeypatch.chdir(runs)
    calm, noticed = outcome(runs / "done"), 0
    changes = flips(runs / kind, count, seed)
    for change in changes:
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree(kind, "copy")
        flip(Path("copy"), change)
        for read in READERS if kind == "done" else [build_report, resume]:
            try:
                read(Path("copy"))
            except PosttrainError as error:
                noticed += 1
                assert len(str(error)) < 5_000, change
            except Exception as error:
                raise AssertionError(f"{change}: {type(error).__name__}: {error}") from error
            else:
                assert read is not resume or kind == "done" or outcome(Path("copy")) == calm, change
    return noticed


def test_damage_of_a_run_is_a_message_or_does_nothing(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(runs, "stopped", 2, 1, monkeypatch) + check(runs, "done", 4, 2, monkeypatch)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["stopped", "done"])
def test_damage_at_a_hundred_places_is_a_message_or_does_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # most bytes of a finished run are in files of which only the hash is read, if that
    assert check(runs, kind, 100, random.SystemRandom().randrange(2**31), monkeypatch) > 3
