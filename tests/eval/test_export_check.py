"""What is exported answers as the model did, a check notices where it does not, Ollama gets the same template."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.core.errors import ModelError
from posttrain.eval.export_check import check_export, reader_of
from posttrain.models.gguf_export import export_gguf
from posttrain.models.ollama_export import TurnParts, go_template, turn_parts
from posttrain.models.saving import write_whole
from posttrain.models.tiny_model import CHATML, SPECIAL, tiny_model, tiny_tokenizer

pytest.importorskip("gguf")
PROGRAM = {"mlx": "mlx_lm", "gguf": "llama_cpp"}
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A model whose weights say something, and a byte-pair tokenizer with merges, which GGUF's readers need."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    raw.train_from_iterator(["the name of the sea is the same as the name of the sky"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", chat_template=CHATML)
    model = tiny_model("llama", vocab_size=len(tokenizer)).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return model, tokenizer


def test_what_was_written_is_compared_with_the_model(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    write_whole(model, tokenizer, tmp_path / "hf", None)
    export_gguf(model, tokenizer, tmp_path / "exact.gguf", "F32")
    export_gguf(model, tokenizer, tmp_path / "rounded.gguf", "Q4_0", "Q4_0")
    prompts = ["the sea", "name"]
    for name, to in (("hf", "hf"), ("hf", "mlx"), ("exact.gguf", "gguf")):
        found = check_export(model, tokenizer, tmp_path / name, prompts, 5, to)
        assert (found.prompts, found.same_prompts, found.same_answers) == (2, 2, 2) and found.kl_max < 1e-7
        assert found.reader == ("transformers" if to == "hf" or not find_spec(PROGRAM[to]) else reader_of(to))
    rounded = check_export(model, tokenizer, tmp_path / "rounded.gguf", prompts, 5)
    assert rounded.same_prompts == 2 and 1e-5 < rounded.kl_mean <= rounded.kl_max


def test_another_model_and_another_template_are_noticed(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    changed = tiny_model("llama", vocab_size=len(tokenizer))
    wrong = tiny_tokenizer()  # bytes alone, and other ids of special tokens
    write_whole(changed, wrong, tmp_path / "wrong", None)
    found = check_export(model, tokenizer, tmp_path / "wrong", ["the sea"], 3)
    assert found.same_prompts == 0 and found.kl_max > 1e-3


def test_the_command_writes_each_format_and_tells_what_it_found(pair: tuple[Any, Any], tmp_path: Path) -> None:
    write_whole(*pair, tmp_path / "model", None)
    for to, kind in (("hub", "auto"), ("ollama", "F32")):
        command = ["export", str(tmp_path / "model"), "--to", to, "--output", str(tmp_path / to), "--check", "2"]
        done = CliRunner().invoke(app, [*command, "--quantization", kind])
        assert done.exit_code == 0, done.output
        assert "2 have the same tokens, 2 the same 24 greedy tokens" in " ".join(done.output.split())
        again = CliRunner().invoke(app, command)
        assert again.exit_code == 1 and "exists already" in again.output
    modelfile = (tmp_path / "ollama" / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./model.gguf\n") and 'PARAMETER stop "<|im_end|>"' in modelfile
    assert (tmp_path / "ollama" / "model.gguf").exists()
    adapter = CliRunner().invoke(app, ["export", str(tmp_path / "model"), "--to", "adapter", "--output", "nowhere"])
    assert adapter.exit_code == 1 and "no adapter" in adapter.output


def test_ollama_s_template_is_the_model_s() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2's: it begins turns, and is not added to texts
    parts = turn_parts(tokenizer)
    assert parts == TurnParts(
        {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("system", "user", "assistant")},
        "", "<|im_start|>assistant\n",
    )  # fmt: skip
    tokenizer.chat_template = DEFAULT_SYSTEM
    asked = turn_parts(tokenizer)
    assert asked.unasked == "<|im_start|>system\nBe kind.<|im_end|>\n" and asked.around == parts.around
    assert go_template(asked) == (
        "{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no') }}", "refuses a conversation"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out a text"),
        (CHATML.replace("message['content']", "message['content'] + (' first' if loop.first else '')"), "after a turn"),
        (None, "has none"),
    ],
)
def test_a_template_that_does_more_is_refused(template: str | None, why: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=why):
        turn_parts(tokenizer)
