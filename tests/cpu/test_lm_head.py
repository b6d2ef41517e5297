"""Log-probabilities in tiles of the vocabulary: against float64 in value and gradient; kept or made again; odd ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.cpu import library as native
from posttrain.cpu import lm_head as vocabulary
from posttrain.cpu.lm_head import head_cross_entropy, head_logprobs
from posttrain.cpu.quantized_matmul import hold_packed, pack_weight, placeholder
from posttrain.losses import linear_logprobs as logprobs
from posttrain.losses.gradient_accumulation import added_in_place
from posttrain.losses.linear_logprobs import Head

pytestmark = pytest.mark.skipif(native.kernels() is None, reason=f"no compiled kernels here: {native.why()}")
N, V, H = 23, 1130, 16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles, the last one short; nothing goes through the other implementation."""
    monkeypatch.setattr(vocabulary, "TILE_BYTES", 1)

    def other(*_: object) -> None:
        raise AssertionError("the other implementation was called")

    monkeypatch.setattr(vocabulary, "linear_logprobs", other)
    monkeypatch.setattr(vocabulary, "linear_cross_entropy", other)


def make(bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    g = torch.Generator().manual_seed(1)
    h, w = (torch.randn(n, H, generator=g).requires_grad_() for n in (N, V))
    b = torch.randn(V, generator=g).requires_grad_() if bias else None
    y = torch.randint(0, V, (N,), generator=g)
    y[:3] = torch.tensor([0, V - 1, 512])
    return h, w, b, y


def slow(h: Tensor, w: Tensor, b: Tensor | None, y: Tensor, scale: float, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """In float64, with the whole matrix."""
    z = h.double() @ w.double().t()
    z = (z + b.double() if b is not None else z) * scale
    logp = (z / (t.double()[:, None] if isinstance(t, Tensor) else t)).log_softmax(-1)
    return logp.gather(1, y[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def uneven() -> Tensor:
    return torch.linspace(0.5, 2.0, N)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    ("bias", "scale", "t"), [(False, 1.0, lambda: 1.0), (True, 0.25, lambda: 0.7), (True, 1.0, uneven)]
)
def test_values_and_gradients_equal_float64(
    monkeypatch: pytest.MonkeyPatch,
    kept: bool,
    entropy: bool,
    bias: bool,
    scale: float,
    t: Callable[[], float | Tensor],
) -> None:
    """On a first backward pass and on a second one; entropies too, where they are asked for."""
    monkeypatch.setattr(logprobs, "KEPT_BYTES", {"cpu": 4 * N * V if kept else 4 * N * V - 1})
    h, w, b, y = make(bias)
    leaves = [x for x in (h, w, b) if x is not None]
    a, c = torch.randn(2, N, generator=torch.Generator().manual_seed(2))
    lp, entropies = head_logprobs(h, Head(w, b, scale), y, t(), entropy)
    assert (lp.grad_fn.kept is not None) == kept  # type: ignore[union-attr]
    assert len(lp.grad_fn.tiles.rows) == 3  # type: ignore[union-attr]
    slow_lp, slow_entropies = slow(h, w, b, y, scale, t())
    torch.testing.assert_close(lp.double(), slow_lp, atol=1e-5, rtol=0)
    loss, slow_loss = (a * lp).sum(), (a * slow_lp).sum()
    if entropy:
        torch.testing.assert_close(entropies.double(), slow_entropies, atol=1e-5, rtol=0)
        loss, slow_loss = loss + (c * entropies).sum(), slow_loss + (c * slow_entropies).sum()
    else:
        assert torch.equal(entropies, torch.zeros(N))
    expected = torch.autograd.grad(slow_loss, leaves)
    for _ in range(2):
        for found, right in zip(torch.autograd.grad(loss, leaves, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(found, right, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(("bias", "scale"), [(False, 1.0), (True, 0.25)])
def test_cross_entropy_is_that_of_the_other_implementation(
    monkeypatch: pytest.MonkeyPatch, bias: bool, scale: float
) -> None:
    """Loss, its parts, hits, gradients; too many positions to keep go the other way."""
    c = torch.rand(N, generator=torch.Generator().manual_seed(3))
    found = []
    for which in (head_cross_entropy, logprobs.linear_cross_entropy):
        h, w, b, y = make(bias)
        with torch.no_grad():
            w[y[5]] = 9 * h[5]  # one that is the likeliest
        loss, nll, hits = which(h, Head(w, b, scale), y, c)
        found.append([loss, nll, hits, *torch.autograd.grad(2 * loss, [x for x in (h, w, b) if x is not None])])
    assert found[0][2][5] and not found[0][2].all()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(logprobs, "KEPT_BYTES", {"cpu": 4 * N * V - 1})
    monkeypatch.setattr(vocabulary, "linear_cross_entropy", lambda *_: "the other")
    h, w, b, y = make(bias)
    assert head_cross_entropy(h, Head(w), y, c) == "the other"


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for_gets_a_gradient(trained: tuple[bool, bool]) -> None:
    h, w, _, y = make(False)
    both = [h.detach().requires_grad_(trained[0]), w.detach().requires_grad_(trained[1])]
    lp, _ = head_logprobs(both[0], Head(both[1]), y)
    assert torch.equal(lp.detach(), head_logprobs(h, Head(w), y)[0].detach()) and lp.requires_grad == any(trained)
    whole = torch.autograd.grad(head_logprobs(h, Head(w), y)[0].sum(), [h, w])
    if any(trained):
        lp.sum().backward()
    for x, given, right in zip(both, trained, whole, strict=True):
        assert (x.grad is not None and torch.equal(x.grad, right)) if given else x.grad is None


def test_the_weight_s_gradient_added_in_place() -> None:
    h, w, _, y = make(False)
    (expected,) = torch.autograd.grad(2 * head_logprobs(h, Head(w), y)[0].sum(), [w])
    mine, place = torch.nn.Parameter(w.detach().clone()), torch.full((V, H), torch.nan)
    for _ in range(2):
        with added_in_place([(mine, place)]):
            head_logprobs(h, Head(mine), y)[0].sum().backward()
    assert mine.grad is place
    torch.testing.assert_close(place, expected, atol=1e-6, rtol=1e-5)


def test_odd_logits() -> None:
    """A largest one that grows from tile to tile, tokens that can't be, and one that is not a number."""
    h, w = torch.ones(2, 1), torch.arange(V, dtype=torch.float32)[:, None] * 2
    lp, entropies = head_logprobs(h, Head(w), torch.tensor([V - 1, V - 2]), entropy=True)
    p = 1 - torch.tensor(-2.0, dtype=torch.float64).exp()  # of a geometric series
    torch.testing.assert_close(lp.double(), torch.stack([p.log(), p.log() - 2]), atol=1e-6, rtol=0)
    torch.testing.assert_close(entropies.double(), (2 * (1 - p) / p - p.log()).expand(2), atol=1e-6, rtol=0)
    bias = torch.full((V,), -torch.inf)
    bias[[3, 1000]] = torch.tensor([-2.0 * 3, -2.0 * 1000 + 1])  # the logits of these two: 0 and 1
    lp, entropies = head_logprobs(h, Head(w, bias), torch.tensor([3, 1000]), entropy=True)
    expected = torch.tensor([0.0, 1.0]).log_softmax(0)
    torch.testing.assert_close(lp, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum().expand(2), atol=1e-6, rtol=0)
    w[700] = torch.nan
    assert head_logprobs(h, Head(w), torch.tensor([3, 1000]))[0].isnan().all()


@pytest.mark.parametrize("wrong", [-1, V])
def test_targets_outside_of_the_vocabulary_are_refused(wrong: int) -> None:
    h, w, _, y = make(False)
    y[4] = wrong
    with pytest.raises(IndexError, match="must be 0 to 1129"):
        head_logprobs(h, Head(w), y)


def test_a_position_does_not_depend_on_the_others_and_threads_change_nothing() -> None:
    h, w, _, y = make(False)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(head_logprobs(h, Head(w), y)[0].detach())
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=0)
    torch.testing.assert_close(head_logprobs(h[5:6], Head(w), y[5:6])[0], found[0][5:6], atol=2e-6, rtol=0)


@pytest.mark.parametrize("why", ["cap", "dtype", "none", "strides", "temperature"])
def test_what_tiles_do_not_take_goes_the_other_way(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    monkeypatch.setattr(vocabulary, "linear_logprobs", logprobs.linear_logprobs)
    h, w, _, y = (x if x is None else x.detach() for x in make(False))
    assert w is not None and h is not None and y is not None
    head, t = Head(w), 1.0
    if why == "cap":
        head = Head(w, softcap=5.0)
    elif why == "dtype":
        h, head = h.bfloat16(), Head(w.bfloat16())
    elif why == "none":
        h, y = h[:0], y[:0]
    elif why == "strides":
        head = Head(w.t().contiguous().t())
    else:
        with pytest.raises(ValueError, match="temperature must be positive"):
            head_logprobs(h, head, y, 0.0)
        with pytest.raises(ValueError, match="23 targets, but temperatures"):
            head_logprobs(h, head, y, torch.ones(2))
    monkeypatch.setattr(vocabulary, "_TiledLogprobs", None)
    if why != "temperature":
        expected = logprobs.linear_logprobs(h, head, y, t)
        assert all(torch.equal(a, b) for a, b in zip(head_logprobs(h, head, y, t), expected, strict=True))


def test_a_weight_that_is_held_packed_is_dequantised_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers and gradients as with the dense one, to the last bit; and it has no gradient itself."""
    h, _, _, y = make(False)
    values = torch.randint(-8, 8, (V, H), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    scale, embedding = torch.linspace(0.05, 0.2, 2 * V).view(V, 2), torch.nn.Embedding(V, H)
    embedding.weight = torch.nn.Parameter(placeholder(V, H))
    hold_packed(embedding, pack_weight(values, scale, None, 4))
    dense = (values.view(V, 2, -1) * scale[..., None]).view(V, H)
    kernels, read, found = type(native.kernels()), [], []
    made = kernels.dequantize
    monkeypatch.setattr(kernels, "dequantize", lambda self, p, rows: read.append(len(rows)) or made(self, p, rows))
    for weight in (dense, embedding.weight):
        assert not read
        logp, entropy = head_logprobs(h, Head(weight), y, entropy=True)
        loss, nll, _ = head_cross_entropy(h, Head(weight), y, torch.linspace(0, 1, N))
        gradients = [*torch.autograd.grad((logp * y).sum() + entropy.sum(), [h]), *torch.autograd.grad(loss, [h])]
        found.append([logp, entropy, loss, nll, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and not embedding.weight.requires_grad
    assert max(read) == 512 and sum(read) == 5 * V  # both passes forward; back twice with entropies, once without
