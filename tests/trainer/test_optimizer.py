"""Schedules by hand; AdamW, clipping and 16-bit parameters against torch's own and a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from posttrain.config import OptimizerConfig
from posttrain.trainer.optimizer import Optimizer, lr_at


def test_schedules_by_hand() -> None:
    c = OptimizerConfig(lr=1.0, schedule="linear", warmup=3, min_lr=0.2)
    assert [lr_at(s, 7, c) for s in range(7)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4])
    c = OptimizerConfig(lr=2.0, schedule="cosine", warmup=0, min_lr=0.0)
    assert [lr_at(s, 4, c) for s in range(4)] == pytest.approx(
        [2.0, 1 + math.cos(math.pi / 4), 1.0, 1 - math.cos(math.pi / 4)]
    )
    c = OptimizerConfig(lr=3.0, schedule="constant", warmup=0.5)
    assert [lr_at(s, 4, c) for s in range(4)] == [1.0, 2.0, 3.0, 3.0]
    c = OptimizerConfig(lr=2.0, schedule="wsd", warmup=1, decay=3, min_lr=0.4)
    assert [lr_at(s, 6, c) for s in range(6)] == pytest.approx([1.0, 2.0, 2.0, 1.6, 1.2, 0.8])
    c = OptimizerConfig(lr=2.0, schedule="wsd", warmup=0, decay=0.2)
    assert [lr_at(s, 4, c) for s in range(4)] == [2.0, 2.0, 2.0, 1.0] and lr_at(0, 1, c) == 1.0
    assert lr_at(0, 1, OptimizerConfig(lr=1.0, warmup=5)) == pytest.approx(1 / 6)  # all warm-up: no division by zero


def test_a_fraction_of_warm_up_is_at_least_one_step() -> None:
    """5% of 10 steps is half a step, which would round to none; 0 is none, and a number of steps stays as it is."""

    def warm(warmup: float, total: int) -> list[float]:
        config = OptimizerConfig(lr=1.0, schedule="constant", warmup=warmup)
        return [r for s in range(total) if (r := lr_at(s, total, config)) < 1]

    assert warm(0.05, 10) == warm(0.01, 3) == warm(0.05, 1) == [0.5]
    assert warm(0.0, 10) == [] and warm(0.05, 50) == [1 / 3, 2 / 3] and warm(2, 10) == [1 / 3, 2 / 3]


def matrices(dtype: torch.dtype) -> list[tuple[str, torch.nn.Parameter]]:
    g = torch.Generator().manual_seed(0)
    return [
        ("w", torch.nn.Parameter(torch.randn(4, 3, generator=g).to(dtype))),
        ("b", torch.nn.Parameter(torch.randn(3, generator=g).to(dtype))),
    ]


def test_three_steps_of_adamw_by_a_slow_loop() -> None:
    """Decoupled decay on the matrix alone; the norm is taken over both, and clipped to 0.5."""
    config = OptimizerConfig(lr=0.1, weight_decay=0.3, max_grad_norm=0.5, betas=(0.8, 0.9), eps=1e-6)
    named = matrices(torch.float32)
    optimizer = Optimizer(named, config)
    w, b = (p.detach().double().clone() for _, p in named)
    m = {"w": torch.zeros_like(w), "b": torch.zeros_like(b)}
    v = {"w": torch.zeros_like(w), "b": torch.zeros_like(b)}
    for t in range(1, 4):
        for i, (_, p) in enumerate(named):
            p.grad = torch.full_like(p, 0.1 * t * (i + 1))
        norm = math.sqrt(12 * (0.1 * t) ** 2 + 3 * (0.2 * t) ** 2)
        norms = {name: float(x) for name, x in optimizer.gradient_norms().items()}
        assert optimizer.clip(norms) == pytest.approx(norm, rel=1e-6)
        optimizer.step(0.1)
        for i, (name, x) in enumerate((("w", w), ("b", b))):
            g = 0.1 * t * (i + 1) * min(1.0, 0.5 / norm)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g * g
            if name == "w":
                x *= 1 - 0.1 * 0.3
            x -= 0.1 * (m[name] / (1 - 0.8**t)) / ((v[name] / (1 - 0.9**t)).sqrt() + 1e-6)
    torch.testing.assert_close(named[0][1].detach().double(), w, atol=1e-6, rtol=0)
    torch.testing.assert_close(named[1][1].detach().double(), b, atol=1e-6, rtol=0)
    assert named[0][1].grad is None


def test_bfloat16_parameters_keep_float32_masters() -> None:
    """Updates of a thousandth of a bfloat16 step add up; gradients of micro-batches add up in float32."""
    p = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = Optimizer([("p", p)], OptimizerConfig(lr=1e-5, weight_decay=0.0, max_grad_norm=0))
    for _ in range(400):
        (p.sum() * 1.0).backward()
        (p.sum() * 0.001).backward()
        assert p.grad is None
        assert float(optimizer.masters["p"].grad[0, 0]) == pytest.approx(1.001, rel=1e-4)  # bfloat16 alone: 1.0
        optimizer.step(1e-5)
    assert float(optimizer.masters["p"][0, 0]) == pytest.approx(1 - 400e-5, abs=2e-5)
    assert float(p[0, 0]) == pytest.approx(0.99609375)  # the nearest bfloat16; one step alone would have stayed at 1


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        Optimizer([("p", torch.nn.Parameter(torch.ones(1), requires_grad=False))], OptimizerConfig())


def test_gradients_lie_in_one_block_and_add_up() -> None:
    a, b, unused = (nn.Parameter(torch.arange(float(n)) + 1) for n in (3, 5, 2))
    optimizer = Optimizer([("a", a), ("b", b), ("unused", unused)], OptimizerConfig())
    for _ in range(2):
        ((a * a).sum() + b.sum()).backward()
    assert a.grad is not None and b.grad is not None and unused.grad is None
    assert a.grad.tolist() == [4.0, 8.0, 12.0] and b.grad.tolist() == [2.0] * 5
    assert a.grad.untyped_storage().data_ptr() == b.grad.untyped_storage().data_ptr()
    optimizer.clear()
    (a * 3).sum().backward()
    assert a.grad is not None and a.grad.tolist() == [3.0] * 3 and b.grad is None
