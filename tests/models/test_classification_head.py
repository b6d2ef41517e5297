"""Heads that score: what we compute is what transformers computes from the folder that was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from posttrain.config import AdapterConfig, ModelConfig
from posttrain.core.errors import ModelError
from posttrain.models.adapters import attach, count_parameters
from posttrain.models.classification_head import (
    Layout,
    open_head,
    padding,
    save_head,
    score_index,
    scores_at,
    verify_scores,
)
from posttrain.models.language_model import LanguageModel
from posttrain.rewards.reward_model_scorer import RewardModel
from tests.conftest import family

AUTO = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
PAD = 0


def places(layout: Layout, rows: list[list[int]], pad: int | None) -> list[list[int]]:
    return [[score_index(r, pad)] if layout == "sequence" else list(range(len(r))) for r in rows]


def theirs(folder: Path, layout: Layout, rows: list[list[int]]) -> list[torch.Tensor]:
    """transformers alone, on a padded batch."""
    model = AUTO[layout].from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers.") and model.config.pad_token_id == PAD
    width = max(map(len, rows))
    ids = torch.tensor([r + [PAD] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return [x.reshape(1, 1) if layout == "sequence" else x[: len(r)] for x, r in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("adapter", [None, AdapterConfig(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("layout", ["sequence", "token"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma"])
def test_transformers_reproduces_our_scores(
    kind: str, layout: Layout, adapter: AdapterConfig | None, tmp_path: Path
) -> None:
    """Weights moved from where they began; sequences that share prefixes here and are padded there."""
    source = ModelConfig(source=f"tiny:{kind}")
    hf, tokenizer = open_head(source, layout, seed=1)
    hf = attach(hf, adapter, 0, "SEQ_CLS") if adapter else hf
    model = LanguageModel(hf)
    assert verify_scores(model, layout) < 1e-5
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape, generator=g)
    assert any(p is model.scorer().weight and p.requires_grad for p in model.parameters())
    rows = [list(s.tokens) for s in family()]
    ours = scores_at(model, rows, places(layout, rows, padding(model)))
    save_head(model, tokenizer, source, layout, tmp_path / "out", adapter, 1)
    for mine, other in zip(ours, theirs(tmp_path / "out", layout, rows), strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    again = LanguageModel(open_head(ModelConfig(source=str(tmp_path / "out")), layout, seed=7)[0])
    for mine, other in zip(ours, scores_at(again, rows, places(layout, rows, PAD), budget=40), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_the_score_is_read_where_transformers_reads_it() -> None:
    """The last token that is not padding, also where a text ends with the padding token."""
    assert score_index([5, 6, 7], 0) == 2 and score_index([5, 6, 0, 0], 0) == 1
    assert score_index([5, 6, 0], None) == 2 and score_index([0, 0], 0) == 0
    hf, _ = open_head(ModelConfig(source="tiny:llama"), "sequence")
    rows = [[5, 6, 7, PAD], [9, PAD, 8, PAD]]
    own = hf(input_ids=torch.tensor(rows)).logits
    ours = scores_at(LanguageModel(hf), rows, places("sequence", rows, PAD))
    torch.testing.assert_close(torch.cat(ours), own, atol=1e-5, rtol=0)


def test_a_new_head_is_drawn_from_its_seed_alone_and_small() -> None:
    heads = [open_head(ModelConfig(source="tiny:llama"), "sequence", seed=s)[0].score.weight for s in (3, 3, 4)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    many = open_head(ModelConfig(source="tiny:llama"), "sequence", seed=0)[0].score.weight
    assert 0.1 < float(many.detach().std()) < 0.26  # 1 / sqrt(33) = 0.174
    total, trainable = count_parameters(attach(open_head(ModelConfig(source="tiny:llama"), "token")[0],
                                               AdapterConfig(r=2), 0, "SEQ_CLS"))  # fmt: skip
    assert trainable < total / 3


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    for layout, name in (("sequence", "rm"), ("token", "prm")):
        hf, tokenizer = open_head(ModelConfig(source="tiny:llama"), layout)  # type: ignore[arg-type]
        hf.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(ModelError, match=r"is a process reward model \(of tokens\), where a reward model"):
        open_head(ModelConfig(source=str(tmp_path / "prm")), "sequence")
    with pytest.raises(ModelError, match="is a reward model"):
        open_head(ModelConfig(source=str(tmp_path / "rm")), "token")
    hf.config.num_labels = 3
    wrong = AutoModelForSequenceClassification.from_config(hf.config)
    wrong.save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="gives 3 numbers, and one is needed"):
        open_head(ModelConfig(source=str(tmp_path / "three")), "sequence")
    with pytest.raises(ModelError, match="olmo2: transformers has no model of this type"):
        open_head(ModelConfig(source="tiny:olmo2"), "token")


def test_a_reward_model_of_other_makers_loads_and_scores(tmp_path: Path) -> None:
    """A folder that transformers alone wrote, with no file of ours in it: its template's whole text is read."""
    hf, tokenizer = open_head(ModelConfig(source="tiny:qwen2"), "sequence", seed=5)
    hf.config.architectures = None
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = ["What is 2 plus 2?", [{"role": "system", "content": "Count."}, {"role": "user", "content": "1, 2?"}]]
    found = RewardModel(str(tmp_path))(prompts, ["4", "3"])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for prompt, completion, score in zip(prompts, ["4", "3"], found, strict=True):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": completion}], tokenize=False)
        assert text.endswith("<|im_end|>\n")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        assert score == pytest.approx(float(plain(ids).logits), abs=1e-4)
    with pytest.raises(ModelError, match="normalise needs the mean"):
        RewardModel(str(tmp_path), normalise=True)
    with pytest.raises(ModelError, match="an ensemble's members needs the mean"):
        RewardModel([str(tmp_path), str(tmp_path)])
