"""The compiled attention over a tree of segments, held to a softmax in float64; threads, neighbours, broken numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.core.ragged import RaggedBatch, pack
from posttrain.core.types import Sample
from posttrain.cpu import library as native
from posttrain.cpu import tiled_attention
from posttrain.cpu import tree_attention as tree
from posttrain.models import attention

pytestmark = pytest.mark.skipif(native.kernels() is None, reason=f"no compiled kernels here: {native.why()}")


def family(seed: int) -> RaggedBatch:
    """Two trees: one three segments deep, with segments on both sides of a tile's and a panel's size; one token's."""
    g = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(10**6, (n,), generator=g).tolist()

    root, middle = tokens(70), tokens(17)
    rows = [root + middle + tokens(n) for n in (1, 130, 48)] + [root + tokens(64), root + tokens(3), tokens(33), [7]]
    return pack([Sample(r, [0.0] + [1.0] * (len(r) - 1)) for r in rows], min_shared=8)


def inputs(batch: RaggedBatch, heads: int, kv: int, size: int, behind: int = 0) -> tuple[Tensor, ...]:
    """Queries, keys, values and a cotangent, laid out in memory as transformers does: tokens first."""
    g = torch.Generator().manual_seed(heads * size)
    total = batch.total + behind
    return tuple(torch.randn(total, n, size, generator=g).transpose(0, 1) for n in (heads, kv, kv, heads))


def ours(batch: RaggedBatch, q: Tensor, k: Tensor, v: Tensor, d: Tensor, window: int | None) -> list[Tensor]:
    """Output and gradients, through the kernels and nothing else."""
    kernels = tree.kernels_for(q, k, v)
    assert kernels is not None
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = tiled_attention.TreeAttention.apply(*leaves, attention.Plan(batch), window, q.shape[-1] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, d)]


@pytest.mark.parametrize("window", [None, 1, 9, 64])
@pytest.mark.parametrize(("heads", "kv", "size"), [(4, 4, 8), (6, 2, 64), (3, 1, 72), (2, 1, 256)])
def test_values_and_gradients_are_those_of_a_softmax_in_float64(
    heads: int, kv: int, size: int, window: int | None
) -> None:
    batch = family(0)
    assert max(batch.parents) >= 1 and len([p for p in batch.parents if p < 0]) == 3
    q, k, v, d = inputs(batch, heads, kv, size)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = attention.plain_attention(*(x[None] for x in exact), attention.Plan(batch), window, size**-0.5)
    gradients = torch.autograd.grad(expected[0].transpose(0, 1), exact, d.double())
    wanted = [expected[0].transpose(0, 1).detach(), *gradients]
    bound = 3e-6 * max(float(x.abs().max()) for x in wanted)  # with window 1 some are 0
    for a, b in zip(ours(batch, q, k, v, d, window), wanted, strict=True):
        assert float((a - b).abs().max()) <= bound


def test_the_same_to_the_last_bit_on_any_number_of_threads() -> None:
    batch, before, found = family(1), torch.get_num_threads(), []
    given = inputs(batch, 6, 2, 32)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(ours(batch, *given, None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_a_tree_does_not_depend_on_its_neighbours() -> None:
    """Values and gradients of the first tree, alone and with others before it, to the last bit."""
    rows = [[1, *range(100, 140), *range(10 * i, 10 * i + 5 + i)] for i in (30, 40)]
    alone = pack([Sample(r, [0.0] * len(r)) for r in rows])
    other = [[0, *range(200, 273)]]  # sorts before
    both = pack([Sample(r, [0.0] * len(r)) for r in rows + other])
    assert both.total == alone.total + 74 and both.rows[0][0] == 74
    given = inputs(both, 3, 1, 48)
    mine = [x[:, 74:] for x in given]
    for a, b in zip(ours(alone, *mine, None), ours(both, *given, None), strict=True):
        assert torch.equal(a, b[:, 74:])


def test_tokens_of_no_segment_get_zeros() -> None:
    batch = family(2)
    given = inputs(batch, 2, 2, 16, behind=5)
    given[3][:, -5:] = 0  # nobody reads them
    for x in ours(batch, *given, 20):
        assert torch.equal(x[:, -5:], torch.zeros_like(x[:, -5:])) and bool(x[:, :-5].isfinite().all())


def test_scores_of_any_size_and_what_is_not_a_number() -> None:
    """Scores of thousands leave the largest alone; a broken key shows in those that see it, and in nobody else."""
    batch = pack([Sample([1, 2, 3, 4], [0.0] * 4)])
    q, k, v, d = inputs(batch, 1, 1, 16)
    k[0] = torch.eye(4, 16)
    q[0] = 4e4 * torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 2, 0, 1]]).float() @ torch.eye(4, 16)
    out = ours(batch, q, k, v, d, None)
    assert torch.equal(out[0][0], v[0, [0, 0, 2, 1]]) and all(bool(x.isfinite().all()) for x in out)
    k[0, 2, 5] = torch.nan
    assert ours(batch, q, k, v, d, None)[0][0].isnan().any(1).tolist() == [False, False, True, True]


def test_what_the_kernels_do_not_take_goes_another_way() -> None:
    x = torch.randn(2, 3, 16)
    assert tree.kernels_for(x, x, x) is not None
    wide, turned = torch.randn(2, 3, 1024), torch.randn(2, 16, 16).mT
    for query, key in (
        (x.double(), x.double()),
        (wide, wide),
        (x, torch.randn(3, 3, 16)),
        (turned, turned),
    ):
        assert tree.kernels_for(query, key, key) is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_they_can_be_asked_for_first_in_any_mode(mode: type) -> None:
    x = torch.randn(2, 3, 16)
    tree._right.cache_clear()
    with mode():
        assert tree.kernels_for(x, x, x) is not None


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernels = torch.randn(2, 3, 16), native.kernels()
    backward = tree.backward
    monkeypatch.setattr(tree, "backward", lambda *given: tuple(1.001 * g for g in backward(*given)))
    tree._right.cache_clear()
    try:
        assert tree.kernels_for(x, x, x) is None and kernels is not None
    finally:
        tree._right.cache_clear()
