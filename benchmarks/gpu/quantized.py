"""QLoRA on this device: NF4 weights of bitsandbytes against a plain loop of peft, merged, and sampled from."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpu.base import DRY, SMALL, Account, Where, byte_tokenizer, random_samples, saved
from posttrain.config import (
    AdapterConfig,
    ModelConfig,
    OptimizerConfig,
    QuantizationConfig,
    SamplingConfig,
    SystemsConfig,
)
from posttrain.core.types import Sample
from posttrain.models.adapters import attach, merge
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import open_model
from posttrain.models.saving import restore_attention
from posttrain.models.verification import verify
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request
from posttrain.trainer.train_step import Learner

STEPS, RATE, RANK, SEED = 6, 5e-3, 8, 7
BOUNDS = {"float32": (1e-3, 1e-2, 1e-3), "bfloat16": (0.05, 0.5, 0.15)}
"""Largest difference of: losses from peft's, logits from merging, log-probabilities of samples from a forward pass."""


def check(where: Where) -> Account:
    """Train adapters on NF4 weights with double quantisation, in float32 and in bfloat16."""
    account = Account()
    if importlib.util.find_spec("bitsandbytes") is None:
        account.note = "not checked: bitsandbytes is not installed"
        return account
    shape = where.pick(SMALL, DRY)
    folder = saved(where.folder / "qlora", shape)
    samples = random_samples(8, 20, where.pick(120, 30), shape["vocab_size"])
    for dtype in ("float32", "bfloat16"):
        try:
            one(dtype, folder, samples, shape["vocab_size"], where, account)
        except Exception as error:
            account.attempt(dtype, error)
    account.note = ", ".join(f"{k} {v}" for k, v in account.numbers.items() if "losses" in k)
    return account


def one(dtype: str, folder: Path, samples: Sequence[Sample], vocabulary: int, where: Where, account: Account) -> None:
    """Compare losses, the merged model and the sampler's log-probabilities, in one dtype."""
    losses_bound, merge_bound, sampler_bound = BOUNDS[dtype]
    config = ModelConfig(
        source=str(folder), dtype=dtype, device=str(where.device), quantization=QuantizationConfig(kind="nf4")
    )
    hf = attach(open_model(config).hf, AdapterConfig(r=RANK, alpha=2 * RANK), SEED)
    model = LanguageModel(hf)
    account.numbers[f"{dtype}: verify"] = float(f"{verify(model):.3g}")
    systems = SystemsConfig(tokens_per_micro_batch=where.pick(400, 100))
    learner = Learner(model, OptimizerConfig(lr=RATE, schedule="constant", warmup=0), systems, STEPS)
    ours = [learner.step(samples).metrics["loss"] for _ in range(STEPS)]
    theirs = losses_of_peft(config, samples)
    account.at_most(f"{dtype}: losses", max(abs(a - b) for a, b in zip(ours, theirs, strict=True)), losses_bound)
    account.true(f"{dtype}: the loss falls", ours[-1] < ours[0], f"{ours[0]:.3f} to {ours[-1]:.3f}")
    sampler = LocalSampler(model, byte_tokenizer(vocabulary))
    request = Request(samples[0].tokens[:10], 8, 0)
    worst = 0.0
    for rollout in sampler.sample([request], SamplingConfig(max_tokens=where.pick(32, 6)))[0].rollouts:
        tokens = [*request.tokens, *rollout.tokens]
        batch = model.pack([Sample(tokens, [0.0] * 10 + [1.0] * len(rollout.tokens))])
        with torch.no_grad():
            found = model(batch)[0].cpu()
        worst = max(worst, float((found - torch.tensor(rollout.logprobs)).abs().max()))
    account.at_most(f"{dtype}: sampler", worst, sampler_bound)
    restore_attention(hf)
    merged, difference = merge(hf)
    account.at_most(f"{dtype}: merging", difference, merge_bound)
    account.true(f"{dtype}: full weights", not any(p.dtype == torch.uint8 for p in merged.parameters()))


def losses_of_peft(config: ModelConfig, samples: Sequence[Sample]) -> list[float]:
    """transformers, bitsandbytes and peft alone, a padded batch at a time, with the same seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    hf: Any = AutoModelForCausalLM.from_pretrained(
        config.source, quantization_config=quantization, dtype=dtype, device_map={"": device}
    )
    for module in hf.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(SEED)
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(hf, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    width = max(map(len, samples))

    def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)

    tokens, mask = padded([s.tokens for s in samples], 0), padded([[1] * len(s) for s in samples], 0)
    labels = padded([[t if w else -100 for t, w in zip(s.tokens, s.weights, strict=True)] for s in samples], -100)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
