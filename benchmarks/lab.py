"""Methods in the laboratory: held-out accuracy before and after, for several methods and seeds.

    python benchmarks/lab.py                                   # GRPO, RLOO and PPO, three seeds
    python benchmarks/lab.py --methods dapo,gspo --seeds 0     # others

Makes each seed's laboratory first where it is not in the cache (`posttrain lab`). Every run is the shipped recipe `lab`
with another method and seed, nothing else changed but --override. The last line is `lowest_after= highest_before=
longest_seconds=` over all runs: the worst of each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import posttrain
from posttrain.core.files import read_lines, write_json
from posttrain.runs.machine import machine


def one(method: str, seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One run in a process of its own, timed as a person would: start to finish."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "posttrain", "run", "lab", "--folder", str(folder), f"model.source=lab:{seed}"]
    command += [f"stages.rl.method={method}", f"seed={seed}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    (metrics,) = (folder / "stages").glob("*/metrics.jsonl")
    measured = [m for m in read_lines(metrics) if "held_out" in m]
    curve = {m["step"]: round(m["held_out"], 4) for m in measured}
    reached = next((m["step"] for m in measured if m["held_out"] > 0.8), None)
    first, last = measured[0], measured[-1]
    return {
        "method": method,
        "seed": seed,
        "before": [first[k] for k in ("held_out", "held_out_low", "held_out_high")],
        "after": [last[k] for k in ("held_out", "held_out_low", "held_out_high")],
        "over 0.8 at step": reached,
        "seconds": round(seconds, 1),
        "curve": curve,
    }


def laboratory(seed: int) -> dict[str, Any]:
    """What lab.json says of a seed's laboratory, made now where it is not there yet."""
    subprocess.run([sys.executable, "-m", "posttrain", "lab", "--seed", str(seed)], check=True)
    from posttrain.models.loading import lab_folder

    found: dict[str, Any] = json.loads((lab_folder(seed) / "lab.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods in the laboratory.")
    parser.add_argument("--methods", default="grpo,rloo,ppo", help="comma between (grpo,rloo,ppo)")
    parser.add_argument("--seeds", default="0,1,2", help="comma between (0,1,2)")
    parser.add_argument("--override", action="append", default=[], help="KEY=VALUE for every run")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    seeds = [int(s) for s in args.seeds.split(",")]
    labs = {seed: laboratory(seed) for seed in seeds}
    for seed, lab in labs.items():
        print(f"lab:{seed}: {lab['parameters']:,} parameters, made in {lab['seconds']:.0f} s")
    print(f"\n{'method':<14}{'seed':>4}  {'before':>22}  {'after':>22}  {'over 0.8 at':>11}  {'seconds':>7}")
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for method in args.methods.split(","):
            for seed in seeds:
                r = one(method, seed, Path(scratch) / f"{method}-{seed}", args.override)
                runs.append(r)
                spans = [f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in (r["before"], r["after"])]
                at = f"step {r['over 0.8 at step']}" if r["over 0.8 at step"] is not None else "never"
                print(
                    f"{method:<14}{seed:>4}  {spans[0]:>22}  {spans[1]:>22}  {at:>11}  {r['seconds']:>7.0f}", flush=True
                )
    worst = {
        "lowest_after": min(r["after"][0] for r in runs),
        "highest_before": max(r["before"][0] for r in runs),
        "longest_seconds": max(r["seconds"] for r in runs),
    }
    if args.json:
        labs_out = {str(seed): {k: v for k, v in lab.items() if k != "settings"} for seed, lab in labs.items()}
        write_json(
            args.json,
            {"posttrain": posttrain.__version__, "machine": machine(), "labs": labs_out, "runs": runs, **worst},
        )
    print(" ".join(f"{k}={v:.3g}" for k, v in worst.items()))


if __name__ == "__main__":
    main()
