"""Soft prompts in whole runs: resumed to the same bits, continued by other methods, used without peft."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaForSequenceClassification
from typer.testing import CliRunner

import posttrain
from posttrain.cli.main import app
from posttrain.config import AdapterConfig, ModelConfig
from posttrain.core.errors import ModelError
from posttrain.core.files import read_lines
from posttrain.methods.reward_model.scorer_stage import ScorerConfig
from posttrain.models.cache_names import cache_argument
from posttrain.models.classification_head import check_soft_start
from posttrain.models.loading import load_model
from posttrain.models.saving import restore_attention
from posttrain.models.soft_prompt import soft_prompt_inputs
from posttrain.models.soft_prompt_files import bake
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.rewards.reward_model_scorer import RewardModel
from posttrain.trainer.train_step import Learner

ROWS = [{"prompt": f"say {i}", "completion": f"{i % 7} abc"} for i in range(24)]
PAIRS = [{"prompt": f"say {i}", "chosen": f"{i % 7} abc", "rejected": "xyz"} for i in range(12)]
PROBLEMS = [{"prompt": f"say {i}", "answer": "-"} for i in range(8)]
DIGITS = {"kind": "length", "unit": "characters", "target": 4, "width": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("rows", ROWS), ("pairs", PAIRS), ("problems", PROBLEMS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sft(data: Path, adapter: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "method": "sft",
        "data": {"source": str(data / "rows.jsonl"), "chat": False},
        "adapter": adapter,
        "batch_size": 4,
        "max_steps": 6,
        "optimizer": {"lr": 0.01},
        "checkpoint_every": 2,
        **more,
    }


def run(stages: list[dict[str, Any]], folder: Path, source: str = "tiny:llama") -> posttrain.RunResult:
    recipe = posttrain.Recipe.model_validate({"name": "soft", "model": {"source": source}, "stages": stages})
    return posttrain.run(recipe, folder)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models of two runs: vectors, and keys and values of every layer."""
    folder = tmp_path_factory.mktemp("trained")
    kinds = {"prompt": {"kind": "prompt", "tokens": 3}, "prefix": {"kind": "prefix", "tokens": 3}}
    return {name: run([sft(data, adapter)], folder / name).model for name, adapter in kinds.items()}


def test_an_interrupted_run_ends_in_the_same_bits(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = sft(data, {"kind": "p_tuning"}, held_out=0.2, held_out_answers=1, evaluate_every=2)
    calm, step = run([stage], tmp_path / "calm"), Learner.step

    def fails(self: Learner, *args: Any, **kwargs: Any) -> Any:
        if self.steps_done == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Learner, "step", fails)
        run([stage], tmp_path / "again")
    again = run([stage], tmp_path / "again")
    files = [r.model / "adapter_model.safetensors" for r in (calm, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    metrics = [(r.folder / "stages" / "0-sft" / "metrics.jsonl").read_text() for r in (calm, again)]
    assert metrics[0] == metrics[1]
    manifest = json.loads((again.folder / "manifest.json").read_text())
    (entry,), model = manifest["stages"], manifest["model"]
    assert (
        entry["tokens_per_second"] > 0 and entry["peak_memory_mb"] > 0 and entry["trainable"] == model["trainable"] > 0
    )


@pytest.mark.parametrize(("kind", "source"), [("prompt", "prompt"), ("p_tuning_v2", "prefix")])
def test_preferences_and_rl_continue_a_soft_prompt(
    kind: str, source: str, data: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    """The reference is the model that the stage starts from: DPO begins at a loss of log 2, RL at a divergence of 0."""
    dpo = {"method": "dpo", "data": {"source": str(data / "pairs.jsonl"), "chat": False}, "max_steps": 2}
    problems = {"kind": "rows", "data": {"source": str(data / "problems.jsonl"), "chat": False}}
    grpo = {
        "method": "grpo", "problems": problems, "rewards": [DIGITS], "steps": 2, "prompts_per_step": 2,
        "group_size": 4, "sampler": {"max_tokens": 6}, "kl": {"coefficient": 0.1},
    }  # fmt: skip
    stages = [s | {"adapter": {"kind": kind}, "optimizer": {"lr": 0.01}} for s in (dpo, grpo)]
    result = run(stages, tmp_path / "run", str(trained[source]))
    first, second = (read_lines(f / "metrics.jsonl") for f in sorted((result.folder / "stages").iterdir()))
    assert first[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    steps = [m for m in second if m["step"]]
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6) and steps[0]["grad_norm"] > 0
    settings = json.loads((result.model / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "tiny:llama" and settings["num_virtual_tokens"] == 3
    before, after = (
        load_file(m / "adapter_model.safetensors")["prompt_embeddings"] for m in (trained[source], result.model)
    )
    assert before.shape == after.shape and not torch.equal(before, after)
    PeftModel.from_pretrained(tiny_model("llama"), result.model)


def test_other_training_on_a_soft_prompt_is_refused(data: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    source = str(trained["prompt"])
    for adapter, message in (
        ({"kind": "lora"}, "lora can't be trained on top of the soft prompt"),
        ({"kind": "prefix"}, "continue it with adapter kind prompt"),
        ({"kind": "prompt", "tokens": 4}, "adapter.tokens is 4, but the soft prompt to start from has 3"),
        (None, "every weight can't be trained on top of the soft prompt"),
    ):
        with pytest.raises(ModelError, match=message):
            run([sft(data, adapter)], tmp_path / "run", source)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="does not fit its base"):
        settings = json.loads((trained["prompt"] / "adapter_config.json").read_text())
        other = tmp_path / "other"
        tiny_model("llama", hidden_size=64).save_pretrained(tmp_path / "wider")
        tiny_tokenizer().save_pretrained(tmp_path / "wider")
        other.mkdir()
        (other / "adapter_model.safetensors").write_bytes(
            (trained["prompt"] / "adapter_model.safetensors").read_bytes()
        )
        named = settings | {"base_model_name_or_path": str(tmp_path / "wider")}
        (other / "adapter_config.json").write_text(json.dumps(named))
        load_model(ModelConfig(source=str(other)))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_baked_soft_prompt_is_used_without_peft(kind: str, trained: dict[str, Path], tmp_path: Path) -> None:
    """As docs/prompt-tuning.md has it: the embeddings of a whole prompt, and a cached prefix."""
    model, _ = load_model(ModelConfig(source=str(trained[kind])))
    restore_attention(model)
    ids = torch.tensor([[5, 9, 13, 7]])
    expected = model(input_ids=ids).logits[:, -4:]
    baked, plain = load_file(bake(model, tmp_path / "baked")), tiny_model("llama").eval()
    if kind == "prompt":
        x = torch.cat([baked["vectors"], plain.get_input_embeddings()(ids[0])])
        assert torch.allclose(plain(inputs_embeds=x[None]).logits[:, -4:], expected, atol=1e-5)

    def cache() -> DynamicCache:
        made = DynamicCache(config=plain.config)
        for layer, (keys, values) in enumerate(zip(baked["keys"], baked["values"], strict=True)):
            made.update(keys[None], values[None], layer)
        return made

    name = cache_argument(plain)
    assert torch.allclose(plain(ids, **{name: cache()}).logits, expected, atol=1e-5)
    filled = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours = plain.generate(filled, attention_mask=torch.ones_like(filled), **{name: cache()}, **options)
    inputs = soft_prompt_inputs(model, ids)
    mask = torch.ones(next(iter(inputs.values())).shape[:2], dtype=torch.long)
    theirs = model.get_base_model().generate(**inputs, attention_mask=mask, **options)
    assert ours[0, -5:].tolist() == theirs[0, -5:].tolist()


def test_the_command_bakes_the_result_of_a_run(trained: dict[str, Path], tmp_path: Path) -> None:
    for kind, names in (("prompt", {"vectors", "keys", "values"}), ("prefix", {"keys", "values"})):
        done = CliRunner().invoke(app, ["bake", str(trained[kind].parent), str(tmp_path / kind)])
        assert done.exit_code == 0 and "base   tiny:llama" in done.output, done.output
        assert load_file(tmp_path / kind / "soft_prompt.safetensors").keys() == names
    again = CliRunner().invoke(app, ["bake", str(trained["prefix"].parent), str(tmp_path / "prompt")])
    assert again.exit_code == 1 and "soft_prompt.safetensors exists already: name another folder" in again.output
    assert "vectors" in load_file(tmp_path / "prompt" / "soft_prompt.safetensors")
    assert "vectors [3, 32]" not in done.output and "keys   [2, 2, 3, 8]" in done.output
    done = CliRunner().invoke(app, ["bake", "tiny:llama", str(tmp_path / "none")])
    assert done.exit_code == 1 and "is a whole model, and no soft prompt: name the run's folder" in done.output
    assert not (tmp_path / "none").exists()


def test_a_reward_model_with_a_soft_prompt(data: Path, tmp_path: Path) -> None:
    """Trained, opened as a reward, by transformers with peft's prefix, and by peft alone: the same scores."""
    stage = {
        "method": "reward_model", "data": {"source": str(data / "pairs.jsonl"), "chat": False}, "max_steps": 3,
        "batch_size": 4, "adapter": {"kind": "p_tuning_v2", "tokens": 3}, "optimizer": {"lr": 0.05},
    }  # fmt: skip
    folder = run([stage], tmp_path / "run").folder / "stages" / "0-reward_model" / "reward_model"
    losses = [m["loss"] for m in read_lines(folder.parent / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    scorer = RewardModel(str(folder))
    scores = scorer.scores(["say 1", "say 2"], ["1 abc", "xyz"])[0]
    trunk = tiny_model("llama")
    trunk.config.num_labels, trunk.config.pad_token_id = 1, scorer.members[0].tokenizer.pad_token_id
    base = LlamaForSequenceClassification(trunk.config)
    base.model.load_state_dict(trunk.model.state_dict())
    theirs = PeftModel.from_pretrained(base, folder).eval()
    for prompt, completion, score in zip(["say 1", "say 2"], ["1 abc", "xyz"], scores, strict=True):
        ids = torch.tensor([scorer.members[0].answer(prompt, completion)])
        expected = pytest.approx(float(score), abs=1e-5)
        inputs = soft_prompt_inputs(theirs, ids) | {"input_ids": ids}
        assert float(theirs.get_base_model()(**inputs).logits[0, 0].detach()) == expected
        if cache_argument(base) == "past_key_values":  # peft 0.21 refuses a classifier whose cache has the newer name
            assert float(theirs(input_ids=ids).logits[0, 0].detach()) == expected
    with pytest.raises(ValidationError, match="a process reward model is saved whole"):
        ScorerConfig(method="process_reward", adapter={"kind": "prompt"})
    with pytest.raises(ModelError, match="is an adapter, on which no reward model with a soft prompt"):
        check_soft_start(ModelConfig(source=str(folder)), AdapterConfig(kind="prompt"))
