"""What `all-linear` adapts: the same parts in every model type, never a router; it is loaded and merged as trained."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import AdapterConfig
from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.models.adapter_targets import default_targets, is_linear, router_names
from posttrain.models.adapters import attach, merge
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from tests.conftest import family

EXPERTS = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "llama4_text",
    "jetmoe",
]
SHARED = {
    "qwen2_moe": "shared_expert.gate_proj",
    "deepseek_v3": "mlp.shared_experts.up_proj",
    "llama4_text": "shared_expert",
}


def adapted(model: Any) -> set[str]:
    """Names of what low-rank matrices sit on, without peft's words."""
    names = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    return {n.removeprefix("base_model.model.") for n in names}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_and_shared_experts_but_no_router(kind: str, tmp_path: Path) -> None:
    hf = tiny_model(kind)
    routers = router_names(hf)
    experts = {n.rpartition(".")[0] for n, p in hf.named_parameters() if p.ndim == 3}
    linears = {n for n, m in hf.named_modules() if is_linear(m)}
    model = attach(copy.deepcopy(hf), AdapterConfig(r=2), 0)
    names = adapted(model)
    assert routers and not any(r in n for r in routers for n in names)
    left = {n for n in linears if not any(n.startswith(r) for r in routers)} - {"lm_head"}
    assert left <= names and experts <= names
    assert kind not in SHARED or any(SHARED[kind] in n for n in names)

    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(3, 40)[None]
    trained = model.eval()(input_ids=tokens, use_cache=False).logits
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that are missing, say
        loaded = PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens, use_cache=False).logits, trained)
    merged, difference = merge(model)
    assert difference < 1e-4
    torch.testing.assert_close(merged.eval()(input_ids=tokens, use_cache=False).logits, trained, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text", "deepseek_v3", "jamba", "falcon_h1"])
def test_every_adapter_gets_a_gradient(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LanguageModel(attach(tiny_model(kind), AdapterConfig(r=2), 0))
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.05)
    batch = model.pack([*family(), Sample(list(range(3, 100)), [0.0] + [1.0] * 96)])
    (-model(batch)[0].sum()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum()] == []


def test_a_model_without_experts_keeps_peft_s_word() -> None:
    assert default_targets(tiny_model("llama")) == ("all-linear", [])


def test_of_a_composite_model_the_text_decoder_is_adapted() -> None:
    """Its eyes get no gradient from text."""
    names = adapted(attach(tiny_model("gemma3"), AdapterConfig(r=2), 0))
    assert names and all("language_model" in n for n in names)


def test_a_router_is_adapted_on_request() -> None:
    assert any("router" in n for n in adapted(attach(tiny_model("phimoe"), AdapterConfig(r=2, target=["router"]), 0)))


def test_dora_on_experts_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"DoRA can't adapt the experts.*k_proj"):
        attach(tiny_model("mixtral"), AdapterConfig(kind="dora", r=2), 0)
    attach(tiny_model("mixtral"), AdapterConfig(kind="dora", r=2, target=["q_proj", "v_proj"]), 0)
