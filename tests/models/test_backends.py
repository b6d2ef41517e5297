"""A device without kernels of its own: nothing of `posttrain.cpu` runs, and the host waits once a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.config import OptimizerConfig, RLConfig, SystemsConfig
from posttrain.core.ragged import RaggedBatch
from posttrain.core.types import Rollout, Sample
from posttrain.losses import preference_loss
from posttrain.methods.rl.rl_loss import Extremes, policy_gradient_loss
from posttrain.models import backends
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from posttrain.models.verification import verify
from posttrain.trainer.reference_model import answer_sums
from posttrain.trainer.train_step import Learner
from tests import warm
from tests.methods.rl.cases import Case, batch_from

WAITING = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu")
"""Methods of a tensor that wait for a GPU to finish."""
WAITING_OPS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "bincount")


class Waits(TorchDispatchMode):
    """Count what would make the host wait for a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        for name in WAITING:
            monkeypatch.setattr(Tensor, name, self._counting(name, getattr(Tensor, name)))

    def _counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return original(*args, **kwargs)

        return method

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        masks = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING_OPS or masks or unsized:
            self.counts[f"{name} {'of a mask' if masks else ''}".strip()] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def generic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, on a CPU."""
    monkeypatch.setattr(backends, "backend_for", lambda device: backends.DeviceBackend())
    for module in ("models.attention", "models.language_model", "models.loading", "sampling.kv_cache"):
        __import__(f"posttrain.{module}")
        monkeypatch.setattr(f"posttrain.{module}.backend_for", lambda device: backends.DeviceBackend())


def preference(model: LanguageModel, batch: RaggedBatch, count: float) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO, with labels that are probabilities."""
    sums, _ = answer_sums(model, batch)
    h = sums[0::2] - sums[1::2]
    losses = preference_loss.dpo(h, 0.1, torch.full_like(h, 0.9))
    return losses.sum() / count, {k: v / count for k, v in preference_loss.pair_metrics(sums[0::2], sums[1::2]).items()}


def rollouts() -> list[Case]:
    """Two completions of each of four prompts, of different lengths, with what GRPO compares them with."""
    cases = []
    for i in range(8):
        n = 3 + i // 2
        rollout = Rollout(range(20, 20 + n), [-5.0] * n, "end", reward=float(i % 2))
        advantages = torch.full((n,), i % 2 - 0.5)
        cases.append(
            Case([5, 6, 7, 8], rollout, i // 2, torch.full((n,), -5.1), torch.full((n,), -5.2), advantages=advantages)
        )
    return cases


POLICY = {
    "method": "grpo",
    "problems": {"kind": "lab"},
    "rewards": [{"kind": "exact"}],
    "mini_batches": 2,
    "kl": {"coefficient": 0.1, "where": "loss"},
    "entropy_coef": 0.01,
    "importance_sampling_cap": 2.0,
    "sampler": {"temperature": 0.7},
}


@pytest.mark.parametrize("method", ["sft", "preference", "grpo"])
def test_a_training_step_waits_for_the_device_once(method: str, generic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches and the update: one `tolist` of everything that the step reports."""
    loss = preference if method == "preference" else None
    model = LanguageModel(tiny_model("llama"))
    learner = Learner(model, OptimizerConfig(lr=1e-3), SystemsConfig(tokens_per_micro_batch=24), 2)
    prompts = [[5, 6, 7, 8, *range(20, 20 + i), 30 + a] for i in range(2, 6) for a in (0, 1)]
    samples = [
        Sample(p, [0.0] * 4 + [1.0] * (len(p) - 4), meta={"group": i // 2, "shared": 4, "whole": True})
        for i, p in enumerate(prompts)
    ]
    if method == "grpo":
        config = RLConfig.model_validate(POLICY)
        samples = [case.sample(i) for i, case in enumerate(rollouts())]
        loss = policy_gradient_loss(batch_from(config, rollouts()), False, Extremes())
    learner.step(samples, loss)
    with Waits(monkeypatch) as waits:
        result = learner.step(samples, loss)
    assert result.micro_batches > 1 and result.metrics["grad_norm"] > 0
    assert waits.counts == {"tolist": 1}


def test_a_forward_never_waits(generic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny_model("qwen3"))
    model.add_value_head()
    batch = model.pack([Sample([5, 6, 7, 8], [0, 0, 1, 1]), Sample([5, 6, 9], [0, 0, 1])])
    with Waits(monkeypatch) as waits:
        model(batch, "values", entropy=True)
        model(batch, "cross_entropy")
    assert not waits.counts


def test_a_device_without_kernels_keeps_the_models_own_forwards(generic: None) -> None:
    model = LanguageModel(tiny_model("llama"))
    assert not [m for m in model.modules() if "forward" in vars(m)]
    assert verify(model) < 1e-5


def test_a_process_without_a_model_on_a_cpu_imports_nothing_of_the_cpu_wing(tmp_path: Path) -> None:
    """In a process that has imported what a run imports, and none of these tests."""
    code = (
        "import sys, torch; import posttrain.trainer.loop, posttrain.sampling.engine, posttrain.methods.sft\n"
        "from posttrain.models.backends import backend_for\n"
        "backend_for(torch.device('cuda')).describe()\n"
        "assert 'posttrain.runs.runner' in sys.modules\n"
        "print([m for m in sys.modules if m.startswith('posttrain.cpu')])"
    )
    warm.run(exec, code, folder=tmp_path)
    assert (tmp_path / "log").read_text().splitlines()[-1] == "[]"  # PyTorch for CUDA warns before


def test_the_largest_of_a_metric_is_taken_where_its_name_says_so() -> None:
    """Over micro-batches; other metrics are summed."""

    def loss(model: LanguageModel, batch: RaggedBatch, count: float) -> tuple[Tensor, dict[str, Tensor]]:
        total = model(batch, "cross_entropy")[0] / count
        return total, {"length_max": torch.tensor(batch.total), "length": torch.tensor(batch.total)}

    learner = Learner(
        LanguageModel(tiny_model("llama")), OptimizerConfig(lr=1e-3), SystemsConfig(tokens_per_micro_batch=8), 1
    )
    metrics = learner.step([Sample(range(5, 5 + n), [0.0] + [1.0] * (n - 1)) for n in (8, 5)], loss).metrics
    assert (metrics["length_max"], metrics["length"]) == (8, 13)
