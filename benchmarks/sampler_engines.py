"""GRPO with vLLM as the sampler, beside the local engine: held-out accuracy, seconds, and how far they differ.

    python benchmarks/sampler_engines.py --python vllm-env/bin/python --json figures.json
    python benchmarks/sampler_engines.py --python vllm-env/bin/python --folder runs     # an interrupted one is resumed
    python benchmarks/sampler_engines.py --address 10.0.0.5:7001 --folder runs          # a server in place of a process
    python benchmarks/sampler_engines.py --python vllm-env/bin/python --recipe grpo     # SmolLM2-135M, LoRA

The recipe `lab` with the same prompts, steps and completions for both; their random streams differ, so that two runs
differ as two seeds do. Held-out problems are answered greedily. The interval of the difference is Student's over seeds
(two at least); `problems_interval` has the seeds as they are, and other problems: normal, of the paired differences.
`last_rewards` is the reward of the completions of the last third of the steps, sampled at temperature 1.
The last line is `accuracy=<vLLM's minus the local engine's, mean over seeds>`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import posttrain
from posttrain.core.files import read_lines, write_json
from posttrain.runs.machine import machine
from posttrain.sampling.rollout_store import read_rollouts, rollouts_path

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Two-sided 95% points of Student's t by number of seeds."""
ENGINES = ("local", "vllm")
HELD_OUT = ("held_out", "held_out_low", "held_out_high")
SOURCES = {"lab": "lab:{seed}"}
"""Models of recipes that have another one for each seed."""


def one(engine: str, seed: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one run, which is resumed if it was interrupted."""
    changes = {
        "seed": seed,
        "stages.rl.steps": args.steps,
        "stages.rl.held_out.every": args.steps,
        "stages.rl.held_out.problems.size": args.held_out,
        "stages.rl.importance_sampling_cap": 2,
        "stages.rl.checkpoint_every": 5,
    }
    if args.recipe in SOURCES:
        changes["model.source"] = SOURCES[args.recipe].format(seed=seed)
    if engine == "vllm":
        where = {"address": args.address} if args.address else {"python": args.python}
        sampler = {"backend": "vllm", "cache_mb": 512, "separate_adapter": args.separate_adapter, **where}
        changes |= {f"stages.rl.sampler.{k}": v for k, v in sampler.items()}
    recipe = posttrain.load_recipe(args.recipe, [f"{name}={value}" for name, value in changes.items()])
    posttrain.run(recipe, folder)
    (stage,) = (folder / "stages").glob("*-rl")
    metrics, timings = list(read_lines(stage / "metrics.jsonl")), list(read_lines(stage / "timings.jsonl"))
    steps = [m for m in metrics if "loss" in m]
    seconds = [t["seconds"] - t["phases"].get("held_out", 0.0) for t in timings]
    answers = read_rollouts(rollouts_path(stage / "held_out", args.steps))
    return {
        "engine": engine,
        "seed": seed,
        "before": [metrics[0][k] for k in HELD_OUT],
        "after": [metrics[-1][k] for k in HELD_OUT],
        "right": "".join(str(int(r["reward"] > 0.5)) for r in answers),
        "steps": len(steps),
        "completions": sum(int(m["samples"]) for m in steps),
        "sampled_tokens": sum(t["sampled_tokens"] for t in timings),
        "last_rewards": statistics.fmean(m["reward"] for m in steps[-len(steps) // 3 :]),
        "mismatch": max(m["mismatch"] for m in steps),
        "mismatch_max": max(m["mismatch_max"] for m in steps),
        "seconds": round(sum(seconds), 2),
        "median_step_seconds": round(statistics.median(seconds), 2),
        "sample_seconds": round(sum(t["phases"]["sample"] for t in timings), 2),
    }


def interval(values: Sequence[float]) -> list[float]:
    """Return the 95% interval of a mean over seeds."""
    mean, width = statistics.fmean(values), T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return [mean - width, mean + width]


def problems_interval(runs: Sequence[dict[str, Any]]) -> list[float]:
    """Return the 95% interval over problems of vLLM's accuracy minus the local engine's; both have the same problems.

    Args:
        runs: The local engine's and vLLM's of each seed, one after the other.
    """
    right = [[int(r) for r in run["right"]] for run in runs]
    values = [b - a for x, y in zip(right[::2], right[1::2], strict=True) for a, b in zip(x, y, strict=True)]
    mean, width = statistics.fmean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return [mean - width, mean + width]


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO with vLLM as the sampler, beside the local engine.")
    parser.add_argument("--python", help="Python of the environment that has vLLM")
    parser.add_argument("--address", help="HOST:PORT of a sampler server with vLLM")
    parser.add_argument("--recipe", default="lab", help="one with a stage `rl` that has held-out problems (lab)")
    parser.add_argument("--separate-adapter", action="store_true", help="vLLM gets LoRA's factors alone")
    parser.add_argument("--seeds", default="0,1,2", help="of the laboratory and of the run, comma between (0,1,2)")
    parser.add_argument("--steps", type=int, default=60, help="of each run (60)")
    parser.add_argument("--held-out", type=int, default=512, help="problems that are measured (512)")
    parser.add_argument("--folder", type=Path, help="keep the runs here, and resume those that were interrupted")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    if (args.python is None) == (args.address is None):
        parser.error("give one of --python and --address")
    seeds = [int(s) for s in args.seeds.split(",")]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            for engine in ENGINES:
                runs.append(one(engine, seed, (args.folder or Path(scratch)) / f"{engine}-{seed}", args))
                print(runs[-1], flush=True)
    after = {e: [r["after"][0] for r in runs if r["engine"] == e] for e in ENGINES}
    differences = [b - a for a, b in zip(after["local"], after["vllm"], strict=True)]
    found: dict[str, Any] = {f"accuracy_{e}": statistics.fmean(values) for e, values in after.items()}
    found["accuracy"] = statistics.fmean(differences)
    found["last_rewards"] = statistics.fmean(
        b["last_rewards"] - a["last_rewards"] for a, b in zip(runs[::2], runs[1::2], strict=True)
    )
    found["problems_interval"] = problems_interval(runs)
    if len(seeds) in T_95:
        found["accuracy_interval"] = interval(differences)
    for name, value in found.items():
        print(name, value)
    if args.json:
        settings = {k: getattr(args, k) for k in ("recipe", "separate_adapter", "seeds", "steps", "held_out")}
        write_json(
            args.json,
            {"posttrain": posttrain.__version__, "machine": machine(), "settings": settings, **found, "runs": runs},
        )
    print(f"accuracy={found['accuracy']:+.3f}")


if __name__ == "__main__":
    main()
