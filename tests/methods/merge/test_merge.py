"""The stage `merge` on tiny models."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.core.process_memory import peak_bytes, reset_peak, resident_bytes
from posttrain.methods.merge.algorithms import MergeInputs
from posttrain.methods.merge.merge import Merge
from posttrain.methods.merge.merge_models import open_sources, write_merged
from posttrain.methods.merge.merge_settings import MergeConfig, Values
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.trainer.stage import StageContext

Maker = Callable[..., str]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Write tiny models that differ by their seed; return their folders."""
    root = tmp_path_factory.mktemp("models")

    def write(
        seed: int, kind: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any
    ) -> str:
        folder = root / f"{kind}-{seed}-{str(dtype)[6:]}-{shard}-{'-'.join(map(str, changes.values()))}"
        if not folder.is_dir():
            tiny_model(kind, seed=seed, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
            tiny_tokenizer().save_pretrained(folder)
        return str(folder)

    return write


def merge(folder: Path, base: str, seed: int = 0, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run the stage; return the weights of the result as transformers opens it, and the manifest's entry."""
    config = MergeConfig.model_validate(settings)
    folder.mkdir(parents=True, exist_ok=True)
    entry = Merge(config, StageContext(None, None)).run(ModelConfig(source=base, device="cpu"), folder, seed)
    assert [p.name for p in folder.iterdir()] == ["model"]
    hf = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    return hf.state_dict(), entry


def state(folder: str) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], error: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=error, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_mean_of_models_in_different_shards(make: Maker, tmp_path: Path) -> None:
    base, other = make(0), make(1, shard="50KB")
    assert len(list(Path(other).glob("*.safetensors"))) > 2
    found, entry = merge(tmp_path, base, models=["base", {"source": other, "weight": 3}], algorithm="linear")
    first, second = state(base), state(other)
    close(found, {name: (value + 3 * second[name]) / 4 for name, value in first.items()})
    assert entry["parameters"] == sum(v.numel() for v in first.values()) and entry["made"]["models merged"] == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == tiny_tokenizer().chat_template


def test_dtypes_shards_and_ties(make: Maker, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    half, other = make(0, dtype=torch.bfloat16, **tied), make(1, dtype=torch.float16, **tied)
    settings: dict[str, Any] = {"models": ["base", other], "algorithm": "linear"}
    found, entry = merge(tmp_path / "a", half, **settings, max_shard_gb=2e-5)
    first, second = state(half), state(other)
    close(found, {n: ((v.float() + second[n].float()) / 2).bfloat16() for n, v in first.items()}, 0.0)
    files = sorted((tmp_path / "a" / "model").glob("*.safetensors"))
    assert len(files) == entry["merged"]["shards"] > 2
    stored = [name for file in files for name in safe_open(file, "pt").keys()]
    assert "lm_head.weight" not in stored and len(stored) == len(first) - 1
    assert entry["parameters"] == sum(v.numel() for n, v in first.items() if n != "lm_head.weight")
    found, _ = merge(tmp_path / "b", half, **settings, dtype="float32")
    close(found, {n: (v.float() + second[n].float()) / 2 for n, v in first.items()})
    # A model with a head of its own makes the result have one: half of it is the other's embedding.
    untied = make(2, tie_word_embeddings=False)
    found, _ = merge(tmp_path / "c", half, models=["base", untied], algorithm="linear", dtype="float32")
    head = (first["model.embed_tokens.weight"].float() + state(untied)["lm_head.weight"]) / 2
    torch.testing.assert_close(found["lm_head.weight"], head)
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_numbers_by_layer_and_by_name(make: Maker, tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 3}
    base, other = make(0, **shape), make(1, **shape)
    t = {"*.mlp.*": [0, 1], "*norm*": 0.25, "*": 0.5}
    algorithm = {"name": "task_arithmetic", "scale": t}
    found, _ = merge(tmp_path, base, models=[other], algorithm=algorithm)
    first, second = state(base), state(other)

    def place(name: str) -> float:
        if ".mlp." in name:
            return int(name.split(".")[2]) / 2
        return 0.25 if "norm" in name else 0.5

    close(found, {n: torch.lerp(v, second[n], place(n)) for n, v in first.items()})
    ends, _ = merge(tmp_path / "ends", base, models=[{"source": other, "weight": [0, 1]}], algorithm="task_arithmetic")
    torch.testing.assert_close(ends["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    torch.testing.assert_close(ends["lm_head.weight"], second["lm_head.weight"])
    torch.testing.assert_close(ends["model.norm.weight"], second["model.norm.weight"])
    with pytest.raises(ModelError, match=r"algorithm\.scale: '\*\.mpl\.\*' fits no tensor"):
        merge(tmp_path / "x", base, models=[other], algorithm={"name": "task_arithmetic", "scale": {"*.mpl.*": 1}})


def test_masks_are_decided_by_the_seed(make: Maker, tmp_path: Path) -> None:
    settings = {"models": [make(1), {"source": make(2), "density": 0.2}], "algorithm": "dare_ties"}
    runs = [merge(tmp_path / str(i), make(0), seed=i // 2, **settings)[0] for i in range(3)]
    close(runs[0], runs[1], 0.0)
    assert not torch.equal(runs[2]["model.embed_tokens.weight"], runs[0]["model.embed_tokens.weight"])


def between(merge: MergeInputs, *, share: Values = 0.5) -> torch.Tensor:
    """Stand for an algorithm from outside the package."""
    return torch.lerp(merge.base, merge.tensors[0], share)


def towards(merge: MergeInputs, *, share: Values, limits: Values = [0, 1]) -> torch.Tensor:  # noqa: B006
    """Stand for one with a setting that must be given, and one whose default is a list."""
    assert isinstance(limits, float)
    return torch.lerp(merge.base, merge.tensors[0], share * limits)


def test_an_algorithm_from_outside_the_package(make: Maker, tmp_path: Path) -> None:
    algorithm = {"name": "tests.methods.merge.test_merge:between", "share": {"lm_head": 1, "*": 0}}
    found, _ = merge(tmp_path, make(0), models=[make(1)], algorithm=algorithm)
    close(found, state(make(0)) | {"lm_head.weight": state(make(1))["lm_head.weight"]})
    own = {"name": "tests.methods.merge.test_merge:towards", "share": {"lm_head": 0.5}}
    found, _ = merge(tmp_path / "own", make(0), models=[make(1)], algorithm=own)
    first, second = state(make(0)), state(make(1))
    torch.testing.assert_close(found["lm_head.weight"], (first["lm_head.weight"] + second["lm_head.weight"]) / 2)
    torch.testing.assert_close(found["model.norm.weight"], second["model.norm.weight"])
    torch.testing.assert_close(found["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="shares"):
        MergeConfig.model_validate({"models": ["a"], "algorithm": {"name": algorithm["name"], "shares": 1}})


def test_layers_are_stacked(make: Maker, tmp_path: Path) -> None:
    base, other = make(0), make(1, num_hidden_layers=4)
    zero = {"*.o_proj": 0, "*.down_proj": 0}
    slices = [{"source": other, "layers": [1, 4]}, {"source": "base", "layers": [0, 2], "scale": zero}]
    found, _ = merge(tmp_path, base, slices=slices)
    first, second = state(base), state(other)
    for place, (source, layer) in enumerate([(second, 1), (second, 2), (second, 3), (first, 0), (first, 1)]):
        for end in ("mlp.up_proj", "self_attn.o_proj", "mlp.down_proj"):
            value = source[f"model.layers.{layer}.{end}.weight"]
            value = value * 0 if place > 2 and end != "mlp.up_proj" else value
            torch.testing.assert_close(found[f"model.layers.{place}.{end}.weight"], value)
    torch.testing.assert_close(found["lm_head.weight"], first["lm_head.weight"])
    # Layers that pass their input on change nothing.
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = torch.arange(10)[None]
    before = hf(tokens).logits
    hf.model.layers = hf.model.layers[:3]
    torch.testing.assert_close(hf(tokens).logits, before)
    with pytest.raises(ModelError, match="slices.0: layers 3 to 5 of .* which has 4 layers"):
        merge(tmp_path / "x", base, slices=[{"source": other, "layers": [3, 5]}])
    with pytest.raises(ModelError, match="has a configuration with"):
        merge(tmp_path / "y", base, slices=[{"source": make(3, intermediate_size=48), "layers": [0, 2]}])


@pytest.mark.parametrize(("kind", "rslora"), [("llama", True), ("gpt2", False)])
def test_adapters_are_merged_into_their_base(kind: str, rslora: bool, make: Maker, tmp_path: Path) -> None:
    base = make(0, kind)
    names = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[kind]
    turned = {"fan_in_fan_out": True} if kind == "gpt2" else {"alpha_pattern": {"down_proj": 3}}
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=names, use_rslora=rslora, **turned)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    for name, parameter in peft.named_parameters():
        parameter.data = torch.randn_like(parameter) if "lora_B" in name else parameter.data
    peft.save_pretrained(tmp_path / "adapter")
    found, entry = merge(tmp_path / "merged", base, models=[str(tmp_path / "adapter")], algorithm="linear")
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    close(found, whole.merge_and_unload().state_dict(), 1e-5)
    assert "added to" in entry["merged"]["models"][0]["adapter"]


def test_other_adapters_and_made_models_are_written_first(make: Maker, tmp_path: Path) -> None:
    base = make(0)
    settings = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    for name, parameter in peft.named_parameters():
        parameter.data = torch.randn_like(parameter) if "lora_B" in name else parameter.data
    peft.save_pretrained(tmp_path / "adapter")
    found, _ = merge(tmp_path / "merged", "tiny:llama", models=[str(tmp_path / "adapter")], algorithm="linear")
    close(found, peft.merge_and_unload().state_dict(), 1e-5)


def test_models_that_do_not_fit_are_refused(make: Maker, tmp_path: Path) -> None:
    base = make(0)

    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(ModelError, match=match):
            merge(tmp_path / "x", base, **({"algorithm": "linear"} | settings))

    refused("is of type gpt2, and the base .* of type llama", models=[make(0, "gpt2")])
    refused("has 4 layers, and the base .* has 2", models=[make(1, num_hidden_layers=4)])
    refused("is .* in .* and .* in the base", models=[make(3, intermediate_size=48)])
    biased = make(4, attention_bias=True)
    refused(r"does not have the tensors .*: it has model\.layers\.\S*bias, .* too$", models=[biased])
    with pytest.raises(ModelError, match=r"the tensors .*: it lacks model\.layers\.\S*bias, [^ ]*bias, [^ ]*$"):
        merge(tmp_path / "x", biased, models=[base], algorithm="linear")
    refused("can't be merged: weights .* sum to zero", models=["base", {"source": base, "weight": -1}])
    template = tmp_path / "template"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(template)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(template)
    refused("has another chat template than .*template: set chat_template", models=[str(template)])
    refused("none of the sources", models=[str(template)], chat_template="nothing")
    for chosen, expected in (
        (str(template), tokenizer.chat_template),
        ("base", tiny_tokenizer().chat_template),
        ("{{ 1 }}", "{{ 1 }}"),
    ):
        merge(tmp_path / "t", base, models=[str(template)], algorithm="linear", chat_template=chosen)
        assert AutoTokenizer.from_pretrained(tmp_path / "t" / "model").chat_template == expected
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(template)
    refused("differs from the base's: 1 tokens more .'<new>'.", models=[str(template)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ["a"]}, "models need an algorithm"),
        ({}, "set either models"),
        ({"models": ["a"], "algorithm": "slerp"}, "slerp takes 2 models"),
        ({"models": ["a", {"source": "b", "weight": 2}], "algorithm": "slerp"}, "t says where"),
        ({"models": [{"source": "b", "density": 0.5}], "algorithm": "linear"}, "has a density, and linear has none"),
        ({"models": ["a"], "algorithm": {"name": "ties", "density": 2}}, "at most 1"),
        ({"models": ["a"], "algorithm": {"name": "ties", "density": []}}, "empty"),
        ({"models": ["a"], "algorithm": "tise"}, "Did you mean ties"),
        ({"slices": [{"source": "a", "layers": [3, 3]}]}, "first < end"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MergeConfig.model_validate(settings)


def test_end_tokens_of_all_models(make: Maker, tmp_path: Path) -> None:
    base = make(0)
    other = tmp_path / "other"
    hf = AutoModelForCausalLM.from_pretrained(base)
    hf.generation_config.eos_token_id = [0, 2]
    hf.save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    own = json.loads((Path(base) / "generation_config.json").read_text()).get("eos_token_id")
    merge(tmp_path / "m", base, models=[str(other)], algorithm="linear")
    ends = json.loads((tmp_path / "m" / "model" / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == {0, 2} | ({own} if isinstance(own, int) else set(own or ()))


def test_revisions_of_one_model_stay_apart(make: Maker, tmp_path: Path) -> None:
    """A folder has no revisions, so what differs between those of a Hub model is set once they are open."""
    base, other = make(0), make(1)
    models = [base, *({"source": other, "revision": name} for name in "ab")]
    settings = {"models": models, "algorithm": "linear"}
    model = ModelConfig(source=base, device="cpu")
    opened, sources = open_sources(MergeConfig.model_validate(settings), model, lambda: tmp_path)
    assert sources[base, None] is opened  # opened once
    second = sources[other, "b"]
    second.tokenizer.chat_template, second.generation.eos_token_id = "{{ 2 }}", [0, 2]
    with pytest.raises(ModelError, match=f"has another chat template than {other}@b: set"):
        write_merged(MergeConfig.model_validate(settings), opened, sources, tmp_path / "x", 0)
    chosen = MergeConfig.model_validate({**settings, "chat_template": f"{other}@b"})
    entry = write_merged(chosen, opened, sources, tmp_path / "m", 0)
    assert [m["source"] for m in entry["merged"]["models"]] == [base, f"{other}@a", f"{other}@b"]
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == "{{ 2 }}"
    assert {0, 2} <= set(json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"])


def test_models_with_own_code(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds that folder
    folders = [tmp_path / "a", tmp_path / "b"]
    for source, folder in zip((make(0), make(1)), folders, strict=True):
        shutil.copytree(source, folder)
        (folder / "modeling_own.py").write_text(OWN_CODE)
        settings = json.loads((folder / "config.json").read_text()) | {"model_type": "own_llama"}
        settings["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
        (folder / "config.json").write_text(json.dumps(settings))
    config = MergeConfig.model_validate({"models": ["base", str(folders[1])], "algorithm": "linear"})
    model = ModelConfig(source=str(folders[0]), device="cpu", trust_remote_code=True)
    Merge(config, StageContext(None, None)).run(model, tmp_path, 0)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert type(hf).__name__ == "OwnModel"
    first, second = state(make(0)), state(make(1))
    close(hf.state_dict(), {name: (value + second[name]) / 2 for name, value in first.items()})


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_memory_is_bounded_by_tensors(make: Maker, tmp_path: Path) -> None:
    """Three models of 5 MB in shards of 1 MB: less than three of these, whatever the size of the models."""
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8}
    paths = [make(seed, shard="1MB", **shape) for seed in range(3)]
    assert sum(f.stat().st_size for f in Path(paths[0]).glob("*.safetensors")) > 5e6
    if not reset_peak():
        pytest.skip("the system can't reset the peak of memory")
    before = resident_bytes()
    config = MergeConfig(models=paths[1:], algorithm="ties", max_shard_gb=0.001)
    Merge(config, StageContext(None, None)).run(ModelConfig(source=paths[0], device="cpu"), tmp_path, 0)
    assert peak_bytes() - before < 3e6


def test_the_command(make: Maker, tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["merge", make(1), make(2), "--output", str(tmp_path / "m"), *arguments])

    assert "name it with --base" in run("--algorithm", "ties").output
    assert "dense" in run("--base", make(0), "--algorithm", "ties", "--setting", "dense=0.5").output
    assert "3 values, and there are 2 models" in run("--weights", "1,2,3").output
    assert "leave --algorithm" in run("--experts", "zeros", "--algorithm", "linear").output
    assert "give one of them" in run("--experts", "zeros", "--ensemble", "arithmetic").output
    assert "add --experts prompts" in run("--experts", "zeros", "--prompts", "rows.jsonl").output
    assert "--prompts was given 1 values" in run("--experts", "prompts", "--prompts", "rows.jsonl").output
    refused = run("--algorithm", "slerp", "--weights", "1,2").output
    assert "slerp takes no weights" in refused and "Value error" not in refused
    done = run("--base", make(0), "--algorithm", "task_arithmetic", "--setting", "scale=0.5", "--weights", "1,0.5")
    assert done.exit_code == 0, done.output
    base, first, second = (state(make(seed)) for seed in range(3))
    expected = {n: v + 0.5 * (first[n] - v) + 0.25 * (second[n] - v) for n, v in base.items()}
    close(state(str(tmp_path / "m")), expected)
    assert "exists already" in run().output and [p.name for p in tmp_path.iterdir()] == ["m"]
