"""KL estimators: values by hand; value and gradient in expectation, over every token of a small vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.losses import advantages, kl

Z = torch.tensor([0.3, -1.0, 0.9, 0.1], dtype=torch.float64)
Z_REFERENCE = torch.tensor([-0.2, 0.4, 0.5, 0.0], dtype=torch.float64)


def exact(z: Tensor, other: Tensor) -> Tensor:
    p, q = z.log_softmax(0), other.log_softmax(0)
    return (p.exp() * (p - q)).sum()


def gradient(value: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(value, z)[0]


def test_by_hand() -> None:
    """Policy twice as likely as the reference, then half."""
    logprobs, reference = torch.tensor([0.0, -math.log(2)]), torch.tensor([-math.log(2), 0.0])
    ln2 = math.log(2)
    assert kl.kl(logprobs, reference, "k1").tolist() == pytest.approx([ln2, -ln2])
    assert kl.kl(logprobs, reference, "k2").tolist() == pytest.approx([ln2**2 / 2, ln2**2 / 2])
    assert kl.kl(logprobs, reference, "k3").tolist() == pytest.approx([0.5 - 1 + ln2, 2 - 1 - ln2])
    assert kl.kl(logprobs, logprobs, "k3").tolist() == [0.0, 0.0]


def test_of_whole_completions() -> None:
    """By hand: two tokens of twice the reference's probability, then one of half; an empty completion between."""
    ln2 = math.log(2)
    logprobs, reference = torch.tensor([0.0, 0.0, -ln2]), torch.tensor([-ln2, -ln2, 0.0])
    found = kl.sequence_kl(logprobs, reference, torch.tensor([0, 0, 2]), 3)
    assert found.tolist() == pytest.approx([2 * (ln2 - 0.5), 0.0, 1 - ln2])


def test_the_mean_over_completions_is_the_divergence_of_completions() -> None:
    """Two tokens, the second's distribution hanging on the first: the sum over all of them, weighted by probability."""
    p1, q1 = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.4, 0.6]).double()
    p2 = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).double()
    q2 = torch.tensor([[0.5, 0.5], [0.3, 0.7]]).double()
    expected = ours = 0.0
    for i in range(2):
        for j in range(2):
            p, q = float(p1[i] * p2[i, j]), float(q1[i] * q2[i, j])
            expected += p * math.log(p / q)
            mine, other = torch.stack([p1[i], p2[i, j]]).log(), torch.stack([q1[i], q2[i, j]]).log()
            ours += p * float(kl.sequence_kl(mine, other, torch.zeros(2, dtype=torch.long), 1))
    assert ours == pytest.approx(expected)


def test_expected_values() -> None:
    p = Z.softmax(0)
    for estimator in ("k1", "k3"):
        ours = (p * kl.kl(Z.log_softmax(0), Z_REFERENCE.log_softmax(0), estimator)).sum()
        assert float(ours) == pytest.approx(float(exact(Z, Z_REFERENCE)))
    near = Z + 0.01 * Z_REFERENCE
    k2 = (near.softmax(0) * kl.kl(near.log_softmax(0), Z.log_softmax(0), "k2")).sum()
    assert float(k2) == pytest.approx(float(exact(near, Z)), rel=0.02)


def test_expected_gradients_in_the_loss() -> None:
    """Sampling weights are constants, as they are for a sampler: k1 teaches nothing, k2 reverse KL, k3 forward KL."""
    z = Z.clone().requires_grad_()
    p, reference = Z.softmax(0), Z_REFERENCE.log_softmax(0)
    found = {e: gradient((p * kl.kl(z.log_softmax(0), reference, e)).sum(), z) for e in ("k1", "k2", "k3")}
    reverse, forward = gradient(exact(z, Z_REFERENCE), z), gradient(exact(Z_REFERENCE, z), z)
    torch.testing.assert_close(found["k1"], torch.zeros_like(Z))
    torch.testing.assert_close(found["k2"], reverse)
    torch.testing.assert_close(found["k3"], forward)
    assert float((reverse - forward).abs().max()) > 0.01, "the two directions must differ for this test to tell"


def test_expected_gradients_in_the_reward() -> None:
    """The score function times a constant: k1 gives that of KL(pi || pi_ref), the others don't."""
    z = Z.clone().requires_grad_()
    p, reference = Z.softmax(0), Z_REFERENCE.log_softmax(0)
    reverse = gradient(exact(z, Z_REFERENCE), z)
    off = {}
    for e in ("k1", "k2", "k3"):
        constant = kl.kl(Z.log_softmax(0), reference, e)
        off[e] = float((gradient((p * constant * z.log_softmax(0)).sum(), z) - reverse).abs().max())
    assert off["k1"] < 1e-12 and off["k2"] > 0.01 and off["k3"] > 0.01


def test_expected_gradients_of_an_older_policys_samples() -> None:
    """ratio * kl, the ratio differentiable: value and gradient of KL(pi || pi_ref) for k1 and k3."""
    old = torch.tensor([0.5, 0.2, -0.4, 0.0], dtype=torch.float64)
    z = Z.clone().requires_grad_()
    for e in ("k1", "k3"):
        ratio = (z.log_softmax(0) - old.log_softmax(0)).exp()
        value = (old.softmax(0) * ratio * kl.kl(z.log_softmax(0), Z_REFERENCE.log_softmax(0), e)).sum()
        assert value.item() == pytest.approx(float(exact(Z, Z_REFERENCE)))
        torch.testing.assert_close(gradient(value, z), gradient(exact(z, Z_REFERENCE), z))


def test_in_the_reward() -> None:
    """Sequences of 2, 0 and 1 tokens; the reward of the empty one has no token to go to."""
    sequence, rewards = torch.tensor([0, 0, 2]), torch.tensor([1.0, 5.0, 0.0])
    divergence = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    ours = kl.token_rewards(rewards, divergence, 0.1, sequence)
    assert ours.tolist() == pytest.approx([-0.05, 0.9, -0.2]) and not ours.requires_grad
    total = kl.penalised_rewards(rewards, divergence, 0.1, sequence)
    assert total.tolist() == pytest.approx([0.85, 5.0, -0.2]) and not total.requires_grad
    assert advantages.returns(ours, sequence).tolist() == pytest.approx([0.85, 0.9, -0.2])


def test_degenerate() -> None:
    none, index = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert kl.kl(none, none).shape == (0,)
    assert kl.token_rewards(torch.ones(2), none, 0.1, index).shape == (0,)
    assert kl.penalised_rewards(torch.ones(2), none, 0.1, index).tolist() == [1.0, 1.0]
    far = torch.tensor([-1000.0, -1.0]).requires_grad_()
    value = kl.kl(far, torch.tensor([-1.0, -1000.0]))
    value.sum().backward()
    assert torch.isfinite(value).all() and far.grad is not None and torch.isfinite(far.grad).all()
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl.kl(none, none, "k4")  # type: ignore[arg-type]
