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
from posttrain.data.preference_rows import PreparedPairs, PreparedUnpaired
from posttrain.data.rows import count_repeats
from posttrain.data.sample_store import SampleStore, SampleWriter
from posttrain.data.sft_rows import Prepared
from posttrain.data.stored_pairs import StoredAnswers, StoredPairs
from posttrain.models.tiny_model import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def sample(number: int, length: int = 4) -> Sample:
    return Sample([5 + number] * length, [0.0] + [1.0] * (length - 1), f"rows.jsonl:{number}")


def stored(
    samples: Sequence[Sample],
    fields: Sequence[tuple[str, str]] = (),
    values: Sequence[dict[str, float]] = (),
    files: Sequence[str] = ("rows.jsonl",),
) -> SampleStore:
    writer = SampleWriter(files, 2**16, None, fields)
    for i, s in enumerate(samples):
        file, _, number = s.source.rpartition(":")
        writer.add(i, s, files.index(file), int(number), i, values[i] if values else None)
    return writer.finish()


def prepared(samples: Sequence[Sample], files: Sequence[str] = ("rows.jsonl",)) -> Prepared:
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
    return Prepared(stored(samples, files=files), stats, [{"source": s.source} for s in samples])


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


def test_rows_that_lie_on_a_disk_are_not_all_read(monkeypatch: pytest.MonkeyPatch) -> None:
    count, read = 5_000, []
    rows = stored([sample(i) for i in range(count)])
    item = SampleStore.item
    monkeypatch.setattr(SampleStore, "item", lambda self, number: read.append(number) or item(self, number))
    stats = {
        "source": "x",
        "used": count,
        "rows": count,
        "dropped": {},
        "tokens": 20_000,
        "loss_tokens": 15_000,
        "duplicates": 0,
    }
    trained, held_out = hold_out(Prepared(rows, stats, rows), 0.05, 100, 0, TOKENIZER)  # type: ignore[arg-type]
    assert held_out is not None and (len(trained), len(held_out)) == (4_900, 100) and len(read) < 500
    assert trained.samples[-1].source == f"rows.jsonl:{4_999}" and len(trained.samples[:2]) == 2
    assert trained.stats["tokens"] == 4 * 4_900


def answers(labels: Sequence[bool], numbers: Sequence[int] | None = None) -> PreparedUnpaired:
    numbers = range(len(labels)) if numbers is None else numbers
    samples = [replace(sample(n), source=f"rows.jsonl:{i}") for i, n in enumerate(numbers)]
    fields = (("prompt", "<u4"), ("desirable", "u1"))
    store = stored(samples, fields, [{"prompt": 1, "desirable": label} for label in labels])
    count = len(labels)
    stats = {"source": "x", "used": count, "rows": count, "dropped": {}, "tokens": 4 * count, "loss_tokens": 3 * count}
    duplicates = count_repeats(tuple(s.tokens) for s in samples)
    return PreparedUnpaired(StoredAnswers(store, []), {**stats, "duplicates": duplicates})


@pytest.mark.parametrize("seed", range(5))
def test_good_and_bad_answers_are_both_held_out(seed: int) -> None:
    """Three bad answers among forty: one is measured even if a single row is asked for, and others are trained on."""
    for fraction, least in ((0.025, 2), (0.1, 4)):
        trained, held_out = hold_out(answers([i % 15 != 7 for i in range(40)]), fraction, 500, seed, TOKENIZER)
        assert held_out is not None and len(held_out) == least
        assert {u.desirable for u in held_out.items} == {True, False} == {u.desirable for u in trained.items}
        assert held_out.stats["desirable"] == sum(u.desirable for u in held_out.items)
        assert trained.stats["desirable"] + held_out.stats["desirable"] == 37


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("good", "bad"), [(2, 2), (2, 1), (1, 2), (1, 1), (30, 2), (2, 30), (30, 1), (3, 0)])
def test_few_answers_of_a_label(good: int, bad: int, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Both parts have both labels, or nothing is held out, as where no row can be spared at all."""
    data = answers([True] * good + [False] * bad)
    with caplog.at_level(logging.WARNING):
        for fraction in (0.1, 0.5, 0.9):
            trained, held_out = hold_out(data, fraction, 500, seed, TOKENIZER, "stage kto")
            if min(good, bad) < 2:
                assert (trained, held_out) == (data, None)
            else:
                assert held_out is not None and len(trained) + len(held_out) == good + bad
                for part in (trained, held_out):
                    assert {u.desirable for u in part.items} == {True, False}
    assert ("stage kto: nothing is held out of" in caplog.text) == (min(good, bad) < 2)


def test_one_answer_alone_is_not_held_out() -> None:
    data = answers([True, False] * 10)
    assert hold_out(data, 0.5, 1, 0, TOKENIZER) == (data, None)
    held_out = hold_out(data, 0.5, 2, 0, TOKENIZER)[1]
    assert held_out is not None and [u.desirable for u in held_out.items] in ([True, False], [False, True])


def test_the_only_bad_answers_are_copies() -> None:
    data = answers([True] * 10 + [False] * 2, [*range(10), 50, 50])
    assert hold_out(data, 0.2, 500, 0, TOKENIZER) == (data, None)


def test_both_parts_say_how_many_rows_of_each_source_they_have() -> None:
    files = ["a.jsonl", "b.jsonl", "c.jsonl"]
    samples = [replace(sample(i), source=f"{files[i % 2]}:{i}") for i in range(40)]
    data = prepared(samples, files)
    layout = {"layout": "messages", "in_source": 25}
    data.stats["sources"] = [{"source": f, **layout, "rows": 22, "used": 20} for f in files[:2]]
    data.stats["sources"] += [{"source": files[2], **layout, "rows": 3, "used": 0, "weight": 2.0}]
    trained, held_out = hold_out(data, 0.25, 500, 0, TOKENIZER)
    assert held_out is not None and len(held_out) == 10
    for i, file in enumerate(files[:2]):
        measured = sum(s.source.startswith(file) for s in held_out.samples)
        assert 0 < measured < 10
        assert trained.stats["sources"][i] == {"source": file, **layout, "rows": 22, "used": 20 - measured}
        assert held_out.stats["sources"][i] == {"source": file, **layout, "rows": measured, "used": measured}
    assert trained.stats["sources"][2] == data.stats["sources"][2] and len(held_out.stats["sources"]) == 2
    assert [s["used"] for s in data.stats["sources"]] == [20, 20, 0]


def test_pairs_the_other_way_round_are_copies() -> None:
    one, other = sample(1), sample(2)
    pairs = [(one, other), (other, one), (sample(3), sample(4))]
    samples = [replace(s, source=f"rows.jsonl:{i}") for i, pair in enumerate(pairs) for s in pair]
    fields = (("prompt", "<u4"), ("probability", "<f8"), ("margin", "<f8"))
    items = StoredPairs(stored(samples, fields, [{"prompt": 1, "probability": 1.0, "margin": 0.0}] * 6), [])
    stats = {"source": "x", "used": 3, "rows": 3, "dropped": {}, "tokens": 24, "loss_tokens": 18}
    stats |= {"duplicates": 0, "contradictory": 1}
    trained, held_out = hold_out(PreparedPairs(items, stats), 0.5, 500, 0, TOKENIZER)
    assert held_out is not None and [p.source for p in held_out.items] == ["rows.jsonl:2"] and len(trained) == 2
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
