"""Mixtures of experts made of dense models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.core.files import write_lines
from posttrain.core.types import Sample
from posttrain.methods.merge.merge import Merge
from posttrain.methods.merge.merge_settings import MergeConfig
from posttrain.methods.sft import SFTConfig
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.models.verification import verify
from posttrain.trainer.policy import open_policy, save_policy
from posttrain.trainer.stage import StageContext
from posttrain.trainer.trained_part import train_only

TOKENS = torch.arange(3, 23).view(2, 10)


def write(folder: Path, kind: str, seed: int, **changes: Any) -> str:
    path = folder / f"{kind}-{seed}"
    tiny_model(kind, seed=seed, **changes).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def mix(folder: Path, base: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Run the stage; return the result as transformers opens it, and the manifest's entry."""
    folder.mkdir(exist_ok=True)
    config = MergeConfig.model_validate(settings)
    entry = Merge(config, StageContext(None, None)).run(ModelConfig(source=base, device="cpu"), folder, 3)
    return AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager").eval(), entry


@pytest.mark.parametrize(
    ("kind", "mixture", "changes"),
    [
        ("llama", "mixtral", {"tie_word_embeddings": True}),
        ("mistral", "mixtral", {"sliding_window": 4}),
        ("qwen2", "qwen2_moe", {}),
        ("qwen3", "qwen3_moe", {"head_dim": 8}),
    ],
)
@torch.no_grad()
def test_a_mixture_of_one_model_is_that_model(tmp_path: Path, kind: str, mixture: str, changes: Any) -> None:
    base = write(tmp_path, kind, 0, **changes)
    found, entry = mix(tmp_path, base, experts={"router": "random", "top_k": 2}, models=["base", base, base])
    assert found.config.model_type == mixture and entry["merged"]["algorithm"] == f"experts ({mixture})"
    assert json.loads((tmp_path / "model/config.json").read_text())["architectures"] == [type(found).__name__]
    dense = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    torch.testing.assert_close(found(TOKENS).logits, dense(TOKENS).logits, atol=1e-5, rtol=0)
    if kind == "llama":
        assert verify(LanguageModel(found)) < 1e-4
    routers = [value for name, value in found.state_dict().items() if name.endswith(".mlp.gate.weight")]
    assert len(routers) == 2 and not torch.equal(*routers) and 0.01 < float(routers[0].std()) < 0.03
    assert entry["parameters"] == sum(p.numel() for p in found.parameters())


@torch.no_grad()
def test_experts_averages_and_routers(tmp_path: Path) -> None:
    base, other = write(tmp_path, "llama", 0), write(tmp_path, "llama", 1)
    models = [{"source": base, "prompts": ["ab", "c"]}, {"source": other, "weight": 3, "prompts": ["xyz"]}]
    found, _ = mix(tmp_path, base, experts={"top_k": 1, "balance": 0.02}, models=models)
    dense = [AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval() for path in (base, other)]
    first, second = (model.state_dict() for model in dense)
    state = found.state_dict()
    for name, value in first.items():
        if ".mlp." not in name:
            torch.testing.assert_close(state[name], (value + 3 * second[name]) / 4)
    for layer in range(2):
        for number, own in enumerate((first, second)):
            gate, up, down = (own[f"model.layers.{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            experts = f"model.layers.{layer}.mlp.experts"
            torch.testing.assert_close(state[f"{experts}.gate_up_proj"][number], torch.cat([gate, up]))
            torch.testing.assert_close(state[f"{experts}.down_proj"][number], down)
    assert found.config.output_router_logits and found.config.router_aux_loss_coef == 0.02
    # The rows of a router: what the base's feed-forward part takes, by a loop over layers and prompts.
    for layer in range(2):
        rows = []
        for texts in (["ab", "c"], ["xyz"]):
            means = []
            for text in texts:
                tokens = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
                states = dense[0](tokens, output_hidden_states=True).hidden_states
                block = dense[0].model.layers[layer]
                positions = dense[0].model.rotary_emb(states[layer], torch.arange(tokens.shape[1])[None])
                mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)[None, None]
                attended = block.self_attn(block.input_layernorm(states[layer]), positions, mask)[0]
                means.append(block.post_attention_layernorm(states[layer] + attended)[0].mean(0))
            rows.append(torch.stack(means).mean(0))
        expected = torch.stack([row / row.norm() for row in rows])
        torch.testing.assert_close(state[f"model.layers.{layer}.mlp.gate.weight"], expected, atol=1e-5, rtol=0)


def test_routers_are_trained_alone(tmp_path: Path) -> None:
    base, other = write(tmp_path, "llama", 0), write(tmp_path, "llama", 1)
    rows = {"source": str(tmp_path / "rows.jsonl")}
    write_lines(tmp_path / "rows.jsonl", [{"prompt": f"{i} and 1", "completion": str(i + 1)} for i in range(4)])
    models = [{"source": "base", "prompts": rows}, {"source": other, "prompts": ["one two"]}]
    mix(tmp_path / "mixed", base, experts={}, models=models)
    model = ModelConfig(source=str(tmp_path / "mixed/model"), device="cpu")
    config = SFTConfig.model_validate({"data": rows, "train": ["*.mlp.gate"]})
    policy = open_policy(config, model, 0)
    gates = {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}
    assert policy.trainable == 2 * 2 * policy.policy.base.config.hidden_size and policy.policy.router_loss is not None
    tokens = [Sample([5, 6, 7, 8], [0.0, 1.0, 1.0, 1.0])]
    policy.policy(policy.policy.pack(tokens), "cross_entropy")[0].backward()
    before = {name: value.clone() for name, value in policy.policy.hf.state_dict().items()}
    for name, parameter in policy.policy.hf.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.abs().max() > 0)) == (name in gates)
        if parameter.grad is not None:
            parameter.data -= parameter.grad
    save_policy(policy, config, model, tmp_path, 0, None)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == gates
    with pytest.raises(ModelError, match=r"train: '\*\.gates' fits no parameter"):
        open_policy(config.model_copy(update={"train": ["*.gates"]}), model, 0)
    tied = tiny_model("llama", tie_word_embeddings=True)
    train_only(tied, ["lm_head"])
    assert [n for n, p in tied.named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match="train selects weights of the model, and an adapter"):
        SFTConfig.model_validate({"data": rows, "train": ["*.mlp.gate"], "adapter": {}})


def test_the_command_writes_what_a_stage_writes(tmp_path: Path) -> None:
    base, other = write(tmp_path, "llama", 0), write(tmp_path, "llama", 1)
    rows = [str(tmp_path / name) for name in ("first.jsonl", "second.jsonl")]
    write_lines(tmp_path / "first.jsonl", [{"text": "ab cd"}, {"text": "e"}])
    write_lines(tmp_path / "second.jsonl", [{"text": "xyz"}])
    models = [
        {"source": s, "weight": w, "prompts": {"source": p}}
        for s, w, p in zip([base, other], (1, 3), rows, strict=True)
    ]
    expected, _ = mix(tmp_path / "stage", base, experts={"top_k": 1}, models=models)
    arguments = ["--experts", "prompts", "--top-k", "1", "--weights", "1,3", "--prompts", rows[0], "--prompts", rows[1]]
    done = CliRunner().invoke(app, ["merge", base, other, "--output", str(tmp_path / "m"), *arguments])
    assert done.exit_code == 0, done.output
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert found.config.num_experts_per_tok == 1
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_what_can_not_become_experts(tmp_path: Path) -> None:
    random = {"experts": {"router": "random"}, "models": ["base", "base"]}
    asked = [{"source": "base", "prompts": {"source": "none.jsonl", "rows": [0, 4]}}] * 2
    with pytest.raises(ModelError, match="of type opt: experts are made of llama, mistral, qwen2, qwen3"):
        mix(tmp_path, write(tmp_path, "opt", 0), experts={}, models=asked)
    with pytest.raises(ModelError, match="has attention_bias, which a mixtral has no place for"):
        mix(tmp_path, write(tmp_path, "llama", 2, attention_bias=True), **random)
    for settings, message in (
        ({"experts": {}}, "router prompts needs prompts of every model"),
        ({"algorithm": "linear", "models": [{"source": "a", "prompts": ["b"]}]}, "prompts are for experts"),
        ({"experts": {"router": "zeros", "top_k": 3}}, "top_k is 3, and there are 2 models"),
        ({"experts": {"router": "zeros"}, "adapter": {}}, "leave adapter out"),
        (
            {"experts": {}, "models": asked, "search": {"coefficients": {"models.0.prompts.rows.1": [4, 8]}}},
            "no number that can be searched; there are models.0.weight, models.1.weight .type",
        ),
        ({"experts": {"router": "zeros"}, "algorithm": "linear"}, "set one of algorithm and experts"),
    ):
        with pytest.raises(ValueError, match=message):
            MergeConfig.model_validate({"models": ["a", "b"], **settings})
