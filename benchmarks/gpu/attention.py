"""Attention as the package computes it on this device, against a softmax in float64: results and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpu.base import Account, Where, apart, family
from posttrain.core.ragged import RaggedBatch, pack
from posttrain.models import attention

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest difference, as a part of the largest value. bfloat16 has eight bits: rounding once is 4e-3."""


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    size: int
    dtype: torch.dtype
    shared: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def name(self) -> str:
        words = [f"{self.heads}/{self.kv_heads} heads of {self.size}", str(self.dtype).removeprefix("torch.")]
        words += ["tree" if self.shared else "rows"] + ([f"window {self.window}"] if self.window else [])
        words += ["soft cap"] if self.softcap else []
        return ", ".join(words + (["sinks"] if self.sinks else []))


def cases(dry: bool) -> Iterator[Case]:
    """Head sizes 64 and 128, with and without grouped keys, trees, windows; soft caps and sinks once each."""
    for dtype in (torch.float32,) if dry else (torch.bfloat16, torch.float16, torch.float32):
        for heads, kv_heads, size in ((4, 2, 32),) if dry else ((9, 3, 64), (14, 2, 64), (8, 8, 128), (8, 2, 128)):
            for shared in (True, False):
                for window in (None, 24):
                    yield Case(heads, kv_heads, size, dtype, shared, window)
        yield Case(4, 2, 64, dtype, softcap=5.0, window=24)
        yield Case(4, 2, 64, dtype, sinks=True)


def visible(batch: RaggedBatch, window: int | None) -> Tensor:
    """(T, T): whether the token of a row sees that of a column."""
    sees = torch.zeros(batch.total, batch.total, dtype=torch.bool)
    for i, (start, end) in enumerate(zip(batch.starts, batch.ends, strict=True)):
        for s in batch.chain(i):
            sees[start:end, batch.starts[s] : batch.ends[s]] = True
    position = batch.positions_T.cpu()
    distance = position[:, None] - position
    sees &= distance >= 0
    return sees if window is None else sees & (distance < window)


def exact(c: Case, batch: RaggedBatch, inputs: list[Tensor], sink: Tensor | None) -> Tensor:
    """(1, T, heads, size), by one softmax over all keys."""
    repeat = c.heads // c.kv_heads
    q, (k, v) = inputs[0], (x.repeat_interleave(repeat, dim=1) for x in inputs[1:])
    scores = q @ k.mT * c.size**-0.5
    if c.softcap is not None:
        scores = c.softcap * torch.tanh(scores / c.softcap)
    scores = scores.masked_fill(~visible(batch, c.window).to(q.device), -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.view(1, -1, 1, 1).expand(1, -1, batch.total, 1)], -1)
    p = scores.softmax(-1)
    return (p if sink is None else p[..., :-1]).matmul(v).transpose(1, 2)


def one(c: Case, where: Where, account: Account) -> None:
    """Forward and backward of one case."""
    batch = pack(family(200, where.pick(8, 2)), c.shared).to(where.device)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(where.device, c.dtype)

    # In memory (T, heads, size), as projections leave it.
    q, k, v = (randn(1, batch.total, n, c.size).transpose(1, 2) for n in (c.heads, c.kv_heads, c.kv_heads))
    d_out = randn(1, batch.total, c.heads, c.size)
    sink = randn(c.heads) if c.sinks else None
    mine = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (q, k, v)]
    out = attention.ragged_attention(
        nn.Identity(), mine[0], mine[1], mine[2], None, sliding_window=c.window, softcap=c.softcap, s_aux=sink,
        ragged=attention.Plan(batch),
    )[0]  # fmt: skip
    found = [out, *torch.autograd.grad(out, mine, d_out)]
    theirs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    right = exact(c, batch, theirs, None if sink is None else sink.double())
    expected = [right, *torch.autograd.grad(right, theirs, d_out.double())]
    for name, a, b in zip(("out", "d query", "d key", "d value"), found, expected, strict=True):
        account.at_most(f"{c.name}: {name}", apart(a, b), BOUNDS[c.dtype])


def check(where: Where) -> Account:
    """Every case; those that die are kept and the others go on."""
    account, count, varlen = Account(), 0, 0
    for case in cases(where.dry):
        count += 1
        like = torch.empty(1, case.heads, 1, case.size, dtype=case.dtype, device=where.device)
        plain = case.softcap is None and not case.sinks
        varlen += plain and attention._can_varlen(like, like)
        try:
            one(case, where, account)
        except Exception as error:
            account.attempt(case.name, error)
    account.numbers = {"cases": count, "in one varlen call": varlen, "differences": worst(account.numbers)}
    if where.cuda:
        account.true("varlen attention is used", varlen > 0)
    account.note = f"{count} cases, {varlen} of them in one varlen call"
    return account


def worst(numbers: dict[str, Any]) -> dict[str, float]:
    """The largest difference by what was compared and dtype; single cases would fill pages."""
    out: dict[str, float] = {}
    for name, value in numbers.items():
        case, _, what = name.rpartition(": ")
        key = f"{case.split(', ')[1]}: {what}"
        out[key] = max(out.get(key, 0.0), value)
    return out


def probe(where: Where) -> Account:
    """What this torch's varlen attention can do: grouped keys without copies, the same bits twice, its speed."""
    account = Account()
    if not where.cuda:
        account.note = "no GPU: nothing to find out"
        return account
    from torch.nn.attention.varlen import varlen_attn

    total, lengths = 16384, 8
    cu = torch.arange(0, total + 1, total // lengths, dtype=torch.int32, device=where.device)
    options: dict[str, Any] = {"scale": 0.125, "window_size": (-1, 0)}
    q, few = (torch.randn(total, n, 64, device=where.device, dtype=torch.bfloat16) for n in (9, 3))
    many = few.repeat_interleave(3, dim=1)

    def go(k: Tensor, **more: Any) -> list[Tensor]:
        longest, leaves = total // lengths, [x.detach().requires_grad_() for x in (q, k, k)]
        out: Any = varlen_attn(leaves[0], leaves[1], leaves[2], cu, cu, longest, longest, **options, **more)
        return [out, *torch.autograd.grad(out, leaves, q)]

    expected = go(many)
    account.numbers["same bits twice"] = all(torch.equal(a, b) for a, b in zip(expected, go(many), strict=True))
    for name, more in (("grouped keys", {}), ("grouped keys, enable_gqa", {"enable_gqa": True})):
        try:
            found = go(few, **more)
            right = [*expected[:2], *(x.unflatten(1, (3, 3)).float().sum(2) for x in expected[2:])]
            account.numbers[name] = max(apart(a, b) for a, b in zip(found, right, strict=True))
        except Exception as error:
            account.numbers[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    for name, k in (("repeated", many), ("grouped", few)):
        try:
            account.numbers[f"ms, {name}"] = milliseconds(where, lambda k=k: go(k))  # type: ignore[misc]
        except Exception as error:
            account.numbers[f"ms, {name}"] = type(error).__name__
    account.note = ", ".join(f"{k}: {account.numbers[k]}" for k in ("grouped keys", "same bits twice"))
    return account


def milliseconds(where: Where, work: Any, repeats: int = 10) -> float:
    """Of one call, on average, after two that are not counted."""
    import time

    for _ in range(2):
        work()
    where.wait()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    where.wait()
    return round((time.perf_counter() - began) / repeats * 1e3, 4)
