"""Triton kernels of a decoding step on an NVIDIA GPU: attention over kept keys and values, and drawing tokens.

They are recorded in CUDA graphs, so no number of rows or columns makes a new version of a kernel, and none is read on
the host. A row's result depends on its own keys alone, whatever the other rows of the batch are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.cuda.triton_kernels import on_its_device

KEYS_AT_ONCE = 32
"""Columns of keys that a program takes at a time."""
ATTEND_WARPS, ATTEND_STAGES = 2, 3
"""Warps of a program, and loads that it has under way."""
MOST_COLUMNS = 4096
"""With more columns than this a row's keys are too many for one program; PyTorch's products are faster."""
DRAWN = 4096
"""Logits of a block: first the block of the drawn token is found, then the token in it."""


@triton.jit
def _seen(q, key, value, top, total, out, inside, scale):  # type: ignore[no-untyped-def]
    """Add a block of columns to a running softmax; key (columns, size), value (columns, size)."""
    scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(inside[None, :], scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    less = tl.exp(top - higher)
    p = tl.exp(scores - higher[:, None])
    added = tl.dot(p.to(value.dtype), value, input_precision="ieee")
    return higher, total * less + tl.sum(p, 1), out * less[:, None] + added


@triton.jit(do_not_specialize=["own_slot", "own_head", "shared_slot", "shared_head", "window"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    q, k, v, own_k, own_v, shared_k, shared_v, columns, positions, prompts, lengths, y, scale, window,
    q_row, q_head, k_row, k_head, v_row, v_head, own_slot, own_head, shared_slot, shared_head,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, member = tl.arange(0, BLOCK_SIZE), tl.arange(0, BLOCK_GROUP)
    real = i < SIZE
    mask = (member < GROUP)[:, None] & real[None, :]
    column = tl.load(columns + row)
    first = head * GROUP + member
    queries = tl.load(q + row * q_row + first[:, None] * q_head + i[None, :], mask=mask, other=0.0)
    key = tl.load(k + row * k_row + head * k_head + i, mask=real, other=0.0)
    value = tl.load(v + row * v_row + head * v_head + i, mask=real, other=0.0)
    own = row * own_slot + head * own_head
    tl.store(own_k + own + column * SIZE + i, key, mask=real)
    tl.store(own_v + own + column * SIZE + i, value, mask=real)
    # The newest token's own key and value come first, from registers.
    top = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
    total = tl.full([BLOCK_GROUP], 1.0, dtype=tl.float32)
    out = tl.zeros([BLOCK_GROUP, BLOCK_SIZE], dtype=tl.float32) + value.to(tl.float32)[None, :]
    at = tl.arange(0, COLUMNS)
    low = 0
    if WINDOW:
        low = tl.maximum(0, column - window + 1)
    for start in range(low, column, COLUMNS):
        place, inside = own + (start + at) * SIZE, start + at < column
        both = inside[:, None] & real[None, :]
        keys = tl.load(own_k + place[:, None] + i[None, :], mask=both, other=0.0)
        values = tl.load(own_v + place[:, None] + i[None, :], mask=both, other=0.0)
        top, total, out = _seen(queries, keys, values, top, total, out, inside, scale)
    if SHARED:
        length = tl.load(lengths + row)
        shared = tl.load(prompts + row) * shared_slot + head * shared_head
        low = 0
        if WINDOW:
            low = tl.maximum(0, tl.load(positions + row) - window + 1)
        for start in range(low, length, COLUMNS):
            place, inside = shared + (start + at) * SIZE, start + at < length
            both = inside[:, None] & real[None, :]
            keys = tl.load(shared_k + place[:, None] + i[None, :], mask=both, other=0.0)
            values = tl.load(shared_v + place[:, None] + i[None, :], mask=both, other=0.0)
            top, total, out = _seen(queries, keys, values, top, total, out, inside, scale)
    target = (row * tl.num_programs(1) * GROUP + first[:, None]) * SIZE + i[None, :]
    tl.store(y + target, (out / total[:, None]).to(y.dtype.element_ty), mask=mask)


@on_its_device
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    regions: Sequence[tuple[Tensor, Tensor]],
    rows: tuple[Tensor, ...],
    window: int | None,
    scale: float,
) -> Tensor:
    """Compute attention of one new token a row over kept keys and values, and keep the token's own.

    Args:
        query: (1, heads, M, size), the last axis without gaps.
        key: (1, key heads, M, size) likewise.
        value: Likewise.
        regions: Keys and values (slots, key heads, columns, size) of completions, row i in slot i; then those of
            prompts, if they lie in slots of their own.
        rows: (M) each: the column of the new token, its position; then the slot and length of its prompt.
        window: Positions that a token sees back, itself included. None: all.
        scale: Multiplies the scores.

    Returns:
        (1, M, heads, size).
    """
    _, heads, count, size = query.shape
    kv = key.shape[1]
    y = query.new_empty(1, count, heads, size)
    (own_k, own_v), (shared_k, shared_v) = regions[0], regions[-1]
    column, position, *of_prompt = rows
    prompt, length = of_prompt or (column, column)
    strides = [s for x in (query, key, value) for s in (x.stride(2), x.stride(1))]
    strides += [s for x in (own_k, shared_k) for s in (x.stride(0), x.stride(1))]
    sizes = (max(16, triton.next_power_of_2(n)) for n in (heads // kv, size))  # a product takes no fewer
    _attend_kernel[(count, kv)](
        query, key, value, own_k, own_v, shared_k, shared_v, column, position, prompt, length, y, scale, window or 0,
        *strides, heads // kv, size, *sizes, KEYS_AT_ONCE, len(regions) == 2, window is not None,
        num_warps=ATTEND_WARPS, num_stages=ATTEND_STAGES,
    )  # fmt: skip
    return y


def can_attend(query: Tensor, key: Tensor, value: Tensor, stored: tuple[Any, ...], columns: int) -> bool:
    """Return True if `attend` takes these: one size of keys and values, a dtype of its own, not too many columns.

    Args:
        query: As given to `attend`.
        key: Likewise.
        value: Likewise.
        stored: Keys of a region as it holds them: one tensor, or two in int8.
        columns: Columns of all regions that a step looks at.
    """
    layout = all(x.stride(-1) == 1 and x.dtype == query.dtype for x in (query, key, value))
    return layout and query.shape[-1] == value.shape[-1] <= 256 and len(stored) == 1 and columns <= MOST_COLUMNS


# ------------------------------------------------------------------------------------------------------------- drawing
@triton.jit
def _blocks_kernel(z, tops, sums, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(z + row * VOCABULARY + at, mask=at < VOCABULARY, other=-float("inf"))
    top = tl.max(values, 0)
    mass = tl.sum(tl.where(values == -float("inf"), 0.0, tl.exp(values - top)), 0)
    tl.store(tops + row * tl.num_programs(1) + block, top)
    tl.store(sums + row * tl.num_programs(1) + block, mass)


@triton.jit
def _draw_kernel(  # type: ignore[no-untyped-def]
    z, tops, sums, uniforms, tokens, logprobs,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    block_tops = tl.load(tops + row * BLOCKS + block, mask=block < BLOCKS, other=-float("inf"))
    block_sums = tl.load(sums + row * BLOCKS + block, mask=block < BLOCKS, other=0.0)
    top = tl.max(block_tops, 0)
    mass = block_sums.to(tl.float64) * tl.exp(block_tops - top).to(tl.float64)
    before = tl.cumsum(mass, 0) - mass
    whole = tl.sum(mass, 0)
    target = tl.load(uniforms + row) * whole
    # The last block that begins at or below the target and has any mass.
    chosen = tl.max(tl.where((before <= target) & (mass > 0), block, 0), 0)
    rest = target - tl.sum(tl.where(block == chosen, before, 0.0), 0)
    at = chosen * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(z + row * VOCABULARY + at, mask=at < VOCABULARY, other=-float("inf"))
    p = tl.exp(values - top).to(tl.float64)
    before_each = tl.cumsum(p, 0) - p
    token = tl.max(tl.where((before_each <= rest) & (p > 0), at, 0), 0)
    tl.store(tokens + row, token.to(tl.int64))
    logit = tl.max(tl.where(at == token, values, -float("inf")), 0)
    tl.store(logprobs + row, logit - (top + tl.log(whole.to(tl.float32))))


@on_its_device
def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by the inverse of the cumulative distribution, with its log-probability.

    The token is the last that has any mass and whose cumulative probability before it is at most the random number.

    Args:
        logits: (M, V) float32 without gaps; -inf: never drawn.
        uniforms: (M) float64 in [0, 1), on the same device.
    """
    count, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, DRAWN)
    tops = logits.new_empty(count, blocks)
    sums, tokens = torch.empty_like(tops), logits.new_empty(count, dtype=torch.long)
    logprobs = logits.new_empty(count)
    _blocks_kernel[(count, blocks)](logits, tops, sums, vocabulary, DRAWN, num_warps=8)
    sizes = vocabulary, DRAWN, blocks, triton.next_power_of_2(blocks)
    _draw_kernel[(count,)](logits, tops, sums, uniforms, tokens, logprobs, *sizes, num_warps=8)
    return tokens, logprobs


def check_decoding(device: torch.device) -> None:
    """Compare `attend` and `draw` with plain PyTorch on a few random rows, so that no model depends on wrong kernels.

    Raises:
        RuntimeError: A result is wrong; whatever Triton raises otherwise.
    """
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 2, 96, 64, generator=generator).to(device) for _ in range(2))
    q, k, v = (torch.randn(1, n, 3, 64, generator=generator).to(device) for n in (4, 2, 2))
    column = torch.tensor([0, 3, 90], device=device)
    found = attend(q, k, v, [(keys, values)], (column, column), None, 0.125)
    for row, end in enumerate((1, 4, 91)):  # the kernel has put the new keys and values where they belong
        seen_k, seen_v = (x[row, :, :end].repeat_interleave(2, 0) for x in (keys, values))
        p = torch.einsum("hd,hcd->hc", q[0, :, row], seen_k).mul(0.125).softmax(-1)
        if not torch.allclose(found[0, row], torch.einsum("hc,hcd->hd", p, seen_v), rtol=1e-2, atol=1e-2):
            raise RuntimeError("attention of a decoding step gives other numbers than PyTorch")
    weights = torch.tensor([[0.0, 1.0, 2.0, 0.0, 5.0]], device=device).expand(4, -1)
    uniforms = torch.tensor([0.0, 0.12, 0.13, 0.99], dtype=torch.float64, device=device)
    tokens, logprobs = draw(weights.log(), uniforms)
    if tokens.tolist() != [1, 1, 2, 4] or not torch.allclose(logprobs.exp() * 8, weights[0, tokens]):
        raise RuntimeError(f"tokens {tokens.tolist()} are drawn in place of [1, 1, 2, 4]")
