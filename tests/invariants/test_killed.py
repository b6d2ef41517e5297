"""A run that is killed at random moments ends bit-identical to one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RECIPE = """
name: killed
model: {source: "tiny:llama"}
stages:
  - method: sft
    data: &rated
      source: "packaged:movie_reviews.tsv"
      prompt: "Rate: {text}"
      completion: "{mean_rating}"
      rows: [0, 400]
      shuffle_seed: 1
    adapter: {r: 4}
    batch_size: 4
    epochs: 1.5
    optimizer: {lr: 0.01, weight_decay: 0.01}
    systems: {tokens_per_micro_batch: 600}
    checkpoint_every: 7
evaluate:
  - name: perplexity
    kind: perplexity
    data: {<<: *rated, rows: [1000, 1200]}
  - name: sign
    kind: choice
    choices: ["negative", "positive"]
    data:
      source: "packaged:movie_reviews.tsv"
      classes: {column: mean_rating, cuts: [0], names: [negative, positive]}
      prompt: "Which? {text}"
      completion: "{label}"
      rows: [1000, 1060]
      shuffle_seed: 1
    show: 2
"""


def start(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "posttrain", "run", str(recipe), "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (folder.parent / f"{folder.name}.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], str, dict[str, str]]:
    """Final weights, metrics, and evaluation items: everything that must not depend on how often it was killed."""
    weights = load_file(folder / "model" / "model.safetensors")
    items = {str(p.relative_to(folder)): p.read_text() for p in sorted((folder / "evaluations").rglob("*.jsonl"))}
    return weights, (folder / "stages" / "0-sft" / "metrics.jsonl").read_text(), items


def records(folder: Path) -> int:
    """How many steps the run has recorded so far."""
    file = folder / "stages" / "0-sft" / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


@pytest.mark.slow
def test_killed_five_times_ends_bit_identical(tmp_path: Path) -> None:
    """SIGKILL five times in one run: once before or while it evaluates, then at four random steps."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    calm = start(recipe, tmp_path / "calm")
    rng = random.Random(time.time_ns())  # other moments every time: the outcome may not depend on them
    targets = [0, *sorted(rng.sample(range(3, 145), 4))]
    folder, moments = tmp_path / "killed", []
    for target in targets:
        process = start(recipe, folder)
        while process.poll() is None and target and records(folder) < target:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3) if target else rng.uniform(3, 7))
        assert process.poll() is None, f"over before it could be killed at {target}: {moments}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        moments.append((target, records(folder)))
    assert start(recipe, folder).wait() == 0, (tmp_path / "killed.log").read_text()[-3000:]
    assert calm.wait() == 0, (tmp_path / "calm.log").read_text()[-3000:]

    weights, metrics, items = outcome(tmp_path / "calm")
    assert len(metrics.splitlines()) == 150 and len(items) == 4
    again, metrics_again, items_again = outcome(folder)
    assert metrics_again == metrics, moments
    assert items_again == items, moments
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[n], w) for n, w in weights.items()), moments
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "done"
