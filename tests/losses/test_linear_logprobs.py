"""Log-probabilities without logits: against float64, in value, gradient and memory."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

import pytest
import torch

from posttrain.cpu.matmul import tune
from posttrain.losses import linear_logprobs as logprobs
from posttrain.losses.gradient_accumulation import added_in_place
from posttrain.losses.linear_logprobs import Head, linear_cross_entropy, linear_logprobs
from tests import warm


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a chunk, so that 23 positions make four, the last one short."""
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", {"cpu": 7 * 4 * 50})


def make(
    bias: bool, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    h = torch.randn(23, 16, generator=g, dtype=dtype).requires_grad_()
    w = torch.randn(50, 16, generator=g, dtype=dtype).requires_grad_()
    b = torch.randn(50, generator=g, dtype=dtype).requires_grad_() if bias else None
    return h, w, b, torch.randint(0, 50, (23,), generator=g)


def slow(h, w, b, y, scale, cap, t):  # type: ignore[no-untyped-def]
    """In float64, with the whole matrix."""
    z = h.double() @ w.double().t()
    z = (z + b.double() if b is not None else z) * scale
    z = cap * torch.tanh(z / cap) if cap else z
    logp = (z / t).log_softmax(-1)
    return logp.gather(1, y[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def test_by_hand() -> None:
    """Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8."""
    head = Head(torch.tensor([[0.0], [math.log(2)], [math.log(5)]]))
    lp, entropy = linear_logprobs(torch.ones(3, 1), head, torch.tensor([0, 1, 2]), entropy=True)
    assert lp.tolist() == pytest.approx([math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)], abs=1e-6)
    h = -(1 / 8 * math.log(1 / 8) + 2 / 8 * math.log(2 / 8) + 5 / 8 * math.log(5 / 8))
    assert entropy.tolist() == pytest.approx([h] * 3, abs=1e-6)
    hot, _ = linear_logprobs(torch.ones(1, 1), head, torch.tensor([2]), temperature=0.5)
    assert float(hot) == pytest.approx(math.log(25 / 30), abs=1e-6)  # squares: 1, 4, 25


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap", "t"), [(1.0, None, 1.0), (0.25, None, 0.7), (1.0, 5.0, 1.3)])
def test_values_and_gradients_equal_float64(bias: bool, scale: float, cap: float | None, t: float) -> None:
    h, w, b, y = make(bias)
    lp, entropy = linear_logprobs(h, Head(w, b, scale, cap), y, t, entropy=True)
    slow_lp, slow_entropy = slow(h, w, b, y, scale, cap, t)
    assert float((lp - slow_lp).abs().max()) < 1e-5
    assert float((entropy - slow_entropy).abs().max()) < 1e-5
    g = torch.Generator().manual_seed(2)
    a, c = torch.randn(23, generator=g), torch.randn(23, generator=g)
    leaves = [x for x in (h, w, b) if x is not None]
    ours = torch.autograd.grad((a * lp + c * entropy).sum(), leaves)
    theirs = torch.autograd.grad((a * slow_lp + c * slow_entropy).sum(), leaves)
    for o, s in zip(ours, theirs, strict=True):
        torch.testing.assert_close(o, s.float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, 5.0)])
def test_cross_entropy_equals_float64(bias: bool, scale: float, cap: float | None) -> None:
    h, w, b, y = make(bias)
    c = torch.rand(23, generator=torch.Generator().manual_seed(3))
    loss, nll, hits = linear_cross_entropy(h, Head(w, b, scale, cap), y, c)
    slow_lp, _ = slow(h, w, b, y, scale, cap, 1.0)
    assert float(loss) == pytest.approx(float(-(c * slow_lp).sum()), abs=1e-5)
    assert float((nll + slow_lp).abs().max()) < 1e-5
    z = h.double() @ w.double().t() + (b.double() if b is not None else 0)
    assert hits.tolist() == (z.argmax(-1) == y).tolist()
    leaves = [x for x in (h, w, b) if x is not None]
    ours = torch.autograd.grad(3 * loss, leaves)  # a factor from outside goes through
    theirs = torch.autograd.grad(-3 * (c * slow_lp).sum(), leaves)
    for o, s in zip(ours, theirs, strict=True):
        torch.testing.assert_close(o, s.float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, 5.0)])
def test_a_temperature_for_each_target(scale: float, cap: float | None) -> None:
    """The same as each target by itself at its own temperature, gradients too."""
    h, w, b, y = make(True)
    t = torch.linspace(0.6, 1.7, 23)
    lp, entropy = linear_logprobs(h, Head(w, b, scale, cap), y, t, entropy=True)
    rows = [slow(h[i : i + 1], w, b, y[i : i + 1], scale, cap, float(t[i])) for i in range(23)]
    slow_lp, slow_entropy = (torch.cat(x) for x in zip(*rows, strict=True))
    assert float((lp - slow_lp).abs().max()) < 1e-5 and float((entropy - slow_entropy).abs().max()) < 5e-5
    a = torch.randn(23, generator=torch.Generator().manual_seed(2))
    leaves = [x for x in (h, w, b) if x is not None]
    ours = torch.autograd.grad((a * lp + entropy).sum(), leaves)
    theirs = torch.autograd.grad((a * slow_lp + slow_entropy).sum(), leaves)
    for o, s in zip(ours, theirs, strict=True):
        torch.testing.assert_close(o, s.float(), atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="23 targets"):
        linear_logprobs(h, Head(w), y, t[:5])
    with pytest.raises(ValueError, match="must be positive"):
        linear_logprobs(h, Head(w), y, t - 0.6)


def test_extreme_logits_stay_finite() -> None:
    head = Head(torch.tensor([[1000.0], [-1000.0]]))
    lp, entropy = linear_logprobs(torch.ones(2, 1, requires_grad=True), head, torch.tensor([0, 1]), entropy=True)
    assert lp.tolist() == [0.0, -2000.0]
    assert torch.isfinite(entropy).all()


def test_nothing_asked_for() -> None:
    h, w, _, _ = make(False)
    none = torch.zeros(0, dtype=torch.long)
    assert linear_logprobs(h[:0], Head(w), none)[0].shape == (0,)
    loss, _, _ = linear_cross_entropy(h[:0], Head(w), none, torch.zeros(0))
    loss.backward()
    assert float(loss) == 0.0 and w.grad is not None and float(w.grad.abs().sum()) == 0.0


def test_temperature_must_be_positive() -> None:
    h, w, _, y = make(False)
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_logprobs(h, Head(w), y, temperature=0.0)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_or_made_again_is_the_same(monkeypatch: pytest.MonkeyPatch, entropy: bool, dtype: torch.dtype) -> None:
    """Value and gradient where exponentials are kept, on a second pass over what they were, and where they are not."""
    a = torch.randn(23, generator=torch.Generator().manual_seed(2))
    found = []
    for kept in (0, 4 * 23 * 50 - 1, 4 * 23 * 50):
        monkeypatch.setattr(logprobs, "KEPT_BYTES", {"cpu": kept})
        h, w, b, y = make(True, dtype)
        assert b is not None
        lp, entropies = linear_logprobs(h, Head(w, b, 0.5), y, torch.linspace(0.6, 1.7, 23), entropy)
        assert (lp.grad_fn.kept is not None) == (kept == 4 * 23 * 50)  # type: ignore[union-attr]
        for _ in range(2):
            found.append([lp, entropies, *torch.autograd.grad((a * lp).sum(), [h, w, b], retain_graph=True)])
    for other in found[1:]:
        for o, s in zip(other, found[0], strict=True):
            tolerance = 2e-6 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(o, s, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("what", ["logprobs", "cross_entropy"])
def test_the_head_s_gradient_added_in_place(what: str) -> None:
    """Two passes into one place equal autograd's sum; what is not in that place's hands is returned as ever."""

    def loss(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if what == "logprobs":
            return 3 * linear_logprobs(h, Head(w), y)[0].sum()
        return -3 * linear_cross_entropy(h, Head(w), y, torch.ones(23))[0]

    h, w, _, y = make(False)
    for part in (y, y.flip(0)):
        loss(h, w, part).backward()
    mine = torch.nn.Parameter(w.detach().clone())
    hidden = h.detach().clone().requires_grad_()
    place = torch.full((50, 16), torch.nan)
    for part in (y, y.flip(0)):
        with added_in_place([(mine, place)]):
            loss(hidden, mine, part).backward()
    assert mine.grad is place and w.grad is not None and hidden.grad is not None and h.grad is not None
    torch.testing.assert_close(place, w.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(hidden.grad, h.grad, atol=1e-6, rtol=1e-5)
    before = place.clone()
    (returned,) = torch.autograd.grad(loss(hidden, mine, y), [mine])
    assert torch.equal(place, before) and float(returned.abs().sum()) > 0


def test_cross_entropy_gives_its_gradients_once() -> None:
    h, w, _, y = make(False)
    loss, _, _ = linear_cross_entropy(h, Head(w), y, torch.ones(23))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


def measure_peaks(cases: list[tuple[int, str]]) -> None:
    """Print the peak memory of each case in MiB; each in a process of its own, all with the same imports."""
    tune()
    # M_MMAP_THRESHOLD, fixed: otherwise freed blocks stay in the heap by luck.
    ctypes.CDLL(None).mallopt(-3, 1 << 20)
    for n, how in cases:
        if not os.fork():
            v, size = 32_000, 8
            h, w = torch.randn(n, size).requires_grad_(), torch.randn(v, size).requires_grad_()
            y = torch.randint(0, v, (n,))
            if how == "ce":
                linear_cross_entropy(h, Head(w), y, torch.ones(n))[0].backward()
            elif how == "lp":
                lp, e = linear_logprobs(h, Head(w), y, entropy=True)
                (lp + e).sum().backward()
            else:
                torch.nn.functional.cross_entropy(h @ w.t(), y).backward()
            # not ru_maxrss, which begins with what the process had that started this one
            (peak,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
            print(int(peak.split()[1]) / 1024, flush=True)
            os._exit(0)
        assert os.wait()[1] == 0


def test_peak_memory_is_free_of_positions_times_vocabulary(tmp_path: Path) -> None:
    """6,000 positions more would be 732 MiB of logits; the hidden states and their gradients are 0.4 MiB.

    The fewer are too many to be kept for backward. Plainly computed, 2,000 positions more are 244 MiB.
    """
    assert 4 * 2_200 * 32_000 > logprobs.KEPT_BYTES["cpu"]
    cases = [(n, how) for how in ("ce", "lp") for n in (2_200, 8_200)] + [(200, "plain"), (2_200, "plain")]
    warm.run(measure_peaks, cases, folder=tmp_path)
    peaks = [float(x) for x in (tmp_path / "log").read_text().split()]
    cross_entropy, likelihoods, plain = (many - few for few, many in zip(peaks[::2], peaks[1::2], strict=True))
    assert max(cross_entropy, likelihoods) < 240 and plain > 240, peaks


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("scale", "cap", "t"), [(1.0, None, 1.0), (0.25, None, 0.7), (1.0, 5.0, 1.3)])
def test_adapters_of_the_head_equal_a_weight_that_holds_them(
    scale: float, cap: float | None, t: float, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two low-rank adapters and three rows of their own, W frozen or not; both functions, and logits to sample from."""
    monkeypatch.setattr(logprobs, "KEPT_BYTES", {"cpu": 1 << 20 if keep else 0})
    h, w, bias, y = make(True)
    g = torch.Generator().manual_seed(5)
    a1, b1, a2, b2, rows = (
        torch.randn(*shape, generator=g).mul_(0.3).requires_grad_()
        for shape in ((3, 16), (50, 3), (2, 16), (50, 2), (3, 16))
    )
    ids = torch.tensor([int(y[0]), 49, 7])
    whole = (w + 1.5 * b1 @ a1 - 0.5 * b2 @ a2).index_copy(0, ids, rows)
    head = Head(w, bias, scale, cap, ((a1, b1, 1.5), (a2, b2, -0.5)), (ids, rows))
    slow_lp, slow_entropy = slow(h, whole, bias, y, scale, cap, t)
    lp, entropy = linear_logprobs(h, head, y, t, entropy=True)
    torch.testing.assert_close(lp.double(), slow_lp, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), slow_entropy, atol=1e-5, rtol=0)
    weights = torch.randn(2, 23, generator=g)
    theirs = (weights[0] * slow_lp + weights[1] * slow_entropy).sum()
    for leaves in ([h, w, bias, a1, b1, a2, b2, rows], [h, a1, b1, rows], [rows]):
        frozen = [x for x in (h, w, bias, a1, b1, a2, b2, rows) if not any(x is leaf for leaf in leaves)]
        expected = torch.autograd.grad(theirs, leaves, retain_graph=True)
        for x in frozen:
            x.requires_grad_(False)
        lp, entropy = linear_logprobs(h, head, y, t, entropy=True)
        found = torch.autograd.grad((weights[0] * lp + weights[1] * entropy).sum(), leaves)
        for x, e in zip(found, expected, strict=True):
            torch.testing.assert_close(x, e.float(), atol=3e-5, rtol=1e-4)
        plain = torch.autograd.grad(linear_logprobs(h, head, y)[0].sum(), leaves)
        loss, nll, _ = linear_cross_entropy(h, head, y, torch.ones(23))
        torch.testing.assert_close(nll, -linear_logprobs(h, head, y)[0].detach(), atol=1e-5, rtol=0)
        for x, e in zip(torch.autograd.grad(-loss, leaves), plain, strict=True):
            torch.testing.assert_close(x, e, atol=3e-5, rtol=1e-4)
        for x in frozen:
            x.requires_grad_(True)
    z = logprobs.head_logits(h, head, t)
    torch.testing.assert_close(z.log_softmax(-1).gather(1, y[:, None])[:, 0].double(), slow_lp, atol=1e-5, rtol=0)
