"""A vocabulary is extended by merges that follow the old ones: old tokens stay what they were, rows start by rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import posttrain
from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.core.files import read_lines
from posttrain.data.text_documents import Documents, prepare_documents
from posttrain.methods.pretrain import new_vocabulary
from posttrain.methods.pretrain.pretrain_settings import PretrainConfig
from posttrain.models.loading import load_tokenizer
from posttrain.models.tiny_model import tiny_model
from posttrain.models.vocabulary_extension import extend_tokenizer, merge_pair, set_part_rows
from tests.methods.pretrain.test_pretrain import settings, stage_of, texts  # noqa: F401

TEXTS = ["low lower lowest newer newest", "low low the newer lower", "naïve café 漢字 café naïve"] * 3


def tokenizer() -> Any:
    return load_tokenizer(ModelConfig(source="tiny:llama"))


def spelled(extended: Any, text: str) -> list[str]:
    return extended.convert_ids_to_tokens(extended(text, add_special_tokens=False)["input_ids"])  # type: ignore[no-any-return]


def test_the_most_frequent_pairs_are_merged() -> None:
    """Counted by hand: ab in aab aab cab cab b: 4; then (a, ab) 2 and (c, ab) 2, the smaller ids first."""
    old = tokenizer()
    made = extend_tokenizer(old, ["aab", "aab", "cab", "cab", "b"], 3)
    assert sorted(made.parts) == [259, 260, 261]
    assert made.tokenizer.convert_ids_to_tokens(sorted(made.parts)) == ["ab", "aab", "cab"]
    a, b, c = (old.convert_tokens_to_ids(t) for t in "abc")
    assert dict(made.parts) == {259: (a, b), 260: (a, a, b), 261: (c, a, b)}
    assert spelled(made.tokenizer, "aabab") == ["aab", "ab"] and len(old) == 259
    assert len(extend_tokenizer(old, ["aab"] * 2, 99).parts) == 2  # no pair occurs any more
    assert merge_pair([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]
    with pytest.raises(ModelError, match="no pair of tokens occurs twice"):
        extend_tokenizer(old, ["abc"], 5)


def slow_merges(old: Any, words: list[str], count: int) -> list[str]:
    """Byte-pair encoding from its definition: count all pairs again before each merge."""
    split = [old(word, add_special_tokens=False)["input_ids"] for word in words]
    names = {i: t for t, i in old.get_vocab().items()}
    out: list[str] = []
    while len(out) < count:
        pairs: dict[tuple[int, int], int] = {}
        for word in split:
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = min(pairs, key=lambda p: (-pairs[p], p))
        new = len(names)
        names[new] = names[best[0]] + names[best[1]]
        out.append(names[new])
        split = [merge_pair(word, best, new) for word in split]
    return out


def test_merges_are_those_of_the_slow_loop_and_continue_over_calls() -> None:
    old = tokenizer()
    words = [word if i == 0 else f" {word}" for text in TEXTS for i, word in enumerate(text.split(" "))]
    made = extend_tokenizer(old, TEXTS, 25)
    assert made.tokenizer.convert_ids_to_tokens(sorted(made.parts)) == slow_merges(old, words, 25)
    # Extended twice: the second call continues the merges of the first.
    first = extend_tokenizer(old, TEXTS, 10).tokenizer
    second = extend_tokenizer(first, TEXTS, 15)
    assert second.tokenizer.get_vocab() == made.tokenizer.get_vocab()


def test_new_tokens_stand_for_the_old_ones(tmp_path: Path) -> None:
    old = tokenizer()
    base = extend_tokenizer(old, TEXTS[:2], 8).tokenizer  # merges of its own, as a real tokenizer has
    made = extend_tokenizer(base, [*TEXTS, "lowering the newness"], 20)
    made.tokenizer.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    others = ["lowly newts and naïveté: 漢字漢字", "xyz 123\n\n  lowest<|im_end|>", "café" * 5, "aabbabab lowlowlow"]
    for text in [*TEXTS, *others]:
        ids = opened(text)["input_ids"]
        assert [t for i in ids for t in made.parts.get(i, (i,))] == base(text)["input_ids"]
        assert opened.decode(ids) == text and len(ids) <= len(base(text)["input_ids"])
    assert opened("Q zv")["input_ids"] == base("Q zv")["input_ids"]  # no new token in it: as before
    assert opened.chat_template == old.chat_template and opened.eos_token_id == old.eos_token_id


def test_other_tokenizers_are_refused() -> None:
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], 0)))
    with pytest.raises(ModelError, match="the tokenizer is Unigram, and new tokens continue the merges"):
        extend_tokenizer(unigram, ["aa"], 1)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ModelError, match="BPE without byte-level words"):
        extend_tokenizer(words, ["aa"], 1)


def test_rows_are_the_mean_of_their_parts() -> None:
    hf = tiny_model("gpt2")  # tied
    before = hf.get_input_embeddings().weight.detach().clone()
    set_part_rows(hf, {7: (1, 2), 8: (1, 1, 4)})
    after = hf.get_output_embeddings().weight
    torch.testing.assert_close(after[7], (before[1] + before[2]) / 2)
    torch.testing.assert_close(after[8], (2 * before[1] + before[4]) / 3)
    keep = [i for i in range(len(before)) if i not in (7, 8)]
    assert torch.equal(after[keep], before[keep])


def test_a_stage_extends_the_vocabulary(texts: Path, tmp_path: Path) -> None:  # noqa: F811
    """Before is the model in its own tokens; the first steps train rows alone; the next stage reads new tokens."""
    general = {"source": str(texts / "general.txt"), "separator": ""}
    vocabulary = {"new_tokens": 12, "train_first": 2}
    first = settings(texts, retention=general, max_steps=2, vocabulary=vocabulary, keep_best=False, evaluate_every=0)
    then = settings(texts, name="then", retention=False, held_out=None, max_steps=1, adapter={"r": 2})
    recipe = {"name": "r", "model": {"source": "tiny:llama"}, "stages": [first, then]}
    result = posttrain.run(posttrain.Recipe.model_validate(recipe), tmp_path / "run")
    done, _ = json.loads((result.folder / "manifest.json").read_text())["stages"]
    assert done["vocabulary"]["new_tokens"] == 12 and done["vocabulary"]["rows"] == 271
    domain = done["retention"]["domain"]
    assert domain["after"]["tokens_per_byte"] < 0.8 * domain["before"]["tokens_per_byte"]
    plain = settings(texts, retention=general, max_steps=1, keep_best=False, evaluate_every=0)
    stage = posttrain.runs.registry.prepare_stage(
        PretrainConfig.model_validate(plain), posttrain.trainer.stage.StageContext(tokenizer(), 2048)
    )
    alone = stage.run(ModelConfig(source="tiny:llama"), tmp_path / "plain", 0)
    for kind in ("general", "domain"):
        assert done["retention"][kind]["before"] == pytest.approx(alone["retention"][kind]["before"])
    # train_first: all other weights are those of the model before.
    weights = load_file(result.folder / "stages" / "0-pretrain" / "model" / "model.safetensors")
    start = tiny_model("llama").state_dict()
    changed = {name for name, w in weights.items() if w.shape != start[name].shape or not torch.equal(w, start[name])}
    assert changed == {name for name in weights if "embed_tokens" in name or "lm_head" in name}
    # What is left opens in transformers, with its tokenizer; the second stage was tokenized by it.
    opened, model = AutoTokenizer.from_pretrained(result.model), AutoModelForCausalLM.from_pretrained(result.model)
    assert len(opened) == model.get_input_embeddings().weight.shape[0] == 271
    used = [read_lines(result.folder / "stages" / n / "metrics.jsonl")[-1] for n in ("0-pretrain", "1-then")]
    data = {e["stage"]: e for e in json.loads((result.folder / "manifest.json").read_text())["data"]}
    assert data["then"]["tokens_per_byte"] < 0.8 * domain["before"]["tokens_per_byte"] and used[1]["loss"] > 0


def test_each_text_is_tokenized_again_once(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    read: list[str] = []

    def counted(data: Any, *arguments: Any, **more: Any) -> Documents:
        read.append(data.name)
        return prepare_documents(data, *arguments, **more)

    monkeypatch.setattr(new_vocabulary, "prepare_documents", counted)
    replay = {"data": {"source": str(texts / "general.txt"), "separator": ""}}
    changes = {"vocabulary": {"new_tokens": 4}, "replay": replay}
    stage = posttrain.runs.registry.prepare_stage(
        PretrainConfig.model_validate(settings(texts, **changes)),
        posttrain.trainer.stage.StageContext(tokenizer(), 2048),
    )
    assert len(stage.data) == 4 and sorted(Path(name).name for name in read) == ["domain.txt", "general.txt"]
    plain = stage_of(texts, replay=replay)
    for (title, data), (same, old) in zip(stage.data, plain.data, strict=True):
        assert title == same and [data.stats[k] for k in ("used", "bytes")] == [old.stats[k] for k in ("used", "bytes")]
        assert data.stats["tokens_per_byte_before"] == pytest.approx(old.stats["tokens_per_byte"])


def test_vocabulary_needs_a_whole_model(texts: Path) -> None:  # noqa: F811
    for adapter, merge in (({"kind": "prompt"}, {}), ({"r": 2}, {"merge": False})):
        with pytest.raises(ValueError, match="vocabulary makes a model with more rows"):
            PretrainConfig.model_validate(settings(texts, vocabulary={}, adapter=adapter, **merge))


def test_adapters_train_the_new_rows(texts: Path, tmp_path: Path) -> None:  # noqa: F811
    changes = {"vocabulary": {"new_tokens": 4, "train_first": 1}, "adapter": {"r": 2}, "max_steps": 1}
    stage = posttrain.runs.registry.prepare_stage(
        PretrainConfig.model_validate(settings(texts, retention=False, held_out=None, **changes)),
        posttrain.trainer.stage.StageContext(tokenizer(), 2048),
    )
    stage.run(ModelConfig(source="tiny:llama"), tmp_path, 0)
    weights, start = load_file(tmp_path / "model" / "model.safetensors"), tiny_model("llama").state_dict()
    changed = {n for n, w in weights.items() if w.shape != start[n].shape or not torch.allclose(w, start[n], atol=1e-6)}
    assert changed == {name for name in weights if "embed_tokens" in name or "lm_head" in name}
    assert torch.equal(weights["model.embed_tokens.weight"][:259], start["model.embed_tokens.weight"])
