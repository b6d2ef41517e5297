"""Triton kernels against plain PyTorch, in Triton's interpreter on a CPU. `make gpu` runs them on a card.

TRITON_INTERPRET=1 must be set, and Triton installed: it comes with PyTorch for CUDA, not with that for CPUs.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":  # triton reads it once, and torch may have imported it long ago
    pytest.skip("start pytest with TRITON_INTERPRET=1", allow_module_level=True)

from posttrain.cuda import fused_forwards as fused
from posttrain.cuda import triton_kernels as kernels
from posttrain.cuda import vocabulary_loss as vocabulary
from posttrain.losses import linear_logprobs as plain


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a row, several programs, and chunks of a few rows, in tensors that the interpreter can take."""
    monkeypatch.setattr(kernels, "VOCABULARY_BLOCK", 16)
    monkeypatch.setattr(kernels, "NORM_ELEMENTS", 32)
    monkeypatch.setattr(kernels, "NORM_BLOCKS", 2)
    monkeypatch.setattr(kernels, "ELEMENTS", 16)
    monkeypatch.setitem(plain.CHUNK_BYTES, "cuda", 3 * 4 * 37)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(ours: Tensor, theirs: Tensor, leaves: list[Tensor], most: float = 2e-5) -> None:
    """Results and gradients, of a sum with random coefficients."""
    d = rand(*ours.shape, seed=9)
    gradients = [torch.autograd.grad((x.float() * d).sum(), leaves) for x in (ours, theirs)]
    for a, b in [(ours, theirs), *zip(*gradients, strict=True)]:
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= most * b.abs().max()


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 7, 24), (1, 5, 3, 8), (1, 1, 40)])
def test_norm(shape: tuple[int, ...], shift: float) -> None:
    x, w = rand(*shape).requires_grad_(), rand(shape[-1], seed=1).requires_grad_()
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * (w + shift)
    compare(fused._Norm.apply(x, w, 1e-3, shift), expected, [x, w])


@pytest.mark.parametrize("kind", list(kernels.GATES))
def test_gated(kind: str) -> None:
    gate, up, w = (rand(1, 5, 9, seed=i).requires_grad_() for i in range(3))
    w = rand(4, 9, seed=2).requires_grad_()
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[kind]
    compare(fused._Gated.apply(gate, up, kind), act(gate) * up, [gate, up])
    compare(fused._GatedDown.apply(gate, up, w, kind), F.linear(act(gate) * up, w), [gate, up, w])


def test_rotation() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    apply = getattr(apply_rotary_pos_emb, "original", apply_rotary_pos_emb)
    q = rand(1, 5, 3, 12).requires_grad_()
    cos, sin = rand(1, 5, 12, seed=1), rand(1, 5, 12, seed=2)
    ours = fused._Rotation.apply(q.transpose(1, 2), cos, sin)
    compare(ours, apply(q.transpose(1, 2), q.transpose(1, 2), cos, sin)[0], [q])


def test_working_kernels_pass_their_check() -> None:
    fused.check_kernels(torch.device("cpu"))


def head(scale: float = 1.0) -> tuple[Tensor, plain.Head, Tensor]:
    hidden, weight = rand(8, 6).requires_grad_(), rand(37, 6, seed=1).requires_grad_()
    targets = torch.randint(37, (8,), generator=torch.Generator().manual_seed(2))
    return hidden, plain.Head(weight, scale=scale), targets


@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.linspace(0.5, 2.0, 8)], ids=["1", "0.7", "each its own"])
@pytest.mark.parametrize("entropy", [False, True])
def test_logprobs(temperature: float | Tensor, entropy: bool) -> None:
    hidden, h, targets = head(1.7)
    ours, own = vocabulary.fused_logprobs(hidden, h, targets, temperature, entropy)
    theirs, expected = plain.linear_logprobs(hidden, h, targets, temperature, entropy)
    mix = rand(8, seed=5)
    compare(ours + (own * mix if entropy else 0), theirs + (expected * mix if entropy else 0), [hidden, h.weight_V_H])
    assert torch.allclose(own, expected, atol=1e-6)


def test_cross_entropy() -> None:
    hidden, h, targets = head(0.6)
    coefficients = rand(8, seed=3)
    given = hidden, h, targets, coefficients
    (ours, nll, hits), (theirs, expected, their_hits) = (
        f(*given) for f in (vocabulary.fused_cross_entropy, plain.linear_cross_entropy)
    )
    compare(3 * ours, 3 * theirs, [hidden, h.weight_V_H])
    assert torch.allclose(nll, expected, atol=1e-6) and torch.equal(hits, their_hits)


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    hidden, weight = torch.ones(3, 2), torch.zeros(37, 2)
    _, _, hits = vocabulary.fused_cross_entropy(hidden, plain.Head(weight), torch.tensor([0, 5, 36]), torch.ones(3))
    assert hits.tolist() == [True, False, False]


def test_a_logit_that_is_not_finite_shows() -> None:
    for broken in (float("nan"), float("inf")):
        weight = torch.zeros(37, 2)
        weight[20] = broken
        logprobs, _ = vocabulary.fused_logprobs(torch.ones(1, 2), plain.Head(weight), torch.tensor([3]))
        assert logprobs.isnan().all()


@pytest.mark.parametrize("temperature", [0.0, torch.tensor([1.0, -1.0] * 4)])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float | Tensor) -> None:
    hidden, h, targets = head()
    with pytest.raises(ValueError, match="temperature must be positive"):
        vocabulary.fused_logprobs(hidden, h, targets, temperature)


def test_other_heads_take_the_plain_way() -> None:
    hidden, h, targets = head()
    for other in (plain.Head(h.weight_V_H, bias_V=rand(37)), plain.Head(h.weight_V_H, softcap=5.0)):
        ours, theirs = (f(hidden, other, targets)[0] for f in (vocabulary.fused_logprobs, plain.linear_logprobs))
        assert torch.equal(ours, theirs)


def test_a_model_is_fused_and_computes_the_same() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                      num_key_value_heads=1, vocab_size=37, max_position_embeddings=64))  # fmt: skip
    tokens = torch.arange(9)[None] * 3
    own = hf(tokens, labels=tokens)
    expected = torch.autograd.grad(own.loss, list(hf.parameters()))
    done = fused.fuse_forwards(hf)
    assert done["LlamaRMSNorm"] == 5 and done["LlamaMLP"] == 2
    ours = hf(tokens, labels=tokens)
    assert torch.allclose(ours.logits, own.logits, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours.loss, list(hf.parameters())), expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_low_rank_adapters_are_one_function() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                      num_key_value_heads=1, vocab_size=37, max_position_embeddings=64))  # fmt: skip
    model = get_peft_model(hf, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    tokens, trained = torch.arange(9)[None] * 3, [p for p in model.parameters() if p.requires_grad]
    own = model(tokens, labels=tokens)
    expected = torch.autograd.grad(own.loss, trained)
    assert fused.fuse_forwards(model)["Linear"] == 7
    ours = model(tokens, labels=tokens)
    assert torch.allclose(ours.logits, own.logits, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours.loss, trained), expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
