"""Drawing by hand: which token a number in [0, 1) picks, what the cut-offs leave, and that frequencies come out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from posttrain.config import SamplingConfig
from posttrain.sampling.token_sampling import cut, draw_tokens, stream

P = [0.1, 0.4, 0.2, 0.3]


def logits(probabilities: list[float], rows: int = 1) -> torch.Tensor:
    return torch.tensor([probabilities] * rows).log()


def kept(**settings: Any) -> list[int]:
    return torch.isfinite(cut(logits(P), SamplingConfig(**settings))[0]).nonzero().flatten().tolist()


def test_the_first_token_whose_cumulative_probability_exceeds_the_number() -> None:
    numbers = [0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 0.999999]
    tokens, logprobs = draw_tokens(logits(P, 8), torch.tensor(numbers, dtype=torch.float64), SamplingConfig())
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert logprobs.exp().tolist() == pytest.approx([0.1, 0.1, 0.4, 0.4, 0.2, 0.2, 0.3, 0.3], abs=1e-6)


def test_cut_offs_by_hand() -> None:
    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [1, 3] and kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.4) == [1] and kept(top_p=0.41) == [1, 3] and kept(top_p=0.7001) == [1, 2, 3]
    assert kept(top_p=1e-9) == [1]
    assert kept(min_p=0.5) == [1, 2, 3] and kept(min_p=0.51) == [1, 3] and kept(min_p=0.999) == [1]
    assert kept(top_k=3, top_p=0.5, min_p=0.8) == [1]  # in this order, each on what the one before left
    assert kept(top_k=3, top_p=0.77) == [1, 3]  # of 0.9 in all, 0.7 is 0.778
    assert kept(top_k=3, top_p=0.79) == [1, 2, 3]


def test_logprobs_are_those_of_what_was_left() -> None:
    tokens, logprobs = draw_tokens(logits(P), torch.tensor([0.5], dtype=torch.float64), SamplingConfig(top_k=2))
    assert tokens.tolist() == [1] and float(logprobs.exp()) == pytest.approx(0.4 / 0.7, abs=1e-6)


def test_greedy_takes_the_first_of_equals_and_says_its_probability() -> None:
    tokens, logprobs = draw_tokens(logits([0.2, 0.4, 0.4]), torch.zeros(1).double(), SamplingConfig(temperature=0))
    assert tokens.tolist() == [1] and float(logprobs.exp()) == pytest.approx(0.4, abs=1e-6)


def test_banned_tokens_only_in_the_rows_marked() -> None:
    numbers = torch.full((2,), 0.3, dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits(P, 2), numbers, SamplingConfig(), [1], torch.tensor([True, False]))
    assert tokens.tolist() == [2, 1]
    assert logprobs.exp().tolist() == pytest.approx([0.2 / 0.6, 0.4], abs=1e-6)


@pytest.mark.parametrize("vocabulary", [5, 255, 256, 257, 3000])
def test_the_same_token_as_a_slow_search(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    z = torch.tensor(rng.normal(0, 3, (64, vocabulary)), dtype=torch.float32)
    z[:, rng.integers(0, vocabulary, vocabulary // 3)] = -torch.inf
    numbers = torch.tensor([0.0, *rng.random(62), 1 - 1e-16])
    tokens, _ = draw_tokens(z.clone(), numbers, SamplingConfig())
    p = z.double().softmax(-1)
    for row, token, u in zip(p, tokens.tolist(), numbers.tolist(), strict=True):
        cumulative = row.cumsum(0)
        below = float(cumulative[token - 1]) if token else 0.0
        assert float(row[token]) > 0
        assert below - 1e-6 <= u <= float(cumulative[token]) + 1e-6


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_p": 0.9995}, {"top_k": 7, "top_p": 0.8}])
def test_top_p_over_a_large_vocabulary_equals_a_full_sort(settings: dict[str, Any]) -> None:
    """Flat rows need more candidates than are looked at first, peaked ones fewer."""
    rng = np.random.default_rng(0)
    z = torch.tensor(rng.normal(0, 1, (6, 4000)) * np.array([[0.01], [0.1], [1], [3], [9], [30]]), dtype=torch.float32)
    got = torch.isfinite(cut(z.clone(), SamplingConfig(**settings)))
    for row, mine in zip(z, got, strict=True):
        order = row.argsort(descending=True)
        order = order[: settings.get("top_k", len(order))]
        p = row[order].double().softmax(0)
        before = p.cumsum(0) - p
        want = order[before < settings["top_p"]]
        edge = abs(len(want) - int(mine.sum()))
        assert edge <= 1 and set(want[:-1].tolist()) <= set(mine.nonzero().flatten().tolist())


def test_frequencies() -> None:
    numbers = torch.tensor(stream(3, 1, 20_000))
    tokens, _ = draw_tokens(logits(P, 20_000), numbers, SamplingConfig())
    share = torch.bincount(tokens, minlength=4) / 20_000
    assert share.tolist() == pytest.approx(P, abs=0.012)  # 3.5 standard errors


def test_streams_are_their_own() -> None:
    assert stream(1, 2, 5).tolist() == stream(1, 2, 9)[:5].tolist()
    different = {tuple(stream(s, j, 3)) for s in (0, 1, -1, 2**63) for j in range(4)}
    assert len(different) == 16
    assert all(0 <= x < 1 for x in stream(7, 0, 1000))
