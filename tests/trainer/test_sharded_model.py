"""A model that FSDP shards computes what it is given: batches as they are, in the same precision as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import AdapterConfig, OptimizerConfig, SystemsConfig
from posttrain.core import distributed
from posttrain.core.types import Sample
from posttrain.models.adapters import attach
from posttrain.models.language_model import LanguageModel
from posttrain.models.model_types import decoder_layers
from posttrain.models.tiny_model import tiny_model
from posttrain.trainer.train_step import Learner
from tests import warm
from tests.trainer.test_sequence_parallel import of_sums

CASES: dict[str, dict[str, Any]] = {
    "all weights, a critic": {},
    "adapters": {"adapter": AdapterConfig(r=4)},
    "soft prompt": {"adapter": AdapterConfig(kind="prefix", tokens=3)},
}
ROWS = [Sample([5 + i, 6, 7, 8, 9 + i], [0.0, 0.0, 0.3001, 1.0, 0.7003]) for i in range(4)]


def steps(name: str) -> dict[str, Any]:
    """Take two steps in bfloat16; return their metrics, and how many plans of attention layers were given in each."""
    hf = tiny_model("llama").bfloat16()
    if "adapter" in CASES[name]:
        hf = attach(hf, CASES[name]["adapter"], 0)
    model = LanguageModel(hf)
    if name.endswith("critic"):
        model.add_value_head()
    learner = Learner(model, OptimizerConfig(lr=0.01, schedule="constant", warmup=0), SystemsConfig(), 2)
    plans: list[Any] = []
    for layer in decoder_layers(model.base):
        layer.register_forward_pre_hook(lambda _, __, given: plans.append(given["ragged"]), with_kwargs=True)
    metrics = [learner.step(ROWS, loss).metrics for loss in (None, of_sums if model.value else None)]
    return {"metrics": metrics, "plans": len({id(plan) for plan in plans}), "asked": len(plans)}


def sharded(folder: Path) -> None:
    distributed.start(torch.device("cpu"))
    found = {name: steps(name) for name in CASES}
    if distributed.is_main():
        torch.save(found, folder / "found.pt")
    distributed.stop()


def test_batches_reach_layers_as_they_are_and_losses_are_those_of_one_process(tmp_path: Path) -> None:
    warm.run(sharded, tmp_path, folder=tmp_path, ranks=2)
    found = torch.load(tmp_path / "found.pt")
    for name in CASES:
        alone, mine = steps(name), found[name]
        assert mine["plans"] == alone["plans"] == 2  # one a pass, whatever the number of layers
        assert mine["asked"] == alone["asked"] > 2
        first, second = zip(mine["metrics"], alone["metrics"], strict=True)
        assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-4), name  # weights of a loss stay float32
        for one, other in (first, second):
            assert one == pytest.approx(other, rel=0.02, abs=0.02), name
