"""What FSDP2 costs on the host: a step of a model sharded over one process, beside the plain learner's.

    python benchmarks/sharded.py --json figures.json

A Qwen2 of 24 very small layers in float32 on the CPU, so that most of the difference is calls of Python, which a GPU
would wait for. Processor seconds, the median of the steps after the first. The last line is `processor_time=<sharded
over plain>`; losses have to be equal.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu.base import DRY, build, random_samples

from posttrain.config import OptimizerConfig, SystemsConfig
from posttrain.core import distributed
from posttrain.core.files import write_json
from posttrain.core.types import Sample
from posttrain.models.language_model import LanguageModel
from posttrain.runs.machine import machine
from posttrain.trainer.train_step import Learner, shard_model

LENGTH = 512
CPU = torch.device("cpu")


def steps(sharded: bool, layers: int, rows: list[Sample], count: int) -> dict[str, Any]:
    """Take steps; return their losses, and the processor seconds of each."""
    model = LanguageModel(build({**DRY, "num_hidden_layers": layers}, torch.float32, CPU, "qwen2"))
    if sharded:
        shard_model(model, torch.float32)
    systems = SystemsConfig(tokens_per_micro_batch=LENGTH * len(rows))
    learner = Learner(model, OptimizerConfig(schedule="constant", warmup=0), systems, count)
    losses, seconds = [], []
    for _ in range(count):
        began = time.process_time()
        losses.append(learner.step(rows).metrics["loss"])
        seconds.append(round(time.process_time() - began, 3))
    return {"losses": losses, "processor_seconds": seconds, "median": statistics.median(seconds[1:])}


def main() -> None:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rows", type=int, default=16, help=f"rows of a step, of {LENGTH} tokens each")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = random_samples(args.rows, LENGTH, LENGTH, DRY["vocab_size"])
    plain = steps(False, args.layers, rows, args.steps)
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        sharded = steps(True, args.layers, rows, args.steps)
        distributed.stop()
    assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(plain["losses"], sharded["losses"], strict=True))
    ratio = sharded["median"] / plain["median"]
    print(f"a step of {LENGTH * args.rows} tokens: {plain['median']} s plain, {sharded['median']} s sharded")
    if args.json:
        write_json(args.json, {"machine": machine(), "plain": plain, "sharded": sharded, "ratio": ratio})
    print(f"processor_time={ratio:.2f}")


if __name__ == "__main__":
    main()
