"""Products turned round for few rows are the same products."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from posttrain.cpu import matmul as cpu


@pytest.fixture
def onednn(monkeypatch):
    """The few-row path on any processor: it is a matter of speed only, so what it computes can be checked anywhere."""
    monkeypatch.setitem(cpu._state, "route", "onednn")


@pytest.mark.parametrize("shape", [(48,), (1, 48), (7, 48), (2, 3, 48), (cpu.FEW_ROWS, 48)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_few_rows_give_the_same_product(onednn: None, shape: tuple[int, ...], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    weight = torch.randn(20, 48, generator=generator)
    bias = torch.randn(20, generator=generator) if with_bias else None
    with torch.no_grad():
        assert cpu.few_rows(x)
        y = cpu.linear(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=0)


def test_many_rows_and_gradients_go_the_ordinary_way(onednn: None) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(4, 8)
    assert not cpu.few_rows(x)
    cpu.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 8))
    with torch.no_grad():
        assert not cpu.few_rows(torch.zeros(cpu.FEW_ROWS + 1, 8))
        assert not cpu.few_rows(torch.zeros(2, 8, dtype=torch.bfloat16))


def test_the_route_comes_back_after_small_products(monkeypatch) -> None:
    route = cpu.matmul_route()
    setting = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ValueError), cpu.small_products():
        assert torch.backends.mkldnn.matmul.fp32_precision == ("ieee" if route == "onednn" else setting)
        raise ValueError
    assert torch.backends.mkldnn.matmul.fp32_precision == setting


@pytest.mark.parametrize("own", [None, "7"])
def test_few_compiled_kernels_are_kept_unless_somebody_said_how_many(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = cpu.matmul_route()
    monkeypatch.setenv("LRU_CACHE_CAPACITY", own or "")  # what the test changes is put back
    if own is None:
        monkeypatch.delenv("LRU_CACHE_CAPACITY")
    monkeypatch.setattr(cpu, "_state", {})  # as in a new process
    assert cpu.matmul_route() == route and os.environ["LRU_CACHE_CAPACITY"] == (own or str(cpu.KERNELS))
