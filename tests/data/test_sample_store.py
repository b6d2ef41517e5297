"""Samples in arrays and files: what is read is what was written, in the order of the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from posttrain.core.errors import DataError
from posttrain.core.types import Sample
from posttrain.data.sample_store import TOKENS, SampleStore, SampleWriter, open_store

WEIGHTS = [[0.0, 1.0], [0.0], [0.0, 0.0, 1.0, 1.0, 0.0, 0.1, 0.1, 1.0], [0.0, -1.5, 1e-300, 0.3]]


def samples(vocabulary: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(40):
        weights = WEIGHTS[i % 4]
        made.append(Sample(rng.integers(0, vocabulary, len(weights)).tolist(), weights, f"{'ab'[i % 2]}.jsonl:{i + 1}"))
    made[7] = Sample(made[3].tokens, made[3].weights, made[7].source)
    return made


def write(given: list[Sample], vocabulary: int, folder: Path | None) -> SampleStore:
    writer = SampleWriter(["a.jsonl", "b.jsonl"], vocabulary, folder)
    for i in np.random.default_rng(1).permutation(len(given)):
        writer.add(10 * int(i), given[i], int(i) % 2, int(i) + 1, 100 * int(i))
    return writer.finish()


@pytest.mark.parametrize("vocabulary", [2**16, 2**16 + 1])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_read_is_what_was_written(tmp_path: Path, vocabulary: int, on_disk: bool) -> None:
    given = samples(vocabulary)
    store = write(given, vocabulary, tmp_path if on_disk else None)
    assert store.dtype.itemsize == (2 if vocabulary == 2**16 else 4)
    for some in (store, open_store(tmp_path, store.names, store.dtype.str) if on_disk else store):
        assert list(some) == given and some[-1] == given[-1] and some[3:5] == given[3:5] and len(some) == 40
        assert all(type(t) is int for t in some[0].tokens) and all(type(w) is float for w in some[0].weights)
    assert store.lengths.tolist() == [len(s) for s in given]
    assert store.loss_tokens == sum(1 for s in given for w in s.weights if w)
    assert store.columns["position"].tolist() == [100 * i for i in range(40)]
    unique = len({tuple(s.tokens) for s in given})
    assert store.repeats == 40 - unique and store.content(3) == store.content(7) != store.content(11)
    part = store.take([5, 0, 5]).take([2, 1])
    assert list(part) == [given[5], given[0]] and part.place(0) == given[5].source
    with pytest.raises(IndexError):
        store[40]


def test_a_token_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(OverflowError):
        write([Sample([70_000], [0.0], "a.jsonl:1")], 100, None)


def test_damage_is_found_when_a_sample_is_read(tmp_path: Path) -> None:
    store = write(samples(300), 300, tmp_path)
    data = bytearray((tmp_path / TOKENS).read_bytes())
    data[int(store.columns["start"][5]) * 2] ^= 1
    (tmp_path / TOKENS).write_bytes(data)
    damaged = open_store(tmp_path, store.names, store.dtype.str)
    assert damaged[4] == samples(300)[4]
    with pytest.raises(DataError, match=r"damaged at b\.jsonl:6: delete .* and run again"):
        damaged[5]
