"""A reinforcement-learning run that is killed inside every phase ends bit-identical to one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.invariants.test_killed import RL, outcome, records

DYING = """
import os, signal, sys, threading
from posttrain.cli import main
from posttrain.train import checkpoint, collect
where, left = sys.argv[1], int(sys.argv[2])
def here(seconds):
    global left
    left -= 1
    if left == 0:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
enter, write = collect.Phases.__call__, checkpoint.write_json
def phase(self, name):
    if name == where:
        here(0.005)
    return enter(self, name)
def write_json(path, value):
    if where == path.name:
        here(0)
        threading.Event().wait(60 if left == 0 else 0)
    write(path, value)
collect.Phases.__call__, checkpoint.write_json = phase, write_json
sys.argv = ["posttrain", "run", sys.argv[3], "--folder", sys.argv[4]]
main()
"""
"""posttrain run, killed 5 ms into a phase the given time it comes; or when a checkpoint is about to be called whole."""


def run(recipe: Path, folder: Path, where: str = "never", count: int = 0) -> tuple[int, str]:
    """(exit status, what was printed)."""
    command = [sys.executable, "-c", DYING, where, str(count), str(recipe), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_killed_inside_every_phase_ends_bit_identical(tmp_path: Path) -> None:
    """PPO, so that there is a critic: killed while it samples, rewards, scores, learns and writes a checkpoint."""
    rows = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(50)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe, killed, calm = (tmp_path / name for name in ("recipe.yaml", "killed", "calm"))
    recipe.write_text(RL.replace("METHOD", "ppo").replace("steps: 40", "steps: 10"))
    for where, count in (("sample", 4), ("reward", 2), ("score", 2), ("learn", 3), ("checksums.json", 2)):
        status, said = run(recipe, killed, where, count)
        assert status == -signal.SIGKILL, (where, said[-3000:])
        assert 0 < records(killed) < 11
    assert list((killed / "stages" / "0-rl" / "checkpoints").glob(".step-*.writing"))  # half of one was left behind
    for folder in (killed, calm):
        status, said = run(recipe, folder)
        assert status == 0, said[-3000:]
    weights, metrics, items = outcome(calm)
    assert (len(metrics.splitlines()), len(items)) == (11, 10 + 2 + 2)
    again, metrics_again, items_again = outcome(killed)
    assert metrics_again == metrics and items_again == items
    assert again.keys() == weights.keys() and all(torch.equal(again[n], w) for n, w in weights.items())
