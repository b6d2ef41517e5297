"""Sequence parallel: processes that compute a micro-batch together give the losses and gradients of one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from posttrain.config import AdapterConfig, OptimizerConfig, Recipe, SystemsConfig
from posttrain.core import distributed
from posttrain.core.errors import ModelError, RecipeError
from posttrain.core.ragged import RaggedBatch
from posttrain.core.types import Sample
from posttrain.models.adapters import attach
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from posttrain.trainer.train_step import Learner, cross_entropy
from tests import warm
from tests.conftest import family, random_samples


@dataclass(frozen=True)
class Case:
    """Hold what is trained on what: a step of each is taken."""

    model_type: str = "llama"
    changes: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    systems: dict[str, Any] = field(default_factory=dict)
    trees: bool = False
    loss: Any = cross_entropy


def of_sums(model: LanguageModel, batch: RaggedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a loss that is not a sum over tokens: of each sample's log-probability, entropies, and a critic."""
    targets = torch.cat(batch.weighted_rows)
    heat = 0.5 + batch.tokens_T[targets] / 259  # a number of the token alone, wherever it is computed
    logprobs, entropies, *values = model(
        batch, "values" if model.value else "logprobs", targets, temperature=heat, entropy=True, probe=False
    )
    sums = torch.stack([x.sum() for x in logprobs.split([len(row) for row in batch.weighted_rows])])
    loss = -(torch.nn.functional.logsigmoid(0.02 * sums).sum() + 0.1 * entropies.sum()) / denominator
    for value in values:
        loss = loss + ((value - 1.0) ** 2).sum() / denominator
    return loss, {"entropy": entropies.sum() / denominator, "lowest_max": -logprobs.min()}


CASES = {
    "trees": Case(trees=True, loss=of_sums, systems={"activation_checkpointing": True}),
    "adapters, odd heads": Case(
        changes={"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}, lora=True
    ),
    "soft caps, windows": Case("gemma2", {"sliding_window": 8}, trees=True),
    "sinks, experts": Case("gpt_oss", {"output_router_logits": True, "sliding_window": 8}),
}
Found = dict[str, tuple[dict[str, float], dict[str, Tensor]]]


def step(case: Case) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Take a step; return its metrics, and gradients before clipping."""
    hf = tiny_model(case.model_type, **case.changes)
    hf = attach(hf, AdapterConfig(r=4), 0) if case.lora else hf
    model = LanguageModel(hf)
    if case.loss is of_sums:
        model.add_value_head()
    learner = Learner(model, OptimizerConfig(), SystemsConfig(tokens_per_micro_batch=40, **case.systems), 4)
    found: dict[str, Tensor] = {}

    def keep(norms: object) -> float:
        given = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
        found.update({n: distributed.full_tensor(g).clone() for n, g in given})
        return 1.0

    learner.optimizer.clip = keep  # type: ignore[method-assign]
    rows = family() if case.trees else [*random_samples(5), Sample([5, 6, 7], [0.0, 0.0, 1.0])]
    return learner.step(rows, case.loss).metrics, found


def steps(folder: Path, names: list[str], replicas: int, together: int) -> None:
    distributed.start(torch.device("cpu"), replicas, together)
    assert distributed.sequence_parallel() == together
    found = {name: step(CASES[name]) for name in names}
    if distributed.is_main():
        torch.save(found, folder / "found.pt")
    distributed.stop()


def equal(found: Found, expected: Found) -> None:
    for name, (metrics, gradients) in expected.items():
        others, other_gradients = found[name]
        assert others == pytest.approx(metrics, rel=1e-5, abs=1e-6), name
        assert other_gradients.keys() == gradients.keys()
        scale = max(float(g.abs().max()) for g in gradients.values())
        for weight, g in gradients.items():
            assert float((other_gradients[weight] - g).abs().max()) < 1e-5 * scale, (name, weight)


@pytest.mark.parametrize(
    ("ranks", "replicas", "together", "names"),
    [
        (2, 1, 2, ["trees", "adapters, odd heads"]),
        pytest.param(4, 2, 2, list(CASES), marks=pytest.mark.long),
        pytest.param(4, 1, 4, list(CASES), marks=pytest.mark.long),  # more than the key heads of all but one
    ],
)
def test_processes_that_share_micro_batches_equal_one(
    tmp_path: Path, ranks: int, replicas: int, together: int, names: list[str]
) -> None:
    warm.run(steps, tmp_path, names, replicas, together, folder=tmp_path, ranks=ranks)
    equal(torch.load(tmp_path / "found.pt"), {name: step(CASES[name]) for name in names})


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"method": "sft", "adapter": {"kind": "prompt", "tokens": 4}}, r"trains a soft prompt \(prompt\)"),
        ({"method": "distill", "teacher": "start"}, r"\(distill\) compares whole distributions"),
    ],
)
def test_what_can_not_be_divided_is_refused_when_a_recipe_is_read(stage: dict[str, Any], message: str) -> None:
    stages = [{"data": {"source": "packaged:movie_reviews.tsv"}, "name": "one", **stage}]
    recipe = {"name": "r", "model": {"source": "tiny:llama"}, "stages": stages, "systems": {"sequence_parallel": 2}}
    with pytest.raises(ValidationError, match=f"stage 'one' {message}.*sequence_parallel divides"):
        Recipe.model_validate(recipe)
    Recipe.model_validate({**recipe, "systems": {}})


def test_processes_that_can_not_be_divided_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"sequence_parallel is 2, and 1 process can't be.*--nproc-per-node 2"):
        distributed.start(torch.device("cpu"), sequence_parallel=2)
    monkeypatch.setattr(distributed, "sequence_parallel", lambda: 2)
    with pytest.raises(ModelError, match="mamba: sequences of this type are computed one at a time"):
        Learner(LanguageModel(tiny_model("mamba")), OptimizerConfig(), SystemsConfig(), 1)
