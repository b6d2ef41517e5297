"""Advantages: by hand, by slow loops over groups and tokens, and where there is nothing to compare with."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from posttrain.losses import advantages
from posttrain.losses.aggregation import sequence_index

# Groups of 3, 2, 1 and 4, their members scattered; the group of 4 has equal rewards.
GROUP = torch.tensor([0, 3, 1, 0, 2, 3, 1, 3, 0, 3])
REWARDS = torch.tensor([1.0, 0.1, 5.0, 0.0, 7.0, 0.1, 1.0, 0.1, 2.0, 0.1])


def slow_groups(rewards: list[float], groups: list[int]) -> dict[int, list[float]]:
    return {g: [r for r, other in zip(rewards, groups, strict=True) if other == g] for g in set(groups)}


def test_leave_one_out_by_hand() -> None:
    """1 against (0 + 2) / 2, 0 against (1 + 2) / 2, 2 against (1 + 0) / 2; 5 against 1; one alone; all equal."""
    ours = advantages.leave_one_out(REWARDS, GROUP)
    assert ours.tolist() == pytest.approx([0, 0, 4, -1.5, 0, 0, -4, 0, 1.5, 0])
    assert ours.dtype == torch.float32


def test_group_relative_by_hand() -> None:
    """1, 0, 2: mean 1, deviation 1. 5 and 1: mean 3, deviation sqrt(8)."""
    ours = advantages.group_relative(REWARDS, GROUP, epsilon=0.5)
    half = 2 / (math.sqrt(8) + 0.5)
    assert ours.tolist() == pytest.approx([0, 0, half, -1 / 1.5, 0, 0, -half, 0, 1 / 1.5, 0])
    none = advantages.group_relative(REWARDS, GROUP, "none")
    assert none.tolist() == pytest.approx([0, 0, 2, -1, 0, 0, -2, 0, 1, 0])
    whole = advantages.group_relative(REWARDS, GROUP, "batch", epsilon=0.25)
    deviation = statistics.stdev(REWARDS.tolist())
    assert whole.tolist() == pytest.approx([x / (deviation + 0.25) for x in none.tolist()])


@pytest.mark.parametrize("seed", range(4))
def test_group_advantages_equal_slow_loops(seed: int) -> None:
    r = random.Random(seed)
    groups = [r.randrange(6) for _ in range(40)]
    rewards = [r.choice([0.0, 1.0, 0.1, -0.3]) for _ in groups]
    members = slow_groups(rewards, groups)
    rloo, grpo = [], []
    for reward, g in zip(rewards, groups, strict=True):
        others = list(members[g])
        others.remove(reward)
        rloo.append(reward - statistics.fmean(others) if others else 0.0)
        spread = statistics.stdev(members[g]) if others else 0.0
        grpo.append((reward - statistics.fmean(members[g])) / (spread + 1e-4))
    at, of = torch.tensor(groups), torch.tensor(rewards)
    assert advantages.leave_one_out(of, at).tolist() == pytest.approx(rloo, abs=1e-6)
    assert advantages.group_relative(of, at).tolist() == pytest.approx(grpo, abs=1e-5)
    mixed = [g in members and min(members[g]) < max(members[g]) for g in range(max(groups) + 1)]
    assert advantages.mixed_groups(of, at).tolist() == mixed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_give_exactly_nothing(reward: float, dtype: torch.dtype) -> None:
    """A mean that is off in its last digit would keep a group without signal in the computation."""
    rewards, one = torch.full((3,), reward, dtype=dtype), torch.zeros(3, dtype=torch.long)
    for ours in (
        advantages.leave_one_out(rewards, one),
        advantages.group_relative(rewards, one),
        advantages.group_relative(rewards, one, "batch"),
        advantages.reinforce(rewards),
        advantages.whiten(rewards),
    ):
        assert not ours.any()


def test_the_naive_mean_is_off() -> None:
    """What the test above guards against does happen."""
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert float((rewards - rewards.sum() / 3).abs().max()) > 0


def test_reinforce_and_its_baselines() -> None:
    rewards = torch.tensor([1.0, 0.0, 5.0])
    assert advantages.reinforce(rewards).tolist() == [-1.0, -2.0, 3.0]
    assert advantages.reinforce(rewards, 0.5).tolist() == [0.5, -0.5, 4.5]
    assert advantages.reinforce(rewards, torch.tensor([1.0, 1.0, 2.0])).tolist() == [0.0, -1.0, 3.0]
    assert advantages.reinforce(torch.tensor([4.0])).tolist() == [0.0]
    assert advantages.moving_average(None, rewards) == 2.0
    assert advantages.moving_average(4.0, rewards, decay=0.75) == pytest.approx(0.75 * 4 + 0.25 * 2)
    assert advantages.moving_average(4.0, rewards[:0]) == 4.0
    assert advantages.moving_average(None, rewards[:0]) == 0.0


def test_remax() -> None:
    ours = advantages.remax(REWARDS[:5], torch.tensor([1.0, 2.0, 3.0, 4.0]), GROUP[:5])
    assert ours.tolist() == pytest.approx([0.0, -3.9, 3.0, -1.0, 4.0])


def test_returns_and_gae_by_hand() -> None:
    """Sequences of 3 and 1. GAE: deltas -0.25 and 0.75, so that A = -0.25 + 0.5 * 0.75 and 0.75."""
    sequence = torch.tensor([0, 0, 0, 1])
    assert advantages.returns(torch.tensor([1.0, 2.0, 3.0, 4.0]), sequence, 0.5).tolist() == [2.75, 3.5, 3.0, 4.0]
    ours, returns = advantages.gae(
        torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25]), torch.tensor([4, 4]), gamma=1.0, lam=0.5
    )
    assert ours.tolist() == [0.125, 0.75]
    assert returns.tolist() == [0.625, 1.0]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_a_slow_loop(gamma: float, lam: float) -> None:
    r = random.Random(7)
    lengths = [5, 0, 1, 17, 2, 64, 3]
    sequence = sequence_index(torch.tensor(lengths))
    rewards = [r.gauss(0, 1) for _ in sequence]
    values = [r.gauss(0, 1) for _ in sequence]
    slow, begin = [0.0] * len(rewards), 0
    for n in lengths:
        after, ahead = 0.0, 0.0
        for t in reversed(range(begin, begin + n)):
            ahead = rewards[t] + gamma * after - values[t] + gamma * lam * ahead
            slow[t], after = ahead, values[t]
        begin += n
    exact = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    ours, returns = advantages.gae(torch.tensor(rewards, dtype=torch.float64), exact, sequence, gamma, lam)
    assert ours.tolist() == pytest.approx(slow, abs=1e-12)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(slow, values, strict=True)], abs=1e-12)
    assert not ours.requires_grad and not returns.requires_grad


def test_whitening() -> None:
    ours = advantages.whiten(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    deviation = math.sqrt((4 + 1 + 0 + 9) / 3)
    assert ours.tolist() == pytest.approx([-2 / deviation, -1 / deviation, 0, 3 / deviation])
    assert advantages.whiten(torch.tensor([4.0])).tolist() == [0.0]


def test_reinforce_plus_plus() -> None:
    """Token rewards (0, 1) and (3): to go 1, 1, 3. With baseline: 1 and 0 against their mean, lengths 2 and 1."""
    sequence = torch.tensor([0, 0, 1])
    ours = advantages.reinforce_plus_plus(torch.tensor([0.0, 1.0, 3.0]), sequence)
    deviation = math.sqrt((2 * (2 / 3) ** 2 + (4 / 3) ** 2) / 2)
    assert ours.tolist() == pytest.approx([-2 / 3 / deviation, -2 / 3 / deviation, 4 / 3 / deviation])
    centred = advantages.group_relative(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), "none")
    base = advantages.whiten(centred[sequence])
    deviation = math.sqrt((2 * (1 / 3) ** 2 + (2 / 3) ** 2) / 2)  # 0.5, 0.5, -0.5 around 1/6
    assert base.tolist() == pytest.approx([1 / 3 / deviation, 1 / 3 / deviation, -2 / 3 / deviation])


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="scale must be group, batch or none"):
        advantages.group_relative(REWARDS, GROUP, "groups")  # type: ignore[arg-type]


def test_nothing_in_nothing_out() -> None:
    none, index = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for ours in (
        advantages.leave_one_out(none, index),
        advantages.group_relative(none, index),
        advantages.group_relative(none, index, "batch"),
        advantages.reinforce(none),
        advantages.mixed_groups(none, index),
        advantages.returns(none, index),
        advantages.whiten(none),
        *advantages.gae(none, none, index),
        advantages.reinforce_plus_plus(none, index),
    ):
        assert ours.shape == (0,)
