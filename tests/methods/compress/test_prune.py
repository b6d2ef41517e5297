"""The stage prune: zeros where they should be, smaller models that are ordinary ones, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.methods.compress.prune import Prune
from posttrain.methods.compress.prune_settings import PruneConfig, SparseWeightsConfig, StructureConfig
from posttrain.methods.compress.sparse_pruning import prune_weights, zeros_in
from posttrain.methods.compress.structured import prune_structure
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model, open_model
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.trainer.stage import StageContext
from tests.conftest import family, random_samples

ROWS = random_samples(12, seed=3)


def opened(kind: str, **changes: Any) -> LanguageModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LanguageModel(tiny_model(kind, **changes))


def logprobs(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        return model(model.pack(family()), "logprobs")[0]


@pytest.mark.parametrize("algorithm", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_half_of_every_matrix_is_zero_and_nothing_else_changes(algorithm: str, kind: str) -> None:
    model = opened(kind)
    before = {n: p.clone() for n, p in model.hf.named_parameters()}
    config = SparseWeightsConfig(
        algorithm=algorithm, sparsity=0.5, leave=["*.0.*.c_proj" if kind == "gpt2" else "*.0.*.o_proj"]
    )
    records = prune_weights(model, ROWS, config)
    assert zeros_in(records) == 0.5 and all(r["zeros"] * 2 == r["weights"] for r in records)
    changed = {n for n, p in model.hf.named_parameters() if not torch.equal(p, before[n])}
    named = {r["matrix"] for r in records}
    experts = {n.rsplit(".", 1)[0] for n in named if ".experts." in n}
    assert changed == {f"{n}.weight" for n in named if ".experts." not in n} | experts
    assert not any("gate.weight" in n or "embed" in n or "norm" in n or "lm_head" in n for n in changed)
    for name in changed if algorithm != "sparsegpt" else ():
        now = dict(model.hf.named_parameters())[name]
        assert bool(((now == before[name]) | (now == 0)).all())


def test_patterns_shares_by_name_and_a_global_threshold() -> None:
    model = opened("llama")
    prune_weights(model, ROWS, SparseWeightsConfig(algorithm="wanda", pattern="2:4"))
    q = model.base.model.layers[1].self_attn.q_proj.weight
    assert (q.unflatten(1, (-1, 4)) == 0).sum(2).unique().tolist() == [2]
    model = opened("llama")
    records = prune_weights(
        model, [], SparseWeightsConfig(algorithm="magnitude", sparsity=0.5, sparsities={"*.mlp.*": 0.25})
    )
    assert {r["zeros"] / r["weights"] for r in records if ".mlp." in r["matrix"]} == {0.25}
    assert {r["zeros"] / r["weights"] for r in records if ".mlp." not in r["matrix"]} == {0.5}
    for algorithm in ("magnitude", "wanda"):
        model = opened("llama")
        model.base.model.layers[0].mlp.up_proj.weight.data.mul_(100)
        records = prune_weights(model, ROWS, SparseWeightsConfig(algorithm=algorithm, sparsity=0.5, scope="global"))
        shares = {r["matrix"]: r["zeros"] / r["weights"] for r in records}
        assert abs(zeros_in(records) - 0.5) < 1e-4 and shares["model.layers.0.mlp.up_proj"] < 0.1


def test_the_head_is_pruned_if_asked_and_not_tied() -> None:
    config = SparseWeightsConfig(algorithm="sparsegpt", sparsity=0.5, head=True)
    records = prune_weights(opened("llama"), ROWS, config)
    assert records[-1]["matrix"] == "lm_head" and records[-1]["zeros"] * 2 == records[-1]["weights"]
    with pytest.raises(ModelError, match="tied to the embeddings"):
        prune_weights(opened("llama", tie_word_embeddings=True), ROWS, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "2:5"}, "which groups of 5 do not divide"),
        (
            {"sparsity": 0.5, "leave": ["*.q_prj"]},
            r"no matrix has a name like '\*.q_prj'; one is called model.layers.0",
        ),
        ({"sparsity": 0.5, "sparsities": {"*.q_prj": 0.1}}, "no matrix has a name like"),
        ({"sparsity": 0.5, "leave": ["*"]}, "nothing to prune"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        prune_weights(opened("llama"), ROWS, SparseWeightsConfig(algorithm="magnitude", **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set either weights"),
        ({"weights": {"sparsity": 0.5}}, "wanda looks at what the layers multiply: set calibration"),
        ({"weights": {"algorithm": "magnitude"}}, "set either sparsity"),
        ({"weights": {"algorithm": "magnitude", "pattern": "4:2"}}, "expected n:m with 0 < n < m"),
        (
            {"weights": {"algorithm": "sparsegpt", "sparsity": 0.5, "scope": "global"}},
            "which sparsegpt does not go with",
        ),
        ({"structure": {"ratio": 0.7, "mlp": 3}}, "ratio chooses the sizes"),
        ({"structure": {"mlp": 3, "remove": ["heads"]}}, "remove says what ratio makes smaller"),
        ({"structure": {"heads": 4, "kv_heads": 3}}, "must be a multiple of kv_heads"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneConfig(**settings)


SIZES = {"layers": 2, "mlp": 40, "heads": 2, "kv_heads": 1, "hidden": 24}


def make_useless(model: LanguageModel, axis: str) -> None:
    """Make a part of the model do nothing, so that removing it changes nothing."""
    for layer in model.base.model.layers:
        if axis == "mlp":
            layer.mlp.down_proj.weight.data[:, 40:] = 0
        if axis == "heads":
            layer.self_attn.o_proj.weight.data[:, 16:] = 0
        if axis == "queries":  # one of the two that share keys and values
            layer.self_attn.o_proj.weight.data[:, 8:16] = layer.self_attn.o_proj.weight.data[:, 16:24] = 0
    if axis == "layers":
        model.base.model.layers[1].self_attn.o_proj.weight.data.zero_()
        model.base.model.layers[1].mlp.down_proj.weight.data.zero_()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("axis", ["mlp", "heads", "queries", "layers"])
def test_removing_what_does_nothing_changes_nothing(kind: str, axis: str) -> None:
    """Every number stays the same: biases, norms of heads, sliding windows and ties are where they were."""
    model = opened(kind, num_hidden_layers=3, tie_word_embeddings=kind == "qwen2")
    make_useless(model, axis)
    before = logprobs(model)
    heads = {"heads": {"heads": 2, "kv_heads": 1}, "queries": {"heads": 2, "kv_heads": 2}}
    sizes = heads[axis] if axis in heads else {axis: SIZES[axis]}
    made = prune_structure(model, ROWS, StructureConfig(**sizes))
    assert made["removed_layers"] == ([1] if axis == "layers" else [])
    difference = float((logprobs(model) - before).abs().max())
    assert difference == 0.0 or (axis != "layers" and difference < 1e-6), difference


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_channels_that_are_zero_are_removed_without_a_trace(kind: str) -> None:
    """Norms over fewer channels are scaled, and their epsilon too."""
    model = opened(kind)
    base = model.base
    base.model.embed_tokens.weight.data[:, 24:] = 0
    for layer in base.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data[24:] = 0
    before = logprobs(model)
    prune_structure(model, ROWS, StructureConfig(hidden=24))
    assert model.base.config.hidden_size == 24 and model.base.config.head_dim == 8
    assert (logprobs(model) - before).abs().max() < 1e-5


def run(folder: Path, settings: dict[str, Any], source: str = "tiny:llama") -> tuple[dict[str, Any], Any]:
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"Question {i}?", "completion": f"Answer {i * i}."}) + "\n" for i in range(20))
    )
    config = PruneConfig(calibration={"source": str(rows)}, rows=8, **settings)
    stage = Prune(config, StageContext(tiny_tokenizer(), 2048, {}))
    stage.data = stage.prepare()
    assert len(stage.samples) == 8
    return stage.run(ModelConfig(source=source), folder, 0), stage


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("qwen2", True), ("qwen3", False), ("gemma2", True)])
def test_a_smaller_model_opens_in_transformers_with_the_same_numbers(kind: str, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "start"
    types = {"layer_types": ["sliding_attention", "full_attention"] * 2} if kind == "gemma2" else {}
    tiny_model(kind, num_hidden_layers=4, tie_word_embeddings=tied, **types).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    sizes = {"layers": 3, "mlp": 48, "heads": 2, "kv_heads": 1, **({"hidden": 24} if kind != "gemma2" else {})}
    entry, _ = run(tmp_path, {"structure": sizes}, str(source))
    model, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        json.loads((tmp_path / "pruning.json").read_text()),
    )
    assert model.config.num_hidden_layers == 3 and model.config.intermediate_size == 48
    assert expected["after"]["heads"] == model.config.num_attention_heads == 2 == entry["made"]["heads (of 4)"]
    own = LanguageModel(load_model(ModelConfig(source=str(tmp_path / "model")))[0])
    tokens = family()[0].tokens
    with torch.no_grad():
        theirs = model.eval()(torch.tensor([tokens])).logits[0].log_softmax(-1)
        ours = own(own.pack([family()[0]]), "logprobs")[0]
    assert (theirs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0] - ours).abs().max() < 2e-5
    assert entry["parameters"] == sum(p.numel() for p in model.parameters()) < entry["made"]["parameters before"]


def test_the_saved_sparse_model_is_the_one_in_memory(tmp_path: Path) -> None:
    entry, stage = run(tmp_path, {"weights": {"algorithm": "wanda", "sparsity": 0.5}})
    again = open_model(ModelConfig(source="tiny:llama"))
    model = LanguageModel(again.hf)
    prune_weights(model, stage.samples, stage.config.weights)
    saved, _ = load_model(ModelConfig(source=str(tmp_path / "model")))
    for name, value in saved.state_dict().items():
        assert torch.equal(value, model.hf.state_dict()[name])
    assert entry["made"]["share of zeros"] == 0.5 and entry["calibration_rows"] == 8


@pytest.mark.parametrize(
    ("remove", "ratio"), [(["mlp"], 0.7), (["layers"], 0.66), (["heads", "mlp"], 0.5), (["hidden"], 0.8)]
)
def test_a_ratio_chooses_sizes_near_it(remove: list[str], ratio: float) -> None:
    model = opened("llama", num_hidden_layers=6, vocab_size=64, intermediate_size=128)
    before = sum(p.numel() for p in model.parameters())
    prune_structure(model, random_samples(4, vocabulary=60), StructureConfig(ratio=ratio, remove=remove, round_to=2))
    assert abs(sum(p.numel() for p in model.parameters()) / before - ratio) < 0.03


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("llama", {"mlp": 65}, "structure.mlp is 65, and the model has 64"),
        ("llama", {"heads": 3}, "2 heads share keys and values"),
        ("llama", {"heads": 4}, "are those of the model already"),
        ("llama", {"ratio": 0.1, "remove": ["heads"]}, "the nearest model has"),
        ("mixtral", {"mlp": 32}, "no mixture of experts"),
        ("gpt2", {"mlp": 32}, "gpt2: its configuration has no intermediate_size"),
        ("gemma2", {"hidden": 24}, "something with its sizes that is not understood"),
    ],
)
def test_structure_that_does_not_fit_is_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        prune_structure(opened(kind), ROWS, StructureConfig(**settings))


def test_layers_of_a_mixture_can_be_removed() -> None:
    model = opened("mixtral", num_hidden_layers=3)
    experts = model.base.model.layers[1].mlp.experts
    model.base.model.layers[1].self_attn.o_proj.weight.data.zero_()
    experts.down_proj.data.zero_()
    before = logprobs(model)
    assert prune_structure(model, ROWS, StructureConfig(layers=2))["removed_layers"] == [1]
    assert torch.equal(logprobs(model), before)


def test_layers_of_another_build_can_be_removed() -> None:
    """GPT-2 has biases, norms with biases and no gate; a layer that adds nothing is found and leaves no trace."""
    model = opened("gpt2", n_layer=3)
    for module in (model.base.transformer.h[1].attn.c_proj, model.base.transformer.h[1].mlp.c_proj):
        module.weight.data.zero_()
        module.bias.data.zero_()
    before = logprobs(model)
    assert prune_structure(model, ROWS, StructureConfig(layers=2))["removed_layers"] == [1]
    assert torch.equal(logprobs(model), before) and model.base.config.n_layer == 2


def test_a_model_in_few_bits_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its weights would be pruned and the integers beside them saved."""
    from posttrain.models import loading

    def marked(config: ModelConfig) -> Any:
        found = open_model(config)
        found.hf.model.layers[0].mlp.up_proj.quantized = object()
        return found

    monkeypatch.setattr(loading, "open_model", marked)
    with pytest.raises(ModelError, match="has quantised weights, which prune can't change"):
        run(tmp_path, {"weights": {"algorithm": "magnitude", "sparsity": 0.5}})
