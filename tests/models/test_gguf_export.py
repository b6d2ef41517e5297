"""GGUF files: what is written is what transformers reads back, weights, tokenizer, template and ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.core.errors import ModelError
from posttrain.models.gguf_blocks import exact_blocks, ggml_type, gguf_blocks, type_for
from posttrain.models.gguf_export import export_gguf
from posttrain.models.gguf_tokenizer import CONTRACTIONS, REST, WORD_SPLIT, split_name
from posttrain.models.quantized_weight import QuantizedWeight, attach_quantized
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer

gguf = pytest.importorskip("gguf")
TOKENS = torch.tensor([[5, 9, 77, 140, 30, 201, 8]])


def exported(model: Any, folder: Path, kind: str, **more: Any) -> Any:
    """Write a model, and return the file's reader."""
    export_gguf(model, tiny_tokenizer(), folder / "model.gguf", kind, **more)
    return gguf.GGUFReader(folder / "model.gguf")


def field(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}),  # it reads no other size
    ],
)
def test_transformers_reads_the_same_model_back(name: str, changes: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(name, **changes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    exported(model, tmp_path, "F32")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(back(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_the_tokenizer_its_ends_and_the_template_are_written(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.eos_token_id = [0, 2]
    reader = exported(model, tmp_path, "F16")
    assert field(reader, "tokenizer.ggml.tokens") == tokenizer.convert_ids_to_tokens(range(259))
    assert field(reader, "tokenizer.ggml.token_type") == [3, 3, 3] + [1] * 256
    assert field(reader, "tokenizer.ggml.model") == "gpt2" and field(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert field(reader, "tokenizer.ggml.eos_token_id") == 2 and field(reader, "tokenizer.ggml.eot_token_id") == 0
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert field(reader, "tokenizer.chat_template") == tokenizer.chat_template


@pytest.mark.parametrize(("kind", "bound"), [("Q8_0", 0.01), ("Q4_0", 0.2), ("Q4_1", 0.1), ("Q4_K", 0.1)])
def test_rounded_weights_are_near(kind: str, bound: float) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    rows[2] = 0.0
    rows[3] = np.abs(rows[3]) + 1  # no value below 0: Q4_K has no offset for it
    back = gguf.quants.dequantize(gguf_blocks(rows, kind), ggml_type(kind))
    assert back.shape == rows.shape and np.array_equal(back[2], rows[2])
    near = np.delete(np.arange(6), 2)
    worst = np.sqrt(np.square(back - rows)[near].mean(1) / np.square(rows)[near].mean(1)).max()
    assert worst < bound


def test_4_bits_with_fitted_scales_beat_those_of_the_extremes() -> None:
    rows = np.random.default_rng(1).normal(size=(64, 512)).astype(np.float32)

    def error(kind: str) -> float:
        return float(np.square(gguf.quants.dequantize(gguf_blocks(rows, kind), ggml_type(kind)) - rows).mean())

    assert error("Q4_K") < error("Q4_1") < error("Q4_0")


def test_types_fall_back_where_blocks_do_not_fit() -> None:
    assert type_for(576, "Q4_K") == "Q5_0" and type_for(512, "Q4_K") == "Q4_K"
    assert type_for(40, "Q4_0") == "F16" and type_for(40, "F32") == "F32"


@pytest.mark.parametrize(("bits", "asymmetric", "kind"), [(8, False, "Q8_0"), (4, False, "Q4_0"), (4, True, "Q4_1")])
def test_quantised_weights_keep_their_integers(bits: Any, asymmetric: bool, kind: str, tmp_path: Path) -> None:
    generator, half = torch.Generator().manual_seed(0), 2 ** (bits - 1)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-half, half, shape, generator=generator).to(torch.int8)

    def weight(rows: int, columns: int) -> QuantizedWeight:
        scale = torch.rand(rows, columns // 32, generator=generator).add(0.5).half().float()  # float16 holds it
        zero = integers(rows, columns // 32) if asymmetric else None
        return QuantizedWeight(integers(rows, columns), scale / 64, zero, 32, bits)

    single = weight(3, 64)
    back = gguf.quants.dequantize(exact_blocks(single), ggml_type(kind))
    np.testing.assert_allclose(back, single.dense().numpy(), rtol=0, atol=2e-3 if asymmetric else 0)

    model = tiny_model("llama")
    for module in model.model.layers.modules():
        if type(module) is torch.nn.Linear:
            attach_quantized(module, weight(*module.weight.shape))
    done = export_gguf(model, tiny_tokenizer(), tmp_path / "auto.gguf")
    assert done.exact == 14 and not done.rounded_again and done.types[kind] >= 14
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "auto.gguf").tensors}
    up = model.model.layers[1].mlp.up_proj.weight
    found = gguf.quants.dequantize(read["blk.1.ffn_up.weight"].data, ggml_type(kind))
    np.testing.assert_allclose(found, up.detach().numpy(), rtol=0, atol=2e-3 if asymmetric else 0)
    other = export_gguf(model, tiny_tokenizer(), tmp_path / "other.gguf", "Q4_1" if bits == 8 else "Q8_0")
    assert other.exact == 0 and len(other.rounded_again) == 14


def test_what_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gpt2.*convert_hf_to_gguf"):
        export_gguf(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="Q3_K.*can't be written"):
        export_gguf(tiny_model("llama"), tiny_tokenizer(), tmp_path / "a.gguf", "Q3_K")
    assert not list(tmp_path.iterdir())
    qwen = {"type": "Split", "pattern": {"Regex": CONTRACTIONS + WORD_SPLIT + r"\p{N}" + REST}}
    level = {"type": "ByteLevel", "use_regex": False}
    assert split_name({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [qwen, level]}}) == "qwen2"
    qwen["pattern"] = {"Regex": r"\p{N}{2}"}
    with pytest.raises(ModelError, match="splits text"):
        split_name({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [qwen, level]}})


def test_the_command_writes_a_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "tiny.gguf"
    command = ["export", "tiny:llama", "--to", "gguf", "--quantization", "Q8_0", "--output", str(file), "--check", "0"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "Q8_0" in done.output and file.stat().st_size > 10_000
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1 and "exists already" in again.output
    assert CliRunner().invoke(app, [*command[:3], "onnx", *command[4:]]).exit_code == 1
