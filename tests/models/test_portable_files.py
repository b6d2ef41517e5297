"""Folders that transformers 4 reads as transformers 5 does, and that other users of the machine can read."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from posttrain.config import AdapterConfig, EpochsConfig, ModelConfig
from posttrain.models.portable_files import finish_folder, old_rope
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.trainer.policy import open_policy, save_policy

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4,
        "original_max_position_embeddings": 32}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "llama", "rope_parameters": DEFAULT}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"model_type": "qwen2", "rope_parameters": YARN},
            {"rope_theta": 1e6, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}},
        ),
        (
            {"model_type": "glm4", "rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}},
            {"rope_theta": 5e5, "rope_scaling": None, "partial_rotary_factor": 0.5},
        ),
        (
            {"model_type": "gpt_neox", "rope_parameters": DEFAULT | {"partial_rotary_factor": 0.25}},
            {"rope_theta": 5e5, "rope_scaling": None, "partial_rotary_factor": 0.25, "rotary_emb_base": 5e5,
             "rotary_pct": 0.25},
        ),
        (
            {"model_type": "phi3", "original_max_position_embeddings": 32, "rope_parameters": LONG},
            {"rope_theta": 1e4,
             "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        ),
        (
            {"model_type": "gemma3_text",
             "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                 "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        (
            {"model_type": "olmo3", "rope_parameters": {"full_attention": DEFAULT, "sliding_attention": DEFAULT}},
            {"rope_theta": 5e5, "rope_scaling": None},
        ),
        (
            {"model_type": "new", "rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT}},
            None,
        ),
        ({"model_type": "gpt2"}, {}),
        ({"model_type": "nope", "rope_parameters": None}, {}),
    ],
)  # fmt: skip
def test_words_of_transformers_4(settings: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert old_rope(settings) == expected


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "glm", "gpt2", "olmo3"]
)
def test_transformers_5_reads_the_same_as_before(kind: str, tmp_path: Path) -> None:
    config = tiny_model(kind).config
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert finish_folder(tmp_path) and finish_folder(tmp_path)  # twice: what a copy of a copy gets
    written, after = json.loads((tmp_path / "config.json").read_text()), AutoConfig.from_pretrained(tmp_path).to_dict()
    new = {"rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_pct", "partial_rotary_factor", "torch_dtype"}
    assert {k: v for k, v in after.items() if k not in new} == {k: v for k, v in before.items() if k not in new}
    rope = written.get("rope_parameters")
    assert ("rope_theta" in written) == (rope is not None)


def test_what_transformers_4_has_no_words_for_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """phi3 with a factor of its own: transformers 4 derives it, and transformers 5 would take the old words first."""
    model = tiny_model("phi3", rope_parameters=LONG | {"factor": 3.0}, original_max_position_embeddings=32)
    model.config.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with caplog.at_level("INFO", "posttrain"):
        assert not finish_folder(tmp_path)
    assert "only transformers 5 computes this model" in caplog.text
    assert json.loads(before) == json.loads((tmp_path / "config.json").read_text())


def test_the_tokenizer_has_a_class_that_both_know(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|x|>"]})
    tokenizer.save_pretrained(tmp_path)
    finish_folder(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|x|>"] and "extra_special_tokens" not in written
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again("a<|x|>b")["input_ids"] == tokenizer("a<|x|>b")["input_ids"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_are_readable_as_the_umask_says(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        source = ModelConfig(source="tiny:llama")
        config = EpochsConfig(method="sft", adapter=AdapterConfig(r=2))
        save_policy(open_policy(config, source, 0), config, source, tmp_path, 0, None)
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.name for p in files} >= {"model.safetensors", "adapter_model.safetensors", "tokenizer.json"}
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o666 & ~umask}
