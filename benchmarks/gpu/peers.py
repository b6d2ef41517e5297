"""SFT, DPO and GRPO on a model of 0.5B parameters with random weights: this package, and TRL beside it."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import counts, median

from gpu.base import DRY, Account, Where, saved
from gpu.speed import QWEN, batches

MISSING = "TRL is not installed"


def qwen(where: Where) -> Path:
    """The folder of the model that all of these train: bfloat16 on a GPU, the shape of Qwen2-0.5B."""
    return saved(where.folder / "qwen", where.pick(QWEN, DRY), "qwen2", where.device)


def seconds_of(marks: Sequence[Any]) -> list[float]:
    """Differences of times, or of the first entries of tuples of times."""
    at = [m[0] if isinstance(m, tuple) else m for m in marks]
    return [b - a for a, b in zip(at, at[1:], strict=False)]


# ----------------------------------------------------------------------------------------------------------------- SFT
def trl_sft(where: Where) -> Account:
    """SFTTrainer in its fastest settings: padded and sorted, and packed without padding; Liger's kernels if installed.

    Packed rows of 2,048 tokens attend across conversations, which is less work than is asked for; TRL's packing that
    keeps them apart needs FlashAttention.
    """
    account = Account()
    if find_spec("trl") is None:
        account.note = MISSING
        return account
    import sft as bench

    work = batches(where, where.pick(8, 3), where.pick(QWEN, DRY)["vocab_size"])
    tokens = [counts(batch)["tokens"] for batch in work]
    packed = where.pick((2048, 8), (32, 2))
    settings: dict[str, dict[str, Any]] = {
        "sorted": {"per_device": where.pick(16, 2), "sorted": True},
        "packed": {"packed": packed},
    }
    account.numbers["liger"] = find_spec("liger_kernel") is not None
    for name, chosen in settings.items():
        job = bench.Job("trl", str(qwen(where)), "", where.device.type, False, "default", 1e-5, 0.01, 0, 0, chosen)
        try:
            took = seconds_of(bench.run_trl(job, work)["marks"])
        except Exception as error:
            account.attempt(name, error)
            continue
        # The last packed step may have fewer rows than the others.
        each = tokens if name == "sorted" else [packed[0] * packed[1]] * (len(took) - 1)
        rates = [n / s for n, s in zip(each, took, strict=False)]
        account.numbers[name] = {"tokens per second": round(median(rates[2:] or rates), 1), "steps": len(rates)}
    best = [n["tokens per second"] for n in account.numbers.values() if isinstance(n, dict)]
    account.numbers |= {"tokens per second": max(best, default=None), "peak MiB": where.peak_mib()}
    found = {k: account.numbers[k]["tokens per second"] for k in settings if k in account.numbers}
    account.note = ", ".join(f"{k} {rate:.0f}" for k, rate in found.items()) + " tokens/s"
    account.note += "" if account.numbers["liger"] else ", without Liger, which is not installed"
    return account


# ----------------------------------------------------------------------------------------------------------------- DPO
def pairs(where: Where) -> list[dict[str, list[int]]]:
    """Pairs of random tokens: prompts of 128 to 512 tokens, answers of 64 to 512, five steps of 16."""
    rng, vocabulary = random.Random(0), where.pick(QWEN, DRY)["vocab_size"]
    prompts, answers = where.pick(((128, 512), (64, 512)), ((4, 12), (3, 9)))

    def draw(sizes: tuple[int, int]) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(*sizes))]

    return [
        {"prompt_ids": draw(prompts), "chosen_ids": draw(answers), "rejected_ids": draw(answers)}
        for _ in range(5 * where.pick(16, 2))
    ]


def _dpo(where: Where, who: str, settings: dict[str, Any]) -> Account:
    import preference as bench

    account, each = Account(), where.pick(16, 2)
    job = bench.Job(who, str(qwen(where)), "", each, 0.1, 1e-6, 0, 0, settings, where.device.type)
    found = (bench.run_ours if who == "ours" else bench.run_trl)(job, pairs(where))
    took = seconds_of(found["marks"])
    before = found["before"][0] / len(took)
    rate = each / (median(took[1:]) + before)
    account.numbers.update({"pairs per second": round(rate, 3), "peak MiB": where.peak_mib(),
                            "losses": [round(x, 5) for x in found["losses"]]})  # fmt: skip
    account.true("losses begin at log 2", abs(found["losses"][0] - 0.6931) < 0.02, str(found["losses"][0]))
    account.note = f"{rate:.1f} pairs/s"
    return account


def own_dpo(where: Where) -> Account:
    """The reference's log-probabilities of all pairs, then steps; each step has its part of the first."""
    return _dpo(where, "ours", {"tokens_per_micro_batch": where.pick(None, 200)})


def trl_dpo(where: Where) -> Account:
    """DPOTrainer; 4 pairs a micro-batch, or 16, whichever is faster."""
    if find_spec("trl") is None:
        return Account(note=MISSING)
    tried = []
    for per_device in where.pick((16, 4), (2,)):
        try:
            tried.append(_dpo(where, "trl", {"per_device": per_device}))
        except Exception as error:  # out of memory: the smaller one is what is left
            tried.append(Account(note=f"{type(error).__name__}: {str(error)[:100]}"))
    return max(tried, key=lambda a: a.numbers.get("pairs per second", 0.0))


# ---------------------------------------------------------------------------------------------------------------- GRPO
def _grpo(where: Where, who: str) -> Account:
    import grpo as bench

    account = Account()
    per_step, group, longest, steps = where.pick((8, 8, 128, 4), (2, 2, 6, 2))
    prompts = [f"question {i}: " + "words and more words " * where.pick(8, 1) for i in range(per_step * steps)]
    job = {"model": str(qwen(where)), "device": where.device.type, "fixed": True, "per_step": per_step, "group": group,
           "longest": longest, "steps": steps, "prompts": prompts, "reward": "mixed", "settings": {}}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        found = (bench.run_ours if who == "ours" else bench.run_trl)(job, Path(scratch))
    took = seconds_of(found["marks"])[-(steps - 1) :]  # the first step warms up
    account.true("every completion has its full length", min(found["lengths"]) == longest, str(found["lengths"]))
    account.numbers.update({"seconds per step": round(median(took), 4), "peak MiB": where.peak_mib()})
    if found["phases"]:
        account.numbers["phases"] = found["phases"][-1]
    account.note = f"{median(took):.2f} s a step of {per_step} prompts x {group} x {longest} tokens"
    return account


def own_grpo(where: Where) -> Account:
    return _grpo(where, "ours")


def trl_grpo(where: Where) -> Account:
    """GRPOTrainer with transformers' `generate`."""
    return _grpo(where, "trl") if find_spec("trl") is not None else Account(note=MISSING)
