"""Published figures, with their sources: some set the simulation's constants, others are compared with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from scale.events import Plan, Run, measured
from scale.parts import (
    DENSE,
    H20,
    H100,
    MIXTURE,
    SEVEN,
    SMALL_MIXTURE,
    Card,
    Decoder,
    Engine,
    Model,
    Transfer,
    with_mean,
)

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "vLLM": "gpustack/gpustack at 10e9444, docs/performance-lab/qwen3-235b-a22b/h100.md: vLLM 0.11, 8 H100",
    "NeMo-RL": "NVIDIA-NeMo/RL, docs/about/performance-summary.md: version 0.6 at 7ea279a; Qwen3-32B: version 0.5",
    "checkpoint-engine": "MoonshotAI/checkpoint-engine at 415c320, README.md, table Benchmark, broadcast",
    "verl": "volcengine/verl at 2147009, docs/advance/fully_async.md: Qwen2.5-Math-7B, H20",
    "Llama 3": "419 unexpected interruptions in 54 days on 16,384 H100 (Llama 3 report, arXiv 2407.21783, as quoted by "
    "datacenterdynamics.com)",
    "Meta's clusters": "7.9 hours to a failure of a job on 1,024 GPUs (arXiv 2410.21680, as quoted by clockwork.io)",
    "AutoModel": "docs.nvidia.com/nemo/automodel, performance summary: 334 TFLOP/s of an H100 for a mixture of 120B",
    "TrainMover": "arXiv 2412.12636: about 20 s of downtime at 1,024 GPUs, with machines on standby",
    "DeepSeek": "deepseek-ai/open-infra-index, day 6: $2 for an hour of an H800",
    "posttrain": "benchmarks/results/gpu-h100.json and grpo-cpu.json",
}

PROMPT = 128
"""Tokens of a prompt of the published runs: an assumption, 2 to 4% of their sequences."""


def engine() -> Engine:
    """Return vLLM's overheads, from two figures of Qwen3-235B on 8 H100, and one for samplers that span nodes.

    - Prompts of 32,000 tokens: median 23.29 ms between tokens. As many sequences run as fit into the cache.
    - 984 short requests at once: at most 9,638 tokens in a second; they hold about 216 + 99 tokens each then.
    - The third (a layer's seconds across nodes) makes NeMo-RL's synchronous step on 256 GPUs right: see calibrated().
    """
    bare = Engine(0.0, 0.0, 0.0)
    decoder = Decoder(MIXTURE, H100, bare, 8)
    fits = int(decoder.capacity / 32100)
    card = decoder.step_seconds(fits) + decoder.token_seconds * fits * 32050
    layer = (23.29e-3 - card) / MIXTURE.layers
    card = decoder.step_seconds(984) + decoder.token_seconds * 984 * 315
    sequence = (984 / 9638 - card - MIXTURE.layers * layer) / 984
    return Engine(layer, layer, sequence)


def own_engine() -> Engine:
    """Return the overheads of posttrain's local engine: 30 layers, CUDA graphs, 16 and 512 sequences on an H100.

    The model has 135M parameters: reading its weights takes 0.1 ms of a step.
    """
    items = json.loads((ROOT / "benchmarks/results/gpu-h100.json").read_text())["items"]
    rates = items["speed sampling"]["numbers"]
    few, many = (n / rates[f"{n} rows, graphs"]["tokens per second"] for n in (16, 512))
    sequence = (many - few) / (512 - 16)
    return Engine((few - 16 * sequence) / 30, (few - 16 * sequence) / 30, sequence)


def transfer() -> Transfer:
    """Return the rate of checkpoint-engine (Qwen3-235B, 8 GPUs) and what each doubling of the samplers costs.

    The doublings: DeepSeek-V3.1 on 16 and on 256 H20.
    """
    return Transfer(MIXTURE.weight_bytes / 6.22, (11.33 - 10.19) / 4)


def training(model: Model, card: Card, gpus: int, mfu: float, forwards: float = 1.0) -> Callable[[float, float], float]:
    """Return the function from tokens and squares to seconds of an update; `forwards` old log-probabilities."""

    def seconds(tokens: float, squares: float) -> float:
        return model.training_operations(tokens, squares, forwards) / (gpus * card.operations * mfu)

    return seconds


def nemo(
    model: Model, layout: tuple[int, int, int], batch: int, mean: float, longest: int, mfu: float, staleness: int,
    overhead: Engine, forwards: float,
) -> Plan:  # fmt: skip
    """Return a run of NeMo-RL: (trainers, GPUs of samplers, GPUs of one sampler); groups of 32."""
    trainers, sampling, one = layout
    moving = transfer().seconds(model.weight_bytes, sampling // one)
    return Plan(
        Decoder(model, H100, replace(overhead, memory=0.8 if staleness else 0.6), one), sampling // one, batch // 32,
        32, PROMPT, with_mean(mean - PROMPT, 1.0, longest - PROMPT), staleness,
        training(model, H100, trainers, mfu, forwards), moving,
    )  # fmt: skip


NEMO = {
    "32B, synchronous, 32 GPUs": (DENSE, (32, 32, 4), 2048, 3251, 4096, 0, 376.0),
    "32B, one update stale, 32 + 32 GPUs": (DENSE, (32, 32, 4), 2048, 3252, 4096, 1, 200.0),
    "235B-A22B, synchronous, 128 GPUs": (MIXTURE, (128, 128, 16), 512, 5698, 8192, 0, 395.0),
    "235B-A22B, synchronous, 256 GPUs": (MIXTURE, (256, 256, 16), 512, 5713, 8192, 0, 312.0),
    "235B-A22B, one update stale, 128 + 128 GPUs": (MIXTURE, (128, 128, 8), 512, 5721, 8192, 1, 231.0),
    "30B-A3B, synchronous, 32 GPUs": (SMALL_MIXTURE, (32, 32, 2), 2048, 3203, 4096, 0, 192.0),
    "30B-A3B, one update stale, 16 + 16 GPUs": (SMALL_MIXTURE, (16, 16, 2), 2048, 3201, 4096, 1, 152.0),
    "30B-A3B, eight updates stale, 128 + 64 GPUs": (SMALL_MIXTURE, (128, 64, 2), 2048, 3206, 4096, 8, 34.5),
}
"""Model, layout, completions of an update, mean and longest sequence, staleness, published seconds of a step."""


def step_of(name: str, mfu: float, overhead: Engine, updates: int = 4) -> float:
    """Return the simulated seconds of a step of a run of NEMO; only asynchronous runs recompute log-probabilities."""
    model, layout, batch, mean, longest, staleness, _ = NEMO[name]
    forwards = 0.0 if model.experts and not staleness else 1.0  # force_on_policy_ratio of the mixtures' recipes
    plan = nemo(model, layout, batch, mean, longest, mfu, staleness, overhead, forwards)
    return measured(plan, updates)["seconds per update"]


def solved(wanted: float, first: float, second: float, seconds: Callable[[float], float], steps: int = 5) -> float:
    """Return the positive argument at which a nearly linear function is `wanted`, by secants from two arguments."""
    x, y, at_x = first, second, seconds(first)
    for _ in range(steps):
        at_y = seconds(y)
        if abs(at_y - wanted) < 1e-3 * wanted or at_y == at_x:
            break
        x, y, at_x = y, max(y + (wanted - at_y) * (y - x) / (at_y - at_x), y / 4), at_y
    return y


FITTED = {"32B": "32B, one update stale, 32 + 32 GPUs", "235B-A22B": "235B-A22B, one update stale, 128 + 128 GPUs",
          "30B-A3B": "30B-A3B, one update stale, 16 + 16 GPUs"}  # fmt: skip
"""The step that sets the share of the card's operations that training of a model reaches: trainers bound it."""
WIDE = "235B-A22B, synchronous, 256 GPUs"
"""The step that sets the seconds of a layer of a sampler that spans nodes."""


def calibrated() -> tuple[Engine, dict[str, float]]:
    """Return the engine, and for each model the share of the card's operations that training reaches."""
    base = engine()
    shares = {}
    for model, name in FITTED.items():

        def step(inverse: float, name: str = name) -> float:
            return step_of(name, 1 / inverse, base, 2)

        shares[model] = 1 / solved(NEMO[name][-1], 1 / 0.3, 1 / 0.15, step)

    def wide(seconds: float) -> float:
        return step_of(WIDE, shares["235B-A22B"], replace(base, layer_across=seconds), 2)

    return replace(base, layer_across=solved(NEMO[WIDE][-1], 1e-4, 2e-4, wide)), shares


def verl(overhead: Engine) -> list[dict[str, Any]]:
    """Compare 512 prompts of 16 completions of at most 28,672 tokens on H20, one GPU a sampler (assumed).

    The mean length, which is not published, makes sampling on 32 GPUs right; training of the asynchronous step takes
    what was measured there.
    """

    def plan(mean: float, samplers: int, staleness: int, train: float) -> Plan:
        return Plan(Decoder(SEVEN, H20, overhead, 1), samplers, 512, 16, PROMPT, with_mean(mean, 1.0, 28672), staleness,
                    lambda tokens, squares: train, 0.0)  # fmt: skip

    def sampling(mean: float, samplers: int) -> float:
        return Run(plan(mean, samplers, 0, 0.0)).go(1).now

    mean = solved(357.41, 3000, 5000, lambda m: sampling(m, 32))
    rows = [_row("verl", "7B, 32 GPUs: seconds of sampling", 357.41, sampling(mean, 32), True)]
    for gpus, seconds in ((64, 150.72), (128, 177.85)):
        rows.append(_row("verl", f"7B, {gpus} GPUs: seconds of sampling", seconds, sampling(mean, gpus)))
    found = measured(plan(mean, 64, 1, 113.16), 3)["seconds per update"]
    rows.append(_row("verl", "7B, asynchronous, 64 + 64 GPUs: seconds of a step", 150.63, found))
    return rows


def _row(source: str, what: str, published: float, simulated: float, fitted: bool = False) -> dict[str, Any]:
    error = simulated / published - 1
    return {"source": source, "what": what, "published": published, "simulated": round(simulated, 2),
            "error": round(error, 3), "fitted": fitted}  # fmt: skip


def validation(overhead: Engine, shares: dict[str, float]) -> list[dict[str, Any]]:
    """Return published figures beside simulated ones; those that set a constant are marked."""
    rows = []
    for name, run in NEMO.items():
        found = step_of(name, shares[name.split(",")[0]], overhead)
        fitted = name in (*FITTED.values(), WIDE)
        rows.append(_row("NeMo-RL", f"{name}: seconds of a step", run[-1], found, fitted))
    rows += verl(overhead)
    moving = transfer()
    for name, size, copies, seconds, fitted in (
        ("Qwen3-235B, 1 sampler", MIXTURE.weight_bytes, 1, 6.22, True),
        ("DeepSeek-V3.1 in FP8, 1 sampler", 671e9, 1, 10.19, False),
        ("DeepSeek-V3.1 in FP8, 16 samplers", 671e9, 16, 11.33, False),
        ("Kimi-K2 in FP8, 16 samplers", 1000e9, 16, 16.04, False),
    ):
        rows.append(_row("checkpoint-engine", f"{name}: seconds", seconds, moving.seconds(size, copies), fitted))
    return rows
