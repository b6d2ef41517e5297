"""Shared by all tests: one thread (tiny models), no network, deterministic random samples."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

from posttrain.core.types import Sample
from posttrain.cpu import library as native

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
native.kernels()  # compiled once, before a test names a cache folder of its own


def random_samples(count: int, seed: int = 0, low: int = 5, high: int = 60, vocabulary: int = 250) -> list[Sample]:
    """Samples of random tokens; the second half of each carries loss."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        n = int(rng.integers(low, high))
        tokens = rng.integers(3, vocabulary, n).tolist()
        samples.append(Sample(tokens, [0.0] * (n - n // 2) + [1.0] * (n // 2)))
    return samples


def family(seed: int = 0, vocabulary: int = 250) -> list[Sample]:
    """Samples sharing prefixes on two levels, one that is a prefix of others, two strangers; all tokens carry loss."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> list[int]:
        return rng.integers(3, vocabulary, n).tolist()  # type: ignore[no-any-return]

    root = draw(20)
    child = root + draw(18)
    rows = [root + draw(5), root + draw(9), root, child + draw(3), child + draw(7), draw(30), draw(2)]
    return [Sample(r, [0.0] + [1.0] * (len(r) - 1)) for r in rows]


@pytest.fixture
def samples() -> list[Sample]:
    return random_samples(7)
