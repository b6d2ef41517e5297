"""Runs from recipes: killed and resumed, and the three methods for a few steps on a model of 135M parameters."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

import posttrain
from gpu.base import DRY, SMALL, Account, Where, saved, smol, write_rows
from posttrain.core.files import read_lines

SFT = {
    "method": "sft",
    "name": "sft",
    "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup": 0.1},
    "checkpoint_every": 100,
}
DPO = {"method": "dpo", "name": "dpo", "optimizer": {"lr": 1e-4, "warmup": 0.1}, "checkpoint_every": 100}
GRPO = {
    "method": "grpo",
    "name": "rl",
    "rewards": {"terms": [{"kind": "length", "unit": "characters", "target": 24, "width": 60}]},
    "optimizer": {"lr": 1e-4},  # at 3e-4 the policy of one run in two collapsed to a uniform distribution
    "checkpoint_every": 100,
}


def rows(path: Path, count: int, kind: str) -> Path:
    """Prompts with answers of different lengths; pairs prefer the answer in capitals."""
    rng = random.Random(0)
    made: list[dict[str, Any]] = []
    for i in range(count):
        answer = " ".join(rng.choice(("one", "two", "three", "four")) for _ in range(rng.randint(2, 24)))
        prompt = f"number {i}"
        if kind == "pairs":
            made.append({"prompt": prompt, "chosen": answer.upper(), "rejected": answer})
        elif kind == "problems":
            made.append({"prompt": prompt, "answer": answer})
        else:
            made.append({"prompt": prompt, "completion": answer})
    return write_rows(path, made)


def recipe(where: Where, name: str, model: Path, stages: list[dict[str, Any]]) -> Path:
    """A recipe's file."""
    path = where.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "model": {"source": str(model)}, "stages": stages}))
    return path


def metrics(folder: Path, stage: str) -> list[dict[str, Any]]:
    """What metrics.jsonl of a run's stage holds so far."""
    found = [p for p in (folder / "stages").glob("*/metrics.jsonl") if p.parent.name.endswith(stage)]
    return [json.loads(line) for line in found[0].read_text().splitlines() if line.endswith("}")] if found else []


# ---------------------------------------------------------------------------------------------------- kill and resume
def start(where: Where, path: Path, name: str) -> subprocess.Popen[bytes]:
    """`posttrain run` in a process of its own; what it prints goes to a file beside its folder."""
    source = Path(posttrain.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "posttrain", "run", str(path), "--folder", str(where.folder / name)]
    with (where.folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def finished(where: Where, process: subprocess.Popen[bytes], name: str) -> None:
    """Wait; raise RuntimeError with the end of what it printed where it failed."""
    if process.wait():
        said = (where.folder / f"{name}.log").read_text(errors="replace")
        raise RuntimeError(f"{name} ended with status {process.returncode}: {said[-1500:]}")


def killed(where: Where) -> Account:
    """SIGKILL in the middle of an SFT run; what it ends in when gone on with, beside runs that were left alone."""
    account = Account()
    model = saved(where.folder / "small", where.pick(SMALL, DRY))
    data = rows(where.folder / "kill.jsonl", 120, "sft")
    stage = {**SFT, "data": {"source": str(data)}, "batch_size": 8, "max_steps": where.pick(40, 12), "epochs": 4,
             "checkpoint_every": where.pick(8, 4)}  # fmt: skip
    path = recipe(where, "kill", model, [stage])
    names = ["calm", "again"] if where.cuda else ["calm"]
    beside = {name: start(where, path, name) for name in names}
    process, least = start(where, path, "killed"), where.pick(14, 6)
    while process.poll() is None and len(metrics(where.folder / "killed", "sft")) < least:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(metrics(where.folder / "killed", "sft"))
    account.true("killed in the middle", process.returncode == -signal.SIGKILL and 0 < there < stage["max_steps"],
                 f"status {process.returncode}, {there} steps")  # fmt: skip
    resumed = start(where, path, "killed")
    for name, other in {**beside, "killed": resumed}.items():
        finished(where, other, name)
    calm, found = (metrics(where.folder / name, "sft") for name in ("calm", "killed"))
    account.numbers.update(steps=len(calm), killed_after=there)
    account.true("as many steps", len(calm) == len(found) == stage["max_steps"])
    if "again" in beside:
        again = metrics(where.folder / "again", "sft")
        account.numbers["two runs alike to the bit"] = again == calm
        account.numbers["two runs, largest difference of losses"] = difference(again, calm)
    account.numbers["resumed alike to the bit"] = found == calm
    account.at_most("resumed, largest difference of losses", difference(found, calm), 0.02 if where.cuda else 0.0)
    manifest = json.loads((where.folder / "killed" / "manifest.json").read_text())
    account.true("done", manifest["status"] == "done")
    account.note = f"killed after {there} of {len(calm)} steps; the same bits: {found == calm}"
    return account


def difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    """Largest relative difference of the losses of two runs."""
    return max((abs(x["loss"] - y["loss"]) / abs(y["loss"]) for x, y in zip(a, b, strict=False)), default=math.inf)


# ------------------------------------------------------------------------------------------------------- three methods
def carried(where: Where, account: Account, name: str, stages: list[dict[str, Any]]) -> Path:
    """A recipe carried through in this process; the run's folder."""
    path = recipe(where, name, smol(where), stages)
    os.environ["POSTTRAIN_CACHE"] = str(where.folder / "cache")
    result = posttrain.run(posttrain.load_recipe(str(path)), where.folder / f"run-{name}")
    for stage in stages:
        records = [m for m in metrics(result.folder, stage["name"]) if m["step"]]
        account.numbers[f"{stage['name']}: losses"] = [round(m["loss"], 4) for m in records if "loss" in m]
        account.true(
            f"{stage['name']}: all finite", all(math.isfinite(m.get("loss", 0.0)) and not m["skipped"] for m in records)
        )
        (timed,) = [
            p for p in (result.folder / "stages").glob("*/timings.jsonl") if p.parent.name.endswith(stage["name"])
        ]
        timings = read_lines(timed)
        account.numbers[f"{stage['name']}: seconds of steps"] = [round(t["seconds"], 3) for t in timings]
        account.numbers[f"{stage['name']}: phases of the last"] = timings[-1].get("phases", {})
        account.numbers[f"{stage['name']}: peak MiB"] = timings[-1]["memory_mb"]
    account.true("a model is left", (result.model / "config.json").exists())
    return result.folder


def sft_stage(where: Where) -> dict[str, Any]:
    data = rows(where.folder / "sft.jsonl", 400, "sft")
    return {**SFT, "data": {"source": str(data)}, "batch_size": where.pick(32, 4), "max_steps": where.pick(20, 4),
            "epochs": 4}  # fmt: skip


def sft(where: Where) -> Account:
    """The loss falls."""
    account = Account()
    carried(where, account, "sft", [sft_stage(where)])
    losses = account.numbers["sft: losses"]
    account.true("the loss falls", losses[-1] < losses[0] - where.pick(2, 0.02), f"{losses[0]} to {losses[-1]}")
    account.note = f"loss {losses[0]:.2f} to {losses[-1]:.2f}"
    return account


def dpo(where: Where) -> Account:
    """Chosen answers become likelier than rejected ones."""
    account = Account()
    data = rows(where.folder / "pairs.jsonl", 400, "pairs")
    stage = {**DPO, "data": {"source": str(data)}, "batch_size": where.pick(16, 4), "max_steps": where.pick(20, 4)}
    folder = carried(where, account, "dpo", [stage])
    margins = account.numbers["margins"] = [m["margin"] for m in metrics(folder, "dpo")]
    account.true("the margin grows", margins[-1] > margins[0] + where.pick(0.1, 0), f"{margins[0]} to {margins[-1]}")
    account.note = f"margin {margins[0]:.3f} to {margins[-1]:.3f}"
    return account


def grpo(where: Where) -> Account:
    """After some SFT, so that completions end: their length moves to where the reward wants it."""
    account = Account()
    data = rows(where.folder / "problems.jsonl", 200, "problems")
    stage = {**GRPO, "problems": {"kind": "rows", "data": {"source": str(data)}}, "steps": where.pick(20, 3),
             "sampler": {"max_tokens": where.pick(128, 8)}, "prompts_per_step": where.pick(16, 2),
             "group_size": where.pick(8, 4)}  # fmt: skip
    folder = carried(where, account, "grpo", [sft_stage(where), stage])
    records = metrics(folder, "rl")
    for name in ("reward", "completions/mean_length", "mismatch", "mismatch_max"):
        account.numbers[name] = [round(m[name], 4) for m in records if name in m]
    rewards = account.numbers["reward"]
    first, last = (sum(part) / len(part) for part in (rewards[:4], rewards[-4:]))
    if not where.dry:
        account.true("the reward rises", last > first + 0.05, f"{first:.3f} to {last:.3f}")
        account.at_most("sampler against learner, mean", max(account.numbers["mismatch"]), 0.05)
    account.note = f"reward {first:.3f} to {last:.3f}"
    return account
