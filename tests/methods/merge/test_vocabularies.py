"""Merges of models with different vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.methods.merge.merge import Merge
from posttrain.methods.merge.merge_settings import MergeConfig
from posttrain.methods.merge.tokenizer_union import union_tokenizer
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.trainer.stage import StageContext


def other_tokenizer() -> Any:
    """The tiny tokenizer with its bytes in the opposite order, the tokens `he` and `hel`, and a special one."""
    tokenizer = tiny_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    ordered = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    tokens = [*ordered[:3], *reversed(ordered[3:]), "he", "hel"]
    content["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    content["model"]["merges"] = [["h", "e"], ["he", "l"]]
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>")
    made.chat_template = tokenizer.chat_template
    made.add_tokens([AddedToken("<|new|>", special=True)], special_tokens=True)
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), True)


def write_models(folder: Path, tied: bool) -> Path:
    for name, tokenizer, rows in (("base", tiny_tokenizer(), 259), ("other", other_tokenizer(), 270)):
        tiny_model("llama", rows, seed=rows, tie_word_embeddings=tied).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def merge(folders: Path, out: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], Any, dict[str, Any]]:
    given = {"models": ["base", str(folders / "other")], "algorithm": "linear", **settings}
    out.mkdir(exist_ok=True)
    stage = Merge(MergeConfig.model_validate(given), StageContext(None, None))
    entry = stage.run(ModelConfig(source=str(folders / "base"), device="cpu"), out, 0)
    hf = AutoModelForCausalLM.from_pretrained(out / "model")
    return hf.state_dict(), AutoTokenizer.from_pretrained(out / "model"), entry


def state(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


LACKED = "rows that a source lacked"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("tied", [True, False])
def test_a_union_has_the_tokens_of_both(tied: bool, tmp_path: Path) -> None:
    folders = write_models(tmp_path, tied)
    found, tokenizer, entry = merge(folders, tmp_path, tokenizer="union")
    ours, theirs, joined = tiny_tokenizer().get_vocab(), other_tokenizer().get_vocab(), tokenizer.get_vocab()
    assert joined.keys() == ours.keys() | theirs.keys() and ours.items() <= joined.items()
    assert tokenizer.tokenize("hello<|new|>") == ["hel", "l", "o", "<|new|>"]
    assert tokenizer.added_tokens_decoder[joined["<|new|>"]].special
    assert tokenizer.decode(tokenizer.encode("hello wörld")) == "hello wörld"
    first, second = state(folders / "base"), state(folders / "other")
    for table in TABLES:
        assert found[table].shape[0] == len(joined) == 262
        for token, row in joined.items():
            own = [s[table][v[token]] for s, v in ((first, ours), (second, theirs)) if token in v]
            torch.testing.assert_close(found[table][row], torch.stack(own).mean(0))
    assert entry["merged"][LACKED] == {str(folders / "base"): 3}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["vocab_size"] == 262


def test_a_row_that_is_lacking_from_its_parts(folders: Path, tmp_path: Path) -> None:
    found, tokenizer, _ = merge(folders, tmp_path, tokenizer="union", missing_rows="subtokens")
    first, second = state(folders / "base"), state(folders / "other")
    ours, theirs = tiny_tokenizer().get_vocab(), other_tokenizer().get_vocab()
    row = tokenizer.get_vocab()["hel"]
    for table in TABLES:
        parts = first[table][[ours[letter] for letter in "hel"]].mean(0)
        torch.testing.assert_close(found[table][row], (parts + second[table][theirs["hel"]]) / 2)
        new = tokenizer.get_vocab()["<|new|>"]  # a mark has no text: the row of the model that has it
        torch.testing.assert_close(found[table][new], second[table][theirs["<|new|>"]])


def test_the_tokenizer_of_one_of_them(folders: Path, tmp_path: Path) -> None:
    first, second = state(folders / "base"), state(folders / "other")
    ours, theirs = tiny_tokenizer().get_vocab(), other_tokenizer().get_vocab()
    found, tokenizer, _ = merge(folders, tmp_path / "base", tokenizer="base")
    assert tokenizer.get_vocab() == ours
    for table in TABLES:
        assert len(found[table]) == 259
        row = (first[table][ours["a"]] + second[table][theirs["a"]]) / 2
        torch.testing.assert_close(found[table][ours["a"]], row)
    found, tokenizer, _ = merge(folders, tmp_path / "other", tokenizer=str(folders / "other"))
    assert tokenizer.get_vocab() == theirs
    for table in TABLES:
        assert len(found[table]) == 270  # rows without a token are kept
        row = (first[table][ours["a"]] + second[table][theirs["a"]]) / 2
        torch.testing.assert_close(found[table][theirs["a"]], row)
        torch.testing.assert_close(found[table][265], second[table][265])
        torch.testing.assert_close(found[table][theirs["hel"]], second[table][theirs["hel"]])
    ends = json.loads((tmp_path / "other" / "model" / "generation_config.json").read_text())
    assert ends.get("eos_token_id") in (None, theirs["<|im_end|>"])
    with pytest.raises(
        ModelError, match=r"3 tokens more \('<\|new\|>', 'he', 'hel'\), 256 with another id. Set tokenizer"
    ):
        merge(folders, tmp_path / "x")


def test_padding_of_one_tokenizer_may_differ(folders: Path, tmp_path: Path) -> None:
    padded = tmp_path / "padded"
    hf = AutoModelForCausalLM.from_pretrained(folders / "base")
    hf.resize_token_embeddings(300)
    hf.save_pretrained(padded)
    tiny_tokenizer().save_pretrained(padded)
    found, _, entry = merge(folders, tmp_path / "m", models=[str(padded)])
    for name, value in state(folders / "base").items():
        torch.testing.assert_close(found[name], value)
    assert LACKED not in entry["merged"]
    tiny_model("llama", 300, seed=2).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    found, _, entry = merge(tmp_path, tmp_path / "both", models=["base", str(padded)])
    assert LACKED not in entry["merged"]  # one vocabulary: padding is merged as it lies
    first, second = state(tmp_path / "base"), state(padded)
    for name, value in first.items():
        torch.testing.assert_close(found[name], (value + second[name]) / 2)


def test_tokenizers_of_two_kinds_are_not_joined() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0)))
    more = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"c": 0, "b": 1}, unk_token="b")))
    with pytest.raises(ModelError, match="that of x is WordLevel, the base's BPE"):
        union_tokenizer(tiny_tokenizer(), [("x", words)])
    with pytest.raises(ModelError, match="of the kinds BPE, WordPiece, WordLevel, and that of x is Unigram"):
        union_tokenizer(words, [("x", pieces)])
    assert union_tokenizer(words, [("x", more)]).get_vocab() == {"a": 0, "b": 1, "c": 2}
