"""Runs on a number of GPUs: what fits, how GPUs are divided, which part bounds the rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from scale.events import Plan, Run, measured
from scale.parts import DENSE, H100, MIXTURE, Card, Decoder, Engine, Lengths, Model, Transfer, with_mean
from scale.published import training


@dataclass(frozen=True)
class Workload:
    """What an update is, and what the machines reach.

    Attributes:
        engine: Overheads of a sampler.
        transfer: Of weights.
        shares: By the name of a model, the share of the card's operations that training reaches.
        prompts: Groups of an update.
        group: Completions of a prompt.
        prompt: Tokens of a prompt.
        lengths: Of completions.
        reward: Seconds of a worker for a completion; there is one worker for each GPU.
        price: Dollars for an hour of a GPU.
        hidden: True: samplers decode while weights move.
        recompute: True: samplers recompute keys and values under new weights.
        forwards: Forward passes of the trainers beside the update (old log-probabilities).
    """

    engine: Engine
    transfer: Transfer
    shares: dict[str, float]
    prompts: int = 128
    group: int = 16
    prompt: int = 512
    lengths: Lengths = with_mean(6000, 1.0, 32768)
    reward: float = 1.0
    price: float = 2.0
    hidden: bool = False
    recompute: bool = False
    forwards: float = 1.0


SAMPLER = {DENSE.name: 4, MIXTURE.name: 8}
"""GPUs of a sampler."""
SIZES = (8, 32, 64, 128, 256, 512, 1024)
STATE = 16
"""Bytes for a parameter: bfloat16 weights and gradients, float32 master weights and Adam's two moments."""
USABLE = 0.85
"""Share of a card's memory for these; the rest is for activations (an assumption)."""
HOST = 25e9
"""Bytes per second between a card and its host's memory (an assumption)."""


def trainers_needed(model: Model, card: Card = H100) -> int:
    """Return the fewest GPUs, in whole nodes, that hold the state of full fine-tuning."""
    nodes = model.parameters * STATE / (card.memory * USABLE) / card.node
    return card.node * math.ceil(nodes)


def together(model: Model, gpus: int, work: Workload) -> Plan:
    """Return the synchronous run in which all GPUs sample and then all train.

    Between the two, Adam's moments and the master weights move to the host's memory and back.
    """
    if gpus < trainers_needed(model):
        raise ValueError(f"{model.name} needs {trainers_needed(model)} GPUs for its training state; there are {gpus}")
    samplers = gpus // SAMPLER[model.name]
    switch = 2 * 12 * model.parameters / gpus / HOST
    return _plan(model, gpus, samplers, 0, work, work.transfer.seconds(model.weight_bytes, samplers) + switch, gpus)


def apart(model: Model, trainers: int, sampling: int, staleness: int, work: Workload) -> Plan:
    """Return the run with trainers and samplers of their own."""
    if trainers < trainers_needed(model):
        raise ValueError(f"{model.name} needs {trainers_needed(model)} trainers for its state; there are {trainers}")
    samplers = sampling // SAMPLER[model.name]
    moving = work.transfer.seconds(model.weight_bytes, samplers)
    return _plan(model, trainers, samplers, staleness, work, moving, trainers + sampling)


def _plan(model: Model, trainers: int, samplers: int, staleness: int, work: Workload, moving: float, gpus: int) -> Plan:
    decoder = Decoder(model, H100, work.engine, SAMPLER[model.name])
    if decoder.capacity < work.prompt + work.lengths.longest:
        raise ValueError(f"the cache of a sampler of {model.name} holds {decoder.capacity:,.0f} tokens, too few")
    train = training(model, H100, trainers, work.shares[model.name], work.forwards)
    return Plan(decoder, samplers, work.prompts, work.group, work.prompt, work.lengths, staleness, train, moving,
                work.hidden, work.reward, gpus, work.recompute)  # fmt: skip


def divided(model: Model, gpus: int, work: Workload) -> tuple[int, int] | None:
    """Return (trainers, GPUs that sample) of the best of a few divisions at staleness 1; None: it does not fit.

    Divisions are whole nodes around the one at which both parts would take the same time at full batches.
    """
    least, node = trainers_needed(model), H100.node
    if gpus - least < max(SAMPLER[model.name], node):
        return None
    decoder = Decoder(model, H100, work.engine, SAMPLER[model.name])
    tokens = work.prompt + work.lengths.mean
    train = work.prompts * work.group * model.training_operations(tokens, 2 * tokens**2, work.forwards)
    train /= H100.operations * work.shares[model.name]
    batch = max(1, min(128, int(decoder.capacity / (1.5 * tokens))))
    step = decoder.step_seconds(batch) + decoder.token_seconds * batch * tokens
    sample = work.prompts * work.group * work.lengths.mean * step / batch * decoder.gpus
    middle = round(gpus / node * train / (train + sample))
    jump = max(1, gpus // node // 16)
    nodes = {min(max(middle + i * jump, least // node), gpus // node - 1) for i in (-1, 0, 1)}
    rates = {n: measured(apart(model, node * n, gpus - node * n, 1, work), 1)["tokens per second"] for n in nodes}
    best = max(rates, key=lambda n: rates[n])
    return node * best, gpus - node * best


def bound(found: dict[str, Any], work: Workload, plan: Plan) -> str:
    """Return which part bounds the rate.

    Trainers, if they are busy for 85% of the time; reward workers, if they are; weights, if moving them takes 30%.
    Otherwise sampling: its rate, if a sampler runs on average at least half of the sequences that fit (at most 256),
    else the longest completions, which run in batches too small to use the card.
    """
    if found["trainers busy"] > 0.85:
        return "trainers"
    if found["rewards busy"] > 0.85:
        return "rewards"
    if found["transfer"] > 0.3:
        return "weights"
    fit = plan.decoder.capacity / (work.prompt + 1.4 * work.lengths.mean)
    full = min(fit, plan.decoder.engine.most, 256)
    return "sampling" if found["sequences per sampler"] > full / 2 else "longest completions"


def point(
    model: Model, gpus: int, division: tuple[int, int] | None, staleness: int, work: Workload, updates: int = 3
) -> dict[str, Any]:
    """Return the figures of a run; division None: all GPUs sample and train in turn."""
    plan = together(model, gpus, work) if division is None else apart(model, *division, staleness, work)
    found: dict[str, Any] = {k: float(f"{v:.4g}") for k, v in measured(plan, updates).items()}
    found |= {"bound": bound(found, work, plan), "updates": updates + -updates % (staleness + 1)}
    found["dollars per million completions"] = round(
        gpus * work.price / 3600 / found["completions per second"] * 1e6, -1 if gpus > 8 else 0
    )
    return found


def cost_of_failure(plan: Plan, updates: int = 5) -> dict[str, float]:
    """Return the seconds that losing a trainer and losing a sampler cost, in the middle of so many updates."""
    calm = Run(plan).go(updates).now
    lost = {part: replace(plan, failures=((calm / 2, part),)) for part in ("trainer", "sampler")}
    return {part: round(Run(p).go(updates).now - calm, 1) for part, p in lost.items()}
