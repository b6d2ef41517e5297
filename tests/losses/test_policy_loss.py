"""Policy losses: by hand, against slow loops over sequences and tokens, and in every split of a batch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.losses import kl
from posttrain.losses import policy_loss as policy
from posttrain.losses.aggregation import (
    Aggregation,
    denominator,
    reduce,
    sequence_index,
    sequence_mean,
    sequence_sum,
    token_weights,
)

LENGTHS = [4, 1, 0, 6, 2, 3, 0, 5]
CONSTANT = 8.0


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(new, old, reference) log-probabilities and advantages, of N tokens, N tokens, N tokens and R sequences."""
    r = random.Random(11)
    n = sum(LENGTHS)
    old = [-abs(r.gauss(0, 1)) for _ in range(n)]
    new, reference = ([x + r.gauss(0, 0.4) for x in old] for _ in range(2))
    scores = [r.choice([-1.3, -0.2, 0.0, 0.4, 1.1]) for _ in LENGTHS]
    scores[0], scores[3], scores[4] = 1.1, -1.3, 0.0
    made = [torch.tensor(x, dtype=dtype) for x in (new, old, reference, scores)]
    return made[0], made[1], made[2], made[3]


# ------------------------------------------------------------------------------------------- by hand
def test_clipped_by_hand() -> None:
    """min(rho A, clip(rho, 0.8, 1.28) A): 1.28, -1.5, 0.5, -0.8, 2.2; no gradient where the clip is taken."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], requires_grad=True)
    loss, metrics = policy.clipped(ratio, torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]), 0.2, 0.28)
    assert loss.tolist() == pytest.approx([-1.28, 1.5, -0.5, 0.8, -2.2])
    loss.sum().backward()
    assert ratio.grad is not None and ratio.grad.tolist() == [0, 1, -1, 0, -2]
    assert [int(metrics[k]) for k in ("clip_low", "clip_high", "clip_fraction")] == [1, 1, 2]
    assert float(metrics["ratio"]) == pytest.approx(5.1)
    assert float(metrics["ratio_squared"]) == pytest.approx(2 * 2.25 + 2 * 0.25 + 1.21)
    slow = sum(x - 1 - math.log(x) for x in (1.5, 1.5, 0.5, 0.5, 1.1))
    assert float(metrics["approx_kl"]) == pytest.approx(slow, abs=1e-6)


def test_dual_clip_by_hand() -> None:
    """Ratio 5: with A = -1 the loss stops at 3 and has no gradient, with A = 1 it is what it was."""
    ratio = torch.tensor([5.0, 5.0, 2.0], requires_grad=True)
    loss, metrics = policy.clipped(ratio, torch.tensor([-1.0, 1.0, -1.0]), dual=3.0)
    assert loss.tolist() == pytest.approx([3.0, -1.2, 2.0])
    loss.sum().backward()
    assert ratio.grad is not None and ratio.grad.tolist() == [0, 0, 1]
    assert int(metrics["clip_dual"]) == 1


def test_cispo_by_hand() -> None:
    """Weights 2 (held), 1.5 and 0.5 times A; the held token still has its gradient."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    ratio = torch.tensor([4.0, 1.5, 0.5])
    loss, metrics = policy.cispo(ratio, logprobs, torch.tensor([1.0, -1.0, 2.0]), high=2.0)
    assert loss.tolist() == pytest.approx([2.0, -3.0, 3.0])
    loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-2.0, 1.5, -1.0]
    assert [int(metrics[k]) for k in ("clip_low", "clip_high", "clip_fraction")] == [0, 1, 1]


def test_reinforce_and_entropy_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = policy.reinforce_loss(logprobs, torch.tensor([3.0, -0.5]))
    assert loss.tolist() == [3.0, -1.0]
    loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-3.0, 0.5]
    assert policy.entropy_bonus(torch.tensor([2.0, 0.0]), 0.1).tolist() == pytest.approx([-0.2, 0.0])


def test_value_loss_by_hand() -> None:
    """V = 1 from 0.5, held at 0.7. To 0: errors 1 and 0.49. To 2: 1 and 1.69, the held one, without gradient."""
    values = torch.tensor([1.0, 1.0, 0.6], requires_grad=True)
    old, returns = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.0, 2.0, 1.0])
    loss, metrics = policy.value_loss(values, old, returns, clip=0.2)
    assert loss.tolist() == pytest.approx([0.5, 0.845, 0.08])
    loss.sum().backward()
    assert values.grad is not None and values.grad.tolist() == pytest.approx([1.0, 0.0, -0.4])
    found = {k: float(v) for k, v in metrics.items()}
    expected = {"value_error_squared": 2.16, "return": 3.0, "return_squared": 5.0, "value_clip": 1.0}
    assert found == pytest.approx(expected)
    plain, _ = policy.value_loss(values, old, returns, clip=None)
    assert plain.tolist() == pytest.approx([0.5, 0.5, 0.08])


def test_importance_by_hand() -> None:
    """Ratios 4, 1/2 and 1; the first sequence's product is 2, under a cap of 3 and over one of 1.5."""
    sampler = torch.tensor([-1.0 - math.log(4), -1.0 + math.log(2), -2.0])
    learner = torch.tensor([-1.0, -1.0, -2.0], requires_grad=True)
    weights, metrics = policy.truncated_importance(learner, sampler, cap=3.0)
    assert weights.tolist() == pytest.approx([3.0, 0.5, 1.0]) and not weights.requires_grad
    found = {k: float(v) for k, v in metrics.items()}
    k3 = (4 - 1 - math.log(4)) + (0.5 - 1 + math.log(2))
    expected = {"importance": 4.5, "importance_truncated": 1, "mismatch": math.log(8), "mismatch_kl": k3}
    assert found == pytest.approx(expected, abs=1e-6)
    index, lengths = torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    assert policy.truncated_importance(learner, sampler, 3.0, index, lengths)[0].tolist() == pytest.approx([2, 2, 1])
    assert policy.truncated_importance(learner, sampler, 1.5, index, lengths)[0].tolist() == pytest.approx(
        [1.5, 1.5, 1]
    )
    masked, metrics = policy.truncated_importance(learner, sampler, 3.0, mask=True)
    assert masked.tolist() == pytest.approx([0, 0.5, 1]) and float(metrics["importance_truncated"]) == 1
    assert policy.truncated_importance(learner, sampler, 1.5, index, lengths, mask=True)[0].tolist() == [0, 0, 1]


def test_sequence_ratios_by_hand() -> None:
    """Log ratios 0.1 and 0.3, then 1: means 0.2 and 1, sums 0.4 and 1."""
    new, old = torch.tensor([0.1, 0.3, 1.0]) - 2, torch.full((3,), -2.0)
    index, lengths = torch.tensor([0, 0, 2]), torch.tensor([2, 0, 1])
    mean = policy.sequence_ratio(new, old, index, lengths)
    assert mean.log().tolist() == pytest.approx([0.2, 0.2, 1.0], abs=1e-6)
    total = policy.sequence_ratio(new, old, index, lengths, mean=False)
    assert total.log().tolist() == pytest.approx([0.4, 0.4, 1.0], abs=1e-6)
    assert policy.sequence_token_ratio(new, old, index, lengths).tolist() == pytest.approx(mean.tolist())


# -------------------------------------------------------------- every method, ours and by slow loops
Ours = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, policy.Metrics]]


def ours_grpo(new: Tensor, old: Tensor, ref: Tensor, a: Tensor, i: Tensor, n: Tensor) -> tuple[Tensor, policy.Metrics]:
    loss, metrics = policy.clipped(policy.token_ratio(new, old), a, 0.2, 0.28)
    return loss + 0.04 * kl.kl(new, ref), metrics


# (new, old, reference, advantages_N, sequence_N, lengths_R) -> loss a token and metrics; aggregation
METHODS: dict[str, tuple[Ours, Aggregation]] = {
    "reinforce": (lambda new, old, ref, a, i, n: (policy.reinforce_loss(new, a), {}), "constant"),
    "grpo": (ours_grpo, "sequence"),
    "dr_grpo": (ours_grpo, "constant"),
    "dapo": (ours_grpo, "token"),
    "gspo": (
        lambda new, old, ref, a, i, n: policy.clipped(policy.sequence_ratio(new, old, i, n), a, 0.1, 0.15),
        "sequence",
    ),
    "gspo_token": (
        lambda new, old, ref, a, i, n: policy.clipped(policy.sequence_token_ratio(new, old, i, n), a, 0.1, 0.15),
        "sequence",
    ),
    "rloo": (
        lambda new, old, ref, a, i, n: policy.clipped(policy.sequence_ratio(new, old, i, n, False), a),
        "sequence",
    ),
    "cispo": (lambda new, old, ref, a, i, n: policy.cispo(policy.token_ratio(new, old), new, a, 1.3), "token"),
}


def ours(name: str, which: list[int], new: Tensor, of: float) -> tuple[Tensor, policy.Metrics]:
    """The share of these sequences, laid end to end in this order, as a micro-batch holds them."""
    _, old, reference, scores = batch()
    begins = [sum(LENGTHS[:k]) for k in range(len(LENGTHS))]
    tokens = torch.tensor([t for k in which for t in range(begins[k], begins[k] + LENGTHS[k])], dtype=torch.long)
    lengths = torch.tensor([LENGTHS[k] for k in which])
    index = sequence_index(lengths)
    make, kind = METHODS[name]
    advantages_N = scores[torch.tensor(which)][index]
    loss, metrics = make(new[tokens], old[tokens], reference[tokens], advantages_N, index, lengths)
    return reduce(loss, token_weights(kind, index, lengths, CONSTANT), of), metrics


def clip(x: Tensor, low: float, high: float) -> Tensor:
    return x if low <= float(x.detach()) <= high else torch.tensor(min(max(float(x.detach()), low), high)).to(x)


def smaller(x: Tensor, y: Tensor) -> Tensor:
    return x if float(x.detach()) < float(y.detach()) else y


def slow(name: str, new: Tensor) -> Tensor:
    """Each method's formula as its paper has it, a sequence and a token at a time."""
    _, old, reference, scores = batch()
    total, begin = torch.zeros((), dtype=torch.float64), 0
    for n, a in zip(LENGTHS, scores.tolist(), strict=True):
        if n == 0:
            continue
        ts = range(begin, begin + n)
        begin += n
        ratios = [torch.exp(new[t] - old[t]) for t in ts]
        if name in ("gspo", "gspo_token", "rloo"):
            s = torch.prod(torch.stack(ratios))
            s = s if name == "rloo" else s ** (1 / n)
            low, high = (0.2, 0.2) if name == "rloo" else (0.1, 0.15)
            total = total - smaller(s * a, clip(s, 1 - low, 1 + high) * a) / len(LENGTHS)
            continue
        for t, rho in zip(ts, ratios, strict=True):
            if name == "reinforce":
                value = -a * new[t]
            elif name == "cispo":
                value = -min(float(rho.detach()), 1.3) * a * new[t]
            else:
                away = reference[t] - new[t]
                value = -smaller(rho * a, clip(rho, 0.8, 1.28) * a) + 0.04 * (torch.exp(away) - away - 1)
            if name in ("dapo", "cispo"):
                total = total + value / sum(LENGTHS)
            elif name in ("reinforce", "dr_grpo"):
                total = total + value / CONSTANT / len(LENGTHS)
            else:
                total = total + value / n / len(LENGTHS)
    return total


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_equal_a_slow_loop(name: str) -> None:
    new = batch()[0].requires_grad_()
    of = denominator(METHODS[name][1], torch.tensor(LENGTHS))
    value, _ = ours(name, list(range(len(LENGTHS))), new, of)
    by_hand = slow(name, new)
    assert value.item() == pytest.approx(by_hand.item(), abs=1e-7)
    torch.testing.assert_close(
        torch.autograd.grad(value, new)[0], torch.autograd.grad(by_hand, new)[0], atol=1e-7, rtol=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", METHODS)
def test_any_split_gives_the_same_loss_gradient_and_metrics(name: str, seed: int) -> None:
    """Micro-batches of whole sequences, in any order and of any size, with the whole batch's denominator."""
    new = batch()[0].requires_grad_()
    of = denominator(METHODS[name][1], torch.tensor(LENGTHS))
    whole, metrics = ours(name, list(range(len(LENGTHS))), new, of)
    r = random.Random(seed)
    order = list(range(len(LENGTHS)))
    r.shuffle(order)
    cuts = sorted(r.sample(range(1, len(order)), r.randint(1, 4)))
    parts = [order[i:j] for i, j in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    shares = [ours(name, part, new, of) for part in parts]
    total = torch.stack([share for share, _ in shares]).sum()
    assert total.item() == pytest.approx(whole.item(), abs=1e-9)
    torch.testing.assert_close(torch.autograd.grad(total, new)[0], torch.autograd.grad(whole, new)[0])
    for key, value in metrics.items():
        assert float(sum(m[key] for _, m in shares)) == pytest.approx(float(value), abs=1e-9)


def test_sequences_without_advantage_may_be_left_out() -> None:
    """Same loss and gradient, as long as the denominator is that of all."""
    new = batch()[0].requires_grad_()
    some = [i for i, a in enumerate(batch()[3].tolist()) if a != 0]
    assert len(some) < len(LENGTHS)
    for name in ("gspo", "rloo", "cispo", "reinforce"):
        of = denominator(METHODS[name][1], torch.tensor(LENGTHS))
        less, all_of_it = ours(name, some, new, of)[0], ours(name, list(range(len(LENGTHS))), new, of)[0]
        assert less.item() == pytest.approx(all_of_it.item(), abs=1e-12)
        torch.testing.assert_close(torch.autograd.grad(less, new)[0], torch.autograd.grad(all_of_it, new)[0])


def test_gspo_token_serves_advantages_of_its_own_for_each_token() -> None:
    """Gradient s A_t a token (eq. 14), where GSPO's would be s mean(A)."""
    new, old = torch.tensor([-1.0, -1.2], requires_grad=True), torch.tensor([-1.1, -1.2])
    index, lengths, scores = torch.tensor([0, 0]), torch.tensor([2]), torch.tensor([2.0, 1.0])
    s = math.exp(0.05)
    for make, expected in (
        (policy.sequence_token_ratio, [-s * 2 / 2, -s * 1 / 2]),
        (policy.sequence_ratio, [-s * 1.5 / 2, -s * 1.5 / 2]),
    ):
        loss, _ = policy.clipped(make(new, old, index, lengths), scores)
        value = reduce(loss, token_weights("sequence", index, lengths), 1.0)
        assert torch.autograd.grad(value, new)[0].tolist() == pytest.approx(expected, abs=1e-6)


# ----------------------------------------------------------------------------- reducer and degenerate cases
def test_token_weights_and_denominators_by_hand() -> None:
    lengths = torch.tensor([2, 0, 1])
    index = sequence_index(lengths)
    assert index.tolist() == [0, 0, 2]
    assert token_weights("token", index, lengths).tolist() == [1, 1, 1]
    assert token_weights("sequence", index, lengths).tolist() == [0.5, 0.5, 1]
    assert token_weights("constant", index, lengths, 4).tolist() == [0.25] * 3
    assert [denominator(k, lengths) for k in ("token", "sequence", "constant")] == [3, 3, 3]
    assert [denominator(k, lengths[:2]) for k in ("token", "sequence")] == [2, 2]
    values = torch.tensor([1.0, 3.0, 5.0])
    assert float(reduce(values, token_weights("sequence", index, lengths), 3)) == pytest.approx(7 / 3)
    assert sequence_sum(values, index, 3).tolist() == [4, 0, 5]
    assert sequence_mean(values, index, lengths).tolist() == [2, 0, 5]
    with pytest.raises(ValueError, match="token, sequence or constant"):
        token_weights("mean", index, lengths)  # type: ignore[arg-type]
    for constant in (None, 0.0, math.nan):
        with pytest.raises(ValueError, match="positive constant"):
            token_weights("constant", index, lengths, constant)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
@pytest.mark.parametrize("name", METHODS)
def test_no_tokens_give_a_loss_of_zero(name: str, lengths: list[int]) -> None:
    make, kind = METHODS[name]
    new, none, of = torch.zeros(0, requires_grad=True), torch.zeros(0), torch.tensor(lengths, dtype=torch.long)
    index = sequence_index(of)
    loss, metrics = make(new, none, none, none, index, of)
    value = reduce(loss, token_weights(kind, index, of, CONSTANT), denominator(kind, of))
    value.backward()
    assert float(value.detach()) == 0 and all(float(m) == 0 for m in metrics.values())


@pytest.mark.parametrize("name", METHODS)
def test_policies_far_apart_stay_finite(name: str) -> None:
    """Log ratios of 1000 either way, advantages of either sign and 0, in float32."""
    new = torch.tensor([-0.1, -1000.0, -0.1, -1000.0, -0.1, -1000.0], requires_grad=True)
    old = torch.tensor([-1000.0, -0.1] * 3)
    index, lengths = torch.arange(6), torch.ones(6, dtype=torch.long)
    scores = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0])
    loss, metrics = METHODS[name][0](new, old, old, scores, index, lengths)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and new.grad is not None and torch.isfinite(new.grad).all()
    assert all(torch.isfinite(m) for m in metrics.values())
    if name not in ("grpo", "dr_grpo", "dapo"):  # these have their KL there
        assert new.grad[4:].tolist() == [0.0, 0.0]


def test_no_values_and_no_importance() -> None:
    none = torch.zeros(0)
    assert policy.value_loss(none, none, none)[0].shape == (0,)
    weights, metrics = policy.truncated_importance(none, none)
    assert weights.shape == (0,) and all(float(m) == 0 for m in metrics.values())
    same = torch.tensor([-1.0, -0.2])
    weights, metrics = policy.truncated_importance(same, same)
    assert weights.tolist() == [1, 1] and float(metrics["mismatch"]) == float(metrics["mismatch_kl"]) == 0


def test_only_the_new_policy_and_the_values_have_a_gradient() -> None:
    """Old, reference and sampler log-probabilities, advantages, returns and old values are constants of the step."""
    new = torch.tensor([-1.0, -0.5], requires_grad=True)
    others = [torch.tensor([-0.9, -0.7], requires_grad=True) for _ in range(3)]
    old, reference, scores = others
    index, lengths = torch.tensor([0, 0]), torch.tensor([2])
    ratios = [
        policy.token_ratio(new, old),
        policy.sequence_ratio(new, old, index, lengths),
        policy.sequence_token_ratio(new, old, index, lengths),
    ]
    losses = [policy.clipped(ratio, scores)[0] for ratio in ratios]
    losses += [policy.cispo(ratios[0], new, scores)[0], policy.reinforce_loss(new, scores)]
    losses += [kl.kl(new, reference, e) for e in ("k1", "k2", "k3")]
    losses += [policy.value_loss(new, old, scores)[0]]
    torch.stack(losses).sum().backward()
    assert new.grad is not None and [x.grad for x in others] == [None, None, None]
