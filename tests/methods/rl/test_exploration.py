"""Exploration: completions dealt out by success, a curriculum by success, numbers that are steered."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from posttrain.config import CurriculumConfig, RLConfig
from posttrain.methods.rl.adaptive_group_size import adaptive_group_sizes
from posttrain.methods.rl.curriculum import Curriculum, curriculum_weight
from posttrain.methods.rl.rl_trainer import hooks_of
from posttrain.methods.rl.steering import Steering


def settings(**changes: Any) -> RLConfig:
    base = {
        "method": "grpo",
        "problems": {"kind": "rows", "data": {"source": "unused.jsonl"}},
        "rewards": {"terms": [{"kind": "exact"}]},
        "sampler": {"max_tokens": 32},
    }
    return RLConfig.model_validate({**base, **changes})


def test_what_is_hard_gets_more_until_the_budget_is_spent() -> None:
    assert adaptive_group_sizes([0, 2, 0, 1], [4, 4, 4, 4], 16, 4, 32) == [4, 0, 4, 0]
    assert adaptive_group_sizes([0, 2, 0, 1], [8, 4, 8, 4], 8, 4, 32) == [4, 0, 4, 0]
    assert adaptive_group_sizes([0, 0, 0], [4, 4, 4], 6, 4, 32) == [4, 2, 0]
    assert adaptive_group_sizes([0, 1], [30, 4], 20, 4, 32) == [2, 0]


def test_what_is_left_goes_to_the_least_successful() -> None:
    # (s + 1) / (n + 2): 2/6, 5/6, 3/6; nobody is without success
    assert adaptive_group_sizes([1, 4, 2], [4, 4, 4], 3, 4, 32) == [3, 0, 0]
    # 3/6, 3/6: in turn; the third is at its most
    assert adaptive_group_sizes([2, 2, 1], [4, 4, 6], 5, 4, 6) == [2, 2, 0]
    assert adaptive_group_sizes([0], [6], 5, 4, 6) == [0]
    assert adaptive_group_sizes([], [], 5, 4, 6) == []


def test_weight_by_hand() -> None:
    p = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    np.testing.assert_allclose(curriculum_weight(p, 0.5), [0.0, 0.36, 1.0, 0.36, 0.0])
    np.testing.assert_allclose(curriculum_weight(np.array([0.25, 0.5]), 0.25), [1.0, 2**0.5 * (2 / 3) ** 1.5])


def test_success_and_probabilities_by_hand() -> None:
    c = Curriculum(CurriculumConfig(floor=0.2, memory=0.5), 4)
    np.testing.assert_allclose(c.probabilities(), [0.25] * 4)
    c.record(0, 4, 8)
    c.record(1, 0, 8)
    # q: (0.98 * 4 + 0) / (0.98 * 8 + 8)
    q = 3.92 / 15.84
    expected = np.array([(4 + 2 * q) / 10, 2 * q / 10, q, q])
    np.testing.assert_allclose(c.estimates(), expected)
    w = 4 * expected * (1 - expected)
    np.testing.assert_allclose(c.probabilities(), 0.8 * w / w.sum() + 0.2 * np.array([0, 0, 0.5, 0.5]))
    c.record(0, 8, 8)  # 0.5 * 4 + 8 of 0.5 * 8 + 8
    q = (0.98 * 3.92 + 8) / (0.98 * 15.84 + 8)
    assert c.estimates()[0] == pytest.approx((10 + 2 * q) / 14)
    c.record(2, 0, 0)
    assert c.answers[2] == 0


def test_draws_follow_success_and_come_again() -> None:
    c = Curriculum(CurriculumConfig(floor=0.1), 6)
    for problem, right in enumerate((0, 1, 4, 7, 8)):
        for _ in range(4):
            c.record(problem, right, 8)
    counts: Counter[int] = Counter()
    for step in range(600):
        drawn = c.draw(np.random.default_rng([0, 3, step]), 2)
        assert len(set(drawn)) == 2
        counts.update(drawn)
    assert counts[2] > counts[1] > counts[0] and counts[2] > counts[3] > counts[4]
    assert counts[5] > counts[0]  # never asked: the floor's
    other = Curriculum(CurriculumConfig(floor=0.1), 6)
    other.load_state_dict(json.loads(json.dumps(c.state_dict())))
    for step in range(5):
        assert other.draw(np.random.default_rng([0, 3, step]), 3) == c.draw(np.random.default_rng([0, 3, step]), 3)


def test_a_curriculum_of_nothing_but_failures_draws_evenly_and_of_few_problems_again() -> None:
    c = Curriculum(CurriculumConfig(floor=0.0), 3)
    for problem in range(3):
        c.record(problem, 0, 8)
    np.testing.assert_allclose(c.probabilities(), [1 / 3] * 3)
    assert len(c.draw(np.random.default_rng(0), 7)) == 7
    c.record(0, 8, 8)
    assert sorted(c.draw(np.random.default_rng(0), 3)) == [0, 1, 2]


def test_controls_move_what_is_steered_and_nothing_else() -> None:
    config = settings(
        exploration={"entropy_target": {"target": 0.5, "gain": 1.0}},
        kl={"coefficient": 0.1, "target": 0.02},
        entropy_coef=0.03,
    )
    controls = Steering(config)
    controls.after_step({"entropy": 0.45, "kl": 0.03})
    assert controls.temperature == pytest.approx(1.1) and controls.beta == pytest.approx(0.1 * 1.02)
    assert controls.bonus == 0.03
    now = controls.before_step(0, config)
    assert now.sampler.temperature == pytest.approx(1.1) and now.kl.coefficient == pytest.approx(0.102)
    assert controls.metrics(0, []) == {"temperature": now.sampler.temperature, "kl_coefficient": now.kl.coefficient}
    for _ in range(3):
        controls.after_step({"entropy": 50.0})
    assert controls.temperature == 1.0  # no cooler than it began, unless low says so
    controls.after_step({"entropy": 0.45})
    controls.after_step({})  # a step without any rollout
    assert controls.temperature == pytest.approx(1.1)
    again = Steering(config)
    again.load_state_dict(json.loads(json.dumps(controls.state_dict())))
    assert again.state_dict() == controls.state_dict()
    assert hooks_of(settings(), 3, 0) == []


def test_a_steered_bonus_starts_within_its_bounds() -> None:
    config = settings(exploration={"entropy_target": {"control": "bonus", "target": 0.5}})
    controls = Steering(config)
    assert controls.bonus == 0.001
    controls.after_step({"entropy": 0.1})
    assert controls.before_step(0, config).entropy_coef == pytest.approx(0.001 * 1.04)
    assert controls.metrics(0, []) == {"entropy_coefficient": pytest.approx(0.00104)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl": {"target": 0.1}}, "needs a coefficient to start from"),
        (
            {"exploration": {"entropy_target": {"target": 0.5, "low": 0.5, "high": 0.9}}},
            "must be within entropy_target's 0.5 to 0.9",
        ),
        (
            {"exploration": {"entropy_target": {"target": 0.5, "high": 0.9}}},
            "low .1. must not be above entropy_target.high .0.9.",
        ),
        (
            {"exploration": {"entropy_target": {"target": 0.5, "low": 3.0}}},
            "low .3. must not be above entropy_target.high .1.5.",
        ),
        (
            {"exploration": {"adaptive_group_size": {"first": 8}}},
            "adaptive_group_size.first .8. must be below group_size .8.",
        ),
        (
            {"exploration": {"adaptive_group_size": {}}, "rewards": {"terms": [{"kind": "self_consistency"}]}},
            "'self_consistency' needs all",
        ),
        ({"exploration": {"replay": {}}, "sampler": {"top_p": 0.9}}, "leave out sampler.top_p"),
        ({"exploration": {"partial_rollouts": 8}, "sampler": {"min_tokens": 2}}, "leave out sampler.min_tokens"),
        ({"exploration": {"partial_rollouts": 8}, "environment": {"kind": "calculator"}}, "middle of a turn"),
        ({"exploration": {"partial_rollouts": 32}}, "partial_rollouts .32. must be below sampler.max_tokens .32."),
        ({"asynchronous": {}, "sampler": {"top_p": 0.9}}, "asynchronous needs .* leave out sampler.top_p"),
        ({"asynchronous": {}, "exploration": {"curriculum": {}}}, "curriculum chooses prompts by the outcomes"),
        (
            {"asynchronous": {}, "exploration": {"partial_rollouts": 8, "max_staleness": 2}},
            "asynchronous.max_staleness bounds the age of every token",
        ),
    ],
)
def test_settings_that_contradict_one_another_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)
