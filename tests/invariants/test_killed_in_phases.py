"""A reinforcement-learning run that is killed inside every phase ends bit-identical to one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.core.progress import Phases
from posttrain.trainer import checkpoint
from tests import warm
from tests.invariants.test_killed import RL, outcome, records


def die(where: str, left: int) -> None:
    """From now on this process is killed 5 ms into a phase the given time it comes; or when a checkpoint is about to be
    called whole."""
    enter, write = Phases.__call__, checkpoint.write_json

    def here(seconds: float) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def phase(self: Any, name: str) -> Any:
        if name == where:
            here(0.005)
        return enter(self, name)

    def write_json(path: Path, value: Any) -> None:
        if where == path.name:
            here(0)
            threading.Event().wait(60 if left == 0 else 0)
        write(path, value)

    Phases.__call__, checkpoint.write_json = phase, write_json  # type: ignore[method-assign, assignment]


def run(recipe: Path, folder: Path, where: str = "never", count: int = 0) -> tuple[int | None, str]:
    """(exit status, what was printed)."""
    log = folder.parent / f"{folder.name}-{where}.log"
    arguments = ["run", str(recipe), "--folder", str(folder)]
    process = warm.posttrain(arguments, log, {}, partial(die, where, count))
    process.join()
    return process.exitcode, log.read_text()


PHASES = [("sample", 4), ("reward", 2), ("score", 2), ("learn", 3), ("checksums.json", 2)]


@pytest.mark.long
def test_killed_inside_every_phase_ends_bit_identical(tmp_path: Path) -> None:
    """PPO, so that there is a critic: killed while it samples, rewards, scores, learns and writes a checkpoint."""
    rows = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(50)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe, killed, calm = (tmp_path / name for name in ("recipe.yaml", "killed", "calm"))
    steps = 10
    recipe.write_text(RL.replace("METHOD", "ppo").replace("steps: 24", f"steps: {steps}"))
    for where, count in PHASES:
        status, said = run(recipe, killed, where, count)
        assert status == -signal.SIGKILL, (where, said[-3000:])
        assert 0 < records(killed) <= steps
    assert list((killed / "stages" / "0-rl" / "checkpoints").glob(".step-*.writing"))  # half of one was left behind
    for folder in (killed, calm):
        status, said = run(recipe, folder)
        assert status == 0, said[-3000:]
    weights, metrics, items = outcome(calm)
    assert len(metrics.splitlines()) == steps + 1 and len(items) >= steps + 2
    again, metrics_again, items_again = outcome(killed)
    assert metrics_again == metrics and items_again == items
    assert again.keys() == weights.keys() and all(torch.equal(again[n], w) for n, w in weights.items())
