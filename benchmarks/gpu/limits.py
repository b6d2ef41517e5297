"""Decoding against the memory's bandwidth, a stage's memory against its prediction, FSDP2 on one rank."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import yaml
from common import Batch, counts, median

import posttrain
from gpu.base import DRY, SMALL, Account, Where, build, byte_tokenizer
from gpu.peers import qwen
from gpu.recipes import SFT, rows
from gpu.sampler import watched
from gpu.speed import QWEN, batches, low, taught, timeline
from gpu.speed import systems as default_systems
from posttrain.config import OptimizerConfig, SamplingConfig
from posttrain.core import distributed
from posttrain.models.language_model import LanguageModel
from posttrain.recipe.parsing import load_recipe
from posttrain.runs.memory_plan import plan_memory
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request
from posttrain.trainer.token_budget import token_budget
from posttrain.trainer.train_step import Learner, shard_model

LARGE = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
         "num_key_value_heads": 2, "vocab_size": 151936}  # fmt: skip
"""The shape of Qwen2-1.5B."""


def bandwidth(where: Where) -> float:
    """Bytes a second of a copy within the device's memory, read and written."""
    source = torch.empty(where.pick(2**30, 2**22), dtype=torch.uint8, device=where.device)
    target, seconds = torch.empty_like(source), []
    for _ in range(12):
        where.wait()
        began = time.perf_counter()
        target.copy_(source)
        where.wait()
        seconds.append(time.perf_counter() - began)
    return 2.0 * source.numel() / median(seconds[2:])


def decoding(where: Where) -> Account:
    """256 sequences of a model of 1.5B parameters: bytes that a step must read, over its time, as a share of a copy's.

    A step reads every weight once, and the keys and values of all sequences. Its time is the difference of two calls
    that differ in the length of their completions alone, so prompts and start are not in it.
    """
    account, shape = Account(), where.pick(LARGE, DRY)
    hf = build(shape, low(where), where.device, "qwen2", on_device=True)
    sampler = LocalSampler(LanguageModel(hf), byte_tokenizer(shape["vocab_size"]))
    count, prompt, short, long = where.pick((256, 64, 64, 192), (4, 4, 3, 9))
    requests = [Request([5 + i % 200] * prompt, 1, i) for i in range(count)]
    seconds = {}
    with watched() as graphs:
        for tokens in (short, long):
            params = SamplingConfig(max_tokens=tokens, min_tokens=tokens)
            for _ in range(2):  # the first call records graphs
                where.wait()
                began = time.perf_counter()
                sampler.sample(requests, params)
                where.wait()
                seconds[tokens] = time.perf_counter() - began
    if where.cuda:
        account.true("graphs are recorded", graphs.recorded > 0 and not graphs.refused, " ".join(graphs.refused)[:300])
    step = (seconds[long] - seconds[short]) / (long - short)
    size = hf.get_input_embeddings().weight.element_size()
    weights = sum(p.numel() for p in hf.parameters()) * size
    head = shape["hidden_size"] // shape["num_attention_heads"]
    token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head * size
    read = weights + count * token * (prompt + (short + long) / 2)
    rate = bandwidth(where)
    account.numbers.update({
        "ms of a step": round(step * 1e3, 4), "tokens per second": round(count / step, 1), "bytes of a step": read,
        "copy, GB/s": round(rate / 1e9, 1), "of the bandwidth": round(read / step / rate, 4),
        "peak MiB": where.peak_mib(), "graphs recorded": graphs.recorded, "graphs replayed": graphs.replayed,
    })  # fmt: skip
    account.note = f"{count / step:.0f} tokens/s, {read / step / rate:.1%} of {rate / 1e9:.0f} GB/s"
    return account


def decoding_profile(where: Where) -> Account:
    """What the time of 64 decoding steps of that model goes into."""
    account, shape = Account(), where.pick(LARGE, DRY)
    hf = build(shape, low(where), where.device, "qwen2", on_device=True)
    sampler = LocalSampler(LanguageModel(hf), byte_tokenizer(shape["vocab_size"]))
    count, prompt, tokens = where.pick((256, 64, 65), (4, 4, 3))
    requests = [Request([5 + i % 200] * prompt, 1, i) for i in range(count)]
    params = SamplingConfig(max_tokens=tokens, min_tokens=tokens)
    for _ in range(2):
        sampler.sample(requests, params)
    timeline(where, account, lambda: sampler.sample(requests, params))
    return account


def memory(where: Where) -> Account:
    """SFT of all weights and with LoRA: the most memory that torch allocates, beside what `posttrain memory` says."""
    account, data = Account(), rows(where.folder / "memory.jsonl", 200, "sft")
    for name, more in (("LoRA", {"adapter": {"r": 16}}), ("all weights", {})):
        systems = {"tokens_per_micro_batch": where.pick(8192, 200)}
        stage: dict[str, Any] = {**SFT, **more, "data": {"source": str(data)}, "batch_size": where.pick(64, 4),
                                 "max_steps": 3, "systems": systems}  # fmt: skip
        model = {"source": str(qwen(where)), "device": where.device.type, "dtype": where.pick("bfloat16", "float32")}
        path = where.folder / "memory.yaml"
        path.write_text(yaml.safe_dump({"name": "memory", "model": model, "stages": [stage]}))
        recipe = load_recipe(path)
        predicted = plan_memory(recipe).training[0].own
        if where.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        posttrain.run(recipe, where.folder / f"run-memory-{name}")
        known = predicted.peak - predicted.parts.get("libraries", 0)
        account.numbers[name] = {"predicted MiB": round(known / 2**20, 1), "allocated MiB": where.peak_mib()}
        if where.cuda:
            error = known / torch.cuda.max_memory_allocated() - 1
            account.numbers[name]["error"] = round(error, 3)
            account.at_most(f"{name}: prediction, error", abs(error), 0.4)
    account.note = ", ".join(f"{k}: {v['predicted MiB']:.0f} predicted, {v['allocated MiB']} allocated (MiB)"
                             for k, v in account.numbers.items() if isinstance(v, dict))  # fmt: skip
    return account


def steps(where: Where, sharded: bool, work: list[Batch]) -> tuple[list[float], list[float]]:
    """(losses, tokens a second) of steps of a learner whose model is sharded over one rank, or is not."""
    model = LanguageModel(build(where.pick(QWEN, SMALL), low(where), where.device, "qwen2", on_device=True))
    if sharded:
        token_budget(default_systems(where), model)  # as a learner on several ranks: for the dtype that is computed in
        shard_model(model, low(where))
    learner = Learner(model, OptimizerConfig(lr=1e-3, schedule="constant", warmup=0), default_systems(where), len(work))
    losses, rates = [], []
    for one in work:
        where.wait()
        began = time.perf_counter()
        losses.append(learner.step(taught(one)).metrics["loss"])
        where.wait()
        rates.append(counts(one)["tokens"] / (time.perf_counter() - began))
    return losses, rates


def fsdp(where: Where) -> Account:
    """FSDP2 on one rank (NCCL, gloo on a CPU) against the plain learner: the same losses, and its speed.

    Sharded weights are float32 and are computed with in bfloat16; plain ones are bfloat16 with float32 masters.
    """
    account = Account()
    work = batches(where, 1, where.pick(QWEN, SMALL)["vocab_size"]) * where.pick(5, 3)
    plain, rate = steps(where, False, work)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if where.cuda:
        torch.cuda.empty_cache()
        torch.cuda.set_device(0)
    backend = "nccl" if where.cuda else "gloo"
    store = f"file://{where.folder / 'fsdp-rendezvous'}"
    torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1)
    try:
        sharded, sharded_rate = steps(where, True, work)
    finally:
        distributed.stop()
    worst = max(abs(a - b) / abs(b) for a, b in zip(sharded, plain, strict=True))
    account.at_most("losses, relative difference", worst, 0.01 if where.cuda else 1e-5)
    account.true("the loss falls", sharded[-1] < sharded[0], str(sharded))
    account.numbers.update({"losses": [round(x, 5) for x in sharded], "backend": backend,
                            "tokens per second": round(median(sharded_rate[2:]), 1),
                            "plain": round(median(rate[2:]), 1), "peak MiB": where.peak_mib()})  # fmt: skip
    account.note = f"{median(sharded_rate[2:]):.0f} tokens/s, plain {median(rate[2:]):.0f}; losses within {worst:.1e}"
    return account
