"""The compiled kernels of decoding, held to float64 and to a slow loop; and life without them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.cpu import library as native
from posttrain.cpu import matmul as cpu
from posttrain.cpu.fused_modules import fuse
from posttrain.models.tiny_model import tiny_model

compiled = pytest.mark.skipif(native.kernels() is None, reason=f"no compiled kernels here: {native.why()}")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_there_are_kernels_where_there_is_a_compiler() -> None:
    if not list((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        pytest.skip("this torch brings no GNU OpenMP")
    assert native.kernels() is not None, native.why()


@compiled
@pytest.mark.parametrize("inner", [5, 16, 100])
@pytest.mark.parametrize("columns", [8, 47, 48, 49, 97])
def test_products_of_any_few_rows(inner: int, columns: int) -> None:
    k = native.kernels()
    assert k is not None
    weight, bias = randn(columns, inner, seed=1), randn(columns, seed=2)
    x = randn(130, inner)
    exact = x.double() @ weight.double().t() + bias.double()
    everything = k.linear(x, weight, bias)
    torch.testing.assert_close(everything.double(), exact, atol=1e-4, rtol=0)
    for rows in (1, 2, 7, 8, 9, 16, 17, 24, 25, 32, 40, 48, 63, 64, 65, 72, 129):
        # not to rounding but to the bit: a row's result is a matter of the row alone
        assert torch.equal(k.linear(x[:rows], weight, bias), everything[:rows])
        assert torch.equal(k.linear(x[-rows:], weight, bias), everything[-rows:])
    assert torch.equal(k.linear(x[None, :6].transpose(0, 1), weight, bias), everything[:6, None])


@compiled
def test_threads_change_nothing() -> None:
    k = native.kernels()
    assert k is not None
    x, weight, before = randn(20, 64), randn(500, 64, seed=1), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((k.linear(x, weight), k.gated(x, x + 1)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@compiled
def test_a_team_that_is_smaller_than_asked_for_does_all_of_the_work(tmp_path) -> None:
    code = (
        "import torch; from posttrain.cpu import library; torch.set_num_threads(4); k = library.kernels()\n"
        "x, w = torch.randn(20, 64), torch.randn(500, 64); y = x @ w.t(); k.linear(x, w).fill_(torch.nan)\n"
        "assert torch.allclose(k.linear(x, w), y, atol=1e-4)"
    )
    limited = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    subprocess.run([sys.executable, "-c", code], env=limited, check=True, timeout=120)


@compiled
def test_gates_and_norms() -> None:
    k = native.kernels()
    assert k is not None
    gate = torch.cat([torch.linspace(-200, 200, 801), torch.zeros(6)]).view(3, 269)
    up = randn(3, 269)
    torch.testing.assert_close(k.gated(gate, up), F.silu(gate.double()).float() * up, rtol=2e-6, atol=1e-30)
    x, weight = randn(2, 5, 53) * 3, randn(53, seed=1)
    for shift in (0.0, 1.0):
        expected = F.rms_norm(x.double(), (53,), weight.double() + shift, 1e-6)
        torch.testing.assert_close(k.rms_norm(x, weight, 1e-6, shift).double(), expected, rtol=2e-6, atol=1e-6)
    zeros = torch.zeros(1, 8)
    assert torch.equal(k.rms_norm(zeros, torch.ones(8), 1e-6, 0.0), zeros)


@compiled
@pytest.mark.parametrize("rows", [3, 400])  # one thread takes few
def test_gradients_of_gates_and_norms(rows: int) -> None:
    """Against autograd in float64; the gradient of the gate in the place of what came, or not."""
    k, before = native.kernels(), torch.get_num_threads()
    assert k is not None
    gate, up, d = randn(rows, 53) * 8, randn(rows, 53, seed=1), randn(rows, 53, seed=2)
    weight = randn(53, seed=3)
    exact = [x.double().requires_grad_() for x in (gate, up)]
    expected = torch.autograd.grad(F.silu(exact[0]) * exact[1], exact, d.double())
    found: list[list[Tensor]] = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(
                [*k.gated_back(gate, up, d, in_place=False), *k.gated_back(gate, up, d.clone(), in_place=True)]
            )
            found[-1] += [k.rms_norm_back(gate, weight, d, 1e-6, shift) for shift in (0.0, 1.0)]
            found[-1].append(k.rms_norm(gate, weight, 1e-6, 0.0))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for a, b in zip(found[0][:4], (*expected, *expected), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-6)
    for shift, a in zip((0.0, 1.0), found[0][4:6], strict=True):
        y = F.rms_norm(exact[0], (53,), weight.double() + shift, 1e-6)
        torch.testing.assert_close(a.double(), *torch.autograd.grad(y, exact[0], d.double()), rtol=2e-6, atol=2e-6)
    exact_norm = F.rms_norm(gate.double(), (53,), weight.double(), 1e-6)
    torch.testing.assert_close(found[0][6].double(), exact_norm, rtol=2e-6, atol=1e-6)


def slow_attention(q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float) -> Tensor:
    """One query over its keys, all in float64."""
    seen = slice(0 if window is None else max(0, len(keys) - window), None)
    p = (keys[seen].double() @ q.double() * scale).softmax(0)
    return p @ values[seen].double()


@compiled
@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("with_prompts", [False, True])
@pytest.mark.parametrize(("size", "heads"), [(12, 2), (16, 4), (64, 6), (80, 14)])
def test_attention_of_one_step(window: int | None, with_prompts: bool, size: int, heads: int) -> None:
    k = native.kernels()
    assert k is not None
    rows, kv = 5, 2
    columns, prompts, lengths = [0, 3, 8, 1, 5], [1, 0, 1, 1, 0], [4, 7, 4, 4, 7]
    own = (randn(rows + 1, kv, 9, size),), (randn(rows + 1, kv, 9, size, seed=1),)
    shared = (randn(2, kv, 7, size, seed=2),), (randn(2, kv, 7, size, seed=3),)
    q, key, value = (randn(rows, n, size, seed=s).transpose(0, 1) for n, s in ((heads, 4), (kv, 5), (kv, 6)))
    out = k.attend(
        q, key, value, own, shared if with_prompts else None, torch.tensor(columns),
        (torch.tensor(prompts), torch.tensor(lengths)) if with_prompts else None, window, 0.3,
    )  # fmt: skip
    for m in range(rows):
        for h in range(heads):
            g, c = h // (heads // kv), columns[m]
            assert torch.equal(own[0][0][m, g, c], key[g, m]) and torch.equal(own[1][0][m, g, c], value[g, m])
            seen = [
                torch.cat([s[prompts[m], g, : lengths[m]], o[m, g, : c + 1]]) if with_prompts else o[m, g, : c + 1]
                for (s,), (o,) in zip(shared, own, strict=True)
            ]
            expected = slow_attention(q[h, m], seen[0], seen[1], window, 0.3)
            torch.testing.assert_close(out[m, h].double(), expected, atol=1e-5, rtol=1e-5)


@compiled
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_rotary_positions_are_transformers_own(name: str) -> None:
    """What decoding gets from a patched function is what the function gives; training gets the function itself."""
    model = tiny_model(name)
    fuse(model)
    home = sys.modules[next(type(m) for m in model.modules() if type(m).__name__.endswith("Attention")).__module__]
    original = getattr(home.apply_rotary_pos_emb, "original", home.apply_rotary_pos_emb)
    assert original is not home.apply_rotary_pos_emb
    q, key = (randn(1, 5, h, 16, seed=h).transpose(1, 2) for h in (4, 2))
    angle = torch.arange(5)[None, :, None] * torch.rand(8).repeat(2)
    for training in (False, True):
        with torch.set_grad_enabled(training):
            found = home.apply_rotary_pos_emb(q, key, angle.cos(), angle.sin())
        for a, b in zip(found, original(q, key, angle.cos(), angle.sin()), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@compiled
def test_draws_are_the_inverse_of_the_cumulative_distribution() -> None:
    k = native.kernels()
    assert k is not None
    z = randn(6, 1000, seed=3) * 4
    z[1] = -torch.inf
    z[1, [3, 700]] = torch.tensor([0.0, 1.0])
    z[2, 500:] = -torch.inf
    p = z.double().softmax(-1)
    for u in (0.0, 0.1, 0.5, 0.9, 1 - 2**-53):
        tokens, logprobs = k.draw(z, torch.full((6,), u, dtype=torch.float64))
        for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            assert p[row, token] > 0
            assert p[row, :token].sum() <= u + 1e-6 and (p[row, : token + 1].sum() > u - 1e-6)
            assert logprob == pytest.approx(float(p[row, token].log()), abs=1e-5)
    broken = z.clone()
    broken[4, 999] = torch.nan
    assert k.draw(broken, torch.full((6,), 0.5, dtype=torch.float64))[1].isnan().tolist() == [i == 4 for i in range(6)]
    assert k.draw(z, torch.zeros(6, dtype=torch.float64))[0][1] == 3
    assert k.draw(z, torch.full((6,), 1 - 2**-53, dtype=torch.float64))[0][1] == 700


def test_without_a_compiler_torch_does_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(native, "_state", {})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert native.kernels() is None
    assert native.why() == "torch (no C compiler: cc, gcc and clang are not on the PATH)"
    with torch.no_grad():
        x, weight = randn(3, 8), randn(16, 8, seed=1)
        torch.testing.assert_close(cpu.linear(x, weight), x @ weight.t())
    monkeypatch.setattr(native, "_state", {})
    monkeypatch.setenv("POSTTRAIN_NATIVE", "0")
    assert native.kernels() is None and native.why() == "torch (POSTTRAIN_NATIVE is 0)"


def test_a_compiler_that_fails_is_told_and_nothing_breaks(monkeypatch, tmp_path) -> None:
    bad = tmp_path / "cc"
    bad.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo bad; else echo no such flag >&2; exit 1; fi\n')
    bad.chmod(0o755)
    monkeypatch.setattr(native, "_state", {})
    monkeypatch.setenv("CC", str(bad))
    assert native.kernels() is None
    assert "failed: no such flag" in native.why()
