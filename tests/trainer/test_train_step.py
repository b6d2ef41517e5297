"""One step, however it is split: micro-batches, order, shared prefixes; parity with transformers' own loss."""

from __future__ import annotations

import random

import pytest
import torch

from posttrain.config import AdapterConfig, OptimizerConfig, SystemsConfig
from posttrain.core.errors import NonFiniteError
from posttrain.core.types import Sample
from posttrain.models.adapters import attach, count_parameters
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from posttrain.trainer.train_step import Learner, cross_entropy
from tests.conftest import family, random_samples


def learner(systems: SystemsConfig | None = None, lr: float = 1e-3, steps: int = 10, adapter: bool = False) -> Learner:
    hf = tiny_model("llama")
    if adapter:
        hf = attach(hf, AdapterConfig(r=4), seed=0)
    return Learner(LanguageModel(hf), OptimizerConfig(lr=lr), systems or SystemsConfig(), steps)


def gradients(samples: list[Sample], systems: SystemsConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and accumulated gradients of a step that is split as `systems` says, before clipping."""
    one = learner(systems)
    found: dict[str, torch.Tensor] = {}

    def keep(norms: object) -> float:
        found.update({n: m.grad.clone() for n, m in one.optimizer.masters.items() if m.grad is not None})
        return 1.0

    one.optimizer.clip = keep  # type: ignore[method-assign]
    result = one.step(samples)
    return result.metrics["loss"], found


@pytest.mark.parametrize("make", [lambda: random_samples(9), family], ids=["apart", "sharing"])
def test_the_step_is_the_same_for_any_budget_order_and_sharing(make) -> None:  # type: ignore[no-untyped-def]
    samples = make()
    loss, expected = gradients(samples, SystemsConfig(tokens_per_micro_batch=100_000))
    shuffled = list(samples)
    random.Random(0).shuffle(shuffled)
    variants = [
        (samples, SystemsConfig(tokens_per_micro_batch=1)),
        (samples, SystemsConfig(tokens_per_micro_batch=64)),
        (samples, SystemsConfig(share_prefixes=False)),
        (shuffled, SystemsConfig(tokens_per_micro_batch=97)),
        (samples, SystemsConfig(tokens_per_micro_batch=64, activation_checkpointing=True)),
    ]
    scale = max(float(g.abs().max()) for g in expected.values())
    for data, systems in variants:
        other, found = gradients(data, systems)
        assert other == pytest.approx(loss, rel=1e-6)
        assert found.keys() == expected.keys()
        for name, g in expected.items():
            assert float((found[name] - g).abs().max()) <= 1e-6 * scale, (systems, name)


def test_loss_and_gradient_equal_transformers_own() -> None:
    """A small padded batch through transformers' loss (labels -100 elsewhere), which divides by all loss tokens."""
    samples = random_samples(4)
    hf = tiny_model("llama").eval()
    width = max(len(s) for s in samples)
    ids = torch.zeros(4, width, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, s in enumerate(samples):
        n, tokens = len(s), torch.tensor(s.tokens)
        ids[i, :n], mask[i, :n] = tokens, 1
        labels[i, :n] = torch.where(torch.tensor(s.weights) > 0, tokens, -100)
    theirs = hf(input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()
    loss, found = gradients(samples, SystemsConfig())
    assert loss == pytest.approx(float(theirs.detach()), abs=1e-5)
    for name, p in hf.named_parameters():
        assert float((found[f"hf.{name}"] - p.grad).abs().max()) < 1e-5, name


def test_weights_scale_what_a_token_counts() -> None:
    """Weight 2 on one token equals the token twice in numerator and denominator."""
    model = LanguageModel(tiny_model("llama"))
    batch = model.pack([Sample([5, 6, 7, 8], [0, 1, 2, 0])])
    loss, _ = cross_entropy(model, batch, 3.0)
    logprobs, _ = model(batch)
    assert float(loss) == pytest.approx(float(-(logprobs[0] + 2 * logprobs[1]) / 3), abs=1e-6)


def test_learning_lowers_the_loss_and_adapters_train_alone() -> None:
    samples = random_samples(4)
    for one, drop in ((learner(lr=3e-2, steps=20), 0.3), (learner(lr=0.1, steps=20, adapter=True), 0.05)):
        frozen = {n: p.detach().clone() for n, p in one.model.named_parameters() if not p.requires_grad}
        losses = [one.step(samples).metrics["loss"] for _ in range(20)]
        assert losses[-1] < losses[0] - drop, losses
        for name, p in one.model.named_parameters():
            if name in frozen:
                assert torch.equal(p, frozen[name]), name
    total, trainable = count_parameters(one.model)
    assert 0 < trainable < total / 3


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_every_kind_of_adapter_starts_as_the_model_itself(kind: str) -> None:
    samples = random_samples(3)
    base = LanguageModel(tiny_model("llama"))
    plain = base(base.pack(samples))[0]
    adapted = LanguageModel(attach(tiny_model("llama"), AdapterConfig(kind=kind, r=4), seed=0))  # type: ignore[arg-type]
    torch.testing.assert_close(adapted(adapted.pack(samples))[0], plain, atol=1e-5, rtol=0)


def test_samples_without_weight_cost_nothing_and_change_nothing() -> None:
    useful = random_samples(3)
    idle = Sample(list(range(3, 50)), [0.0] * 47)
    a, b = learner(), learner()
    with_idle, without = a.step([*useful, idle]), b.step(useful)
    assert with_idle.metrics["loss"] == without.metrics["loss"]
    assert with_idle.computed_tokens == without.computed_tokens
    assert with_idle.tokens == without.tokens + 47
    before = {n: m.detach().clone() for n, m in a.optimizer.masters.items()}
    a.step([idle])
    assert all(torch.equal(m, before[n]) for n, m in a.optimizer.masters.items())


def test_a_step_that_is_not_finite_is_skipped_counted_and_after_five_stops_the_run() -> None:
    one = learner()
    good = random_samples(3)
    one.step(good)
    before = {n: m.detach().clone() for n, m in one.optimizer.masters.items()}
    poisoned = [Sample(s.tokens, [w * float("inf") if w else 0.0 for w in s.weights]) for s in good]
    assert one.step(poisoned).metrics["skipped"] == 1
    assert all(torch.equal(m, before[n]) for n, m in one.optimizer.masters.items())
    assert one.step(good).metrics["skipped"] == 0 and one.skipped == 1
    for _ in range(4):
        one.step(poisoned)
    with pytest.raises(NonFiniteError, match="lower optimizer.lr"):
        one.step(poisoned)
    assert one.skipped == 6


def test_bfloat16_follows_float32() -> None:
    """bf16 compute over float32 masters: the same trajectory to bf16's accuracy."""
    samples = random_samples(4)
    one = learner(lr=3e-3)
    half = Learner(LanguageModel(tiny_model("llama").to(torch.bfloat16)), OptimizerConfig(lr=3e-3), SystemsConfig(), 10)
    assert half.optimizer.masters.keys() == one.optimizer.masters.keys()
    assert all(m.dtype == torch.float32 for m in half.optimizer.masters.values())
    for _ in range(6):
        a, b = one.step(samples).metrics["loss"], half.step(samples).metrics["loss"]
        assert b == pytest.approx(a, rel=0.02)


@pytest.mark.long
def test_compiled_layers_give_the_same_step() -> None:
    """torch.compile (C++ on a CPU): the same loss and gradient norm, and something was compiled."""
    samples = random_samples(3)
    torch._dynamo.utils.counters.clear()
    a = learner(SystemsConfig(compile=True)).step(samples).metrics
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    b = learner().step(samples).metrics
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
