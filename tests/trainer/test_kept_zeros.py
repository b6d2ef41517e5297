"""A pruned model is trained, and its zeros stay: with weight decay, clipping and any split of a batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import posttrain
from posttrain.config import EpochsConfig, OptimizerConfig, SystemsConfig
from posttrain.core.errors import ModelError
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from posttrain.trainer.kept_zeros import mark_zeros
from posttrain.trainer.train_step import Learner
from tests.conftest import random_samples


def test_zeros_of_a_pruned_model_stay_and_the_rest_is_trained(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": str(i * i)}) + "\n" for i in range(12)))
    train = {"method": "sft", "data": {"source": str(data)}, "batch_size": 4, "max_steps": 3}
    decayed = {"lr": 1e-2, "weight_decay": 0.1}
    stages = [
        {"method": "prune", "weights": {"algorithm": "magnitude", "sparsity": 0.5, "leave": ["*.o_proj"]}},
        {**train, "name": "kept", "keep_zeros": True, "optimizer": decayed},
        {**train, "name": "filled", "start": "stage:prune", "optimizer": decayed},
    ]
    recipe = {"name": "r", "model": {"source": "tiny:llama"}, "stages": stages}
    result = posttrain.run(posttrain.Recipe.model_validate(recipe), tmp_path / "run")
    names = ("0-prune", "1-kept", "2-filled")
    folders = [result.folder / "stages" / name / "model" for name in names]
    pruned, kept, filled = (dict(AutoModelForCausalLM.from_pretrained(f).named_parameters()) for f in folders)
    for name, weight in pruned.items():
        if "_proj" not in name:
            continue
        zero = weight == 0
        assert bool(zero.any()) != ("o_proj" in name)
        assert torch.equal(kept[name] == 0, zero) and not torch.equal(kept[name], weight)
        assert not bool((filled[name] == 0).any())
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert 0.2 < manifest["stages"][1]["kept_zeros"] < 0.5 and "kept_zeros" not in manifest["stages"][2]


def test_a_step_is_that_of_gradients_without_the_zeros() -> None:
    """Marked weights do not count in the gradient's norm."""
    norms = []
    for marked in (True, False):
        model = LanguageModel(tiny_model("llama"))
        for layer in model.base.model.layers:
            layer.mlp.up_proj.weight.data[:, ::2] = 0
        if marked:
            assert mark_zeros(model) > 0
        learner = Learner(model, OptimizerConfig(lr=1e-3), SystemsConfig(tokens_per_micro_batch=64), 2)
        norms.append(learner.step(random_samples(5)).metrics["grad_norm"])
    assert norms[0] < norms[1]


def test_what_keep_zeros_can_not_do_is_refused() -> None:
    with pytest.raises(ModelError, match="no weight of the model is zero"):
        mark_zeros(LanguageModel(tiny_model("llama")))
    with pytest.raises(ValueError, match="an adapter adds to zeros too"):
        EpochsConfig(method="sft", keep_zeros=True, adapter={"r": 2})
