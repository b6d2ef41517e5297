"""Training ends in the same bits on rows in memory, on rows written to the cache, and on those found there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import DataConfig, OptimizerConfig, SystemsConfig
from posttrain.data import sample_cache
from posttrain.data.sft_rows import prepare
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.trainer.loop import permutation_batches
from posttrain.trainer.train_step import Learner


def test_training_on_cached_rows_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_cache, "cache_folder", lambda: tmp_path / "cache")
    rows = [{"prompt": f"{i}?", "completion": "x" * (i % 5) + "."} for i in range(12)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results: list[tuple[list[Any], list[torch.Tensor]]] = []
    for least in (2**40, 0, 0):
        monkeypatch.setattr(sample_cache, "CACHED_FROM", least)
        prepared = prepare(DataConfig(source=str(source), shuffle_seed=1), tiny_tokenizer())
        batch_at, steps = permutation_batches(prepared.samples, 5, 1.5, 0)
        model = LanguageModel(tiny_model("llama"))
        learner = Learner(model, OptimizerConfig(lr=1e-3), SystemsConfig(), steps)
        metrics = [learner.step(batch_at(step)).metrics for step in range(steps)]
        results.append((metrics, [p.detach().clone() for p in model.parameters()]))
        assert (tmp_path / "cache").exists() == (least == 0)
    assert len(list((tmp_path / "cache" / "data").glob("*/header.json"))) == 1
    for metrics, weights in results[1:]:
        assert metrics == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][1], strict=True))
