"""Divergences between teacher and student: by hand, against a slow loop in float64, against TRL."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posttrain.losses import distillation_loss as distill
from posttrain.losses import linear_logprobs as logprobs
from posttrain.losses.distillation_loss import TeacherHidden, TeacherTop, distillation_loss, top_logprobs
from posttrain.losses.gradient_accumulation import added_in_place
from posttrain.losses.linear_logprobs import Head

V, N, H = 50, 23, 16
DIVERGENCES: dict[str, Callable[..., object]] = {
    "forward_kl": distill.forward_kl,
    "reverse_kl": distill.reverse_kl,
    "jsd": partial(distill.jensen_shannon, beta=0.3),
    "skewed_forward_kl": partial(distill.skewed_forward_kl, alpha=0.2),
    "skewed_reverse_kl": partial(distill.skewed_reverse_kl, alpha=0.2),
}


def slow(name: str, p: Tensor, q: Tensor) -> Tensor:
    """One position, class by class."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for v in range(len(a)):
            total = total + a[v] * (torch.log(a[v]) - torch.log(b[v]))
        return total

    match name:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            m = 0.3 * p + 0.7 * q
            return 0.3 * kl(p, m) + 0.7 * kl(q, m)
        case "skewed_forward_kl":
            return kl(p, 0.2 * p + 0.8 * q)
        case _:
            return kl(q, 0.2 * q + 0.8 * p)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a chunk in blocks of three, so that chunks and blocks end in the middle."""
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", {"cpu": 7 * 4 * V})
    monkeypatch.setattr(distill, "BLOCK_BYTES", {"cpu": 3 * 4 * V})


def make(bias: bool = False, seed: int = 1, width: int = H, size: int = V) -> tuple[Tensor, Head]:
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(N, width, generator=g), torch.randn(size, width, generator=g) / 2
    return h, Head(w, torch.randn(size, generator=g) if bias else None)


def logits(h: Tensor, head: Head, t: float) -> Tensor:
    z = h.double() @ head.weight_V_H.double().t()
    z = (z + head.bias_V.double() if head.bias_V is not None else z) * head.scale
    return (head.softcap * torch.tanh(z / head.softcap) if head.softcap else z) / t


def test_by_hand() -> None:
    """Teacher 1/2, 1/4, 1/4 and student 1/4, 1/4, 1/2."""
    half, quarter = math.log(1 / 2), math.log(1 / 4)
    p, q = torch.tensor([[half, quarter, quarter]]), torch.tensor([[quarter, quarter, half]])
    kl = 1 / 2 * math.log(2) + 1 / 4 * math.log(1 / 2)  # 0.1733
    for name in ("forward_kl", "reverse_kl"):
        assert float(DIVERGENCES[name](q, p)[0]) == pytest.approx(kl, abs=1e-6)  # type: ignore[index]
    value, d = distill.forward_kl(q, p)
    assert d.tolist() == [[pytest.approx(x, abs=1e-6) for x in (-1 / 4, 0, 1 / 4)]]
    value, _ = distill.jensen_shannon(q, p, 0.5)  # the mixture is 3/8, 1/4, 3/8
    expected = 1 / 2 * math.log(4 / 3) + 1 / 4 * math.log(2 / 3)
    assert float(value) == pytest.approx(expected, abs=1e-6)
    # The top token of the teacher alone: 1/2 and 1/2 against 1/4 and 3/4.
    head = Head(torch.tensor([[quarter], [quarter], [half]]))
    top = TeacherTop(torch.tensor([[0]]), torch.tensor([[half]]), torch.tensor([half]))
    loss, values, same = distillation_loss(torch.ones(1, 1), head, top, torch.tensor([3.0]))
    assert values.tolist() == [pytest.approx(1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3), abs=1e-6)]
    assert float(loss) == pytest.approx(3 * float(values)) and same.tolist() == [False]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("bias", "scale", "cap", "t"), [(False, 1.0, None, 1.0), (True, 0.5, 4.0, 1.7)])
def test_equals_a_slow_loop(name: str, bias: bool, scale: float, cap: float | None, t: float) -> None:
    h, head = make(bias)
    teacher_h, teacher_head = make(bias, seed=2, width=H + 3)
    teacher_head = replace(teacher_head, scale=0.7)
    head = replace(head, scale=scale, softcap=cap)
    leaves = [x.requires_grad_() for x in (h, head.weight_V_H, head.bias_V) if x is not None]
    c = torch.rand(N, generator=torch.Generator().manual_seed(3))
    given = TeacherHidden(teacher_h, teacher_head)
    loss, values, same = distillation_loss(h, head, given, c, DIVERGENCES[name], t)  # type: ignore[arg-type]
    p, q = logits(teacher_h, teacher_head, t).softmax(-1), logits(h, head, t).softmax(-1)
    expected = torch.stack([slow(name, p[n], q[n]) for n in range(N)])
    torch.testing.assert_close(values.double(), expected.detach(), atol=1e-6, rtol=1e-5)
    assert same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    ours = torch.autograd.grad(2 * loss, leaves)
    theirs = torch.autograd.grad(2 * (c * expected).sum(), leaves)
    for o, s in zip(ours, theirs, strict=True):
        torch.testing.assert_close(o, s.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_with_its_tail(name: str) -> None:
    """The divergence of k + 1 classes; gradients reach the tail's tokens; as the whole one where k leaves one token."""
    h, head = make()
    teacher_h, teacher_head = make(seed=2)
    leaves = [h.requires_grad_(), head.weight_V_H.requires_grad_()]
    c = torch.rand(N, generator=torch.Generator().manual_seed(3))
    p, q = logits(teacher_h, teacher_head, 1.3).softmax(-1), logits(h, head, 1.3).softmax(-1)
    for k in (4, V - 1):
        top = top_logprobs(teacher_h, teacher_head, k, 1.3)
        loss, values, same = distillation_loss(h, head, top, c, DIVERGENCES[name], 1.3)  # type: ignore[arg-type]
        classes = []
        for n in range(N):
            ids = p[n].topk(k).indices
            classes.append([torch.cat([x[ids], (x.sum() - x[ids].sum())[None]]) for x in (p[n], q[n])])
        expected = torch.stack([slow(name, a, b) for a, b in classes])
        torch.testing.assert_close(values.double(), expected.detach(), atol=2e-6, rtol=1e-5)
        ours = torch.autograd.grad(loss, leaves)
        theirs = torch.autograd.grad((c * expected).sum(), leaves, retain_graph=True)
        for o, s in zip(ours, theirs, strict=True):
            torch.testing.assert_close(o, s.float(), atol=2e-5, rtol=2e-4)
        assert same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    whole = distillation_loss(h, head, TeacherHidden(teacher_h, teacher_head), c, DIVERGENCES[name], 1.3)[1]  # type: ignore[arg-type]
    torch.testing.assert_close(values, whole, atol=1e-6, rtol=1e-5)


def test_places_that_a_server_did_not_fill() -> None:
    """A row of two tokens beside a row of three: the unused place changes nothing, and nothing is NaN."""
    h, head = make()
    leaves = [h.requires_grad_(), head.weight_V_H.requires_grad_()]
    certain = torch.tensor([[0.0, -math.inf, -math.inf]])
    ids, given = torch.tensor([[7, 0, 0]]), certain
    short = TeacherTop(ids[:, :1], given[:, :1], torch.tensor([-math.inf]))
    padded = TeacherTop(ids, given, torch.tensor([-math.inf]))
    for divergence in DIVERGENCES.values():
        outcomes = []
        for top in (short, padded):
            loss, values, _ = distillation_loss(h[:1], head, top, torch.ones(1), divergence)  # type: ignore[arg-type]
            outcomes.append((values, *torch.autograd.grad(loss, leaves)))
        assert all(torch.isfinite(x).all() for x in outcomes[1])
        for a, b in zip(*outcomes, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


RECORDED = json.loads((Path(__file__).parent / "recorded_trl_distillation.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda c: f"beta {c['beta']}, t {c['temperature']}")
def test_equals_what_trl_makes_of_the_same_tensors(case: dict[str, object]) -> None:
    """benchmarks/record_trl_distillation.py wrote the file: losses and gradients of GKDTrainer.generalized_jsd_loss."""
    beta = float(case["beta"])  # type: ignore[arg-type]
    ends = {0.0: distill.forward_kl, 1.0: distill.reverse_kl}
    divergence = ends.get(beta, partial(distill.jensen_shannon, beta=beta))
    student, teacher = (torch.tensor(RECORDED[name]) for name in ("student", "teacher"))
    head = Head(torch.eye(student.shape[1]))  # the hidden states are the logits
    z = student.requires_grad_()
    mask = torch.tensor(RECORDED["mask"])
    c = mask / mask.sum()
    loss, _, _ = distillation_loss(z, head, TeacherHidden(teacher, head), c, divergence, float(case["temperature"]))  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(case["loss"], abs=1e-6)
    loss.backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.tensor(case["gradient"]), atol=1e-6, rtol=1e-5)


def test_a_divergence_from_outside_needs_no_derivative() -> None:
    h, head = make()
    given = TeacherHidden(*make(seed=2))
    c = torch.rand(N, generator=torch.Generator().manual_seed(3))
    leaves = [h.requires_grad_(), head.weight_V_H.requires_grad_()]

    def by_autograd(student: Tensor, teacher: Tensor) -> Tensor:
        return (teacher.exp() * (teacher - student)).sum(-1)

    ours, theirs = (distillation_loss(h, head, given, c, d)[0] for d in (distill.forward_kl, by_autograd))
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="one number for each"):
        distillation_loss(h, head, given, c, lambda student, teacher: student)


def test_vocabularies_that_are_padded_differently() -> None:
    """Tokens that one of them lacks are in neither distribution, and get no gradient."""
    h, small = make()
    teacher_h, wide = make(seed=2, size=V + 6)
    cut = Head(wide.weight_V_H[:V])
    c = torch.ones(N)
    expected = distillation_loss(h, small, TeacherHidden(teacher_h, cut), c)[1]
    assert torch.equal(distillation_loss(h, small, TeacherHidden(teacher_h, wide), c)[1], expected)
    w = wide.weight_V_H.requires_grad_()
    loss, values, _ = distillation_loss(teacher_h, Head(w), TeacherHidden(h, small), c)
    (d,) = torch.autograd.grad(loss, w)
    assert not d[V:].any() and d[:V].any()


def test_adapters_on_the_head() -> None:
    """A low-rank adapter and replaced rows give what the whole weight gives."""
    h, head = make()
    g = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, H, generator=g).requires_grad_(), torch.randn(V, 2, generator=g).requires_grad_()
    ids, rows = torch.tensor([3, 40]), torch.randn(2, H, generator=g).requires_grad_()
    adapted = replace(head, low_rank=((a, b, 0.5),), rows=(ids, rows))
    given, c = TeacherHidden(*make(seed=2)), torch.rand(N, generator=g)
    loss, values, _ = distillation_loss(h, adapted, given, c, distill.reverse_kl)
    whole = (head.weight_V_H + 0.5 * b @ a).index_copy(0, ids, rows)
    expected, same_values, _ = distillation_loss(h, Head(whole), given, c, distill.reverse_kl)
    torch.testing.assert_close(values, same_values, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (a, b, rows)), torch.autograd.grad(expected, (a, b, rows)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_gradients_are_added_where_they_are_kept() -> None:
    h, head = make()
    w = torch.nn.Parameter(head.weight_V_H)
    given, c = TeacherHidden(*make(seed=2)), torch.ones(N)
    distillation_loss(h, Head(w), given, c)[0].backward()
    expected, w.grad, place = w.grad, None, torch.empty_like(w)
    with added_in_place([(w, place)]):
        distillation_loss(h, Head(w), given, c)[0].backward()
    assert w.grad is place and expected is not None
    torch.testing.assert_close(place, expected)


def test_refuses_what_does_not_fit() -> None:
    h, head = make()
    given = TeacherHidden(*make(seed=2))
    with pytest.raises(ValueError, match="23 positions of the student, and 5"):
        distillation_loss(h, head, TeacherHidden(given.hidden_N_H[:5], given.head), torch.ones(N))
    with pytest.raises(ValueError, match="must be positive"):
        distillation_loss(h, head, given, torch.ones(N), temperature=0.0)
    with pytest.raises(ValueError, match="top_k is 50, and the vocabulary has 50"):
        top_logprobs(given.hidden_N_H, given.head, V)
    top = TeacherTop(torch.full((N, 1), V), torch.zeros(N, 1), torch.zeros(N))
    with pytest.raises(ValueError, match="token 50 of 50"):
        distillation_loss(h, head, top, torch.ones(N))
    loss, values, _ = distillation_loss(h[:0], head, TeacherHidden(h[:0], head), torch.ones(0))
    assert float(loss) == 0 and values.shape == (0,)
