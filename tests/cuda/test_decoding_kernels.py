"""Triton kernels of a decoding step against plain PyTorch, in Triton's interpreter on a CPU."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":  # triton reads it once, and torch may have imported it long ago
    pytest.skip("start pytest with TRITON_INTERPRET=1", allow_module_level=True)
if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("Triton 3.6's interpreter can't loop up to numbers with numpy 2.4", allow_module_level=True)

from posttrain.config import SamplingConfig
from posttrain.cuda import decoding_kernels as kernels
from posttrain.models import backends
from posttrain.sampling import token_sampling
from posttrain.sampling.kv_cache import DecodingStep, Region


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(shared: bool) -> DecodingStep:
    """Three rows, two of one prompt, in regions filled with numbers."""
    own = Region(4, 96)
    own.stored = [((rand(4, 2, 96, 12, seed=0),), (rand(4, 2, 96, 12, seed=1),))]
    columns, positions = torch.tensor([0, 71, 30]), torch.tensor([70, 90, 69])
    made = DecodingStep(own, torch.arange(3), columns, columns.clone(), own_columns=80)
    if shared:
        made.position_M, made.shared = positions, Region(2, 100)
        made.shared.stored = [((rand(2, 2, 100, 12, seed=2),), (rand(2, 2, 100, 12, seed=3),))]
        made.prompt_M, made.rank_M, made.prompt_length_M = (
            torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1]), torch.tensor([70, 19, 70])
        )  # fmt: skip
        made.prompt_slots, made.prompt_columns, made.ranks = 2, 90, 2
    return made


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("window", [None, 40])
def test_attention(shared: bool, window: int | None) -> None:
    # As a rotation leaves them: ordered by token.
    q, k, v = (rand(3, heads, 12, seed=s).transpose(0, 1)[None] for s, heads in ((4, 6), (5, 2), (6, 2)))
    ours, theirs = step(shared), step(shared)
    stored = ours.own.stored[0][0]
    assert kernels.can_attend(q, k, v, stored, ours.own_columns + ours.prompt_columns)
    backend = backends.DeviceBackend()
    backend.decoding_kernels = kernels  # type: ignore[attr-defined]
    out = backends.CUDABackend.decode_attention(backend, ours, q, k, v, window, 0.3)  # type: ignore[arg-type]
    expected = theirs._attend(q, k, v, window, 0.3, None, None)
    assert out is not None and out.shape == expected.shape and ours.layer == 1
    assert (out - expected).abs().max() < 1e-5
    for mine, other in zip(ours.own.stored[0], theirs.own.stored[0], strict=True):
        assert torch.equal(mine[0], other[0])


def test_what_attention_does_not_take() -> None:
    q = rand(1, 2, 3, 12, seed=0)
    stored = (q,)
    assert not kernels.can_attend(q, q, q[..., :8], stored, 9)  # values of another size
    assert not kernels.can_attend(q, q.double(), q, stored, 9)
    assert not kernels.can_attend(q, q, q, (q, q), 9)  # int8 with scales
    assert not kernels.can_attend(q, q, q, stored, kernels.MOST_COLUMNS + 1)
    assert not kernels.can_attend(q.transpose(-1, -2), q, q, stored, 9)


def test_wrong_kernels_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.check_decoding(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "draw", lambda z, u: (torch.full(u.shape, 4), torch.zeros(len(u))))
        with pytest.raises(RuntimeError, match="tokens .4, 4, 4, 4. are drawn"):
            kernels.check_decoding(torch.device("cpu"))
    monkeypatch.setattr(kernels, "attend", lambda q, *_: q.transpose(1, 2))
    with pytest.raises(RuntimeError, match="attention of a decoding step"):
        kernels.check_decoding(torch.device("cpu"))


def test_drawing_is_that_of_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DRAWN", 32)
    monkeypatch.setattr(token_sampling, "backend_for", lambda _: backends.DeviceBackend())
    logits = rand(200, 203, seed=0) * 3
    logits[:, :40] = -torch.inf  # a block and a part of the next
    logits[0, :-1] = -torch.inf
    uniforms = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniforms[:4] = torch.tensor([0.5, 0.0, 1 - 2**-53, 0.0])
    tokens, logprobs = kernels.draw(logits, uniforms)
    expected, their_logprobs = token_sampling.draw_tokens(logits.clone(), uniforms, SamplingConfig())
    assert torch.equal(tokens, expected)
    assert torch.allclose(logprobs, their_logprobs, atol=1e-5)
