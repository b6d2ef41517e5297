"""Turns that are rewarded one by one: each turn's own reward, compared with the same turn of other completions."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from posttrain.config import RLConfig
from posttrain.core.types import Rollout, turn_name, turn_of
from posttrain.methods.rl.collect_rollouts import has_signal
from tests.methods.rl.cases import Case, fill_advantages
from tests.methods.rl.test_policy_gradient import settings

WEIGHT, OUTCOME = 0.5, 0.25


def two_turns(method: str, **changes: Any) -> RLConfig:
    terms = [
        {"kind": "function", "name": "turns", "function": "f", "weight": WEIGHT},
        {"kind": "length", "name": "short", "max": 9, "weight": OUTCOME},
    ]
    return settings(method, rewards={"terms": terms}, **changes)


def chain(first: int, reply: int, second: int, scores: list[float], short: float) -> Rollout:
    """A first turn, a reply of the environment, and a second turn, if there are scores of both."""
    mask = [True] * first + ([False] * reply + [True] * second if len(scores) > 1 else [])
    spans = [(0, first), (first + reply, first + reply + second)]
    steps = {turn_name("turns", i + 1): [(*spans[i], s)] for i, s in enumerate(scores)}
    rewards = {"turns": scores[-1], "short": short}
    total = WEIGHT * scores[-1] + OUTCOME * short
    return Rollout([5] * len(mask), [-1.0] * len(mask), "end", "", rewards, total, mask, {"turns": [], **steps})


def batch() -> list[Case]:
    made = [
        (0, chain(2, 3, 3, [0.0, 2.0], 0.5)),
        (0, chain(1, 2, 2, [1.0, 1.0], 0.0)),
        (0, chain(3, 1, 1, [1.0, -1.0], 1.0)),
        (0, chain(2, 0, 0, [1.0], 0.0)),  # was cut in its first turn
        (1, chain(1, 1, 4, [0.0, 0.0], 0.0)),
        (1, chain(2, 2, 1, [0.0, 2.0], 0.0)),
    ]
    return [Case([3], rollout, group) for group, rollout in made]


def advantage(method: str, mine: float, others: list[float], everybody: list[float]) -> float:
    """Of a number among those of the same turn: others of its group, without it, and all of the batch."""
    group = [mine, *others]
    if method == "grpo":
        return (mine - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4) if len(group) > 1 else 0.0
    if method == "dr_grpo":
        return mine - statistics.fmean(group)
    if method == "rloo":
        return mine - statistics.fmean(others) if others else 0.0
    return mine - statistics.fmean(everybody)


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo", "reinforce"])
def test_each_turn_has_its_own_advantage(method: str) -> None:
    """By a loop over tokens: the completion's own for all of them, and the turn's, in which no other turn counts."""
    rolled, config = batch(), two_turns(method)
    fill_advantages(config, rolled)
    scores = [[s for t in (1, 2) for *_, s in r.rollout.steps.get(turn_name("turns", t), ())] for r in rolled]
    short = [OUTCOME * r.rollout.rewards["short"] for r in rolled]
    for i, r in enumerate(rolled):
        mates = [j for j, x in enumerate(rolled) if x.group == r.group and j != i]
        whole = advantage(method, short[i], [short[j] for j in mates], short)
        expected = []
        for t, s in enumerate(scores[i]):
            same = [scores[j][t] for j in mates if len(scores[j]) > t]
            value = WEIGHT * advantage(method, s, same, [x[t] for x in scores if len(x) > t])
            (begin, end, _) = r.rollout.steps[turn_name("turns", t + 1)][0]
            expected += [whole + value] * (end - begin)
        assert r.advantages.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", ["reinforce_pp", "ppo"])
def test_rewards_to_go_stay_within_their_turn(method: str) -> None:
    """By a loop: every turn is an episode, whose last token has the turn's reward and the completion's."""
    gamma, lam = 0.9, 0.8 if method == "ppo" else 1.0
    own = {"gamma": gamma, "gae_lambda": lam} if method == "ppo" else {"gamma": gamma}
    kl = {"coefficient": 0.3, "where": "reward", "estimator": "k1", "later_turns": 0.5}
    config = two_turns(method, advantages=own, kl=kl, environment={"kind": "calculator"})
    rolled, g = batch(), torch.Generator().manual_seed(0)
    for r in rolled:
        r.values, r.reference = torch.randn(r.length, generator=g), torch.randn(r.length, generator=g)
    fill_advantages(config, rolled)
    raw, returns = [], []
    for r in rolled:
        at = 0
        for t in (1, 2):
            for begin, end, score in r.rollout.steps.get(turn_name("turns", t), ()):
                n = end - begin
                penalty = [0.3 * (1.0 if t == 1 else 0.5) * (-1.0 - float(r.reference[at + i])) for i in range(n)]  # type: ignore[index]
                earned = [-p for p in penalty]
                earned[-1] += WEIGHT * score + OUTCOME * r.rollout.rewards["short"]
                v = [*r.values[at : at + n].tolist(), 0.0] if method == "ppo" else [0.0] * (n + 1)  # type: ignore[index]
                delta = [earned[i] + gamma * v[i + 1] - v[i] for i in range(n)]
                row = [sum((gamma * lam) ** (k - i) * delta[k] for k in range(i, n)) for i in range(n)]
                raw += row
                returns += [a + b for a, b in zip(row, v[:n], strict=True)]
                at += n
    mean, spread = statistics.fmean(raw), statistics.stdev(raw)
    got = torch.cat([r.advantages for r in rolled]).tolist()
    assert got == pytest.approx([(a - mean) / (spread + 1e-8) for a in raw], rel=1e-4, abs=1e-5)
    if method == "ppo":
        assert torch.cat([r.returns for r in rolled]).tolist() == pytest.approx(returns, rel=1e-5, abs=1e-5)  # type: ignore[misc]


def test_turns_alike_teach_nothing_though_the_two_turns_differ() -> None:
    same = [Case([3], chain(2, 1, n, [0.0, 2.0], 0.0), 0) for n in (1, 3)]
    assert not has_signal([r.rollout for r in same])
    for method in ("grpo", "dr_grpo", "rloo", "reinforce"):
        fill_advantages(two_turns(method), same)
        assert not any(bool(r.advantages.any()) for r in same) and not any(r.signal for r in same)
    assert has_signal([chain(2, 1, 1, [0.0, 2.0], 0.0), chain(2, 1, 1, [0.0, 1.0], 0.0)])


def test_a_turn_without_a_score_gets_none_and_the_others_keep_theirs() -> None:
    """As in stage 1, where the first answer has no reward: its tokens have no gradient but the penalty's."""
    rolled = [Case([3], chain(2, 1, 2, [0.0, s], 0.0), 0) for s in (0.0, 1.0)]
    for r in rolled:
        del r.rollout.steps[turn_name("turns", 1)]  # type: ignore[attr-defined]
    fill_advantages(two_turns("dr_grpo"), rolled)
    assert [r.advantages.tolist() for r in rolled] == [[0, 0, -0.25, -0.25], [0, 0, 0.25, 0.25]]


def test_names_of_turns() -> None:
    assert turn_of(turn_name("right", 12), "right") == 12
    assert turn_of("right", "right") == turn_of("right@1", "righ") == turn_of("right@x", "right") == 0
