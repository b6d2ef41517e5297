"""What is made again for backward: the same to the bit, its memory free in between, nobody else's mistaken for it."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from posttrain.core.types import Sample
from posttrain.cpu import recompute as remake
from posttrain.cpu.fused_modules import _RMSNorm
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model


def norm_then_linear(lean: bool, trained: bool) -> tuple[list[torch.Tensor], bool]:
    """Gradients of x, of the norm's weight and of two linear layers behind it; whether the norm's output was freed."""
    g = torch.Generator().manual_seed(0)
    x, scale, a, b = (torch.randn(s, generator=g).requires_grad_() for s in ((40, 16), (16,), (16, 8), (16, 8)))
    scale.requires_grad_(trained)

    def forward() -> tuple[torch.Tensor, StorageWeakRef]:
        y = _RMSNorm.apply(x, scale, 1e-6, 0.0)
        kept = StorageWeakRef(y.untyped_storage())
        return (y @ a).sin().sum() + (y[None] @ b).cos().sum(), kept

    if lean:
        with remake.cheap_results():
            loss, kept = forward()
    else:
        loss, kept = forward()
    freed = kept.expired()
    loss.backward()
    return [t.grad for t in (x, scale, a, b) if t.grad is not None], freed


@pytest.mark.parametrize("trained", [True, False])
def test_a_norm_s_output_is_not_kept_and_gradients_are_the_same_to_the_bit(trained: bool) -> None:
    (own, kept), (lean, freed) = norm_then_linear(False, trained), norm_then_linear(True, trained)
    assert freed and not kept
    assert len(own) == len(lean) == 3 + trained
    assert all(torch.equal(p, q) for p, q in zip(own, lean, strict=True))


def test_a_tensor_in_the_freed_memory_is_not_taken_for_the_one_before() -> None:
    """The norm's output is gone after the first product; whatever lies there next must be kept as it is."""
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(64, 64, generator=g).requires_grad_() for _ in range(6)]
    x = torch.randn(128, 64, generator=g)

    def gradients() -> list[torch.Tensor]:
        h = x
        for w in weights:
            h = _RMSNorm.apply(h, torch.ones(64), 1e-6, 0.0) @ w
            h = h * h.tanh()  # keeps tensors of the same size that are no norm's output
        return list(torch.autograd.grad(h.sum(), weights))

    own = gradients()
    with remake.cheap_results():
        lean = gradients()
    assert all(torch.equal(p, q) for p, q in zip(own, lean, strict=True))


def test_a_model_s_gradients_are_the_same_to_the_bit(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    model = LanguageModel(tiny_model("llama"))
    batch = model.pack([Sample(list(range(3, 50)), [0.0] + [1.0] * 46), Sample(list(range(9, 30)), [0.0] + [1.0] * 20)])
    targets = batch.targets_N

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(batch, "logprobs", targets)[0].sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    lean = gradients()
    monkeypatch.setattr(remake, "made", lambda *_: None)
    assert all(torch.equal(p, q) for p, q in zip(lean, gradients(), strict=True))


def test_roomy_memory_has_the_shape_and_more_than_it_needs() -> None:
    y = remake.roomy(torch.empty(3, 5))
    assert y.shape == (3, 5) and y.is_contiguous()
    assert y.untyped_storage().nbytes() == 4 * (15 + remake.SLACK)
