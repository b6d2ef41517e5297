"""Five steps equal those of the flat loop in examples/, which shares no code with the library."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from posttrain.config import OptimizerConfig, SystemsConfig
from posttrain.models.lm import LanguageModel
from posttrain.models.tiny import tiny_model
from posttrain.train.learner import Learner
from tests.conftest import random_samples


def flat_loop() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "sft_loop.py"
    spec = importlib.util.spec_from_file_location("sft_loop", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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
