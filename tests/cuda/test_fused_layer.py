"""Fused decoder layers against transformers' own, in Triton's interpreter on a CPU. `make gpu` runs them on a card."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":  # triton reads it once, and torch may have imported it long ago
    pytest.skip("start pytest with TRITON_INTERPRET=1", allow_module_level=True)

from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.core.types import Sample
from posttrain.cuda import fused_layer
from posttrain.models import attention, backends
from posttrain.models.language_model import LanguageModel
from posttrain.sampling.kv_cache import DecodingStep, Filling, Region, decode_step

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
         "num_key_value_heads": 2, "vocab_size": 37, "max_position_embeddings": 64}  # fmt: skip
SAMPLES = [Sample(list(range(3, 3 + n)), [0.0] + [1.0] * (n - 1)) for n in (9, 4)] + [Sample([3, 4, 9], [0.0, 1, 1])]


def model(kind: str, **more: Any) -> LanguageModel:
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **more), dtype=torch.float32)
    hf.set_attn_implementation("eager")
    for name, p in hf.named_parameters():  # norms and biases are all alike at first
        if p.ndim == 1:
            torch.nn.init.normal_(p, 0.0 if "bias" in name else 1.0, 0.3)
    return LanguageModel(hf)


def fuse(m: LanguageModel) -> int:
    plan = attention.Plan(m.pack(SAMPLES))
    return fused_layer.fuse_layers(m.hf, attention.attend_rows, plan, plan.batch.total)


@pytest.fixture(autouse=True)
def plain_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_backend", lambda _: backends.DeviceBackend())


def step(m: LanguageModel) -> Tensor:
    loss, _, _ = m(m.pack(SAMPLES), "cross_entropy")
    return loss  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_losses_gradients_and_decoding(kind: str) -> None:
    more = {"sliding_window": None} if kind == "mistral" else {}
    own = model(kind, **more)
    fused = copy.deepcopy(own)
    assert fuse(fused) == 2
    losses = [step(m) for m in (fused, own)]
    assert abs(losses[0] - losses[1]) < 1e-5
    sides = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (fused, own), strict=True)]
    for name, a, b in zip(dict(own.named_parameters()), *sides, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max(), name
    states = []
    with torch.no_grad():
        for m in (fused, own):
            region = Region(2, 8)
            batch = m.pack([Sample([3, 4, 5], [0.0] * 3), Sample([7, 8], [0.0] * 2)])
            m.decoder(use_cache=False, **m.ragged_inputs(batch, keep=Filling(region, batch.kept_rows(), [0, 1])))
            at = torch.tensor([3, 2])
            made = DecodingStep(region, torch.arange(2), at, at, own_columns=4)
            states.append(decode_step(m, torch.tensor([6, 9]), at, made))
    assert torch.allclose(*states, atol=1e-5)


def test_weights_lie_together_and_stay_what_they_are() -> None:
    m = model("qwen2")
    before = {name: p.clone() for name, p in m.named_parameters()}
    layer = m.base.model.layers[0]
    parts = [layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]
    assert fused_layer.joint(parts).data_ptr() != parts[0].data_ptr()
    fuse(m)
    assert fused_layer.joint(parts).data_ptr() == parts[0].data_ptr()
    assert torch.equal(fused_layer.joint(parts), torch.cat(parts))
    assert all(torch.equal(p, before[name]) for name, p in m.named_parameters())


def test_frozen_weights_get_no_gradient() -> None:
    own = model("llama")
    for name, p in own.named_parameters():
        p.requires_grad_("up_proj" in name or "layers.1.self_attn.k_proj" in name)
    fused = copy.deepcopy(own)
    assert fuse(fused) == 2
    for m in (fused, own):
        step(m).backward()
    for (name, p), q in zip(fused.named_parameters(), own.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None), name
        assert p.grad is None or (p.grad - q[1].grad).abs().max() <= 1e-4 * q[1].grad.abs().max()


def test_layers_of_other_kinds_keep_their_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuse(model("mistral", sliding_window=5)) == 0
    assert fuse(model("granite", residual_multiplier=0.3)) == 0
    assert fuse(model("llama", attention_bias=True)) == 0  # o has a bias too
    zeros = model("llama")
    torch.nn.init.zeros_(zeros.base.model.layers[0].self_attn.o_proj.weight)
    torch.nn.init.zeros_(zeros.base.model.layers[0].mlp.down_proj.weight)
    assert fuse(zeros) == 0  # it adds nothing yet, so nothing can be compared


def test_a_layer_that_has_changed_computes_its_own_way() -> None:
    m = model("llama")
    fuse(m)
    expected = step(m)
    calls = []
    m.base.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    assert torch.allclose(step(m), expected) and calls
