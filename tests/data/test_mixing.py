"""Weights of sources, as training draws rows by them, and where there are none."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import DataConfig
from posttrain.config.feedback import PairsConfig
from posttrain.core.errors import DataError
from posttrain.data.human_feedback import read_answers
from posttrain.data.mixing import refuse_weights, row_weights
from posttrain.data.preference_rows import prepare_pairs
from posttrain.data.prompt_sources import RowPrompts
from posttrain.data.prompts import load_prompts
from posttrain.data.sft_rows import prepare
from posttrain.trainer.loop import permutation_batches
from tests.data.tokenizers import byte_level

TOKENIZER = byte_level("chatml")


def sources(tmp_path: Path, **columns: str) -> list[Any]:
    for name, count in (("a", 4), ("b", 6), ("c", 2)):
        rows = [{"prompt": f"{name}{i}?", **{c: f"{text} {i}" for c, text in columns.items()}} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path)
    return [{"source": f"{path}/a.jsonl", "weight": 2}, {"source": f"{path}/b.jsonl", "weight": 0.5}, f"{path}/c.jsonl"]


def drawn(samples: Any, weights: Any, epochs: float) -> Counter[str]:
    batch_at, steps = permutation_batches(samples, 3, epochs, 0, weights=weights)
    return Counter(sample.source for step in range(steps) for sample in batch_at(step))


def test_rows_are_drawn_by_the_weights_of_their_sources(tmp_path: Path) -> None:
    """In an epoch 2 * 4 of a, 3 of the 6 of b, 2 of c; in two epochs every row of b once."""
    config = DataConfig(source=sources(tmp_path, completion="x"), shuffle_seed=1)
    prepared = prepare(config, TOKENIZER)
    weights = row_weights(prepared)
    assert weights is not None and weights.size == 13
    assert [s.get("weight") for s in prepared.stats["sources"]] == [2, 0.5, None] and prepared.stats["used"] == 12
    one, two = drawn(prepared.samples, weights, 1), drawn(prepared.samples, weights, 2)
    assert [one[f"a.jsonl:{i}"] for i in range(1, 5)] == [2] * 4 and one.total() == 13
    assert sorted(one[f"b.jsonl:{i}"] for i in range(1, 7)) == [0, 0, 0, 1, 1, 1]
    assert [two[f"b.jsonl:{i}"] for i in range(1, 7)] == [1] * 6 and two["c.jsonl:2"] == 2
    part = prepared.take([0, 1, 2, 3, 4])  # as when rows are held out
    assert row_weights(part).sources.tolist() == weights.sources[:5].tolist()  # type: ignore[union-attr]


def test_pairs_have_weights_too(tmp_path: Path) -> None:
    config = DataConfig(source=sources(tmp_path, chosen="x", rejected="y"), shuffle_seed=1)
    pairs = prepare_pairs(config, TOKENIZER)
    weights = row_weights(pairs)
    assert weights is not None and weights.size == 13
    assert drawn(pairs.items, weights, 2)["a.jsonl:3"] == 4


def test_a_single_source_with_a_weight(tmp_path: Path) -> None:
    config = DataConfig(source=sources(tmp_path, completion="x")[:1])
    weights = row_weights(prepare(config, TOKENIZER))
    assert weights is not None and weights.size == 8
    assert row_weights(prepare(DataConfig(source=f"{tmp_path}/a.jsonl"), TOKENIZER)) is None


def test_weights_are_refused_where_rows_are_not_trained_on_in_epochs(tmp_path: Path) -> None:
    data = DataConfig(source=sources(tmp_path, answer="x", chosen="x", rejected="y"))
    with pytest.raises(DataError, match="prompts: .*a.jsonl has weight 2.*max_rows"):
        load_prompts(RowPrompts.Config(data=data), TOKENIZER, context=None)
    with pytest.raises(DataError, match="feedback: .*a.jsonl has weight 2"):
        read_answers(PairsConfig(data=data))
    refuse_weights(DataConfig(source=["a.jsonl", {"source": "b.jsonl", "weight": 1.0}]), "here")  # type: ignore[list-item]
