"""A layer of a decoding step in one call: what its own forward gives, to the bit; its own where it is another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model

from posttrain.config import SamplingConfig
from posttrain.core.types import Rollout
from posttrain.cpu import decoder_layer as layer
from posttrain.cpu import library as native
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request

pytestmark = pytest.mark.skipif(native.kernels() is None, reason=f"no compiled kernels here: {native.why()}")

PARAMS = SamplingConfig(max_tokens=12, min_tokens=12)


def layers_of(model: LanguageModel) -> list[Any]:
    return [m for m in model.base.modules() if hasattr(m, "in_one_call")]


def sampled(model: LanguageModel, monkeypatch: Any) -> tuple[list[Rollout], int]:
    """Completions, one, two and ten of each prompt, and how often a layer was computed in one call."""
    calls = 0
    computed = layer._computed

    def counting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return computed(*args)

    monkeypatch.setattr(layer, "_computed", counting)
    sampler = LocalSampler(model, tiny_tokenizer())
    groups = []
    for n in (1, 2, 10):  # 40 rows have more heads than a product may have rows
        groups += sampler.sample([Request(list(range(5, 9 + i)), n, i) for i in range(4)], PARAMS)
    monkeypatch.setattr(layer, "_computed", computed)
    return [r for g in groups for r in g.rollouts], calls


def with_biases(model: Any) -> Any:
    """Every bias, norm and weight something else than what a new model has, where it shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=generator) * (0.2 if "norm" in name else 0.5))
    return model


@pytest.mark.parametrize(
    ("name", "changes", "tried"),
    [
        ("llama", {}, 2),
        ("mistral", {"sliding_window": None}, 2),
        ("qwen2", {}, 2),
        ("qwen3", {}, 2),
        ("smollm3", {"num_hidden_layers": 4}, 3),  # one in four has no rotary positions
    ],
)
def test_what_comes_out_is_its_own_to_the_bit(name: str, changes: dict[str, Any], tried: int, monkeypatch) -> None:
    model = LanguageModel(with_biases(tiny_model(name, **changes)))
    layers = layers_of(model)
    assert len(layers) == tried
    one_call, calls = sampled(model, monkeypatch)
    assert all(x.in_one_call for x in layers) and calls >= 22 * len(layers)
    for x in layers:
        x.in_one_call = False
    assert sampled(model, monkeypatch) == (one_call, 0)


@pytest.mark.parametrize("name", ["gemma", "granite"])
def test_another_layer_of_the_same_parts_keeps_its_own(name: str, monkeypatch) -> None:
    model = LanguageModel(tiny_model(name, **({"residual_multiplier": 0.5} if name == "granite" else {})))
    layers = layers_of(model)
    first, _ = sampled(model, monkeypatch)
    assert layers and all(x.in_one_call is False for x in layers)
    assert sampled(model, monkeypatch) == (first, 0)


@pytest.mark.parametrize("name", ["olmo", "olmo2", "mixtral", "ministral3", "phi3", "gemma3_text"])
def test_what_has_other_parts_or_takes_other_arguments_is_not_tried(name: str, monkeypatch) -> None:
    """Norms without weights, norms elsewhere, experts, queries that positions scale, one matrix for three."""
    model = LanguageModel(tiny_model(name))
    assert sampled(model, monkeypatch)[1] == 0


def test_windows_of_attention_are_left_to_the_layer() -> None:
    assert layers_of(LanguageModel(tiny_model("mistral", sliding_window=4))) == []


def test_a_layer_that_does_nothing_yet_says_nothing_of_its_kind(monkeypatch) -> None:
    """With zeros behind attention and gates every decoder layer is the identity; once they are something it shows."""
    for name, same in (("llama", True), ("gemma", False)):
        model = LanguageModel(tiny_model(name))
        layers = layers_of(model)
        kept = [[x.self_attn.o_proj.weight.clone(), x.mlp.down_proj.weight.clone()] for x in layers]
        with torch.no_grad():
            for x in layers:
                x.self_attn.o_proj.weight.zero_()
                x.mlp.down_proj.weight.zero_()
        sampled(model, monkeypatch)
        assert all(x.in_one_call is None for x in layers)
        with torch.no_grad():
            for x, (o, down) in zip(layers, kept, strict=True):
                x.self_attn.o_proj.weight.copy_(o)
                x.mlp.down_proj.weight.copy_(down)
        sampled(model, monkeypatch)
        assert all(x.in_one_call is same for x in layers)


def test_norms_that_an_adapter_takes_over_are_its_own(monkeypatch) -> None:
    """It begins as a copy, and keeps the model's weight beside the one that it trains."""
    model = LanguageModel(tiny_model("llama"))
    before, calls = sampled(model, monkeypatch)
    model.hf = get_peft_model(model.hf, LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln_tuning" in name:
                p.mul_(3)
    after, more = sampled(model, monkeypatch)
    assert calls and not more and after != before


def _adapted(model: LanguageModel) -> None:
    """Of a rank that is too low for the kernels."""
    model.hf = get_peft_model(model.hf, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def _hooked(model: LanguageModel) -> None:
    for x in layers_of(model):
        x.mlp.down_proj.register_forward_hook(lambda module, args, output: output * 2)


def _with_gaps(model: LanguageModel) -> None:
    for x in layers_of(model):
        x.mlp.down_proj.weight.data = x.mlp.down_proj.weight.data.t().contiguous().t()


@pytest.mark.parametrize("change", [_adapted, _hooked, _with_gaps])
def test_what_is_put_into_a_layer_takes_effect(change: Callable[[LanguageModel], None], monkeypatch) -> None:
    model = LanguageModel(tiny_model("llama"))
    before, calls = sampled(model, monkeypatch)
    assert calls
    change(model)
    after, calls = sampled(model, monkeypatch)
    assert not calls and (change is _with_gaps or after != before)


@pytest.mark.parametrize("where", ["all-linear", ["q_proj", "down_proj"], ["k_proj", "o_proj", "up_proj"]])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_low_rank_adapters_are_computed_along(name: str, where: Any, monkeypatch) -> None:
    """To the bit what the parts give one by one; switched off, merged or of another kind they are left to the layer."""
    config = LoraConfig(r=8, lora_alpha=20, target_modules=where, init_lora_weights=False, task_type="CAUSAL_LM")
    model = LanguageModel(get_peft_model(with_biases(tiny_model(name)), config))
    layers = layers_of(model)
    with_adapters, calls = sampled(model, monkeypatch)
    assert all(x.in_one_call for x in layers) and calls >= 33 * len(layers)
    for x in layers:
        x.in_one_call = False
    assert sampled(model, monkeypatch) == (with_adapters, 0)
    for x in layers:
        x.in_one_call = True
    with model.hf.disable_adapter():
        without, calls = sampled(model, monkeypatch)
    assert not calls and without != with_adapters
    model.hf.merge_adapter()
    assert not sampled(model, monkeypatch)[1]


def test_weights_that_change_between_two_calls_are_the_new_ones(monkeypatch) -> None:
    model = LanguageModel(tiny_model("llama"))
    before, _ = sampled(model, monkeypatch)
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data * 1.5  # elsewhere in memory
    after, calls = sampled(model, monkeypatch)
    for x in layers_of(model):
        x.in_one_call = False
    assert calls and after != before and sampled(model, monkeypatch)[0] == after
