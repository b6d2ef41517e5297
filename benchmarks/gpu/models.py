"""Whole models: log-probabilities and gradients of ragged batches, and the optimizer's float32 masters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu.base import DRY, SMALL, Account, Where, build, family, random_samples
from posttrain.config import OptimizerConfig, SystemsConfig
from posttrain.core.types import Sample
from posttrain.models.language_model import LanguageModel
from posttrain.trainer.train_step import Learner, cross_entropy

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "mistral": {"sliding_window": 24},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "sliding_window": 24},
    "gemma3_text": {"head_dim": 64, "sliding_window": 24},
}
BOUNDS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.06, 0.12)}
"""Largest difference of a log-probability in nats, and of all gradients by their norm; from float32 on rounded weights.
Models with random weights have gradients that nearly cancel, which bfloat16 shows."""


def one_at_a_time(hf: Any, samples: Sequence[Sample], device: torch.device) -> tuple[list[Tensor], dict[str, Tensor]]:
    """transformers' own forward, a sequence at a time: log-probabilities of every token but the first, and the
    gradients of the loss that the learner's cross-entropy is."""
    denominator = sum(map(sum, (s.weights for s in samples)))
    found = []
    for s in samples:
        tokens = torch.tensor(s.tokens, device=device)
        logits = hf(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
        logprobs = logits.log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)
        weights = torch.tensor(s.weights[1:], device=device)
        (-(logprobs * weights).sum() / denominator).backward()
        found.append(logprobs.detach())
    return found, {n: p.grad for n, p in hf.named_parameters() if p.grad is not None}


def check(where: Where) -> Account:
    """Every type of model, in float32 and bfloat16, prefixes shared and not."""
    account = Account()
    for kind, more in KINDS.items():
        for dtype in (torch.float32,) if where.dry else (torch.float32, torch.bfloat16):
            name = f"{kind} {str(dtype).removeprefix('torch.')}"
            try:
                one(name, kind, dtype, more, where, account)
            except Exception as error:
                account.attempt(name, error)
    numbers = account.numbers
    worst = {
        f"{dtype}, {what}": max((v for n, v in numbers.items() if dtype in n and n.endswith(f": {what}")), default=None)
        for dtype in ("float32", "bfloat16")
        for what in ("logprobs", "gradient")
    }
    account.note = "; ".join(f"{k} {v:.1e}" for k, v in worst.items() if v is not None)
    return account


def one(name: str, kind: str, dtype: torch.dtype, more: dict[str, Any], where: Where, account: Account) -> None:
    shape = where.pick(SMALL, DRY)
    samples = family(shape["vocab_size"], where.pick(4, 1))
    peer = build(shape, dtype, where.device, kind, **more).float().eval()
    expected, gradients = one_at_a_time(peer, samples, where.device)
    for shared in (True, False):
        model = LanguageModel(build(shape, dtype, where.device, kind, **more))
        batch = model.pack(samples, shared)
        targets = torch.cat([row[1:] for row in batch.rows])
        with torch.no_grad():
            logprobs = model(batch, targets_N=targets)[0]
        logp_bound, gradient_bound = BOUNDS[dtype]
        label = f"{name} {'shared' if shared else 'alone'}"
        difference = float((logprobs - torch.cat(expected)).abs().max())
        account.at_most(f"{label}: logprobs", difference, logp_bound)
        loss, _ = cross_entropy(model, batch, sum(map(sum, (s.weights for s in samples))))
        loss.backward()
        mine = {n: p.grad for n, p in model.hf.named_parameters() if p.grad is not None}
        account.true(f"{label}: all have gradients", mine.keys() == gradients.keys())
        squared = sum(float((mine[n].double() - g.double()).square().sum()) for n, g in gradients.items())
        whole = sum(float(g.double().square().sum()) for g in gradients.values())
        account.at_most(f"{label}: gradient", (squared / whole) ** 0.5, gradient_bound)


def masters(where: Where) -> Account:
    """bfloat16 weights: three of the learner's steps against AdamW by hand on float32 copies; then the loss falls."""
    account, shape = Account(), where.pick(SMALL, DRY)
    config = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0, weight_decay=0.1, max_grad_norm=1.0)
    batches = [random_samples(8, 20, where.pick(200, 40), shape["vocab_size"], seed=s) for s in range(3)]
    systems = SystemsConfig(tokens_per_micro_batch=where.pick(600, 100))
    learner = Learner(LanguageModel(build(shape, torch.bfloat16, where.device)), config, systems, 60)
    before = {n: p.detach().float() for n, p in learner.model.named_parameters()}
    hand = LanguageModel(build(shape, torch.bfloat16, where.device))
    copies = {n: p.detach().float().requires_grad_() for n, p in hand.named_parameters()}
    adamw = torch.optim.AdamW(
        [{"params": [c for c in copies.values() if (c.ndim >= 2) == decays], "weight_decay": 0.1 * decays}
         for decays in (True, False)], lr=1e-3, foreach=False,
    )  # fmt: skip
    for i, batch in enumerate(batches):
        result = learner.step(batch)
        step_by_hand(hand, copies, adamw, batch)
        account.true(f"step {i + 1}: in several passes", result.micro_batches > 1)
    state = learner.optimizer.state_dict()
    apart_by_name = {n: (state[f"weight.{n}"] - c).detach().abs().mean() for n, c in copies.items()}
    # Adam divides by the root of the second moment: where a gradient is next to nothing, rounding shows in full.
    account.at_most("masters against by hand, mean, of the learning rate",
                    float(torch.stack(list(apart_by_name.values())).max()) / 1e-3, 0.25)  # fmt: skip
    low = dict(learner.model.named_parameters())
    account.true("weights are the masters, rounded",
                 all(torch.equal(p, state[f"weight.{n}"].to(p.dtype)) for n, p in low.items()))  # fmt: skip
    moved = [float((state[f"weight.{n}"] != b).double().mean()) for n, b in before.items() if "embed" not in n]
    account.true("masters are float32", all(state[f"weight.{n}"].dtype == torch.float32 for n in before))
    account.true("masters move where bfloat16 would not", min(moved) > 0.9, str(min(moved)))
    losses = [learner.step(batches[0]).metrics["loss"] for _ in range(where.pick(20, 8))]
    account.numbers["losses"] = [round(x, 4) for x in losses]
    account.true("the loss falls", losses[-1] < losses[0] - 0.3, f"{losses[0]:.3f} to {losses[-1]:.3f}")
    account.note = f"loss {losses[0]:.2f} to {losses[-1]:.2f}"
    return account


def step_by_hand(model: LanguageModel, copies: dict[str, Tensor], adamw: Any, samples: Sequence[Sample]) -> None:
    """One step of AdamW on float32 copies by gradients of the bfloat16 model, a sample at a time."""
    denominator = sum(map(sum, (s.weights for s in samples)))
    model.train()
    parameters = dict(model.named_parameters())
    grads = {n: torch.zeros_like(c) for n, c in copies.items()}
    for sample in samples:
        loss, _ = cross_entropy(model, model.pack([sample]), denominator)
        loss.backward()
        for n, p in parameters.items():
            assert p.grad is not None
            grads[n] += p.grad.float()
            p.grad = None
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    for n, copy in copies.items():
        copy.grad = grads[n] / (norm + 1e-6).clamp_min(1.0)
    adamw.step()
    with torch.no_grad():
        for n, p in parameters.items():
            p.copy_(copies[n])
