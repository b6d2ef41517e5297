"""Pairs and answers whose samples lie in a store: the same in memory, once written to the cache, and found there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config import DataConfig
from posttrain.data import sample_cache, stored_items
from posttrain.data.preference_rows import PreparedPairs, PreparedUnpaired, prepare_pairs, prepare_unpaired
from posttrain.data.stored_pairs import contradictions, pair_sizes
from tests.data.tokenizers import byte_level

TOKENIZER = byte_level("chatml")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(i: int, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": f"{i}?", "chosen": chosen, "rejected": rejected, "rater": f"r{i}", **more}


PAIRS = [
    pair(0, "yes", "no"),
    pair(1, "left", "right", probability=0.25, margin=2),
    pair(0, "no", "yes"),  # the opposite of the first
    pair(2, "same", "same"),  # a bad row
    pair(0, "yes", "no"),  # the first again, and so the opposite of the third
    pair(3, "a", "b", probability=0.875, margin=0.5),
]
ANSWERS = [
    {"prompt": "q?", "completion": text, "label": good} for text, good in (("x", 1), ("y", 0), ("x", 0), ("z", 1))
]


def content(prepared: PreparedPairs | PreparedUnpaired) -> Any:
    items = [(item, dict(item.row)) for item in prepared.items]
    stats = json.loads(json.dumps(prepared.stats))
    return items, stats, [prepared.content(i) for i in range(len(prepared))], list(prepared.samples)


@pytest.mark.parametrize("kind", ["pairs", "answers"])
def test_in_memory_in_the_cache_and_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(sample_cache, "cache_folder", lambda: tmp_path / "cache")
    source = write(tmp_path / "rows.jsonl", PAIRS if kind == "pairs" else ANSWERS)
    config = DataConfig(source=source, on_bad_row="skip", shuffle_seed=2)
    read: Any = prepare_pairs if kind == "pairs" else prepare_unpaired
    in_memory = content(read(config, TOKENIZER))
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(sample_cache, "CACHED_FROM", 0)
    assert content(read(config, TOKENIZER)) == in_memory
    monkeypatch.setattr(stored_items, "encode_stream", None)
    found = read(config, TOKENIZER)
    assert content(found) == in_memory
    taken = found.take([2, 0])
    assert content(taken)[0] == [in_memory[0][2], in_memory[0][0]] and taken.place(1) == found.place(0)
    if kind == "pairs":
        assert pair_sizes(found.items) == [len(p.chosen) + len(p.rejected) - p.prompt for p, _ in in_memory[0]]
    else:
        assert [found.label_of(i) for i in range(4)] == [u.desirable for u, _ in in_memory[0]]


def test_what_a_pair_holds(tmp_path: Path) -> None:
    made = prepare_pairs(DataConfig(source=write(tmp_path / "p.jsonl", PAIRS), on_bad_row="skip"), TOKENIZER)
    assert [(p.row["completion"], p.row["rejected"], p.probability, p.margin) for p in made.items] == [
        ("yes", "no", 1.0, 0.0),
        ("right", "left", 0.75, 2.0),
        ("no", "yes", 1.0, 0.0),
        ("yes", "no", 1.0, 0.0),
        ("a", "b", 0.875, 0.5),
    ]
    assert [p.row["rater"] for p in made.items] == ["r0", "r1", "r0", "r0", "r3"]
    stats = made.stats
    assert (stats["used"], stats["swapped"], stats["duplicates"], stats["contradictory"]) == (5, 1, 1, 2)
    assert stats["contradictions"] == ["p.jsonl:3 against p.jsonl:1", "p.jsonl:5 against p.jsonl:3"]
    assert stats["dropped"] == {"the two answers are equal": 1}


def test_opposites_are_found_as_by_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 40):
        content, side = rng.integers(0, 9, (size, 2)), rng.integers(0, 2, size)
        first: dict[Any, int] = {}
        expected = []
        for i, (about, value) in enumerate(zip(map(tuple, content.tolist()), side.tolist(), strict=True)):
            if (about, 1 - value) in first:
                expected.append(f"{i} against {first[about, 1 - value]}")
            first.setdefault((about, value), i)
        found = contradictions(content, side, str)
        assert found.get("contradictory", 0) == len(expected)
        assert found.get("contradictions", []) == expected[:10]
