"""Five steps equal those of the flat loop in examples/, which shares no code with the library."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from posttrain.config import OptimizerConfig, RLConfig, SystemsConfig
from posttrain.core.types import Rollout, Sample
from posttrain.data.preference_rows import Pair
from posttrain.methods.preference.objectives import objective, pair_loss, pair_samples
from posttrain.methods.preference.offline import PreferenceConfig
from posttrain.methods.preference.pair_trainer import preference_data, with_reference
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from posttrain.trainer.reference_model import Reference
from posttrain.trainer.train_step import Learner
from tests.conftest import random_samples
from tests.methods.rl.cases import Case, fill_advantages, loss_of


def flat_loop(name: str = "sft_loop") -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_five_steps_equal_the_flat_loop(kind: str) -> None:
    """Losses at 1e-5 and weights at 1e-5, with warm-up, cosine, decay and clipping all at work."""
    batches = [random_samples(4, seed=s) for s in range(5)]
    flat = tiny_model(kind).eval()
    flat.train = lambda mode=True: flat  # the loop keeps dropout where the model has it; posttrain switches it off
    pairs = [[(list(s.tokens), [int(w) for w in s.weights]) for s in batch] for batch in batches]
    expected = flat_loop().train(flat, pairs, lr=1e-3, warmup=2, weight_decay=0.1, max_grad_norm=0.5)
    config = OptimizerConfig(lr=1e-3, warmup=2, weight_decay=0.1, max_grad_norm=0.5, schedule="cosine")
    hf = tiny_model(kind)
    learner = Learner(LanguageModel(hf), config, SystemsConfig(tokens_per_micro_batch=100), total_steps=5)
    losses = [learner.step(batch).metrics["loss"] for batch in batches]
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[0] != pytest.approx(losses[-1], abs=1e-4)
    mine = dict(hf.named_parameters())
    for name, p in flat.named_parameters():
        # Adam divides by the root of the second moment: where a gradient is next to nothing, rounding shows in full.
        assert float((mine[name] - p).abs().mean()) < 1e-6, name
        torch.testing.assert_close(mine[name], p, atol=2e-4, rtol=0)


def test_grpo_steps_equal_the_flat_loop() -> None:
    """Three steps on the same completions, so that the ratio leaves 1 and is clipped: losses and weights at 1e-5."""
    loop = flat_loop("grpo_loop")
    flat = tiny_model("llama").eval()
    torch.manual_seed(1)
    groups = [loop.sample(flat, list(range(5 + i, 25 + i)), 4, 8, 0.9, 2) for i in range(3)]
    for group in groups:
        for c in group:
            c.reward = float(sum(c.tokens) % 5)
        loop.compute_advantages(group)
    flat_batch = [c for group in groups for c in group]
    optimizer = torch.optim.AdamW(flat.parameters(), lr=3e-3, weight_decay=0.0)
    expected = [loop.learn(flat, optimizer, flat_batch, 0.9) for _ in range(3)]

    config = RLConfig.model_validate(
        {
            "method": "grpo",
            "problems": {"kind": "rows", "data": {"source": "unused"}},
            "rewards": {"terms": [{"kind": "exact"}]},
            "sampler": {"temperature": 0.9},
            "optimizer": {"lr": 3e-3},
            "ppo_epochs": 3,
        }
    )
    hf = tiny_model("llama")
    learner = Learner(LanguageModel(hf), config.optimizer, SystemsConfig(), total_steps=3)
    rolled = [
        Case(c.prompt, Rollout(c.tokens, c.logprobs, "end", reward=c.reward), g, old=torch.tensor(c.logprobs))
        for g, group in enumerate(groups)
        for c in group
    ]
    fill_advantages(config, rolled)
    loss = loss_of(config, rolled, True)
    samples = [r.sample(i) for i, r in enumerate(rolled)]
    steps = [learner.step(samples, loss).metrics for _ in range(3)]
    assert [s["loss"] for s in steps] == pytest.approx(expected, abs=1e-5)
    assert expected[0] != pytest.approx(expected[-1], abs=1e-3)
    assert steps[-1]["clip_fraction"] > 0
    mine = dict(hf.named_parameters())
    for name, p in flat.named_parameters():
        assert float((mine[name] - p).abs().mean()) < 1e-5, name


def test_the_flat_grpo_loop_learns() -> None:
    """Its own task, from the command line's defaults: from about half to nearly all even digits."""
    loop = flat_loop("grpo_loop")
    torch.manual_seed(0)
    model, tokenizer = loop.tiny()
    problems = [{"prompt": str(n), "answer": ""} for n in range(10, 100)]
    options = {"steps": 15, "prompts": 4, "group": 8, "longest": 12, "lr": 3e-3}
    rewards = loop.train(model.eval(), tokenizer, problems, loop.even_digits, **options)
    assert rewards[0] < 0.6 and sum(rewards[-3:]) / 3 > 0.75


def test_dpo_steps_equal_the_flat_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps with warm-up, cosine and clipping: losses, margins, weights; prompts shared, several passes."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 250, (count,), generator=generator).tolist()  # type: ignore[no-any-return]

    flat_batches = [[(draw(20 + s), draw(5 + i), draw(12 - i)) for i in range(3)] for s in range(5)]
    flat = tiny_model("llama")
    expected = flat_loop("dpo_loop").train(flat, flat_batches, lr=1e-3, beta=0.3, warmup=2, max_grad_norm=0.5)

    def sample(prompt: list[int], answer: list[int]) -> Sample:
        return Sample([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer))

    pairs = [Pair(sample(x, w), sample(x, v), len(x)) for batch in flat_batches for x, w, v in batch]
    systems = SystemsConfig(tokens_per_micro_batch=100)
    hf = tiny_model("llama")
    policy = LanguageModel(hf)
    reference = with_reference(Reference(policy, systems), preference_data(pairs, 0, None), "reference").reference
    assert reference is not None
    config = OptimizerConfig(lr=1e-3, warmup=2, max_grad_norm=0.5, schedule="cosine")
    learner = Learner(policy, config, systems, total_steps=5)
    what = objective(PreferenceConfig.model_validate({"method": "dpo", "data": {"source": "unused"}, "beta": 0.3}))
    for step, record in enumerate(expected):
        part = slice(3 * step, 3 * step + 3)
        samples = [s for n, pair in enumerate(pairs[part]) for s in pair_samples(pair, n)]
        result = learner.step(samples, pair_loss(what, pairs[part], reference[part]))
        assert result.micro_batches > 1
        assert {k: result.metrics[k] for k in ("loss", "margin")} == pytest.approx(
            {k: record[k] for k in ("loss", "margin")}, abs=1e-5
        )
        if step:  # before the first step both are the same model, and what is above 0 is rounding
            assert result.metrics["accuracy"] == pytest.approx(record["accuracy"])
    assert abs(expected[-1]["margin"]) > 0.01
    mine = dict(hf.named_parameters())
    for name, p in flat.named_parameters():
        assert float((mine[name] - p).abs().mean()) < 1e-6, name
