"""Rows held out of a stage's own data: how many, which, what the manifest says; other held-out data without copies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from posttrain.core.errors import DataError
from posttrain.core.types import Sample
from posttrain.data.held_out_rows import drop_training_overlap, hold_out
from posttrain.data.preference_rows import Pair, PreparedPairs, PreparedUnpaired, Unpaired
from posttrain.data.rows import count_repeats
from posttrain.data.sft_rows import Prepared
from posttrain.models.tiny_model import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def sample(number: int, length: int = 4) -> Sample:
    return Sample([5 + number] * length, [0.0] + [1.0] * (length - 1), f"rows.jsonl:{number}")


def prepared(samples: Sequence[Sample]) -> Prepared:
    stats: dict[str, Any] = {
        "source": "rows.jsonl",
        "rows": len(samples) + 2,
        "used": len(samples),
        "dropped": {"empty": 2},
        "bad_rows": [{"file": "rows.jsonl", "row": 99, "reason": "empty"}],
        "tokens": sum(map(len, samples)),
        "loss_tokens": sum(sum(s.weights) for s in samples),
        "duplicates": count_repeats(tuple(s.tokens) for s in samples),
    }
    return Prepared(samples, stats, [{"source": s.source} for s in samples])


@pytest.mark.parametrize(
    ("count", "fraction", "most", "expected"),
    [
        (100, 0.05, 500, 5),
        (100, 0.05, 3, 3),
        (10, 0.05, 500, 1),
        (2, 0.9, 500, 1),
        (7, 0.5, 500, 4),
        (40, 0.99, 500, 39),
    ],
)
def test_how_many_rows_are_held_out(count: int, fraction: float, most: int, expected: int) -> None:
    data = prepared([sample(i, 2 + i % 7) for i in range(count)])
    trained, held_out = hold_out(data, fraction, most, 0, TOKENIZER)
    assert held_out is not None and (len(trained), len(held_out)) == (count - expected, expected)
    places = [s.source for part in (trained, held_out) for s in part.samples]
    assert len(places) == count and set(places) == {s.source for s in data.samples}
    for part in (trained, held_out):  # prompts stay with their samples, in the order of the data
        assert [r["source"] for r in part.rows] == [s.source for s in part.samples]
        numbers = [int(s.source.split(":")[1]) for s in part.samples]
        assert numbers == sorted(numbers)
        lengths = [len(s) for s in part.samples]
        assert (part.stats["used"], part.stats["tokens"], part.stats["longest"]) == (
            len(part),
            sum(lengths),
            max(lengths),
        )
        assert part.stats["loss_tokens"] == sum(sum(s.weights) for s in part.samples)
        assert part.stats["median"] == int(np.median(lengths))
        assert [e["text"] for e in part.stats["examples"]] == [s.source for s in part.samples[:3]]
    assert trained.stats["held_out"] == expected and trained.stats["dropped"] == {"empty": 2}
    assert held_out.stats["rows"] == expected and held_out.stats["dropped"] == {}
    assert held_out.stats["bad_rows"] == [] and data.stats["used"] == count  # a copy was changed


def test_the_seed_decides_which_rows() -> None:
    data = prepared([sample(i) for i in range(200)])

    def chosen(seed: int) -> list[str]:
        held_out = hold_out(data, 0.1, 500, seed, TOKENIZER)[1]
        assert held_out is not None
        return [s.source for s in held_out.samples]

    assert chosen(0) == chosen(0) != chosen(1)
    assert chosen(0) != [f"rows.jsonl:{i}" for i in range(20)]


@pytest.mark.parametrize("copies", [1, 80])
def test_no_copy_of_a_held_out_row_is_trained_on(copies: int) -> None:
    """Ten rows that occur once among many that don't: these are all that may be held out."""
    samples = [sample(i) for i in range(10)] + [sample(100 + i) for i in range(30) for _ in range(1 + copies)]
    trained, held_out = hold_out(prepared(samples), 0.9, 500, 3, TOKENIZER)
    assert held_out is not None and sorted(s.source for s in held_out.samples) == [f"rows.jsonl:{i}" for i in range(10)]
    assert not {tuple(s.tokens) for s in trained.samples} & {tuple(s.tokens) for s in held_out.samples}
    assert len(trained) == 30 * (1 + copies) and held_out.stats["duplicates"] == 0


def test_the_samples_of_a_row_stay_together() -> None:
    """Rows of one to four samples; the row of samples 20 to 22 has one that another row repeats."""
    rows = [[sample(10 * i + k) for k in range(1 + i % 4)] for i in range(40)] + [[sample(21)]]
    samples = [replace(s, source=f"rows.jsonl:{i}") for i, row in enumerate(rows) for s in row]
    data = prepared(samples)
    for seed in range(5):
        trained, held_out = hold_out(data, 0.3, 500, seed, TOKENIZER)
        assert held_out is not None
        places = [[s.source for s in part.samples] for part in (trained, held_out)]
        assert not set(places[0]) & set(places[1]) and "rows.jsonl:2" in places[0]
        assert len(held_out) <= round(0.3 * len(samples)) and held_out.stats["used"] == len(set(places[1]))
        assert not {tuple(s.tokens) for s in trained.samples} & {tuple(s.tokens) for s in held_out.samples}
    one = prepared([replace(sample(i), source="rows.jsonl:1") for i in range(3)])
    assert hold_out(one, 0.5, 500, 0, TOKENIZER) == (one, None)


@pytest.mark.parametrize("samples", [[sample(1)], [sample(1), sample(1), sample(2), sample(2)]], ids=["one", "copies"])
def test_where_no_row_can_be_spared_nothing_is_held_out(
    samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    data = prepared(samples)
    with caplog.at_level(logging.WARNING):
        assert hold_out(data, 0.5, 500, 0, TOKENIZER, "stage sft") == (data, None)
    assert "stage sft: nothing is held out" in caplog.text


class OnDisk(Sequence[Sample]):
    """Samples that can be read by number alone, as from a file."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: Any) -> Any:
        assert isinstance(number, int) and 0 <= number < self.count
        self.read += 1
        return sample(number)


def test_rows_that_lie_on_a_disk_are_not_all_held_in_memory() -> None:
    rows = OnDisk(5_000)
    stats = {"used": 5_000, "rows": 5_000, "dropped": {}, "tokens": 20_000, "loss_tokens": 15_000, "duplicates": 0}
    trained, held_out = hold_out(Prepared(rows, stats, rows), 0.05, 100, 0, TOKENIZER)  # type: ignore[arg-type]
    assert held_out is not None and (len(trained), len(held_out)) == (4_900, 100)
    assert trained.samples[-1].source == f"rows.jsonl:{4_999}" and len(trained.samples[:2]) == 2
    assert trained.stats["tokens"] == 4 * 4_900


def unpaired(number: int, desirable: bool) -> Unpaired:
    return Unpaired(sample(number), 1, desirable, f"rows.jsonl:{number}")


@pytest.mark.parametrize("seed", range(5))
def test_good_and_bad_answers_are_both_held_out(seed: int) -> None:
    """Three bad answers among forty: one is measured even if a single row is asked for, and others are trained on."""
    items = [unpaired(i, i % 15 != 7) for i in range(40)]
    stats = {"used": 40, "rows": 40, "dropped": {}, "tokens": 160, "loss_tokens": 120, "duplicates": 0}
    for fraction, least in ((0.025, 2), (0.1, 4)):
        trained, held_out = hold_out(PreparedUnpaired(items, stats), fraction, 500, seed, TOKENIZER)
        assert held_out is not None and len(held_out) == least
        assert {u.desirable for u in held_out.items} == {True, False} == {u.desirable for u in trained.items}
        assert held_out.stats["desirable"] == sum(u.desirable for u in held_out.items)
        assert trained.stats["desirable"] + held_out.stats["desirable"] == 37


def test_pairs_the_other_way_round_are_copies() -> None:
    one, other = sample(1), sample(2)
    pairs = [
        Pair(one, other, 1, source="a"),
        Pair(other, one, 1, source="b"),
        Pair(sample(3), sample(4), 1, source="c"),
    ]
    stats = {"used": 3, "rows": 3, "dropped": {}, "tokens": 24, "loss_tokens": 18, "duplicates": 0, "contradictory": 1}
    trained, held_out = hold_out(PreparedPairs(pairs, stats), 0.5, 500, 0, TOKENIZER)
    assert held_out is not None and [p.source for p in held_out.items] == ["c"] and len(trained) == 2
    assert "contradictory" not in held_out.stats and trained.stats["contradictory"] == 1
    assert [e["label"] for e in held_out.stats["examples"]] == ["chosen", "rejected"]


def test_held_out_rows_of_another_file_lose_those_that_are_trained_on() -> None:
    trained, other = prepared([sample(i) for i in range(10)]), prepared([sample(i) for i in range(8, 14)])
    left = drop_training_overlap(other, trained, "stage sft")
    assert [s.source for s in left.samples] == [f"rows.jsonl:{i}" for i in (10, 11, 12, 13)]
    assert left.stats["used"] == 4 and left.stats["dropped"] == {"empty": 2, "trained on too": 2}
    with pytest.raises(
        DataError, match=r"stage sft: 10 of 10 held-out rows are trained on too \(for example rows.jsonl:0"
    ):
        drop_training_overlap(trained, trained, "stage sft")
