"""Quantising experts that lie in one parameter: each is quantised as the same matrix in a linear layer would be."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.config import DataConfig, ModelConfig
from posttrain.config.quantization_settings import QuantizedTrainingConfig
from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.eval.speed import sizes_of
from posttrain.methods.compress.gptq import gptq
from posttrain.methods.compress.quantize import Quantize
from posttrain.methods.compress.quantize_layers import LayerQuantizer, chosen_settings
from posttrain.methods.compress.quantize_settings import QuantizeConfig
from posttrain.models.compressed_writing import write_compressed
from posttrain.models.fake_quantization import experts_in_full, note_grid
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.models.model_shape import shape_of_model
from posttrain.models.quantization_grid import Grid, round_to_nearest
from posttrain.models.quantized_weight import forget_quantized, quantized_matrices
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.trainer.stage import StageContext

SAMPLES = [Sample([(7 * i + 3 * r) % 250 + 3 for i in range(20)], [0.0] + [1.0] * 19) for r in range(6)]
CALIBRATED = {"calibration": DataConfig(source="unused.jsonl"), "bits": 4, "group": 16, "symmetric": True}


def quantised(hf: Any, samples: list[Sample], **settings: Any) -> tuple[LanguageModel, LayerQuantizer]:
    policy = LanguageModel(hf)
    quantizer = LayerQuantizer(policy, QuantizeConfig(**{**CALIBRATED, **settings}))
    with torch.no_grad():
        quantizer.run(samples, lambda done: None)
    return policy, quantizer


def inputs_of_experts(hf: Any, samples: list[Sample]) -> dict[int, Tensor]:
    """Return the inputs of each expert of the first layer, by what transformers' router says of one row at a time."""
    found: dict[int, list[Tensor]] = {}

    def hook(module: Any, args: tuple[Any, ...]) -> None:
        hidden, chosen = args[0].flatten(0, -2), args[1].view(-1, args[1].shape[-1])
        for expert in chosen.unique().tolist():
            found.setdefault(expert, []).append(hidden[(chosen == expert).any(-1)])

    handle = hf.model.layers[0].mlp.experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        for sample in samples:
            hf(torch.tensor([sample.tokens]))
    handle.remove()
    return {expert: torch.cat(inputs) for expert, inputs in found.items()}


@pytest.mark.parametrize(("kind", "transposed"), [("mixtral", False), ("gpt_oss", True)])
def test_gptq_of_an_expert_is_that_of_a_linear_layer_with_its_inputs(kind: str, transposed: bool) -> None:
    hf = tiny_model(kind)
    given = inputs_of_experts(hf, SAMPLES)
    before = hf.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    policy, _ = quantised(hf, SAMPLES)
    after = {matrix.name: weight for matrix, weight in quantized_matrices(policy.base)}
    assert len(given) > 2
    for expert, x in given.items():
        weight = before[expert].t() if transposed else before[expert]
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        expected = gptq(linear.weight, x.t() @ x, Grid(4, 16))
        found = after[f"model.layers.0.mlp.experts.gate_up_proj.{expert}"]
        assert float((found.values_O_I == expected.values_O_I).float().mean()) > 0.999  # sums in another order
        assert torch.equal(found.scale_O_G, expected.scale_O_G)
        stored = policy.base.model.layers[0].mlp.experts.gate_up_proj[expert]
        assert torch.equal(stored.t() if transposed else stored, found.dense())
        nearest = round_to_nearest(weight, Grid(4, 16))
        assert not torch.equal(found.values_O_I, nearest.values_O_I)


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_an_expert_that_no_row_reaches_is_rounded_to_nearest_and_named(
    algorithm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf, source = tiny_model("mixtral", num_local_experts=8), tmp_path / "start"
    hf.save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    (source / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "bcd"}))
    data = DataConfig(source=str(source / "rows.jsonl"), chat=False)
    config = QuantizeConfig(algorithm=algorithm, calibration=data, rows=1, row_tokens=3)
    stage = Quantize(config, StageContext(tiny_tokenizer(), 512))
    stage.prepare()
    assert len(stage.samples) == 1 and len(stage.samples[0]) == 3  # of 2 experts each: 2 of 8 at least get none
    reached = inputs_of_experts(hf, list(stage.samples))
    with caplog.at_level(logging.WARNING, "posttrain"):
        stage.run(ModelConfig(source=str(source)), tmp_path, 0)
    record = json.loads((tmp_path / "quantization.json").read_text())
    names = [f"model.layers.0.mlp.experts.{p}.{e}" for p in ("gate_up_proj", "down_proj") for e in range(8)]
    unreached = [name for name in names if int(name[-1]) not in reached]
    assert 2 * 2 <= len(unreached) < 16
    assert [name for name in record["unreached"] if ".layers.0." in name] == unreached
    assert {e["layer"]: e["algorithm"] for e in record["layers"] if e["layer"] in names} == {
        name: "rtn" if name in unreached else algorithm for name in names
    }
    scaled = {
        name: s["error_ratio"] for s in record["scales"] for name in s["layers"] if ".layers.0.mlp.experts" in name
    }
    downs = [name for name in names if "down" in name and name not in unreached]
    assert list(scaled) == (downs if algorithm == "awq" else [])
    assert not scaled or min(scaled.values()) < 1.0
    assert unreached[0] in caplog.text and "rounded to nearest" in caplog.text
    again, _ = load_model(ModelConfig(source=str(tmp_path / "model")))
    for name in unreached:
        start, end = (
            m.model.layers[0].mlp.experts.get_parameter(name.split(".")[-2])[int(name[-1])] for m in (hf, again)
        )
        assert torch.equal(end, round_to_nearest(start, Grid(4, 32)).dense())


def test_experts_that_are_skipped_or_can_t_be_quantised(tmp_path: Path) -> None:
    rtn = {"algorithm": "rtn", "calibration": None}
    policy, _ = quantised(tiny_model("qwen3_moe"), [], **rtn, skip=["*experts*"])
    assert len(list(quantized_matrices(policy.base))) == 8
    policy.base.save_pretrained(tmp_path)
    assert write_compressed(policy.base, tmp_path) is None
    ignored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    layers = [f"re:model\\.layers\\.{i}\\.mlp\\.experts\\..*" for i in (0, 1)]
    assert set(ignored) == {*layers, "lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    _, quantizer = quantised(tiny_model("qwen3_moe"), [], **rtn, skip=["*.down_proj", "*.layers.1.*.gate_up_proj.2"])
    assert len(quantizer.record()["layers"]) == 8 + 7
    with pytest.raises(ModelError, match=r"not known here: set skip: \['\*experts\*'\]"):
        quantised(tiny_model("llama4_text"), [], **rtn)
    with pytest.raises(ModelError, match=r"activation_bits\): set skip: \['\*experts\*'\]"):
        quantised(tiny_model("qwen3_moe"), [], **{**rtn, "bits": 8, "group": 0, "activation_bits": 8})


def test_sizes_count_experts_in_few_bits() -> None:
    hf = tiny_model("mixtral")
    shape = shape_of_model(hf)
    linear, own = shape.linear, [p for n, p in hf.named_parameters() if ".experts." in n]
    assert shape.experts == sum(p.numel() for p in own) > linear / 2
    policy, quantizer = quantised(hf, [], algorithm="rtn", calibration=None)
    entry = quantizer.summary()
    total = sum(p.numel() for p in hf.parameters())
    packed = linear // 2 + linear // 16 * 4  # int4, and a float32 scale for 16 weights
    assert entry["bytes"] == packed + (total - linear) * 4
    assert entry["share of the weights"] == round(linear / total, 4)
    sizes = sizes_of(policy, None)
    held = sum(4 * b.numel() for b in hf.buffers())
    assert sizes["packed_bytes"] == entry["bytes"] + held
    assert sizes["memory_bytes"] == total * 4 + linear + linear // 16 * 4 + held


def test_training_changes_the_dense_experts_and_rounds_linear_layers_alone(tmp_path: Path) -> None:
    hf = tiny_model("mixtral")
    grid = QuantizedTrainingConfig(group=16)
    note_grid(tmp_path, grid, experts_in_full(hf))
    chosen, notes = chosen_settings(QuantizeConfig(algorithm="rtn"), tmp_path)
    assert chosen.skip == [f"model.layers.*.mlp.experts.{p}_proj" for p in ("gate_up", "down")] and not notes
    policy, quantizer = quantised(hf, [], algorithm="rtn", calibration=None)
    assert {m.expert is None for m, _ in quantized_matrices(policy.base)} == {True, False}
    forget_quantized(policy.base)
    assert not list(quantized_matrices(policy.base))
    _, quantizer = quantised(hf, [], algorithm="rtn", calibration=None, skip=chosen.skip)
    assert len(quantizer.record()["layers"]) == 8
