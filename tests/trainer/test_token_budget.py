"""The token budget of a micro-batch, by the memory of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posttrain.config import OptimizerConfig, SystemsConfig
from posttrain.core.types import Sample
from posttrain.models import attention, language_model
from posttrain.models.backends import DeviceBackend
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from posttrain.trainer.token_budget import bytes_per_token, suited_budget, token_budget
from posttrain.trainer.train_step import Learner

GiB = 2**30


class Flash(torch.autograd.Function):
    """Keeps for backward what attention on a GPU keeps: its arguments, its result, one number a head."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.clone()
        ctx.save_for_backward(q, k, v, out, q[..., 0].float())
        return out


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    repeat = q.shape[1] // k.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    return Flash.apply(q, *(x.repeat_interleave(repeat, dim=1) for x in (k, v)))[None]  # type: ignore[no-any-return]


def model_of(kind: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> LanguageModel:
    return LanguageModel(tiny_model(kind, **settings).to(dtype))


def kept(model: LanguageModel, count: int) -> int:
    """Bytes of what a forward pass over so many tokens saves for backward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    batch = model.pack([Sample([3] * count, [0.0] + [1.0] * (count - 1))])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.hidden_T_H(batch)
    return sum(x.nbytes() for x in found.values())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_estimate_is_near_what_a_pass_keeps(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    plain = DeviceBackend()
    for module in (language_model, attention):
        monkeypatch.setattr(module, "backend_for", lambda device: plain)
    monkeypatch.setattr(attention, "plain_attention", flash)
    model = model_of(kind, hidden_size=64, intermediate_size=176, num_hidden_layers=10)
    estimate = bytes_per_token(model, boundaries=False)
    assert estimate is not None and 0.7 < (kept(model, 96) - kept(model, 32)) / 64 / estimate < 1.4


def test_more_memory_and_less_work_give_more_tokens() -> None:
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    model, systems = model_of("llama", **shape), SystemsConfig()
    trained = sum(p.numel() for p in model.parameters())
    budgets = [suited_budget(model, systems, free * GiB, 80 * GiB, trained) for free in (1, 8, 20, 40, 4000)]
    assert budgets == sorted(budgets) and budgets[0] == 4096 and budgets[-1] == 65536 and len(set(budgets)) > 2
    assert all(b & (b - 1) == 0 or b % 3 == 0 and (b // 3) & (b // 3 - 1) == 0 for b in budgets)
    lean = SystemsConfig(activation_checkpointing=True)
    assert suited_budget(model, lean, 8 * GiB, 80 * GiB, trained) > budgets[1]
    # What is free says nothing of a frozen model's.
    assert len({suited_budget(model, systems, free * GiB, 80 * GiB, 0) for free in (1, 70)}) == 1


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float32), ("gemma2", torch.bfloat16)])
def test_attention_of_quadratic_memory_gets_the_least(kind: str, dtype: torch.dtype) -> None:
    assert suited_budget(model_of(kind, dtype), SystemsConfig(), 70 * GiB, 80 * GiB, 1) == 4096


def test_a_setting_goes_before_and_a_checkpoint_keeps_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", torch.float32)
    assert (
        token_budget(SystemsConfig(), model) == 768
        and token_budget(SystemsConfig(tokens_per_micro_batch=5), model) == 5
    )
    learner = Learner(model, OptimizerConfig(), SystemsConfig(), 2)
    assert "token_budget" not in learner.state_dict()["numbers"]  # a CPU's is the same everywhere
    model.token_budget = 8192
    numbers = learner.state_dict()["numbers"]
    model.token_budget = 4096
    learner.load_state_dict(numbers)
    assert model.token_budget == 8192
    # On a GPU it is asked for once.
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
    assert token_budget(SystemsConfig(), model) == 8192
