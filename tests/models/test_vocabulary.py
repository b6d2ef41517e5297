"""Tokens that a recipe adds, tokenizers larger than the embedding, and rows that are no token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config import AdapterConfig, EpochsConfig, ModelConfig, NewToken, SamplingConfig
from posttrain.core.types import Sample
from posttrain.data.sample_store import vocabulary_size
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import describe_vocabulary, load_model, load_tokenizer, open_model
from posttrain.models.saving import restore_attention
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.models.vocabulary import textless_ids
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.greedy import greedy
from posttrain.sampling.protocol import Request
from posttrain.trainer.policy import open_policy, save_policy

THINK = ["<think>", NewToken(token="<|end|>", special=True)]
NEW = (259, 260)
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {"r": 2},
    "dora": {"r": 2, "kind": "dora", "target": ["q_proj"]},
    "embedding": {"r": 2, "target": ["embed_tokens", "q_proj"]},
    "head": {"r": 2, "target": ["lm_head"]},
}


def save_base(folder: Path, tied: bool = False, rows: int = 259, kind: str = "llama") -> str:
    tiny_model(kind, rows, tie_word_embeddings=tied).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def logits(hf: Any, tokens: list[int]) -> torch.Tensor:
    restore_attention(hf)
    with torch.no_grad():
        return hf.eval()(input_ids=torch.tensor([tokens]), use_cache=False).logits


def stir(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [259, 300])
def test_new_tokens_start_at_the_mean(tied: bool, rows: int, tmp_path: Path) -> None:
    """Also in rows that were there before without a token."""
    base = save_base(tmp_path, tied, rows)
    opened = open_model(ModelConfig(source=base, add_tokens=THINK))
    assert opened.new_tokens == NEW and opened.notes["vocabulary"]["first"] == ["<think>", "<|end|>"]
    plain = AutoModelForCausalLM.from_pretrained(base)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(m, get)().weight.detach() for m in (plain, opened.hf))
        assert len(after) == max(rows, 261) == opened.hf.config.vocab_size
        for token in NEW:
            torch.testing.assert_close(after[token], before[:259].mean(0))
        assert torch.equal(after[:259], before[:259])
    again = open_model(ModelConfig(source=base, add_tokens=THINK)).hf
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), opened.hf.parameters(), strict=True))
    tokenizer = opened.tokenizer
    assert tokenizer("a<think>b<|end|>")["input_ids"] == [67, 259, 68, 260]
    assert tokenizer.decode([67, 259, 68, 260], skip_special_tokens=True) == "a<think>b"


def test_tokens_are_named_once_and_known_ones_are_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "posttrain"):
        assert len(load_tokenizer(ModelConfig(source="tiny:llama", add_tokens=["<|im_end|>"]))) == 259
    assert "'<|im_end|>' is a token already" in caplog.text
    for tokens, match in ((["a", NewToken(token="a")], "add_tokens has 'a' twice"), ([""], "at least 1 character")):
        with pytest.raises(ValidationError, match=match):
            ModelConfig(source="tiny:llama", add_tokens=tokens)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", ADAPTERS)
def test_new_tokens_are_trained_and_saved(case: str, tied: bool, merge: bool, tmp_path: Path) -> None:
    adapter = ADAPTERS[case]
    base = save_base(tmp_path / "base", tied)
    source = ModelConfig(source=base, add_tokens=THINK)
    config = EpochsConfig(method="sft", adapter=adapter and AdapterConfig(**adapter), merge=merge or adapter is None)
    opened = open_policy(config, source, 0)
    sample = Sample([5, 259, 7, 260, 8, 259], [0, 1, 1, 1, 1, 1])
    opened.policy(opened.policy.pack([sample]), "cross_entropy")[0].backward()
    gradients = {n: p.grad for n, p in opened.policy.named_parameters() if p.requires_grad}
    rows = [g for n, g in gradients.items() if "tokens_delta" in n]  # of the embedding, and of a head of its own
    assert all(float(g.abs().amax(-1).min()) > 0 for g in rows) and any(g.abs().max() > 0 for g in gradients.values())
    targets = {"embedding": 0 if tied else 1, "head": 0 if tied else 1}.get(case, 1 if tied else 2)
    assert len(rows) == (0 if adapter is None else targets)
    trained = logits(stir(opened.policy.hf), list(sample.tokens))
    save_policy(opened, config, source, tmp_path / "out", 0, None)
    folder = tmp_path / "out" / "model"
    again, tokenizer = load_model(ModelConfig(source=str(folder)))
    torch.testing.assert_close(logits(again, list(sample.tokens)), trained, atol=1e-4, rtol=0)
    assert tokenizer("<think>")["input_ids"] == [259] and vocabulary_size(tokenizer) == 261
    follow = open_model(ModelConfig(source=str(folder), add_tokens=THINK))  # the next stage of the recipe
    assert follow.new_tokens == ()
    torch.testing.assert_close(logits(follow.hf, list(sample.tokens)), trained, atol=1e-4, rtol=0)
    if adapter is None:
        return
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter")))
    with_peft = PeftModel.from_pretrained(plain, str(tmp_path / "out" / "adapter"))
    torch.testing.assert_close(logits(with_peft, list(sample.tokens)), trained, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_an_adapter_are_kept_by_the_next(tied: bool, tmp_path: Path) -> None:
    """SFT with new tokens leaves an adapter; another adapter on top adds one more, and both are one."""
    base = save_base(tmp_path / "base", tied)
    first = ModelConfig(source=base, add_tokens=THINK)
    config = EpochsConfig(method="sft", adapter=AdapterConfig(r=2), merge=False)
    opened = open_policy(config, first, 0)
    stir(opened.policy.hf)
    save_policy(opened, config, first, tmp_path / "one", 0, None)
    second = ModelConfig(source=str(tmp_path / "one" / "model"), add_tokens=[*THINK, "<more>"])
    opened = open_policy(config, second, 0)
    assert opened.new_tokens == (261,)
    trained = logits(stir(opened.policy.hf), [5, 259, 260, 261, 7])
    save_policy(opened, config, second, tmp_path / "two", 0, None)
    assert opened.notes["adapter"] == "combined"
    settings = json.loads((tmp_path / "two" / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base and settings["r"] == 4
    assert settings["trainable_token_indices"]["model.embed_tokens"] == [259, 260, 261]
    for hf in (load_model(ModelConfig(source=str(tmp_path / "two" / "model")))[0], None):
        if hf is None:
            hf = AutoModelForCausalLM.from_pretrained(base)
            hf.resize_token_embeddings(262)
            hf = PeftModel.from_pretrained(hf, str(tmp_path / "two" / "model"))
        torch.testing.assert_close(logits(hf, [5, 259, 260, 261, 7]), trained, atol=1e-4, rtol=0)


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = ModelConfig(source=str(tmp_path))
    assert describe_vocabulary(source) == (
        "the tokenizer has 261 tokens and the embedding 259 rows: 2 tokens have no trained row ('<one>', '<two>'); "
        "theirs start at the mean of the others"
    )
    opened = open_model(source)
    assert opened.new_tokens == NEW and opened.notes["vocabulary"]["rows"] == 261
    assert describe_vocabulary(ModelConfig(source="tiny:llama")) is None
    assert "3 tokens have" not in str(describe_vocabulary(ModelConfig(source="tiny:llama", add_tokens=THINK)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token_are_never_sampled(temperature: float) -> None:
    """An embedding of 900 rows for 259 tokens: most of a random model's probability is on ids without text."""
    model, tokenizer = LanguageModel(tiny_model("llama", 900)), tiny_tokenizer()
    assert textless_ids(tokenizer, 900) == list(range(259, 900)) and not textless_ids(tokenizer, 259)
    params = SamplingConfig(max_tokens=12, temperature=temperature)
    (group,) = LocalSampler(model, tokenizer).sample([Request([5, 6, 7], n=6, seed=1)], params)
    for rollout in group.rollouts:
        assert max(rollout.tokens) < 259
        whole = Sample([5, 6, 7, *rollout.tokens], [0.0] * 3 + [1.0] * len(rollout.tokens))
        learner = model(model.pack([whole]))[0].detach()  # of all 900
        torch.testing.assert_close(torch.tensor(rollout.logprobs), learner, atol=1e-4, rtol=0)
    cut = SamplingConfig(max_tokens=12, top_k=5)
    (group,) = LocalSampler(model, tokenizer).sample([Request([5, 6, 7], n=6, seed=1)], cut)
    assert max(max(r.tokens) for r in group.rollouts) < 259
    assert max(greedy(LanguageModel(tiny_model("mamba", 900)), tokenizer, [[5, 6, 7]], 12)[0]) < 259


def test_holes_in_a_tokenizer_are_not_sampled() -> None:
    model, tokenizer = LanguageModel(tiny_model("llama")), tiny_tokenizer()
    vocabulary = {t: i for t, i in tokenizer.get_vocab().items() if i % 3}
    tokenizer.get_vocab = lambda: vocabulary
    sampler = LocalSampler(model, tokenizer)
    (group,) = sampler.sample([Request([5, 6, 7], n=8, seed=1)], SamplingConfig(max_tokens=20))
    assert all(t % 3 for r in group.rollouts for t in r.tokens)
