"""Every kind of optimizer against its library's own loop, over a checkpoint and back, and with 16-bit weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from posttrain.config import OptimizerConfig
from posttrain.core.errors import RecipeError
from posttrain.trainer import update_rules
from posttrain.trainer.kept_zeros import ZERO_MARK
from posttrain.trainer.optimizer import Optimizer, lr_at

KINDS = ["adamw", "muon", "adafactor", "adamw8bit", "schedule_free"]
TOTAL = 6


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 64), nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 11, bias=False)).to(dtype)


def gradient(model: nn.Module, step: int) -> None:
    """Leave the gradient of a step's batch; clipping is off."""
    tokens = torch.arange(step, step + 9) % 11
    nn.functional.cross_entropy(model(tokens).float(), (tokens * 3 + 1) % 11).backward()


def settings(kind: str) -> OptimizerConfig:
    if kind in ("adamw8bit", "schedule_free"):
        pytest.importorskip({"adamw8bit": "bitsandbytes", "schedule_free": "schedulefree"}[kind])
    return OptimizerConfig(kind=kind, lr=0.01, weight_decay=0.1, max_grad_norm=0, warmup=2)  # type: ignore[arg-type]


def train(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.begin()
        gradient(model, step)
        optimizer.step(lr_at(step, TOTAL, optimizer.config))


def made(model: nn.Module, kind: str) -> Optimizer:
    return Optimizer(model.named_parameters(), settings(kind), matrices=["1.weight", "1.bias"])


def libraries_own(kind: str, model: nn.Module) -> list[Any]:
    """Return the library's optimizers as its documentation makes them; biases have no decay."""
    embedding, weight, bias, head = model.parameters()
    decayed, plain = [embedding, weight, head], [bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    if kind == "adamw":
        return [torch.optim.AdamW(groups, fused=True)]
    if kind == "adafactor":
        return [torch.optim.Adafactor(groups)]
    if kind == "muon":
        rest = [{"params": [embedding, head], "weight_decay": 0.1}, groups[1]]
        return [
            torch.optim.Muon([weight], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, fused=True),
        ]
    if kind == "adamw8bit":
        import bitsandbytes

        return [bitsandbytes.optim.AdamW8bit(groups)]
    import schedulefree

    return [schedulefree.AdamWScheduleFree(groups, foreach=False)]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_librarys_own_loop(kind: str) -> None:
    model, other = network(), network()
    optimizer = made(model, kind)
    train(model, optimizer, 0, TOTAL)
    rules = libraries_own(kind, other)
    for step in range(TOTAL):
        for rule in rules:
            getattr(rule, "train", lambda: None)()
        gradient(other, step)
        for rule in rules:
            for group in rule.param_groups:
                group["lr"] = lr_at(step, TOTAL, optimizer.config)
            rule.step()
            rule.zero_grad()
            getattr(rule, "eval", lambda: None)()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    if kind == "adamw8bit":
        assert {v.dtype for k, v in optimizer.state_dict().items() if k.startswith("state1.1.w")} == {torch.uint8}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_ends_in_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    """The state is loaded in place into an optimizer that was just made, as a checkpoint is."""
    whole, first, resumed = (network(dtype) for _ in range(3))
    train(whole, made(whole, kind), 0, TOTAL)
    stopped = made(first, kind)
    train(first, stopped, 0, 3)
    with torch.no_grad():
        for p in resumed.parameters():
            p.zero_()
    going_on = made(resumed, kind)
    state, stored = going_on.state_dict(), stopped.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in stored.items()}
    for name, tensor in state.items():
        tensor.copy_(stored[name])
    going_on.update_parameters()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), resumed.parameters(), strict=True))
    train(resumed, going_on, 3, TOTAL)
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == dtype
    assert all(m.dtype == torch.float32 for m in going_on.masters.values())


def test_muon_takes_the_matrices_inside_of_layers() -> None:
    optimizer = made(network(), "muon")
    names = list(optimizer.state_dict())
    assert [n for n in names if n.startswith("momentum_buffer.")] == ["momentum_buffer.1.weight"]
    assert [n for n in names if n.startswith("exp_avg.")] == [
        f"exp_avg.{n}" for n in ("0.weight", "1.bias", "3.weight")
    ]


def refusal(make: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        make()
    return str(caught.value)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OptimizerConfig(kind="schedule_free").schedule == "constant"
    assert OptimizerConfig(**OptimizerConfig(kind="schedule_free").model_dump()).schedule == "constant"
    assert "leave schedule out" in refusal(lambda: OptimizerConfig(kind="schedule_free", schedule="cosine"))
    assert "momentum has no effect" in refusal(lambda: OptimizerConfig(momentum=0.9))
    assert "betas has no effect" in refusal(lambda: OptimizerConfig(kind="adafactor", betas=(0.9, 0.95)))
    model = network()
    setattr(next(model.parameters()), ZERO_MARK, torch.zeros(11, 64, dtype=torch.bool))
    assert "keep_zeros" in refusal(lambda: made(model, "muon"), RecipeError)
    monkeypatch.setattr(update_rules.distributed, "world", lambda: 2)
    assert "works in one process" in refusal(lambda: made(network(), "adafactor"), RecipeError)
