"""Preference losses: by hand, against a slow loop over pairs, soft labels, and what happens at the edges."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.losses import preference_loss as pref

LN2, LN3 = 0.6931471805599453, 1.0986122886681098
Loss = Callable[..., Tensor]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(found: Tensor, *expected: float) -> None:
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


# ------------------------------------------------------------------------------------------- by hand
def test_dpo_by_hand() -> None:
    """beta h = ln 3 makes sigma = 3/4: loss ln 4/3, slope -beta / 4; -ln 3 makes 1/4: ln 4, slope -3 beta / 4."""
    h = vector(2 * LN3, -2 * LN3, 0.0)
    loss = pref.dpo(h, 0.5)
    close(loss, 0.28768207245178085, 1.3862943611198906, LN2)
    loss.sum().backward()
    assert h.grad is not None
    close(h.grad, -0.125, -0.375, -0.25)


def test_smoothed_and_soft_by_hand() -> None:
    """e = 0.25 at sigma = 3/4: 3/4 ln 4/3 + 1/4 ln 4 = 0.56233514..., where its slope is 0."""
    h = vector(2 * LN3)
    loss = pref.dpo(h, 0.5, smoothing=0.25)
    close(loss, 0.5623351446188083)
    loss.sum().backward()
    assert h.grad is not None
    close(h.grad, 0.0)
    close(pref.dpo(h, 0.5, torch.tensor([0.75], dtype=torch.float64)), 0.5623351446188083)
    # p = 0.9 and e = 0.25: 0.9 * 0.75 + 0.1 * 0.25 = 0.7, so 0.7 ln 4/3 + 0.3 ln 4 = 0.6172657590522137
    both = pref.dpo(h, 0.5, torch.tensor([0.9], dtype=torch.float64), smoothing=0.25)
    close(both, 0.7 * 0.28768207245178085 + 0.3 * 1.3862943611198906)


def test_robust_dpo_by_hand() -> None:
    """(3/4 ln 4/3 - 1/4 ln 4) / (1/2) = 2 (0.21576155... - 0.34657359...) = -0.26162407..., below 0."""
    h = vector(2 * LN3, 0.0)
    close(pref.robust_dpo(h, 0.5, 0.25), -0.26162407188227383, LN2)
    close(pref.robust_dpo(h, 0.5, 0.0), 0.28768207245178085, LN2)


def test_robust_dpo_is_unbiased() -> None:
    """A share e of labels flipped, in expectation: DPO on the true ones."""
    h, e = vector(1.3, -0.4, 2.2), 0.2
    noisy = (1 - e) * pref.robust_dpo(h, 0.7, e) + e * pref.robust_dpo(-h, 0.7, e)
    torch.testing.assert_close(noisy, pref.dpo(h, 0.7))


def test_ipo_by_hand() -> None:
    """beta 0.25: pulled to h = 2; (h - 2)^2 and its slope."""
    h = vector(0.0, 2.0, 5.0)
    loss = pref.ipo(h, 0.25)
    close(loss, 4.0, 0.0, 9.0)
    loss.sum().backward()
    assert h.grad is not None
    close(h.grad, -4.0, 0.0, 6.0)
    close(pref.ipo(h.detach(), 0.25, torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64)), 4.0, 4.0, 9.0)


def test_simpo_and_cpo_by_hand() -> None:
    """beta h - gamma = ln 3 for h = (ln 3 + 1) / 2; at h = 0, ln(1 + e)."""
    close(pref.simpo(vector((LN3 + 1) / 2, 0.0), 2.0, 1.0), 0.28768207245178085, 1.3132616875182228)
    close(pref.dpo(vector(2 * LN3), 0.5), 0.28768207245178085)


def test_length_normalised_dpo_by_hand() -> None:
    """Log ratios 6 of 3 tokens and -1 of 2: 2 - (-1/2) = 5/2 a token, times beta 2/5 ln 3 is ln 3: -log 3/4; in sum it
    would be 7."""
    h = pref.log_ratio(vector(-3.0), vector(-9.0), torch.tensor([3]))
    h = h - pref.log_ratio(vector(-5.0), vector(-4.0), torch.tensor([2]))
    close(h, 2.5)
    close(pref.dpo(h, 0.4 * LN3), 0.28768207245178085)
    close(pref.dpo(h, 0.4 * LN3, smoothing=0.1), 0.28768207245178085 + 0.1 * LN3)  # -log 1/4 is ln 3 above -log 3/4


def test_orpo_by_hand() -> None:
    """P = 3/4 against 1/2: odds 3 and 1, log odds ln 3 and 0; loss beta ln 4/3."""
    odds = pref.log_odds(vector(math.log(0.75), math.log(0.5)))
    close(odds, LN3, 0.0)
    close(pref.orpo(odds[:1] - odds[1:], 0.2), 0.2 * 0.28768207245178085)
    close(pref.nll(vector(-6.0, -1.5, 0.0), torch.tensor([3, 1, 0])), 2.0, 1.5, 0.0)


def test_kto_by_hand() -> None:
    """beta (r - z) = ln 3: a good answer 1/4, a bad one 3/4, times their weights; slopes -+ beta 3/16."""
    r = vector(2 * LN3 + 1, 2 * LN3 + 1, 1.0)
    loss = pref.kto(r, torch.tensor([True, False, True]), 1.0, 0.5, good=2.0, bad=3.0)
    close(loss, 0.5, 2.25, 1.0)
    loss.sum().backward()
    assert r.grad is not None
    close(r.grad, -0.1875, 0.28125, -0.25)


def test_kl_estimate_by_hand() -> None:
    given = vector(0.5, -0.2, 0.6)
    kl = pref.kl_estimate(given)
    assert float(kl) == pytest.approx(0.3) and not kl.requires_grad
    assert float(pref.kl_estimate(-given)) == 0.0 and float(pref.kl_estimate(given[:0])) == 0.0


def test_metrics_by_hand() -> None:
    metrics = pref.pair_metrics(vector(1.0, -0.5, 0.25), vector(0.5, 0.5, 0.25))
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
        {"reward_chosen": 0.75, "reward_rejected": 1.25, "margin": -0.5, "accuracy": 1.5}
    )
    assert not any(v.requires_grad for v in metrics.values())


# ------------------------------------------------------------------------------------------- a slow loop
def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow(name: str, w: float, ref_w: float, n_w: int, l_: float, ref_l: float, n_l: int) -> float:
    """Each method's loss of one pair, written down from its formula again."""
    if name in ("dpo", "cdpo", "robust_dpo"):
        a, b = (-math.log(sigma(s * 0.3 * ((w - ref_w) - (l_ - ref_l)))) for s in (1, -1))
        return {"dpo": a, "cdpo": 0.9 * a + 0.1 * b, "robust_dpo": (0.9 * a - 0.1 * b) / 0.8}[name]
    if name == "dpo_norm":
        return -math.log(sigma(2 * (w - ref_w) / n_w - 2 * (l_ - ref_l) / n_l))
    if name == "ipo":
        return ((w - ref_w) / n_w - (l_ - ref_l) / n_l - 1 / (2 * 0.3)) ** 2
    if name == "cpo":
        return -math.log(sigma(0.3 * (w - l_))) - w / n_w
    if name == "simpo":
        return -math.log(sigma(2.5 * w / n_w - 2.5 * l_ / n_l - 0.8))
    p, q = math.exp(w / n_w), math.exp(l_ / n_l)
    return -w / n_w - 0.2 * math.log(sigma(math.log(p / (1 - p) * (1 - q) / q)))


def ours(name: str, w: Tensor, ref_w: Tensor, n_w: Tensor, l_: Tensor, ref_l: Tensor, n_l: Tensor) -> Tensor:
    plain = pref.log_ratio(w, ref_w) - pref.log_ratio(l_, ref_l)
    by_token = pref.log_ratio(w, ref_w, n_w) - pref.log_ratio(l_, ref_l, n_l)
    means = pref.per_token(w, n_w), pref.per_token(l_, n_l)
    made: dict[str, Callable[[], Tensor]] = {
        "dpo": lambda: pref.dpo(plain, 0.3),
        "cdpo": lambda: pref.dpo(plain, 0.3, smoothing=0.1),
        "robust_dpo": lambda: pref.robust_dpo(plain, 0.3, 0.1),
        "dpo_norm": lambda: pref.dpo(by_token, 2.0),
        "ipo": lambda: pref.ipo(by_token, 0.3),
        "cpo": lambda: pref.dpo(w - l_, 0.3) + pref.nll(w, n_w),
        "simpo": lambda: pref.simpo(means[0] - means[1], 2.5, 0.8),
        "orpo": lambda: pref.orpo(pref.log_odds(means[0]) - pref.log_odds(means[1]), 0.2) + pref.nll(w, n_w),
    }
    return made[name]()


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust_dpo", "dpo_norm", "ipo", "cpo", "simpo", "orpo"])
def test_against_a_slow_loop(name: str) -> None:
    """Values, and gradients by differences, of random pairs."""
    r = random.Random(3)
    rows = []
    for _ in range(7):
        n_w, n_l = r.randint(1, 9), r.randint(1, 9)
        w, l_ = (-n * abs(r.gauss(0.9, 0.5)) - 0.1 for n in (n_w, n_l))
        rows.append((w, w + r.gauss(0, 1.5), n_w, l_, l_ + r.gauss(0, 1.5), n_l))
    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True)]
    columns[0].requires_grad_()
    columns[3].requires_grad_()
    loss = ours(name, *columns)
    assert loss.tolist() == pytest.approx([slow(name, *row) for row in rows], rel=1e-9)
    loss.sum().backward()
    for at in (0, 3):
        grad = columns[at].grad
        assert grad is not None
        for i, row in enumerate(rows):
            moved = [list(row), list(row)]
            moved[0][at] += 1e-6
            moved[1][at] -= 1e-6
            difference = (slow(name, *moved[0]) - slow(name, *moved[1])) / 2e-6  # type: ignore[arg-type]
            assert float(grad[i]) == pytest.approx(difference, abs=1e-7)


# ------------------------------------------------------------------------------------------- soft labels, edges
ALL: list[Loss] = [pref.dpo, pref.robust_dpo, pref.ipo, pref.simpo, pref.orpo]


@pytest.mark.parametrize("loss", ALL)
def test_a_soft_label_is_the_expectation_over_which_answer_is_better(loss: Loss) -> None:
    h, p = vector(0.7, -1.1, 0.0), torch.tensor([0.8, 0.6, 1.0], dtype=torch.float64)
    expected = p * loss(h) + (1 - p) * loss(-h)
    torch.testing.assert_close(loss(h, probability_P=p), expected)
    torch.testing.assert_close(loss(h, probability_P=torch.ones_like(p)), loss(h))
    torch.testing.assert_close(loss(h, probability_P=1 - p), loss(-h, probability_P=p))


@pytest.mark.parametrize("loss", ALL)
def test_edges(loss: Loss) -> None:
    empty = loss(vector())
    assert empty.shape == (0,) and float(empty.sum().detach()) == 0
    far = vector(1e4, -1e4)
    value = loss(far)
    assert torch.isfinite(value).all()
    value.sum().backward()
    assert far.grad is not None and torch.isfinite(far.grad).all()
    with pytest.raises(ValueError, match="beta must be positive, and is 0"):
        loss(far, 0)
    for p, message in (
        (torch.tensor([0.5]), "1,. probabilities for .2"),
        (torch.tensor([0.5, 1.5]), "from 0.5 to 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(far, probability_P=p)


def test_log_odds_where_digits_are_short() -> None:
    """Next to P = 1 and next to P = 0, in float32: log odds, and gradients that stay finite."""
    x = torch.tensor([-1e-4, -30.0, 0.0], requires_grad=True)
    odds = pref.log_odds(x)
    assert odds.tolist() == pytest.approx([math.log(1e4), -30.0, math.log(1e6)], rel=1e-4)
    odds.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and float(x.grad[2]) == 0


def test_wrong_arguments() -> None:
    two, three = vector(1.0, 2.0), vector(1.0, 2.0, 3.0)
    for call in (
        lambda: pref.log_ratio(two, three),
        lambda: pref.per_token(two, torch.tensor([1])),
        lambda: pref.pair_metrics(two, three),
        lambda: pref.log_ratio(two[None], two[None]),
    ):
        with pytest.raises(ValueError, match="vectors of one length"):
            call()
    for smoothing in (0.5, -0.1):
        with pytest.raises(ValueError, match="share of wrong labels"):
            pref.robust_dpo(two, 0.1, smoothing)
    with pytest.raises(ValueError, match="one bool an answer"):
        pref.kto(two, torch.tensor([1, 0]), 0.0)
    assert not pref.log_ratio(two.detach(), two).requires_grad  # the reference gets no gradient


def test_hinge_by_hand() -> None:
    """1 - 0.5 (1 - 0) = 0.5; 1 - 0.5 (4 - 0) is below 0; 1 - 0.5 (0 - 3) = 2.5."""
    losses = pref.hinge(torch.tensor([1.0, 4.0, 0.0]), torch.tensor([0.0, 0.0, 3.0]), beta=0.5)
    assert losses.tolist() == [0.5, 0.0, 2.5]
