"""Adapters on the output head and on embeddings that share its weights: trained, sampled from, merged and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain.config import AdapterConfig, EpochsConfig, ModelConfig, SamplingConfig
from posttrain.core.types import Sample
from posttrain.models.language_model import LanguageModel
from posttrain.models.saving import restore_attention
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.models.verification import verify
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request
from posttrain.trainer.policy import open_policy, save_policy
from posttrain.trainer.reference_model import fingerprint, without_adapters

SAMPLE = Sample([5, 9, 7, 8, 30, 2], [0, 0, 1, 1, 1, 1])
TOKENS = torch.tensor([list(SAMPLE.tokens)])


def tiny(kind: str, tied: bool) -> Any:
    return tiny_model(kind, tie_word_embeddings=tied)


def stirred(hf: Any, scale: float = 0.2) -> Any:
    generator = torch.Generator().manual_seed(1)
    for p in hf.parameters():
        if p.requires_grad:
            p.data += scale * torch.randn(p.shape, generator=generator)
    return hf


def plain_logits(hf: Any) -> torch.Tensor:
    restore_attention(hf)
    with torch.no_grad():
        return hf.eval()(input_ids=TOKENS, use_cache=False).logits


CASES = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "rslora": {"target_modules": ["lm_head"], "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 30]}},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_peft_and_transformers(case: str, tied: bool) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **CASES[case])
    model = LanguageModel(stirred(get_peft_model(tiny("llama", tied), config)))
    assert verify(model) < 1e-4
    loss = model(model.pack([SAMPLE]), "cross_entropy", coefficients_N=torch.ones(4))[0]
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.hf.named_parameters() if p.grad is not None}
    model.zero_grad()
    restore_attention(model.hf)
    logits = model.hf(input_ids=TOKENS, use_cache=False).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits[1:], TOKENS[0, 2:], reduction="sum")
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), abs=1e-4)
    trained = {n: p.grad for n, p in model.hf.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys() and all(float(g.abs().max()) > 0 for g in found.values())
    for name, gradient in trained.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    with without_adapters(model):
        assert fingerprint(model) == fingerprint(LanguageModel(tiny("llama", tied)))
        base = LanguageModel(tiny("llama", tied))
        torch.testing.assert_close(model(model.pack([SAMPLE]))[0], base(base.pack([SAMPLE]))[0])


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(("tied", "kind"), [(True, "gemma"), (True, "llama"), (False, "llama")])
@pytest.mark.parametrize("target", [["lm_head", "q_proj"], ["embed_tokens", "down_proj"], ["embed_tokens", "lm_head"]])
def test_what_is_saved_is_what_was_trained(
    target: list[str], tied: bool, kind: str, merge: bool, tmp_path: Path
) -> None:
    tiny(kind, tied).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    source = ModelConfig(source=str(tmp_path / "base"))
    config = EpochsConfig(method="sft", adapter=AdapterConfig(r=2, target=target), merge=merge)
    opened = open_policy(config, source, 0)
    trained = plain_logits(stirred(opened.policy.hf))
    save_policy(opened, config, source, tmp_path / "out", 0, None)
    if merge:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        assert bool(model.config.tie_word_embeddings) is False
        assert opened.notes["merge_difference"] < 1e-4
        torch.testing.assert_close(plain_logits(model), trained, atol=1e-4, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
    torch.testing.assert_close(plain_logits(adapter), trained, atol=1e-4, rtol=0)


def test_a_merge_that_loses_something_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.core.errors import ModelError
    from posttrain.models import adapters

    monkeypatch.setattr(adapters, "_separate_embeddings", lambda base: None)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens"])
    with pytest.raises(ModelError, match=r"the merged model is not the trained one.*merge: false"):
        adapters.merge(stirred(get_peft_model(tiny("llama", True), config)))


@pytest.mark.parametrize("case", ["head", "tokens"])
def test_the_sampler_draws_from_the_adapted_head(case: str) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **CASES[case])
    model = LanguageModel(stirred(get_peft_model(tiny("llama", False), config), 0.5))
    requests = [Request([5, 6, 7], n=2, seed=3)]
    (group,) = LocalSampler(model, tiny_tokenizer()).sample(requests, SamplingConfig(max_tokens=8))
    for rollout in group.rollouts:
        whole = Sample([5, 6, 7, *rollout.tokens], [0.0] * 3 + [1.0] * len(rollout.tokens))
        learner = model(model.pack([whole]))[0].detach()
        torch.testing.assert_close(torch.tensor(rollout.logprobs), learner, atol=1e-4, rtol=0)
