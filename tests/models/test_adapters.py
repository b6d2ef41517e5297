"""Kinds of adapters, from outside too; and adapters that training would ignore."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from peft import CPTConfig, IA3Config, LoHaConfig, LoraConfig, get_peft_model
from pydantic import ValidationError

from posttrain.config import AdapterConfig, OptimizerConfig, SystemsConfig
from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.models.adapters import attach
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from posttrain.trainer.train_step import Learner


def ia3(hf: Any, config: AdapterConfig, seed: int, task: str, *, feedforward: tuple[str, ...] = ("down_proj",)) -> Any:
    """(IA)^3 (arXiv 2205.05638): one learned factor for each key, value and inner activation."""
    targets = ["k_proj", "v_proj", *feedforward]
    return get_peft_model(hf, IA3Config(task_type=task, target_modules=targets, feedforward_modules=list(feedforward)))


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_adapters")
    module.ia3 = ia3  # type: ignore[attr-defined]
    module.nothing = lambda hf, config, seed, task: hf  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_adapters", module)


def test_a_kind_from_outside_is_trained(outside: None) -> None:
    hf = attach(tiny_model("llama"), AdapterConfig(kind="my_adapters:ia3"), seed=0)
    learner = Learner(LanguageModel(hf), OptimizerConfig(lr=1e-2), SystemsConfig(), 3)
    losses = [learner.step([Sample([5, 6, 7, 8], [0, 1, 1, 1])]).metrics["loss"] for _ in range(3)]
    assert all("ia3" in name for name in learner.optimizer.parameters) and losses[2] < losses[0]


def test_what_a_kind_from_outside_may_be_told(outside: None) -> None:
    options = {"feedforward": ["up_proj"]}
    attach(tiny_model("llama"), AdapterConfig(kind="my_adapters:ia3", options=options), seed=0)
    with pytest.raises(ValidationError, match="no setting feed_forward .it has: .'feedforward'"):
        AdapterConfig(kind="my_adapters:ia3", options={"feed_forward": []})
    with pytest.raises(ValidationError, match="lora has no setting feedforward"):
        AdapterConfig(options=options)
    with pytest.raises(ModelError, match="expected a peft model from it, got LlamaForCausalLM"):
        attach(tiny_model("llama"), AdapterConfig(kind="my_adapters:nothing"), seed=0)


def test_an_unknown_kind_gets_the_nearest_name() -> None:
    with pytest.raises(ValidationError, match="Did you mean rslora"):
        AdapterConfig(kind="rs_lora")
    with pytest.raises(ValidationError, match="can't be imported"):
        AdapterConfig(kind="my_adapters_that_are_not_there:f")


@pytest.mark.parametrize(
    "config",
    [
        CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"], use_dora=True),
        LoHaConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"]),
    ],
    ids=["cpt", "dora head", "loha head"],
)
def test_parameters_that_would_get_no_gradient_are_refused(config: Any) -> None:
    with pytest.raises(ModelError, match="would get no gradient"):
        LanguageModel(get_peft_model(tiny_model("llama"), config))


def test_a_head_that_is_trained_as_a_whole_is_not_refused() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = LanguageModel(get_peft_model(tiny_model("llama", tie_word_embeddings=False), config))
    model(model.pack([Sample([5, 6, 7], [0, 1, 1])]), "cross_entropy")[0].backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()}
    assert any("lm_head" in n for n in trained) and any("lora_B" in n for n in trained)
