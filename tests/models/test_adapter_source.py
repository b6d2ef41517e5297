"""A stage that starts from an adapter: trained on top of it, its reference is that model, and nothing of it is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain.config import AdapterConfig, EpochsConfig, ModelConfig
from posttrain.core.errors import ModelError
from posttrain.models.classification_head import open_head
from posttrain.models.loading import load_model, load_tokenizer
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.trainer.policy import open_policy, save_policy
from posttrain.trainer.reference_model import fingerprint, without_adapters

TOKENS = torch.arange(3, 40)[None]


def logits(model: Any) -> torch.Tensor:
    """transformers' own, of a model or a peft model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("eager")
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def stir(model: Any, seed: int = 0) -> Any:
    """Move everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def save_base(folder: Path, kind: str = "llama") -> str:
    tiny_model(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_start(folder: Path, base: str, **settings: Any) -> Any:
    """An adapter as peft alone writes it, without a tokenizer; returns the model."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings
    model = stir(get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings)), 7)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def base(tmp_path: Path) -> str:
    return save_base(tmp_path / "base")


STARTS = {
    "lora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 20}},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_is_opened_as_the_model_that_it_makes(start: str, base: str, tmp_path: Path) -> None:
    expected = logits(save_start(tmp_path / "start", base, **STARTS[start]))
    model, tokenizer = load_model(ModelConfig(source=str(tmp_path / "start")))
    close(logits(model), expected)
    assert not hasattr(model, "peft_config") and all(p.requires_grad for p in model.parameters())
    assert tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"  # its base's


@pytest.mark.parametrize(
    ("start", "kind", "merge"),
    [
        ("lora", "lora", False), ("rslora", "lora", True), ("rslora", "rslora", False), ("dora", "lora", False),
        ("lora", "dora", True), ("dora", "dora", False), ("lora", None, True),
    ],
)  # fmt: skip
def test_a_stage_trains_on_top_and_saves_the_sum(
    start: str, kind: str | None, merge: bool, base: str, tmp_path: Path
) -> None:
    expected = logits(save_start(tmp_path / "start", base, **STARTS[start]))
    source = ModelConfig(source=str(tmp_path / "start"))
    adapter = AdapterConfig(kind=kind, r=3, target=["k_proj", "v_proj"]) if kind else None
    config = EpochsConfig(method="sft", adapter=adapter, merge=merge)
    opened = open_policy(config, source, seed=0)
    with without_adapters(opened.policy):  # the reference
        assert fingerprint(opened.policy) == fingerprint(open_policy(EpochsConfig(method="sft"), source, 0).policy)
        close(logits(stir(opened.policy.hf) if kind else opened.policy.hf), expected)
    stir(opened.policy.hf, 1)
    trained = logits(opened.policy.hf)
    assert float((trained - expected).abs().max()) > 0.1
    save_policy(opened, config, source, tmp_path / "out", 0, None)
    folder = tmp_path / "out" / "model"
    close(logits(load_model(ModelConfig(source=str(folder)))[0]), trained)
    if merge:
        close(logits(AutoModelForCausalLM.from_pretrained(folder)), trained)
        assert opened.notes.get("merge_difference", 0.0) < 1e-4 and opened.notes["start"]["merge_difference"] < 1e-4
    if kind is None or (merge and opened.notes["adapter"].startswith("not saved alone")):
        assert not (tmp_path / "out" / "adapter").exists()
        return
    combined = kind != "dora" and start != "dora"
    for made in (folder, tmp_path / "out" / "adapter") if not merge else (tmp_path / "out" / "adapter",):
        settings = json.loads((made / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == (base if combined else "base")
        on = AutoModelForCausalLM.from_pretrained(base if combined else made / "base")
        close(logits(PeftModel.from_pretrained(on, str(made))), trained)  # with peft alone
    assert opened.notes["adapter"] == ("combined" if combined else "on start")


def test_the_base_is_found_after_a_run_was_moved(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage on what an earlier stage of the run made names it as it is seen from the run's folder."""
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    shutil.move(base, run / "stages" / "0-sft" / "model")
    source = ModelConfig(source=str(run / "stages" / "0-sft" / "model"))
    config = EpochsConfig(method="sft", adapter=AdapterConfig(r=2), merge=False)
    opened = open_policy(config, source, 0)
    trained = logits(stir(opened.policy.hf))
    save_policy(opened, config, source, run / "stages" / "1-dpo", 0, None)
    shutil.copytree(run / "stages" / "1-dpo" / "model", run / "model")
    run.rename(tmp_path / "moved")
    settings = json.loads((tmp_path / "moved" / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "stages/0-sft/model"
    for folder in ("model", "stages/1-dpo/model", "stages/1-dpo/adapter"):
        close(logits(load_model(ModelConfig(source=str(tmp_path / "moved" / folder)))[0]), trained)
    monkeypatch.chdir(tmp_path / "moved")
    close(logits(AutoPeftModelForCausalLM.from_pretrained("model")), trained)  # as docs/models.md says


def test_an_adapter_of_the_hub(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the Hub's cache, as a download leaves it: on its base at a commit, both are named again."""
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for module in ("transformers.utils.hub", "huggingface_hub.file_download"):
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            monkeypatch.setattr(f"{module}.{name}", str(tmp_path / "hub"), raising=False)

    def publish(name: str, commit: str) -> Path:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        return repository / "snapshots" / commit

    first = save_start(tmp_path / "start", base, revision="b" * 40)
    settings = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "some/base"
    (tmp_path / "start" / "adapter_config.json").write_text(json.dumps(settings))
    shutil.copytree(tmp_path / "start", publish("some/adapter", "a" * 40))
    shutil.copytree(base, publish("some/base", "b" * 40))
    source = ModelConfig(source="some/adapter")
    assert load_tokenizer(source)("a")["input_ids"]
    config = EpochsConfig(method="sft", adapter=AdapterConfig(r=2), merge=False)
    opened = open_policy(config, source, 0)
    with without_adapters(opened.policy):
        close(logits(opened.policy.hf), logits(first))
    save_policy(opened, config, source, tmp_path / "out", 0, None)
    settings = json.loads((tmp_path / "out" / "model" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("some/base", "b" * 40)


def test_adapters_of_reward_models(base: str, tmp_path: Path) -> None:
    """peft's adapter of a sequence classification model opens with its head; that of a causal one gets a new head."""
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    model = stir(get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], task_type=TaskType.SEQ_CLS)))
    model.save_pretrained(tmp_path / "scorer")
    found, _ = open_head(ModelConfig(source=str(tmp_path / "scorer")), "sequence")
    close(logits(found), logits(model))
    with pytest.raises(ModelError, match="task_type SEQ_CLS.*causal language model is needed"):
        load_model(ModelConfig(source=str(tmp_path / "scorer")))
    with pytest.raises(ModelError, match="is a reward model"):
        open_head(ModelConfig(source=str(tmp_path / "scorer")), "token")
    start = save_start(tmp_path / "start", base)
    found, _ = open_head(ModelConfig(source=str(tmp_path / "start")), "sequence")
    start.get_base_model().set_attn_implementation("eager")
    trunk = start.get_base_model().model(input_ids=TOKENS).last_hidden_state
    close(logits(found), found.score(trunk[:, -1]).detach())


def test_adapters_that_do_not_fit(base: str, tmp_path: Path) -> None:
    save_start(tmp_path / "start", base)
    file = tmp_path / "start" / "adapter_config.json"
    good = json.loads(file.read_text())

    def fails(match: str, **settings: Any) -> None:
        file.write_text(json.dumps(good | settings))
        with pytest.raises(ModelError, match=match):
            load_model(ModelConfig(source=str(tmp_path / "start")))

    fails("names no base model. Set base_model_name_or_path", base_model_name_or_path=None)
    fails("names the adapter's folder itself", base_model_name_or_path=".")
    fails(
        r"does not fit its base .*: 4 of its 12 tensors have no place.*down_proj", target_modules=["q_proj", "v_proj"]
    )
    fails(r"does not fit its base .*: 0 of its 12 tensors have no place there and 4 are missing.*k_proj",
          target_modules=["q_proj", "v_proj", "down_proj", "k_proj"])  # fmt: skip
    fails("can't be loaded on its base .*size mismatch", r=8)
    fails("can't be loaded on its base tiny:gpt2", base_model_name_or_path="tiny:gpt2")
    fails("can't be loaded on its base .*NONSENSE", peft_type="NONSENSE")
    fails("is not on this machine and not in the Hub's cache", base_model_name_or_path="no-one/no-such-model")
    file.write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json: expected the settings of an adapter as JSON"):
        load_model(ModelConfig(source=str(tmp_path / "start")))
    file.write_text(json.dumps(good))
    shutil.copy(Path(base) / "model.safetensors", tmp_path / "start")
    with pytest.raises(ModelError, match="holds the weights of a whole model and an adapter"):
        load_model(ModelConfig(source=str(tmp_path / "start")))
