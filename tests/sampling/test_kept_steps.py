"""Regions and steps that a sampler keeps between calls, where steps are of few sizes."""

from __future__ import annotations

import weakref

import pytest
import torch

from posttrain.config import SamplingConfig
from posttrain.core.types import RolloutGroup
from posttrain.sampling import kv_cache
from posttrain.sampling.cuda_graphs import KeptSteps, RegionSizes, state_of
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request
from tests.sampling.test_engine import prompts, sampler, tokens

PARAMS = SamplingConfig(max_tokens=20)


def static(**options: object) -> LocalSampler:
    return sampler(max_running=8, static_shapes=True, **options)


def asked(n: int, seed: int = 0, low: int = 1, high: int = 30) -> list[Request]:
    return [Request(p, n=n, seed=i) for i, p in enumerate(prompts(7, seed, low, high))]


def logprobs(groups: list[RolloutGroup]) -> list[tuple[float, ...]]:
    return [r.logprobs for g in groups for r in g.rollouts]


def move_weights(s: LocalSampler) -> None:
    with torch.no_grad():
        for p in s.model.parameters():
            p.mul_(1.1)


@pytest.mark.parametrize("n", [1, 3])
def test_what_is_kept_changes_no_bit(n: int) -> None:
    """Calls of other lengths before, and weights that training has changed in place."""
    old, new = static(), static()
    old.sample(asked(n), SamplingConfig(max_tokens=20, temperature=2))
    old.sample(asked(n, seed=6, low=90, high=150), SamplingConfig(max_tokens=70))
    old.sample(asked(4 - n, seed=7), PARAMS)
    for s in (old, new):
        move_weights(s)
    kept = dict(old.kept.known)
    found, expected = old.sample(asked(n), PARAMS), new.sample(asked(n), PARAMS)
    assert tokens(found) == tokens(expected) and logprobs(found) == logprobs(expected)
    layout = next(reversed(old.kept.known))
    assert old.kept.known[layout] is kept[layout]  # it was used again


def test_other_weights_make_what_is_kept_invalid() -> None:
    s = static()
    s.sample(asked(3), PARAMS)
    before = next(iter(s.kept.known.values()))
    weight = next(s.model.parameters())
    weight.data = weight.data.clone()
    s.sample(asked(3), PARAMS)
    assert len(s.kept.known) == 1 and next(iter(s.kept.known.values())) is not before
    s.release()
    assert not s.kept.known


def test_adapters_that_are_switched_off_are_another_state() -> None:
    from posttrain.config import AdapterConfig
    from posttrain.models.adapters import attach
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.tiny_model import tiny_model
    from posttrain.trainer.reference_model import without_adapters

    model = LanguageModel(attach(tiny_model("llama"), AdapterConfig(r=2), 0))
    with without_adapters(model):
        off = state_of(model)
    assert off != state_of(model) == state_of(model)


def test_memory_that_is_kept_is_bounded() -> None:
    s = static()
    s.sample(asked(3), PARAMS)
    layout, steps = next(iter(s.kept.known.items()))
    size = steps.bytes()
    assert size == layout.tokens * s.bytes_per_token()
    tight = static(memory_mb=1.5 * size / 2**20)
    assert tokens(tight.sample(asked(3), PARAMS)) == tokens(static().sample(asked(3), PARAMS))
    assert not tight.kept.known  # more than half of what is allowed


def test_older_steps_make_room_for_a_call() -> None:
    s, kept = static(), KeptSteps()

    def take(columns: int, allowed: float) -> None:
        layout = RegionSizes(4, columns, 0, 0, 1)
        steps = kept.take(layout, s.model, lambda *_: torch.zeros(1), s.model.device, 8, allowed)
        steps.own.at(0, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))  # 8 bytes a token
        kept.keep(layout, steps, allowed)

    for columns in (128, 256):
        take(columns, 1e6)
    assert [x.columns for x in kept.known] == [128, 256]
    take(128, 1e6)
    assert [x.columns for x in kept.known] == [256, 128]  # the least recently used is first
    take(64, 4 * 8 * (128 + 64))
    assert [x.columns for x in kept.known] == [128, 64]


def test_a_sampler_that_is_dropped_frees_its_memory() -> None:
    s = static()
    s.sample(asked(3), PARAMS)
    steps = weakref.ref(next(iter(s.kept.known.values())))
    del s
    assert steps() is None


@pytest.mark.parametrize("n", [1, 3])
def test_slots_written_in_one_operation_hold_the_same(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """As on a GPU: prompts that are filled in, and rows that move to where others left."""
    found = []
    for together in (False, True):
        monkeypatch.setattr(kv_cache, "_in_one", lambda x, together=together: together)
        found.append(static().sample(asked(n), PARAMS))
    assert tokens(found[0]) == tokens(found[1]) and logprobs(found[0]) == logprobs(found[1])
