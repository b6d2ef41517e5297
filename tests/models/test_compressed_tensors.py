"""Quantised weights in files: what is written is read back to the same numbers, here and by compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain.config import ModelConfig, SamplingConfig
from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.cpu import library as native
from posttrain.cpu.quantized_matmul import is_placeholder
from posttrain.eval.speed import sizes_of
from posttrain.models.compressed_reading import share_with_head
from posttrain.models.compressed_tensors import SHARD_INDEX, pack_words, read_quantized, unpack_words
from posttrain.models.compressed_writing import write_compressed
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model, load_settings
from posttrain.models.quantization_grid import Grid, round_to_nearest
from posttrain.models.quantized_weight import (
    attach_quantized,
    attach_to_matrix,
    quantized_matrices,
    quantized_modules,
    quantized_of,
)
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.models.verification import verify
from posttrain.models.weight_matrices import matrices_of
from posttrain.recipe.machine_checks import is_installed
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request

TOKENS = torch.tensor([[5, 9, 3, 77, 102, 8, 41]])
INT4 = Grid(4, 32)


def test_words_by_hand() -> None:
    values = torch.tensor([[-8, -7, 0, 7, 1, 2, 3, -1, 5, -6]], dtype=torch.int8)
    assert pack_words(values, 4).tolist() == [[0x7BA9F810, 0x2D]]
    assert pack_words(torch.tensor([[-128, 127, 0, -1, 1]], dtype=torch.int8), 8).tolist() == [[0x7F80FF00, 129]]
    top = pack_words(torch.full((1, 8), 7, dtype=torch.int8), 4)
    assert top.tolist() == [[-1]]
    for bits, low, high in ((4, -8, 8), (8, -128, 128)):
        drawn = torch.randint(low, high, (5, 37), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
        assert torch.equal(unpack_words(pack_words(drawn, bits), bits, 37), drawn)


def quantised(
    grid: Grid, model: str = "llama", embeddings: bool = False, inputs: Any = None, mixed: bool = False, **settings: Any
) -> Any:
    """Return a model whose layers are quantised but for the first value projection; mixed: down projections in int8."""
    hf = tiny_model(model, hidden_size=64, intermediate_size=96, **settings)
    hf.set_attn_implementation("eager")
    for name, module in list(hf.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name and name != "model.layers.0.self_attn.v_proj":
            own = Grid(8, None) if mixed and "down" in name else grid
            attach_quantized(module, round_to_nearest(module.weight, own, None, inputs))
    for matrix in matrices_of(hf):
        if matrix.expert is not None:
            attach_to_matrix(matrix, round_to_nearest(matrix.weight_O_I, grid))
    if embeddings:
        attach_quantized(hf.model.embed_tokens, round_to_nearest(hf.model.embed_tokens.weight, Grid(8, None)))
        share_with_head(hf)
    return hf


def save(hf: Any, folder: Path, **arguments: Any) -> Path:
    hf.save_pretrained(folder, **arguments)
    write_compressed(hf, folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


CASES = {
    "int4": {"grid": INT4},
    "zeros": {"grid": Grid(4, 32, symmetric=False)},
    "rows": {"grid": Grid(4, None, symmetric=False)},
    "int8": {"grid": Grid(8, None)},
    "qwen2": {"grid": INT4, "model": "qwen2"},
    "mixed": {"grid": INT4, "mixed": True},
    "tied": {"grid": INT4, "embeddings": True, "tie_word_embeddings": True},
    "mixtral": {"grid": INT4, "model": "mixtral"},
    "qwen3_moe": {"grid": Grid(8, None), "model": "qwen3_moe"},
    "gpt_oss": {"grid": Grid(4, 32, symmetric=False), "model": "gpt_oss"},
    "nemotron_h": {"grid": INT4, "model": "nemotron_h"},
    "w8a8": {"grid": Grid(8, None), "inputs": 8},
}


EXPERTS_IN_FILES = {
    "mixtral": [f"model.layers.1.block_sparse_moe.experts.3.w{i}" for i in (1, 2, 3)],
    "qwen3_moe": [f"model.layers.1.mlp.experts.0.{part}_proj" for part in ("gate", "up", "down")],
    "gpt_oss": ["model.layers.0.mlp.experts.gate_up_proj.3", "model.layers.1.mlp.experts.down_proj.0"],
    "nemotron_h": ["backbone.layers.1.mixer.experts.2.up_proj", "backbone.layers.0.mixer.in_proj"],
}
"""What vLLM and transformers call them; gpt-oss keeps all experts in one tensor there, and these are slices of it."""


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_what_is_reloaded_is_what_was_in_memory(case: str, tmp_path: Path) -> None:
    hf = quantised(**CASES[case])
    expected = hf(TOKENS).logits
    folder = save(hf, tmp_path / "q")
    assert load_settings(ModelConfig(source=str(folder))) is not None  # no package is asked for
    again, _ = load_model(ModelConfig(source=str(folder)))
    assert float((again(TOKENS).logits - expected).abs().max()) == 0.0
    before = {matrix.name: weight for matrix, weight in quantized_matrices(hf)}
    after = {matrix.name: weight for matrix, weight in quantized_matrices(again)}
    assert before.keys() == after.keys() and len(before) >= 13
    for name, weight in before.items():
        assert torch.equal(weight.values_O_I, after[name].values_O_I), name
        assert (weight.group, weight.bits, weight.activation_bits) == (
            after[name].group, after[name].bits, after[name].activation_bits,
        )  # fmt: skip
    stored = load_file(folder / "model.safetensors")
    assert case == "nemotron_h" or "model.layers.0.self_attn.v_proj.weight" in stored
    for name in EXPERTS_IN_FILES.get(case, ()):
        assert {f"{name}.weight_packed", f"{name}.weight_scale"} <= stored.keys() and f"{name}.weight" not in stored
    assert not any(tensor.ndim == 3 for key, tensor in stored.items() if "experts" in key and "bias" not in key)
    assert again.config.to_dict().get("quantization_config") is None


@pytest.mark.skipif(native.kernels() is None, reason="no compiled kernels here")
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("qwen3_moe", "nemotron_h")])
@torch.no_grad()
def test_a_model_for_inference_holds_packed_weights_and_computes_the_same(case: str, tmp_path: Path) -> None:
    """Products of many rows are the same to the last bit, those of decoding and of experts up to rounding."""
    folder = save(quantised(**CASES[case]), tmp_path / "q")
    config = ModelConfig(source=str(folder))
    (hf, tokenizer), (lean, _) = load_model(config), load_model(config, inference=True)
    dense, packed = LanguageModel(hf).eval(), LanguageModel(lean).eval()
    verify(packed)
    alone = [n for n, p in lean.named_parameters() if is_placeholder(p)]
    layers, experts = list(quantized_modules(hf)), [name for name in alone if "experts" in name]
    assert len(alone) - len(experts) == (0 if case == "w8a8" else len(layers)) and len(layers) >= 7
    assert len(experts) == (4 if case in ("mixtral", "gpt_oss") else 0)
    assert case == "w8a8" or not list(quantized_matrices(lean))  # no integers beside
    tokens = torch.randint(3, 259, (400,), generator=torch.Generator().manual_seed(2)).tolist()
    scores = []
    for model in (dense, packed):
        batch = model.pack([Sample(tokens, [0.0] + [1.0] * (len(tokens) - 1))])
        scores.append(model(batch, want="logprobs")[0])
    torch.testing.assert_close(*scores, rtol=0, atol=1e-5 if experts else 0)
    params = SamplingConfig(temperature=0.0, max_tokens=12, min_tokens=12)
    written = [LocalSampler(m, tokenizer).sample([Request(tokens[:9])], params) for m in (dense, packed)]
    expected, found = (groups[0].rollouts[0] for groups in written)
    assert expected.tokens == found.tokens and expected.logprobs == pytest.approx(found.logprobs, abs=1e-5)
    if alone:
        sizes = [sizes_of(model, config) for model in (dense, packed)]
        assert sizes[1]["memory_bytes"] < (0.3 if experts else 0.8) * sizes[0]["memory_bytes"]
        assert sizes[1]["parameters"] == sizes[0]["parameters"]


@torch.no_grad()
def test_a_model_for_inference_in_bfloat16_holds_no_integers(tmp_path: Path) -> None:
    """They would be a third of its memory; how large it is packed is known. Experts and a tied head too."""
    hf = quantised(INT4, "mixtral", embeddings=True, tie_word_embeddings=True)
    config = ModelConfig(source=str(save(hf, tmp_path / "q")), dtype="bfloat16")
    models = [load_model(config, inference=inference)[0] for inference in (False, True)]
    assert torch.equal(*(hf(TOKENS).logits for hf in models))
    full, lean = (sizes_of(LanguageModel(hf).eval(), config) for hf in models)
    assert lean["packed_bytes"] == full["packed_bytes"] and lean["memory_bytes"] < 0.7 * full["memory_bytes"]
    known = [weight for weight in map(quantized_of, models[1].modules()) if weight is not None]
    assert len(known) == 9 and all(weight.values_O_I.is_meta for weight in known)


@torch.no_grad()
def test_a_type_that_reads_a_weight_without_its_layer_is_opened_in_full(tmp_path: Path) -> None:
    """Mamba multiplies by the weight of dt_proj itself, which would be a placeholder."""
    hf = tiny_model("mamba")
    for name, module in list(hf.named_modules()):
        if type(module) is torch.nn.Linear and "lm_head" not in name:
            attach_quantized(module, round_to_nearest(module.weight, Grid(8, None)))
    expected = hf(TOKENS).logits
    again, _ = load_model(ModelConfig(source=str(save(hf, tmp_path / "q"))), inference=True)
    assert float((again(TOKENS).logits - expected).abs().max()) < 1e-5
    assert not any(is_placeholder(p) for p in again.parameters())


def test_a_vocabulary_that_grows_is_opened_in_full(tmp_path: Path) -> None:
    folder = save(quantised(**CASES["tied"]), tmp_path / "q")
    hf, tokenizer = load_model(ModelConfig(source=str(folder), add_tokens=["<new>"]), inference=True)
    assert len(hf.get_input_embeddings().weight) == len(tokenizer) == 260
    assert not any(is_placeholder(p) for p in hf.parameters())


@pytest.mark.skipif(not is_installed("compressed-tensors"), reason="compressed-tensors is not installed")
@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("tied", "gpt_oss")])
@torch.no_grad()
def test_transformers_reads_the_same_numbers(case: str, dequantize: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AutoQuantizationConfig

    if dequantize and case in ("mixed", "w8a8"):
        pytest.skip("transformers' own reader takes the first group's scheme for all, and leaves inputs in full")
    if not dequantize and case in ("zeros", "rows"):
        pytest.skip("compressed-tensors 0.20 expects packed zeros unpacked there, also of folders that it wrote")
    hf = quantised(**CASES[case])
    folder = save(hf, tmp_path / "q")
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    own = AutoQuantizationConfig.from_dict({**stored, "dequantize": True})
    settings = {"quantization_config": own} if dequantize else {}
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **settings)
    assert float((other(TOKENS).logits - hf(TOKENS).logits).abs().max()) == 0.0


def test_the_configuration_names_schemes_and_what_is_in_full(tmp_path: Path) -> None:
    config = json.loads((save(quantised(INT4, mixed=True), tmp_path / "q") / "config.json").read_text())
    found = config["quantization_config"]
    assert (found["quant_method"], found["format"]) == ("compressed-tensors", "pack-quantized")
    assert found["ignore"] == ["model.layers.0.self_attn.v_proj", "lm_head"]
    int8, int4 = found["config_groups"].values()
    assert int8["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)] and int4["targets"] == ["Linear"]
    assert int8["weights"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel",
    }  # fmt: skip
    assert (int4["weights"]["strategy"], int4["weights"]["group_size"]) == ("group", 32)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    hf = quantised(INT4)
    folder = save(hf, tmp_path / "q", max_shard_size="100KB")
    index = json.loads((folder / SHARD_INDEX).read_text())
    files = {name: set(load_file(folder / name)) for name in set(index["weight_map"].values())}
    assert len(files) > 1
    assert all(key in files[name] for key, name in index["weight_map"].items())
    assert sum(map(len, files.values())) == len(index["weight_map"])
    again, _ = load_model(ModelConfig(source=str(folder)))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, hf(TOKENS).logits)


def test_a_weight_that_was_changed_is_written_in_full(tmp_path: Path) -> None:
    hf = quantised(INT4)
    down = hf.model.layers[1].mlp.down_proj
    with torch.no_grad():
        down.weight[0, 0] += 1.0
    names = read_quantized(save(hf, tmp_path / "q"))
    assert "model.layers.1.mlp.down_proj" not in names and "model.layers.1.mlp.up_proj" in names
    again, _ = load_model(ModelConfig(source=str(tmp_path / "q")))
    assert torch.equal(again.model.layers[1].mlp.down_proj.weight, down.weight)


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = save(quantised(INT4), tmp_path / "q")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_packed"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj"):
        load_model(ModelConfig(source=str(folder)))
