"""The stage `quantize`, and training for it, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import AdapterConfig, DataConfig, ModelConfig, OptimizerConfig
from posttrain.config.quantization_settings import QuantizedTrainingConfig
from posttrain.core.errors import ModelError
from posttrain.methods.compress.calibration_pass import LayerByLayer
from posttrain.methods.compress.quantize import Quantize
from posttrain.methods.compress.quantize_settings import QuantizeConfig
from posttrain.methods.compress.scale_folding import find_folds
from posttrain.methods.sft import SFT, SFTConfig
from posttrain.models.fake_quantization import GRID, train_in_full
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.models.quantized_weight import RoundedInputLinear, quantized_modules
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.trainer.policy import open_policy
from posttrain.trainer.stage import StageContext

TOKENS = torch.tensor([[5, 9, 3, 77, 102, 8, 41, 17, 30]])
ROWS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(12) for b in range(3)]


def folder_of(path: Path, kind: str = "llama", **settings: Any) -> Path:
    tiny_model(kind, hidden_size=64, intermediate_size=96, **settings).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


def rows_of(source: Path) -> DataConfig:
    return DataConfig(source=str(source / "rows.jsonl"), chat=False)


def quantize(source: Path, folder: Path, algorithm: str = "rtn", **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Run the stage, and return the model that it left and its entry."""
    folder.mkdir(exist_ok=True)
    if algorithm != "rtn":
        settings["calibration"] = rows_of(source)
    stage = Quantize(QuantizeConfig(algorithm=algorithm, **settings), StageContext(tiny_tokenizer(), 512))
    stage.prepare()
    entry = stage.run(ModelConfig(source=str(source)), folder, 0)
    return load_model(ModelConfig(source=str(folder / "model")))[0], entry


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_outputs_are_nearer_to_the_model_s_than_after_rounding(algorithm: str, kind: str, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "start", kind)
    errors, moved = {}, {}
    start = load_model(ModelConfig(source=str(source)))[0]
    tokens = torch.tensor([tiny_tokenizer()("".join(r["prompt"] + r["completion"] for r in ROWS[:12])).input_ids])
    for name in ("rtn", algorithm):
        hf, entry = quantize(source, tmp_path / name, name)
        record = json.loads((tmp_path / name / "quantization.json").read_text())
        assert {layer["bits"] for layer in record["layers"]} == {4} and len(record["layers"]) == 14
        errors[name] = entry["quantized"]
        with torch.no_grad():
            moved[name] = float((hf(tokens).logits - start(tokens).logits).square().mean())
    if algorithm == "gptq":
        assert moved[algorithm] < 0.8 * moved["rtn"]
    else:
        gains = [entry["error_ratio"] for entry in record["scales"]]
        assert len(gains) == 8 and max(gains) <= 1.0 and sum(gains) < 0.95 * len(gains)
    assert 0 < errors[algorithm]["mean relative output error"] < 0.2
    assert errors["rtn"]["bytes"] == errors[algorithm]["bytes"] < 0.5 * errors["rtn"]["bytes before"]


def test_it_is_refused_with_what_to_do(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "start")
    with pytest.raises(ModelError, match=r"group: 40 does not divide the layers' widths of 32, 64, 96"):
        quantize(source, tmp_path / "a", group=40)
    with pytest.raises(ModelError, match="no linear layers"):
        quantize(source, tmp_path / "b", skip=["*"])
    quantize(source, tmp_path / "c")
    with pytest.raises(ModelError, match="has quantised weights, which quantize can't change"):
        quantize(tmp_path / "c" / "model", tmp_path / "d")
    tied = folder_of(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ModelError, match="set embeddings to quantise both"):
        quantize(tied, tmp_path / "e", head=8)


def test_settings_that_do_not_go_together_are_refused() -> None:
    for settings, message in (
        ({"algorithm": "gptq"}, "set calibration"),
        ({"algorithm": "rtn", "damping": 0.1}, "settings of gptq"),
        ({"algorithm": "rtn", "activation_bits": 8, "bits": 4}, "bits: 8"),
        ({"algorithm": "rtn", "group": 4}, "at least 8"),
        ({"algorithm": "rtn", "format": "gguf", "group": 48}, "multiple of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantizeConfig(**settings)
    QuantizeConfig(**QuantizeConfig(algorithm="rtn").model_dump())  # as a run writes its recipe, defaults and all


def test_layers_embeddings_and_head_that_are_chosen(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "start")
    hf, _ = quantize(source, tmp_path / "q", "gptq", skip=["*.down_proj", "model.layers.0.*"], embeddings=8, head=4)
    bits = {name: weight.bits for name, _, weight in quantized_modules(hf)}
    assert bits.pop("model.embed_tokens") == 8 and bits.pop("lm_head") == 4
    assert set(bits) == {f"model.layers.1.{n}" for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    )}  # fmt: skip


def test_the_gguf_file_beside_the_folder_holds_the_same_numbers(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = folder_of(tmp_path / "start")
    hf, entry = quantize(source, tmp_path / "q", format="gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "q" / "model.gguf").tensors}
    down = tensors["blk.0.ffn_down.weight"]
    assert entry["quantized"]["gguf"]["exact"] == 14 and down.tensor_type.name == "Q4_0"
    found = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
    assert torch.equal(found, hf.model.layers[0].mlp.down_proj.weight)
    experts = folder_of(tmp_path / "experts", "mixtral")
    with pytest.raises(ModelError, match="this model is mixtral"):
        quantize(experts, tmp_path / "f", format="gguf")


def test_inputs_in_eight_bits(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "start")
    hf, _ = quantize(source, tmp_path / "q", bits=8, group=0, activation_bits=8)
    down = hf.model.layers[0].mlp.down_proj
    assert isinstance(down, RoundedInputLinear)
    x = torch.randn(1, 3, 96, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    expected = ((x / scale).round().clamp(-128, 127) * scale) @ down.weight.t()
    assert torch.allclose(down(x), expected, atol=1e-6)
    # The model is computed so by posttrain too, and in full once it is trained.
    policy = LanguageModel(hf)
    plain = open_policy(SFTConfig(data=rows_of(source)), ModelConfig(source=str(tmp_path / "q" / "model")), 0).policy
    a, b = (p.base.model.layers[0].mlp(x[..., :64]) for p in (policy, plain))
    assert 0 < float((a - b).abs().max()) < 0.1 * float(b.abs().max())
    assert not list(quantized_modules(plain.base))


@pytest.mark.parametrize(
    ("kind", "count"), [("llama", 4), ("qwen2", 4), ("gemma2", 4), ("phi3", 2), ("mixtral", 2 + 4), ("gpt_oss", 2)]
)
def test_places_for_scales_leave_the_model_as_it_is(kind: str, count: int) -> None:
    policy = LanguageModel(tiny_model(kind, hidden_size=64, intermediate_size=96))
    layers = LayerByLayer(policy).layers
    with torch.no_grad():
        before = policy.base(TOKENS).logits if not policy.ragged else None
        folds = find_folds(policy, layers)
        weights = [p.clone() for p in policy.base.parameters()]
        for fold in folds[0]:
            fold.apply(torch.full((fold.width,), 1.5))
    assert before is None or torch.equal(before, policy.base(TOKENS).logits)
    assert len(folds[0]) == len(folds[1]) == count
    assert any(not torch.equal(a, b) for a, b in zip(weights, policy.base.parameters(), strict=True))


def trained(source: Path, folder: Path, adapter: AdapterConfig | None, qat: Any, **more: Any) -> tuple[SFT, Any]:
    folder.mkdir()
    config = SFTConfig(
        data=rows_of(source),
        batch_size=6,
        max_steps=3,
        adapter=adapter,
        qat=qat,
        optimizer=OptimizerConfig(lr=3e-3),
        **more,
    )
    stage = SFT(config, StageContext(tiny_tokenizer(), 512))
    stage.prepare()
    return stage, stage.run(ModelConfig(source=str(source)), folder, 0)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(r=4), AdapterConfig(kind="rslora", r=4)])
def test_what_is_trained_rounded_is_what_quantising_gives(
    adapter: AdapterConfig | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each layer multiplies with in training, rounded in every pass, is the quantised weight, bit by bit."""
    source, seen = folder_of(tmp_path / "start"), {}

    def probed(hf: Any) -> None:
        with torch.no_grad():
            for name, module in hf.named_modules():
                if hasattr(module, GRID):  # without biases, inputs of 0 and 1 give the weight itself
                    seen[name.removeprefix("base_model.model.")] = module(torch.eye(module.in_features)).t()
            seen["outputs"] = LanguageModel(hf).hidden_T_H(batch_of(hf))
        train_in_full(hf)

    monkeypatch.setattr("posttrain.trainer.policy.train_in_full", probed)
    trained(source, tmp_path / "t", adapter, QuantizedTrainingConfig(group=16))
    hf, entry = quantize(tmp_path / "t" / "model", tmp_path / "q")
    assert "notes" not in entry["quantized"]
    weights = {name: weight for name, _, weight in quantized_modules(hf)}
    assert len(weights) == len(seen) - 1 == 14
    for name, weight in weights.items():
        assert (weight.bits, weight.group) == (4, 16) and torch.equal(weight.dense(), seen[name]), name
    found = LanguageModel(hf).hidden_T_H(batch_of(hf)).detach()
    assert torch.allclose(found, seen["outputs"], atol=1e-5)
    full = LanguageModel(load_model(ModelConfig(source=str(tmp_path / "t" / "model")))[0])
    assert not torch.allclose(full.hidden_T_H(batch_of(full.base)).detach(), found, atol=1e-2)
    _, other = quantize(tmp_path / "t" / "model", tmp_path / "o", bits=8)
    assert "bits: 8 (trained with 4)" in other["quantized"]["notes"][0]


def batch_of(hf: Any) -> Any:
    from posttrain.core.ragged import pack
    from posttrain.core.types import Sample

    return pack([Sample(TOKENS[0].tolist(), [0.0] * 8 + [1.0])], torch.device("cpu"))
