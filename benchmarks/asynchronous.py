"""Asynchronous RL beside synchronous RL, with a tool that takes 200 ms a call: throughput, and held-out accuracy.

    python benchmarks/asynchronous.py --json figures.json             # three laboratories, both ways
    python benchmarks/asynchronous.py --seeds 0 --staleness 1         # one, with another bound
    python benchmarks/asynchronous.py --folder runs                   # keeps the runs: an interrupted one is resumed

GRPO in the laboratory of sums (the recipe `lab`, with 8 prompts a step), where a tool reads every line that the model
writes and lets it continue. All calls of a round are answered together after the wait, so that the synchronous run
waits as little as it can: once a round. Both ways sample the same number of completions of the same prompts.
Throughput is completions per second of all steps, without the held-out measurements; its ratio is the geometric mean
over seeds. The last line is `throughput=<asynchronous / synchronous> accuracy=<difference of held-out accuracy>`.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import posttrain
from posttrain.config import Recipe
from posttrain.core.files import read_lines, write_json
from posttrain.runs.machine import machine

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Two-sided 95% points of Student's t by number of seeds."""


class SlowTool:
    """A tool that reads each line, and answers nothing, after a wait."""

    concurrent = True

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def start(self, example: Mapping[str, Any]) -> None:
        return None

    def step(self, state: None, text: str) -> tuple[None, bool]:
        return self.step_many([state], [text])[0]

    def step_many(self, states: Sequence[None], texts: Sequence[str]) -> list[tuple[None, bool]]:
        time.sleep(self.seconds)
        return [(None, False) for _ in texts]


def recipe(seed: int, ahead: int | None, args: argparse.Namespace) -> Recipe:
    """One run; ahead: `max_staleness`, or None for the synchronous way."""
    problems = {"kind": "lab"}
    stage = {
        "method": "grpo",
        "name": "rl",
        "problems": problems,
        "held_out": {"problems": {**problems, "held_out": True, "size": args.held_out}, "every": args.steps},
        "rewards": [{"kind": "exact", "name": "right", "extract": "last_line"}],
        "environment": {
            "kind": "function",
            "function": "slow",
            "options": {"seconds": args.seconds},
            "stop": ["\n"],
            "max_turns": 12,
        },
        "sampler": {"max_tokens": 64, "workers": args.workers if ahead is not None and args.workers else None},
        "prompts_per_step": args.prompts,
        "group_size": args.group,
        "steps": args.steps,
        "optimizer": {"lr": 2e-4},
        "asynchronous": None if ahead is None else {"max_staleness": ahead},
    }
    name = "synchronous" if ahead is None else f"ahead-{ahead}"
    return Recipe.model_validate({"name": name, "model": {"source": f"lab:{seed}"}, "seed": seed, "stages": [stage]})


def one(seed: int, ahead: int | None, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one run, which is resumed if it was interrupted."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    posttrain.run(recipe(seed, ahead, args), folder, rewards={"slow": SlowTool})
    after = resource.getrusage(resource.RUSAGE_SELF)
    (stage,) = (folder / "stages").glob("*-rl")
    metrics, timings = list(read_lines(stage / "metrics.jsonl")), list(read_lines(stage / "timings.jsonl"))
    seconds = sum(t["seconds"] - t["phases"].get("held_out", 0.0) for t in timings)
    idle = [sum(t.get(f"{side}_idle_seconds", 0.0) for t in timings) for side in ("learner", "sampler")]
    first, last = metrics[0], metrics[-1]
    return {
        "seed": seed,
        "max_staleness": ahead,
        "completions": int(sum(m["samples"] for m in metrics if "samples" in m)),
        "seconds": round(seconds, 2),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "learner_idle_seconds": round(idle[0], 2),
        "sampler_idle_seconds": round(idle[1], 2),
        "staleness_mean": round(statistics.fmean(m.get("staleness_mean", 0.0) for m in metrics[1:]), 3),
        "staleness_max": max(m.get("staleness_max", 0.0) for m in metrics[1:]),
        "before": [first[k] for k in ("held_out", "held_out_low", "held_out_high")],
        "after": [last[k] for k in ("held_out", "held_out_low", "held_out_high")],
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95% interval over seeds); not-a-number for a single value."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description="Asynchronous RL beside synchronous RL, with a slow tool.")
    parser.add_argument("--seeds", default="0,1,2", help="of the laboratory and of the run, comma between (0,1,2)")
    parser.add_argument("--staleness", type=int, default=2, help="asynchronous.max_staleness (2)")
    parser.add_argument("--workers", type=int, default=0, help="processes that sample ahead; 0: a thread (0)")
    parser.add_argument("--seconds", type=float, default=0.2, help="that the tool takes (0.2)")
    parser.add_argument("--steps", type=int, default=40, help="of each run (40)")
    parser.add_argument("--prompts", type=int, default=8, help="a step (8)")
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt (8)")
    parser.add_argument("--held-out", type=int, default=512, help="problems that are measured (512)")
    parser.add_argument("--folder", type=Path, help="keep the runs here, and resume those that were interrupted")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    seeds = [int(s) for s in args.seeds.split(",")]
    if len(seeds) > max(T_95):
        raise SystemExit(f"expected at most {max(T_95)} seeds, and got {len(seeds)}")
    pairs = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            pair = []
            for ahead in (None, args.staleness):
                folder = (
                    args.folder or Path(scratch)
                ) / f"{'synchronous' if ahead is None else f'ahead-{ahead}'}-{seed}"
                pair.append(one(seed, ahead, folder, args))
                print({k: v for k, v in pair[-1].items() if v is not None}, flush=True)
            assert pair[0]["completions"] == pair[1]["completions"]
            pairs.append(pair)
    ratio, ratio_width = interval([math.log(a["seconds"] / b["seconds"]) for a, b in pairs])
    accuracy, width = interval([b["after"][0] - a["after"][0] for a, b in pairs])
    found: dict[str, Any] = {
        "throughput": math.exp(ratio),
        "accuracy": accuracy,
        "accuracy_synchronous": statistics.fmean(a["after"][0] for a, _ in pairs),
        "accuracy_asynchronous": statistics.fmean(b["after"][0] for _, b in pairs),
    }
    if len(pairs) > 1:
        found["throughput_interval"] = [math.exp(ratio - ratio_width), math.exp(ratio + ratio_width)]
        found["accuracy_interval"] = [accuracy - width, accuracy + width]
    for name, value in found.items():
        print(name, value)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "folder")}
        runs = [r for pair in pairs for r in pair]
        record = {"posttrain": posttrain.__version__, "machine": machine(), "settings": settings, **found, "runs": runs}
        write_json(args.json, record)
    print(f"throughput={found['throughput']:.3g} accuracy={accuracy:+.3f}")


if __name__ == "__main__":
    main()
