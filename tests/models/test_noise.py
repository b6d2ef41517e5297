"""Nothing random is left in a forward pass while training, in any model type; what can't be switched off is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from posttrain.config import ModelConfig, OptimizerConfig, SystemsConfig
from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.models.classification_head import open_head, verify_scores
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from posttrain.models.verification import verify
from posttrain.trainer.train_step import Learner
from tests.conftest import family

TYPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_dropout": 0.3}),
    ("seed_oss", {}),  # residual_dropout of the class's default
    ("starcoder2", {"residual_dropout": 0.3, "embedding_dropout": 0.3}),
    ("phimoe", {"input_jitter_noise": 0.1}),  # its routing is sampled too
    ("mixtral", {"router_jitter_noise": 0.3}),
    ("minimax_m2", {"router_jitter_noise": 0.3, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("bloom", {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
    ("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}),
    ("opt", {"layerdrop": 0.5, "dropout": 0.3, "activation_dropout": 0.3}),
    ("biogpt", {"layerdrop": 0.5}),
    ("xglm", {"layerdrop": 0.5, "activation_dropout": 0.3}),
    ("persimmon", {"attention_dropout": 0.3, "hidden_dropout": 0.3}),
    ("rwkv", {"rescale_every": 1}),
]


@pytest.mark.parametrize(("kind", "changes"), TYPES, ids=[t for t, _ in TYPES])
def test_training_draws_no_random_number(kind: str, changes: dict[str, Any]) -> None:
    """Two passes in training mode are equal to the bit, and leave weights as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LanguageModel(tiny_model(kind, **changes)).train()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch, state = model.pack(family()), torch.get_rng_state()
    first, second = (model(batch)[0].detach() for _ in range(2))
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, model.eval()(batch)[0].detach())
    verify(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_a_step_does_not_depend_on_its_split() -> None:
    """Seed-OSS, whose residual dropout is in a function's argument: the same loss for any number of micro-batches."""
    losses = []
    for budget in (768, 40):
        learner = Learner(
            LanguageModel(tiny_model("seed_oss")),
            OptimizerConfig(lr=1e-3),
            SystemsConfig(tokens_per_micro_batch=budget),
            2,
        )
        losses.append([learner.step(family()).metrics["loss"] for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


class Noisy(torch.nn.Module):
    """A layer that drops in evaluation mode too, as `F.dropout(x, p)` does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_that_stays_is_refused(dtype: torch.dtype) -> None:
    hf = tiny_model("llama").to(dtype)
    hf.model.layers[1].mlp.act_fn = torch.nn.Sequential(hf.model.layers[1].mlp.act_fn, Noisy())
    with pytest.raises(ModelError, match="llama: two forward passes over the same tokens differ"):
        verify(LanguageModel(hf))


def test_a_reward_model_with_noise_is_refused() -> None:
    hf, _ = open_head(ModelConfig(source="tiny:llama"), "sequence")
    assert verify_scores(LanguageModel(hf), "sequence") < 1e-5
    hf, _ = open_head(ModelConfig(source="tiny:llama"), "sequence")
    hf.score.weight.data.mul_(10)
    hf.model.layers[1].mlp.act_fn = torch.nn.Sequential(hf.model.layers[1].mlp.act_fn, Noisy())
    with pytest.raises(ModelError, match="llama: posttrain's scores differ"):
        verify_scores(LanguageModel(hf), "sequence")


def test_what_differs_in_training_mode_alone_is_refused() -> None:
    """Something that follows the mode of the critic and not the model's."""
    model = LanguageModel(tiny_model("llama"))
    model.hf.model.layers[0].register_forward_hook(lambda layer, inputs, out: out * 1.1 if model.training else out)
    with pytest.raises(ModelError, match="training differs from that of sampling"):
        verify(model)


def test_checkpointed_layers_compute_the_same_step() -> None:
    """Recomputed in evaluation mode, where transformers' own checkpointing does nothing."""
    calls, losses = [], []
    for checkpointed in (False, True):
        hf = tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2)
        hf.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        systems = SystemsConfig(activation_checkpointing=checkpointed)
        learner = Learner(LanguageModel(hf), OptimizerConfig(lr=1e-3), systems, 2)
        calls.clear()
        losses.append([learner.step([Sample(range(5, 25), [0.0] + [1.0] * 19)]).metrics for _ in range(2)])
        assert len(calls) == (4 if checkpointed else 2)
    for plain, recomputed in zip(*losses, strict=True):
        assert recomputed["loss"] == pytest.approx(plain["loss"], abs=1e-6)
        assert recomputed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


@torch.no_grad()
def test_outputs_that_are_no_numbers_are_refused() -> None:
    model = tiny_model("llama")
    for value, message in ((torch.nan, r"no numbers \(NaN\)"), (0.0, "the same for all tokens")):
        model.model.norm.weight.fill_(value)
        with pytest.raises(ModelError, match=message):
            verify(LanguageModel(model))
