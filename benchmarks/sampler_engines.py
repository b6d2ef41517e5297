"""GRPO in the laboratory with vLLM as the sampler, beside the local engine: held-out accuracy, and how far they differ.

    python benchmarks/sampler_engines.py --python vllm-env/bin/python --json figures.json
    python benchmarks/sampler_engines.py --python vllm-env/bin/python --folder runs     # an interrupted one is resumed
    python benchmarks/sampler_engines.py --address 10.0.0.5:7001 --folder runs          # a server in place of a process

The recipe `lab` with the same prompts for both; their random streams differ, so that two runs differ as two seeds do.
Held-out problems are answered greedily. The last line is `accuracy=<vLLM's minus the local engine's, mean over seeds>`.
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

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Two-sided 95% points of Student's t by number of seeds."""
ENGINES = ("local", "vllm")


def one(engine: str, seed: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one run, which is resumed if it was interrupted."""
    changes = {
        "seed": seed,
        "model.source": f"lab:{seed}",
        "stages.rl.steps": args.steps,
        "stages.rl.held_out.every": args.steps,
        "stages.rl.held_out.problems.size": args.held_out,
        "stages.rl.importance_sampling_cap": 2,
        "stages.rl.checkpoint_every": 5,
    }
    if engine == "vllm":
        where = {"address": args.address} if args.address else {"python": args.python}
        changes |= {f"stages.rl.sampler.{k}": v for k, v in {"backend": "vllm", "cache_mb": 256, **where}.items()}
    recipe = posttrain.load_recipe("lab", [f"{name}={value}" for name, value in changes.items()])
    posttrain.run(recipe, folder)
    (stage,) = (folder / "stages").glob("*-rl")
    metrics, timings = list(read_lines(stage / "metrics.jsonl")), list(read_lines(stage / "timings.jsonl"))
    held_out = ("held_out", "held_out_low", "held_out_high")
    return {
        "engine": engine,
        "seed": seed,
        "before": [metrics[0][k] for k in held_out],
        "after": [metrics[-1][k] for k in held_out],
        "mismatch": max(m["mismatch"] for m in metrics if "mismatch" in m),
        "seconds": round(sum(t["seconds"] - t["phases"].get("held_out", 0.0) for t in timings), 2),
    }


def interval(values: Sequence[float]) -> list[float]:
    """Return the 95% interval of a mean over seeds."""
    mean, width = statistics.fmean(values), T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return [mean - width, mean + width]


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO in the laboratory with vLLM, beside the local engine.")
    parser.add_argument("--python", help="Python of the environment that has vLLM")
    parser.add_argument("--address", help="HOST:PORT of a sampler server with vLLM")
    parser.add_argument("--seeds", default="0,1,2", help="of the laboratory and of the run, comma between (0,1,2)")
    parser.add_argument("--steps", type=int, default=40, help="of each run (40)")
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
    if len(seeds) in T_95:
        found["accuracy_interval"] = interval(differences)
    for name, value in found.items():
        print(name, value)
    if args.json:
        settings = {k: getattr(args, k) for k in ("seeds", "steps", "held_out")}
        write_json(
            args.json,
            {"posttrain": posttrain.__version__, "machine": machine(), "settings": settings, **found, "runs": runs},
        )
    print(f"accuracy={found['accuracy']:+.3f}")


if __name__ == "__main__":
    main()
