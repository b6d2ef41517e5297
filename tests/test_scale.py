"""The simulation of many GPUs: hand-worked traces, queueing theory, conservation, the bound of staleness, figures."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def second_a_token(capacity: int = 10**6) -> Any:
    """A sampler that takes one second for every step, whatever runs, with room for `capacity` tokens."""
    from scale.parts import Card, Decoder, Engine, Model

    model = Model("toy", 1, 1e-9, 1e-9, 1, 1)
    card = Card("toy", 1e30, memory=model.cache_bytes * capacity, bandwidth=1e30)
    return Decoder(model, card, Engine(1.0, 1.0, 0.0, 1.0, 1.0, 1.0), 1)


def toy(**settings: Any) -> Any:
    """One group of two completions of five tokens in an update; training takes three seconds, the transfer one."""
    from scale.events import Plan
    from scale.parts import Lengths

    plan = Plan(second_a_token(), 1, 1, 2, 0, Lengths(5.5, 0.0, 10), 0, lambda tokens, squares: 3.0, 1.0)
    return replace(plan, **settings)


def test_decoding_time_is_the_sum_over_steps_and_its_inverse() -> None:
    from scale.parts import elapsed, steps_in

    first, per_token, cached, batch = 0.02, 1e-6, 5000.0, 7
    slow = sum(first + per_token * (cached + batch * i) for i in range(300))
    assert elapsed(300, first, per_token, cached, batch) == pytest.approx(slow)
    assert steps_in(slow, first, per_token, cached, batch) == pytest.approx(300)
    assert steps_in(0.5, first, 0.0, cached, batch) == pytest.approx(25)


def test_mean_length_after_the_cut() -> None:
    from scale.parts import with_mean

    lengths = with_mean(1200, 1.0, 4096)
    drawn = lengths.draw(200_000, np.random.default_rng(0))
    assert lengths.mean == pytest.approx(1200) and drawn.mean() == pytest.approx(1200, rel=0.01)
    assert drawn.max() == 4096 and drawn.min() >= 1
    with pytest.raises(ValueError, match="between 1 and the longest, 10; it is 12"):
        with_mean(12, 1.0, 10)


def test_operations_bytes_and_transfers_by_hand() -> None:
    from scale.parts import H100, MIXTURE, Model, Transfer, sharded_seconds

    model = Model("m", 2, 100.0, 100.0, 8, 4, 10, 1, 80.0)
    assert model.training_operations(30, 500, 1) == pytest.approx((6 * 100 * 30 + 12 * 2 * 8 * 250) * 4 / 3)
    assert model.cache_bytes == 2 * 2 * 2 * 4
    assert model.bytes_read(1) == pytest.approx(2 * (20 + 8)) and model.bytes_read(2) == pytest.approx(2 * (20 + 15.2))
    assert MIXTURE.expert_parameters == pytest.approx(227.1e9, rel=1e-3)
    assert Transfer(10.0, 0.5).seconds(100, 8) == 11.5
    # Two copies of 8: NVLink gathers 7/8 of 200 bytes three times a pass, two passes; then 1/8 is reduced by two.
    seconds = sharded_seconds(model, H100, 16, 8, tokens=16 * 20000)
    assert seconds == pytest.approx(2 * 3 * 200 * 7 / 8 / 450e9 + 2 * 0.5 * 200 / 8 / 50e9)


def test_reward_workers_are_a_queue_with_the_waiting_time_of_theory() -> None:
    """M/D/1: a mean wait of rho s / (2 (1 - rho))."""
    from scale.events import Pool

    rng, pool, count = np.random.default_rng(0), Pool(1, 2.0), 100_000
    for arrival in rng.exponential(2.0 / 0.7, count).cumsum():
        pool.finish(float(arrival))
    assert pool.waited / count == pytest.approx(0.7 * 2.0 / (2 * 0.3), rel=0.03)


def test_synchronous_trace_by_hand() -> None:
    """Sampling 5 s, one worker rewards for 2 s each (at 7 and 9), training 3 s, transfer 1 s: 13 s."""
    from scale.events import Run

    run = Run(toy(reward=2.0, workers=1)).go(3)
    assert [(u.began, u.trained, u.ended) for u in run.updates] == [
        pytest.approx((9 + t, 12 + t, 13 + t)) for t in (0, 13, 26)
    ]
    assert all(u.oldest == 0 and u.stale_tokens == 0 for u in run.updates)


def test_asynchronous_trace_by_hand() -> None:
    """Staleness 1: groups are asked at 0, 0, 9, 13, 19, ...; the third has 3 tokens of version 1 and 2 of version 2."""
    from scale.events import Run

    run = Run(toy(staleness=1)).go(6)
    assert [u.ended for u in run.updates] == pytest.approx([9, 13, 19, 23, 29, 33])
    assert [u.oldest for u in run.updates] == [0, 1, 1, 1, 1, 1]
    assert run.updates[1].stale_tokens == 1 and run.updates[2].stale_tokens == pytest.approx(3 / 5)


def test_a_synchronous_step_is_its_longest_completion_then_training_then_the_transfer() -> None:
    from scale.events import Run
    from scale.parts import Lengths

    plan = toy(samplers=3, batch=5, group=4, lengths=Lengths(30, 1.0, 400), train=lambda tokens, squares: tokens / 100)
    rng, now = np.random.default_rng(7), 0.0
    for update in Run(plan, seed=7).go(4).updates:
        lengths = np.concatenate([plan.lengths.draw(4, rng) for _ in range(5)])
        now += lengths.max() + lengths.sum() / 100 + 1.0
        assert update.ended == pytest.approx(now) and update.tokens == lengths.sum()


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_nothing_is_lost_or_doubled_and_no_token_is_too_old(staleness: int) -> None:
    """A full cache evicts, samplers and the trainer are lost: every completion is trained on once, with its tokens."""
    from scale.events import Run
    from scale.parts import Lengths

    trained: list[int] = []

    class Checked(Run):
        def trained(self) -> None:
            assert self.training is not None
            for number in self.training[1]:
                trained.append(number)
                for sequence in self.groups[number].sequences:
                    assert sum(n for _, n in sequence.pieces) == sequence.done == sequence.length
            super().trained()

        def sampler_event(self, sampler: Any) -> None:
            super().sampler_event(sampler)
            assert sampler.cached <= sampler.decoder.capacity * 1.0001

    losses = ((40.0, "sampler"), (90.0, "trainer"), (300.0, "sampler"), (310.0, "sampler"))
    plan = toy(decoder=second_a_token(600), samplers=2, batch=4, group=3, prompt=10, lengths=Lengths(40, 1.0, 500),
               staleness=staleness, reward=1.0, workers=3, failures=losses, restart=30.0, checkpoint=3)  # fmt: skip
    run = Checked(plan, seed=3).go(25)
    assert len(trained) == len(set(trained)) == 25 * 4 == run.asked - len(run.groups)
    assert run.lost_tokens > 0 and run.lost_seconds >= 30
    assert sum(u.completions for u in run.updates) == 25 * 4 * 3
    assert max(u.oldest for u in run.updates) == staleness  # the bound holds, and is used


def test_a_lost_trainer_costs_its_restart_and_what_was_not_saved() -> None:
    """Lost 1 s into the fourth update (48 to 51 s): one update of 3 s since a checkpoint."""
    from scale.events import Run

    plan = toy(reward=2.0, workers=1, restart=10.0, checkpoint=2, failures=((49.0, "trainer"),))
    calm, lost = (Run(replace(plan, failures=f)).go(5) for f in ((), plan.failures))
    assert calm.updates[3].began == pytest.approx(48) and lost.lost_seconds == 10 + 3
    assert lost.now - calm.now == pytest.approx(1 + 10 + 3)


def test_plans_that_do_not_fit_are_refused_and_figures_can_be_repeated() -> None:
    """The constants and one small run of benchmarks/results/scale.json, and the tables of docs/scale.md."""
    import simulate_scale
    from scale import plans, published
    from scale.parts import DENSE, MIXTURE, Engine

    values = json.loads((BENCHMARKS / "results" / "scale.json").read_text())
    work = simulate_scale.workload(values["constants"])
    assert plans.trainers_needed(DENSE) == 8 and plans.trainers_needed(MIXTURE) == 56
    with pytest.raises(ValueError, match="needs 56 GPUs for its training state; there are 32"):
        plans.together(MIXTURE, 32, work)
    with pytest.raises(ValueError, match="a sampler of 32B dense holds .* tokens, too few"):
        plans.apart(DENSE, 8, 8, 1, replace(work, engine=replace(work.engine, memory=0.21)))
    assert plans.divided(DENSE, 8, work) is None
    found, kept = published.engine(), Engine(**values["constants"]["engine"])
    assert math.isclose(found.sequence, kept.sequence) and math.isclose(found.layer, kept.layer)
    assert simulate_scale.check(work) == values["check"]
    page = simulate_scale.PAGE.read_text()
    assert len(simulate_scale.BLOCK.findall(page)) == page.count("<!-- table: ") > 8
    assert simulate_scale.page_with_tables(page, values) == page
