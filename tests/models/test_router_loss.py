"""The router loss of mixtures of experts: transformers' number, for any split and on shared prefixes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from posttrain.config import OptimizerConfig, SystemsConfig
from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.models.language_model import LanguageModel
from posttrain.models.router_loss import RouterLoss
from posttrain.models.tiny_model import tiny_model
from posttrain.models.verification import verify
from posttrain.trainer.train_step import Learner, cross_entropy
from tests.conftest import family

CONFIG = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)
TYPES = [
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe", "jetmoe", "minimax", "jamba",
    "ernie4_5_moe", "dbrx", "flex_olmo",
]  # fmt: skip


def of(kind: str, **changes: Any) -> LanguageModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LanguageModel(tiny_model(kind, output_router_logits=True, **changes))


def padded(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """A batch as transformers takes it: padded on the right, with a mask."""
    width = max(map(len, samples))
    fill = lambda values, pad: torch.tensor([[*v, *[pad] * (width - len(v))] for v in values])  # noqa: E731
    return {
        "input_ids": fill([s.tokens for s in samples], 0),
        "attention_mask": fill([[1] * len(s) for s in samples], 0),
        "labels": fill([[t if w else -100 for t, w in zip(s.tokens, s.weights, strict=True)] for s in samples], -100),
    }


@pytest.mark.parametrize("kind", TYPES)
def test_equal_to_transformers_at_the_start(kind: str) -> None:
    """`verify` compares one sequence with `aux_loss`; this compares the loss of a whole batch."""
    model = of(kind)
    assert model.router_loss is not None and model.router_loss.coefficient > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verify(model)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_step_s_loss_and_gradient_are_transformers_own(kind: str) -> None:
    """Rows of different lengths in one padded batch there, ragged here; any split gives the same step."""
    samples = [Sample(list(range(3 + i, 12 + 4 * i)), [0.0] * 3 + [1.0] * (6 + 3 * i)) for i in range(4)]
    hf = tiny_model(kind, output_router_logits=True, router_aux_loss_coef=0.5).eval()
    hf.set_attn_implementation("eager")
    out = hf(**padded(samples), use_cache=False)
    out.loss.backward()
    norm = torch.stack([p.grad.norm() for p in hf.parameters() if p.grad is not None]).norm()
    for budget in (768, 25):
        model = of(kind, router_aux_loss_coef=0.5)
        learner = Learner(model, CONFIG, SystemsConfig(tokens_per_micro_batch=budget), 5)
        result = learner.step(samples)
        assert (result.micro_batches > 1) == (budget == 25)
        assert result.metrics["router_loss"] == pytest.approx(float(out.aux_loss.detach()), rel=1e-5)
        assert result.metrics["loss"] == pytest.approx(float(out.loss.detach()), rel=1e-5)
        assert result.metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_shared_prefixes_and_checkpointing_change_nothing() -> None:
    metrics = []
    for systems in (
        SystemsConfig(share_prefixes=False),
        SystemsConfig(share_prefixes=True),
        SystemsConfig(tokens_per_micro_batch=60, activation_checkpointing=True),
    ):
        learner = Learner(of("qwen3_moe", router_aux_loss_coef=0.5), CONFIG, systems, 5)
        metrics.append([learner.step(family()).metrics for _ in range(2)])
    for other in metrics[1:]:
        for a, b in zip(metrics[0], other, strict=True):
            assert {k: b[k] for k in ("loss", "router_loss")} == pytest.approx(
                {k: a[k] for k in ("loss", "router_loss")}, rel=1e-5
            )


def test_by_hand() -> None:
    """Two tokens, two experts, one each: f = (1, 0) and P the mean softmax."""
    from posttrain.models.router_loss import routing_of

    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [9.0, -9.0]])  # the third lies after the batch
    routing = routing_of([logits], torch.ones(2), 1)
    p = float((torch.sigmoid(torch.tensor(2.0)) + torch.sigmoid(torch.tensor(1.0))) / 2)
    assert float(RouterLoss(0.1, 1).share(routing, routing)) == pytest.approx(2 * 1.0 * p)
    twice = routing_of([logits], torch.tensor([2.0, 1.0]), 1)  # the first token is in two samples
    p = float((2 * torch.sigmoid(torch.tensor(2.0)) + torch.sigmoid(torch.tensor(1.0))) / 3)
    assert float(RouterLoss(0.1, 1).share(twice, twice)) == pytest.approx(2 * p)


def test_models_that_do_not_ask_for_it_do_not_get_it() -> None:
    assert LanguageModel(tiny_model("mixtral")).router_loss is None
    assert of("llama").router_loss is None
    learner = Learner(LanguageModel(tiny_model("mixtral")), CONFIG, SystemsConfig(), 2)
    assert "router_loss" not in learner.step(family()).metrics


def test_only_passes_with_gradients_count() -> None:
    """A loss that also runs the model without them (a reference, say)."""

    def loss(model: LanguageModel, batch: Any, denominator: float) -> Any:
        value = cross_entropy(model, batch, denominator)
        with torch.no_grad():
            model(batch, "logprobs")
        return value

    plain, both = (Learner(of("mixtral"), CONFIG, SystemsConfig(), 2).step(family(), f).metrics for f in (None, loss))
    assert both["router_loss"] == pytest.approx(plain["router_loss"], rel=1e-6)


def test_another_form_of_the_loss_is_refused() -> None:
    """Doge's routers score keys, not experts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LanguageModel(
            tiny_model("doge", output_router_logits=True, is_moe=True, num_experts=16, num_experts_per_tok=2)
        )
        with pytest.raises(ModelError, match="doge: .*"):
            verify(model)
