"""How fast: matrix products, SFT, sampling, what a step's time goes into; TRL beside it where it is installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from common import Batch, counts, make_batches, matrix_rates, median, operations

from gpu.base import DRY, SMOL, Account, Where, build, byte_tokenizer, smol
from gpu.sampler import watched
from posttrain.config import OptimizerConfig, SamplingConfig, SystemsConfig
from posttrain.core.types import Sample
from posttrain.models.language_model import LanguageModel
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request
from posttrain.trainer.token_budget import token_budget
from posttrain.trainer.train_step import Learner

QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936}  # fmt: skip
"""The shape of Qwen2-0.5B."""


def low(where: Where) -> torch.dtype:
    return torch.bfloat16 if where.cuda else torch.float32


def card(where: Where) -> float:
    """Operations a second of one large product."""
    n = where.pick(8192, 256)
    a, b = (torch.randn(n, n, device=where.device, dtype=low(where)) for _ in range(2))
    seconds = []
    for _ in range(12):
        where.wait()
        began = time.perf_counter()
        a @ b
        where.wait()
        seconds.append(time.perf_counter() - began)
    return 2.0 * n**3 / median(seconds[2:])


def batches(where: Where, steps: int, vocabulary: int) -> list[Batch]:
    """Conversations of 64 to 2048 tokens, as `benchmarks/sft.py --gpu` has them, of random ids."""
    shortest, longest = where.pick((64, 2048), (8, 40))
    return make_batches(steps, where.pick(32, 4), shortest, longest, 0, None, None, vocabulary)


def taught(batch: Batch) -> list[Sample]:
    return [Sample(c["input_ids"], [0.0, *map(float, c["completion_mask"][1:])]) for c in batch]


def systems(where: Where, **more: Any) -> SystemsConfig:
    """The defaults; small micro-batches in a dry run."""
    return SystemsConfig(tokens_per_micro_batch=where.pick(None, 200), **more)


def trained(
    where: Where, kind: str, shape: dict[str, int], account: Account, steps: int, compiled: bool = False
) -> None:
    """Full fine-tuning with the learner, tokens a second after two steps to warm up."""
    hf = build(shape, low(where), where.device, kind, on_device=True)
    work = batches(where, steps + 2, shape["vocab_size"])
    model, config = LanguageModel(hf), systems(where, compile=compiled)
    learner = Learner(model, OptimizerConfig(schedule="constant", warmup=0), config, steps + 2)
    rates, done = [], []
    for batch in work:
        where.wait()
        began = time.perf_counter()
        learner.step(taught(batch))
        where.wait()
        seconds = time.perf_counter() - began
        rates.append(counts(batch)["tokens"] / seconds)
        done.append(operations(hf, batch) / seconds)
    peak, rate = where.peak_mib(), card(where)
    own = matrix_rates(hf, work[0], low(where), str(where.device), 3)["rate"]
    account.numbers.update({
        "tokens per second": round(median(rates[2:]), 1), "peak MiB": peak,
        "of the card's rate": round(median(done[2:]) / rate, 4), "card's TFLOP/s": round(rate / 1e12, 2),
        "of its own products' rate": round(median(done[2:]) / own, 4), "own products' TFLOP/s": round(own / 1e12, 2),
        "fused layers": sum(hasattr(m, "fused_kind") for m in hf.modules()),
        "tokens a step": counts(work[0])["tokens"], "tokens per micro-batch": token_budget(config, model),
    })  # fmt: skip
    account.note = f"{median(rates[2:]):.0f} tokens/s, {median(done[2:]) / rate:.1%} of {rate / 1e12:.0f} TFLOP/s"


def sft_smol(where: Where) -> Account:
    account = Account()
    trained(where, "llama", where.pick(SMOL, DRY), account, where.pick(8, 2))
    return account


def compiled(where: Where, kind: str, shape: dict[str, int]) -> Account:
    """With systems.compile, where torch can compile for this device."""
    account = Account()
    if where.dry:
        account.note = "compiling on a CPU takes too long for a dry run"
        return account
    try:
        trained(where, kind, shape, account, 6, compiled=True)
    except Exception as error:  # no compiler, no headers: nothing that this program can help
        account.note = f"torch.compile does not work here: {type(error).__name__}: {str(error)[:200]}"
    return account


def sft_compiled(where: Where) -> Account:
    return compiled(where, "llama", SMOL)


def sft_qwen_compiled(where: Where) -> Account:
    return compiled(where, "qwen2", QWEN)


def sft_qwen(where: Where) -> Account:
    account = Account()
    trained(where, "qwen2", where.pick(QWEN, DRY), account, where.pick(6, 2))
    return account


def sampling(where: Where) -> Account:
    """Tokens a second with and without graphs: many completions, and few."""
    account, shape = Account(), where.pick(SMOL, DRY)
    model = LanguageModel(build(shape, low(where), where.device))
    sampler = LocalSampler(model, byte_tokenizer(shape["vocab_size"]))
    longest = where.pick(128, 6)
    params = SamplingConfig(max_tokens=longest, min_tokens=longest)
    for name, prompts, n in (("512 rows", where.pick(64, 2), 8), ("16 rows", where.pick(16, 2), 1)):
        requests = [Request([5 + i] * where.pick(64, 4), n, i) for i in range(prompts)]
        for graphs in (True, False):
            sampler.release()
            seconds = []
            with watched(graphs) as found:
                for _ in range(2):
                    where.wait()
                    began = time.perf_counter()
                    made = sampler.sample(requests, params)
                    where.wait()
                    seconds.append(time.perf_counter() - began)
            tokens = sum(len(r.tokens) for g in made for r in g.rollouts)
            label = f"{name}, {'graphs' if graphs else 'no graphs'}"
            account.numbers[label] = {"tokens per second": round(tokens / seconds[-1], 1), "seconds": seconds,
                                      "graphs recorded": found.recorded}  # fmt: skip
    account.numbers["peak MiB"] = where.peak_mib()
    account.note = "; ".join(f"{k}: {v['tokens per second']:.0f}/s" for k, v in account.numbers.items() if "rows" in k)
    return account


def profile(where: Where, kind: str, shape: dict[str, int]) -> Account:
    """What one SFT step's time goes into: the largest kernels, and the share of the time that the GPU is busy."""
    account = Account()
    model = LanguageModel(build(shape, low(where), where.device, kind, on_device=True))
    learner = Learner(model, OptimizerConfig(), systems(where), 4)
    samples = [taught(batch) for batch in batches(where, 3, shape["vocab_size"])]
    learner.step(samples[0])
    learner.step(samples[1])
    timeline(where, account, lambda: learner.step(samples[2]))
    return account


def timeline(where: Where, account: Account, work: Callable[[], Any]) -> None:
    """Run work once under the profiler: its largest kernels, and the share of the time that the GPU is busy."""
    where.wait()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if where.cuda else []
    with torch.profiler.profile(activities=activities) as found:
        began = time.perf_counter()
        work()
        where.wait()
        seconds = time.perf_counter() - began
    name = "self_device_time_total" if where.cuda else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda e: -getattr(e, name))
    on_device = [e for e in events if not where.cuda or e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(getattr(e, name) for e in on_device) / 1e6
    account.numbers.update(seconds=round(seconds, 4), busy=round(busy / seconds, 3))
    account.numbers["largest, ms and calls"] = {
        e.key[:90]: [round(getattr(e, name) / 1e3, 3), e.count] for e in on_device[:30]
    }
    account.note = f"GPU busy {busy / seconds:.0%} of {seconds * 1e3:.0f} ms" if where.cuda else "no GPU"


def profile_smol(where: Where) -> Account:
    return profile(where, "llama", where.pick(SMOL, DRY))


def profile_qwen(where: Where) -> Account:
    return profile(where, "qwen2", where.pick(QWEN, DRY))


def trl(where: Where) -> Account:
    """TRL's SFTTrainer on the same batches and a model of the same shape, at its best setting and in this process."""
    account = Account()
    if find_spec("trl") is None:
        account.note = "TRL is not installed"
        return account
    import sft as bench

    vocabulary = where.pick(SMOL, DRY)["vocab_size"]
    work = batches(where, where.pick(8, 3), vocabulary)
    settings: dict[str, Any] = {"per_device": where.pick(16, 2), "sorted": True}
    job = bench.Job("trl", str(smol(where)), "", where.device.type, False, "default", 1e-5, 0.01, 0, 0, settings)
    marks = bench.run_trl(job, work)["marks"]
    seconds = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    rates = [counts(batch)["tokens"] / s for batch, s in zip(work, seconds, strict=True)]
    account.numbers = {"tokens per second": round(median(rates[2:]), 1), "peak MiB": where.peak_mib()}
    account.note = f"{median(rates[2:]):.0f} tokens/s"
    return account
