"""A run that is killed at random moments ends bit-identical to one that was left alone."""

from __future__ import annotations

import json
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posttrain.core.files import cache_folder
from posttrain.sampling.rollout_store import read_rollouts
from tests import warm

RECIPE = """
name: killed
model: {source: "tiny:llama"}
stages:
  - method: sft
    data: &rated
      source: "packaged:movie_reviews.tsv"
      prompt: "Rate: {text}"
      completion: "{mean_rating}"
      rows: [0, 200]
      shuffle_seed: 1
    held_out: {<<: *rated, rows: [1200, 1215]}
    evaluate_every: 20
    held_out_answers: 2
    answer_tokens: 4
    adapter: {r: 4}
    batch_size: 4
    epochs: 1.5
    optimizer: {lr: 0.01, weight_decay: 0.01}
    systems: {tokens_per_micro_batch: 600}
    checkpoint_every: 7
evaluate:
  - name: perplexity
    kind: perplexity
    data: {<<: *rated, rows: [1000, 1030]}
  - name: sign
    kind: choice
    choices: ["negative", "positive"]
    data:
      source: "packaged:movie_reviews.tsv"
      classes: {column: mean_rating, cuts: [0], names: [negative, positive]}
      prompt: "Which? {text}"
      completion: "{label}"
      rows: [1000, 1010]
      shuffle_seed: 1
    show: 2
"""

RL = """
name: killed
model: {source: "tiny:llama"}
stages:
  - method: METHOD
    name: rl
    problems: {kind: rows, data: {source: problems.jsonl, rows: [0, 40], chat: false}}
    held_out: {every: 10, problems: {kind: rows, data: {source: problems.jsonl, rows: [40, 50], chat: false}}}
    rewards:
      - {kind: length, unit: characters, target: 12, width: 30}
      - {kind: function, name: slow, function: "tests.invariants.plugged_in:vowels", weight: 0.5}
    sampler: {max_tokens: 10}
    prompts_per_step: 6
    group_size: 4
    steps: 24
    mini_batches: 2
    kl: {coefficient: 0.05}
    optimizer: {lr: 0.002}
    checkpoint_every: 2
"""
"""Sampling, a reward in a worker process, learning and checkpoints take about as long, so that a kill hits each."""

EXPLORING = """
    exploration:
      dynamic_sampling: 1
      success: 0.9
      entropy_target: {target: 4.0, low: 0.3}
      adaptive_group_size: {first: 2}
      curriculum: {}
      replay: {rare: 0.6}
      partial_rollouts: 6
      max_staleness: 3
"""
"""All of adaptive exploration and of trajectory management, for a stage of RL."""


TURNS = """
    environment: {kind: function, function: "tests.invariants.plugged_in:Counting", stop: [e, a, "1"], max_turns: 3}
"""


REFINING = """
    environment:
      kind: refine
      answers: inline
      stop: [e, a, "1"]
      feedback: ["tests.invariants.plugged_in:counted", {kind: model, source: "tiny:qwen2", sampler: {max_tokens: 5}}]
"""


PREFERENCE = """
name: killed
model: {source: "tiny:llama"}
stages:
  - method: kto
    name: preference
    data: &rows {source: preferences.jsonl, rows: [0, 60], shuffle_seed: 1}
    held_out: {every: 8, data: {<<: *rows, rows: [60, 80]}}
    adapter: {r: 4}
    batch_size: 4
    epochs: 2
    optimizer: {lr: 0.003}
    systems: {tokens_per_micro_batch: 150}
    checkpoint_every: 3
"""


REWARD_MODEL = """
name: killed
model: {source: "tiny:llama"}
stages:
  - method: reward_model
    name: rm
    data: {source: pairs.jsonl, rows: [0, 100]}
    held_out: {every: 16, data: {source: pairs.jsonl, rows: [100, 120]}}
    members: 2
    adapter: {r: 4}
    batch_size: 8
    epochs: 9
    max_steps: 32
    optimizer: {lr: 0.003}
    checkpoint_every: 4
"""


def start(recipe: Path, folder: Path) -> ForkServerProcess:
    # What one run keeps in the cache is no help to another, but for the compiled kernels.
    cache = folder.with_suffix(".cache")
    if not cache.is_dir():
        cache.mkdir()
        (cache / "native").symlink_to(cache_folder() / "native", target_is_directory=True)
        (cache_folder() / "native").mkdir(parents=True, exist_ok=True)
    environment = {"POSTTRAIN_CACHE": str(cache)}
    log = folder.parent / f"{folder.name}.log"
    return warm.posttrain(["run", str(recipe), "--folder", str(folder)], log, environment)


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], str, dict[str, str]]:
    """Final weights, metrics, and evaluation items: everything that must not depend on how often it was killed."""
    made = [folder / "model", *sorted((folder / "stages").glob("*/reward_model"))]
    files = [p for m in made if m.is_dir() for p in sorted(m.rglob("model.safetensors"))]
    weights = {f"{p.relative_to(folder)} {n}": w for p in files for n, w in load_file(p).items()}
    items = {str(p.relative_to(folder)): p.read_text() for p in sorted((folder / "evaluations").rglob("*.jsonl"))}
    for pattern in ("*/held_out/*.json*", "*/best_step.json", "*/member-*/metrics.jsonl", "*/reward_model/reward.json"):
        items |= {str(p.relative_to(folder)): p.read_text() for p in sorted((folder / "stages").glob(pattern))}
    for p in sorted((folder / "stages").rglob("*.parquet")):
        items[str(p.relative_to(folder))] = repr(read_rollouts(p))
    (metrics,) = (folder / "stages").glob("0-*/metrics.jsonl")
    return weights, metrics.read_text(), items


def records(folder: Path) -> int:
    """How many steps the run has recorded so far."""
    while True:
        try:
            return sum(len(p.read_bytes().splitlines()) for p in (folder / "stages").glob("0-*/**/metrics.jsonl"))
        except FileNotFoundError:  # a checkpoint got its name while its folder was being looked through
            pass


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.long)])
def test_killed_while_it_evaluates_and_at_random_steps_ends_bit_identical(tmp_path: Path, kills: int) -> None:
    """SIGKILL in one run: once before or while it evaluates, then at random steps.

    75 steps and the record before the first. Items: three tasks before and after; held-out rows before, after 20, 40,
    60 and 75 steps; the step that was chosen."""
    rng = random.Random(time.time_ns())  # other moments every time: the outcome may not depend on them
    check_killed(tmp_path, RECIPE, [0, *sorted(rng.sample(range(3, 70), kills))], rng, (76, 6 + 5 + 1))


@pytest.mark.slow
def test_reinforcement_learning_killed_twice_ends_bit_identical(tmp_path: Path) -> None:
    """The same with rollouts, rewards from other processes and a reference: 8 steps and the one before,
    their rollouts and two held-out ones, which are evaluations too."""
    kill_rl(tmp_path, "grpo, exploring", 2, 8, (9, 8 + 2 + 2))


@pytest.mark.long
@pytest.mark.parametrize("method", ["grpo", "grpo, in turns", "grpo, refining", "grpo, exploring"])
def test_reinforcement_learning_killed_six_times_ends_bit_identical(tmp_path: Path, method: str) -> None:
    """The same with 24 steps, four held-out rollouts, and killed before or while it evaluates too."""
    kill_rl(tmp_path, method, 5, 24, (25, 24 + 4 + 2), at_once=True)


def kill_rl(
    tmp_path: Path, method: str, kills: int, steps: int, counts: tuple[int, int], at_once: bool = False
) -> None:
    rows = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(50)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rng = random.Random(time.time_ns())
    targets = [0] * at_once + sorted(rng.sample(range(2, steps - 1), kills))
    name, _, more = method.partition(", ")
    text = (
        RL.replace("METHOD", name).replace("steps: 24", f"steps: {steps}")
        + {"": "", "in turns": TURNS, "refining": REFINING, "exploring": EXPLORING}[more]
    )
    if more == "exploring":
        text = text.replace("kl: {coefficient: 0.05}", "kl: {coefficient: 0.05, target: 0.01}")
    check_killed(tmp_path, text, targets, rng, counts)


@pytest.mark.long
def test_preference_killed_three_times_ends_bit_identical(tmp_path: Path) -> None:
    """Before or while the reference's numbers are made, then at two random steps; 30 steps and the one before.

    KTO, which has all that the losses of pairs have, and a baseline from the whole batch."""
    rows = [
        {"prompt": f"Say {i} and a word or two", "completion": f"{i} or two" + "!" * (i % 5), "label": i % 3 > 0}
        for i in range(80)
    ]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rng = random.Random(time.time_ns())
    check_killed(tmp_path, PREFERENCE, [0, *sorted(rng.sample(range(2, 27), 2))], rng, (31, 1))


@pytest.mark.long
def test_an_ensemble_of_reward_models_killed_three_times_ends_bit_identical(tmp_path: Path) -> None:
    """Before or while the first member is measured, within its steps, and within the second's."""
    rng = random.Random(time.time_ns())
    letters = ["".join(rng.choice("abcdefgh ") for _ in range(12)) for _ in range(120)]
    rows = [{"prompt": f"about {i}", "chosen": f"{x} q{i}", "rejected": f"{x} j{i}"} for i, x in enumerate(letters)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    check_killed(tmp_path, REWARD_MODEL, [0, rng.randrange(3, 28), rng.randrange(36, 60)], rng, (33, 5))


@pytest.mark.slow
def test_killed_and_then_its_data_edited_it_says_so_and_ends_bit_identical_once_they_are_back(tmp_path: Path) -> None:
    """Between each kill and the next start one row is another one: the start names the file, and changes nothing."""
    rng = random.Random(time.time_ns())
    rows = [{"prompt": f"Say {i}", "completion": f"{i} or two" + "!" * (i % 5), "label": i % 3 > 0} for i in range(80)]
    data, recipe, folder = tmp_path / "preferences.jsonl", tmp_path / "recipe.yaml", tmp_path / "killed"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe.write_text(PREFERENCE)
    calm = start(recipe, tmp_path / "calm")
    for target in [rng.randrange(4, 27)]:
        process = start(recipe, folder)
        while process.is_alive() and records(folder) < target:
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        whole = data.read_text()
        data.write_text(whole.replace(f"{rng.randrange(60)} or two", "something else", 1))
        noted = json.loads((folder / "manifest.json").read_text())["inputs"]
        process = start(recipe, folder)
        process.join()
        log = (tmp_path / "killed.log").read_text()
        assert process.exitcode == 1 and "preferences.jsonl: sha256" in log and "--accept-changed-data" in log, log[
            -2000:
        ]
        assert json.loads((folder / "manifest.json").read_text())["inputs"] == noted
        data.write_text(whole)
    process = start(recipe, folder)
    for one in (process, calm):
        one.join()
        assert one.exitcode == 0
    weights, metrics, items = outcome(tmp_path / "calm")
    again, metrics_again, items_again = outcome(folder)
    assert (metrics_again, items_again) == (metrics, items)
    assert all(torch.equal(again[n], w) for n, w in weights.items())


def check_killed(tmp_path: Path, text: str, targets: list[int], rng: random.Random, counts: tuple[int, int]) -> None:
    """counts: records of metrics, and files of items, that there must be in the end."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    calm = start(recipe, tmp_path / "calm")
    folder, moments = tmp_path / "killed", []
    for target in targets:
        process = start(recipe, folder)
        while process.is_alive() and target and records(folder) < target:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3) if target else rng.uniform(0, 2))
        assert process.is_alive(), f"over before it could be killed at {target}: {moments}"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        moments.append((target, records(folder)))
    for name, process in (("killed", start(recipe, folder)), ("calm", calm)):
        process.join()
        assert process.exitcode == 0, (tmp_path / f"{name}.log").read_text()[-3000:]

    weights, metrics, items = outcome(tmp_path / "calm")
    assert (len(metrics.splitlines()), len(items)) == counts
    again, metrics_again, items_again = outcome(folder)
    assert metrics_again == metrics, moments
    assert items_again == items, moments
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[n], w) for n, w in weights.items()), moments
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "done"
