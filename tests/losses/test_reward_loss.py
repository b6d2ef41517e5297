"""Reward models' losses against numbers worked out by hand, and against a slow loop."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.losses.reward_loss import (
    bradley_terry,
    bradley_terry_metrics,
    centring,
    combine_members,
    combine_steps,
    step_logits,
    step_loss,
    step_metrics,
)


def test_bradley_terry_by_hand() -> None:
    """-log sigma(ln 3) = -log 3/4 = ln 4/3; swapped ln 4; equal rewards ln 2; a margin of ln 3 takes the lead away."""
    ln3 = math.log(3)
    chosen, rejected = torch.tensor([ln3, 0.0, 1.0, ln3]), torch.tensor([0.0, ln3, 1.0, 0.0])
    margins = torch.tensor([0.0, 0.0, 0.0, ln3])
    expected = torch.tensor([0.28768207, 1.38629436, 0.69314718, 0.69314718])
    torch.testing.assert_close(bradley_terry(chosen, rejected, margins), expected)


def test_soft_labels_by_hand_and_where_they_are_least() -> None:
    """p = 0.75 at d = ln 3: -(3/4) ln(3/4) - (1/4) ln(1/4), which is also the least it can be: the gradient is 0."""
    d = torch.tensor([math.log(3), -math.log(3)], requires_grad=True)
    loss = bradley_terry(d, torch.zeros(2), None, torch.tensor([0.75, 0.75]))
    torch.testing.assert_close(loss, torch.tensor([0.56233514, 1.11164122]))
    (gradient,) = torch.autograd.grad(loss.sum(), d)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.5]))  # sigma(d) - p: 1/4 - 3/4
    shifted = bradley_terry(torch.tensor([math.log(3) + 2]), torch.zeros(1), torch.tensor([2.0]), torch.tensor([0.75]))
    assert float(shifted) == pytest.approx(0.56233514)


def test_bradley_terry_equals_a_slow_loop_and_holds_far_out() -> None:
    g = torch.Generator().manual_seed(0)
    c, r, m = torch.randn(3, 50, generator=g, dtype=torch.float64) * 3
    p = torch.rand(50, generator=g, dtype=torch.float64)
    slow = []
    for i in range(50):
        s = 1 / (1 + math.exp(-(float(c[i]) - float(r[i]) - abs(float(m[i])))))
        slow.append(-float(p[i]) * math.log(s) - (1 - float(p[i])) * math.log(1 - s))
    torch.testing.assert_close(bradley_terry(c, r, m.abs(), p), torch.tensor(slow, dtype=torch.float64))
    far = bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert float(far) == 2e4  # no overflow, no infinity


def test_centring_and_metrics_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, -3.0, 0.5])
    torch.testing.assert_close(centring(chosen, rejected, 0.01), torch.tensor([0.09, 0.25, 0.01]))
    found = {k: float(v) for k, v in bradley_terry_metrics(chosen, rejected).items()}
    assert found == {"accuracy": 1.5, "margin": 0.0, "reward": -0.5}  # wrong, right, a tie


def test_step_loss_by_hand() -> None:
    """Target 1/4 at log odds -ln 3 (sigma = 1/4): the entropy of 1/4; hard targets are one term alone."""
    logits = torch.tensor([-math.log(3), math.log(3), math.log(3), 0.0])
    targets = torch.tensor([0.25, 1.0, 0.0, 0.8])
    expected = torch.tensor([0.56233514, 0.28768207, 1.38629436, 0.69314718])
    torch.testing.assert_close(step_loss(logits, targets), expected)
    found = {k: float(v) for k, v in step_metrics(logits, targets).items()}
    assert found["accuracy"] == 3 and found["score"] == pytest.approx(0.25 + 0.75 + 0.75 + 0.5)


def test_one_label_or_two_are_the_same_log_odds() -> None:
    torch.testing.assert_close(step_logits(torch.tensor([[2.0], [-1.0]])), torch.tensor([2.0, -1.0]))
    two = torch.tensor([[1.0, 3.0], [0.5, -0.5]])
    torch.testing.assert_close(step_logits(two).sigmoid(), two.softmax(-1)[:, 1])
    with pytest.raises(ValueError, match=r"\(N, 1\) or \(N, 2\), got \(2, 3\)"):
        step_logits(torch.zeros(2, 3))


def test_combining_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 3.0]])
    torch.testing.assert_close(combine_members(scores), torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(combine_members(scores, "min"), torch.tensor([1.0, 0.0]))
    # sqrt(8/3) = 1.6329932, sqrt(2) = 1.4142136
    conservative = combine_members(scores, "conservative", 2.0)
    torch.testing.assert_close(conservative, torch.tensor([3 - 3.2659863, 1 - 2.8284271]))
    for kind in ("mean", "min", "conservative"):
        torch.testing.assert_close(combine_members(scores[:1], kind), scores[0])
    steps = [0.5, 0.8, 0.25]
    found = [combine_steps(steps, kind) for kind in ("min", "product", "last", "mean")]
    assert found == pytest.approx([0.25, 0.1, 0.25, 1.55 / 3]) and combine_steps([]) == 0


def test_nothing_gives_nothing_and_the_wrong_thing_an_error() -> None:
    none = torch.zeros(0)
    assert (
        bradley_terry(none, none, none, none).shape == (0,)
        and float(bradley_terry_metrics(none, none)["accuracy"]) == 0
    )
    with pytest.raises(ValueError, match="one length"):
        bradley_terry(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"probabilities_P must lie in \[0, 1\], and go from 0.5 to 1.5"):
        bradley_terry(torch.zeros(2), torch.zeros(2), None, torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="coefficient of 0 or more"):
        centring(none, none, -1)
    with pytest.raises(ValueError, match="mean, min or conservative"):
        combine_members(torch.zeros(2, 2), "median")
