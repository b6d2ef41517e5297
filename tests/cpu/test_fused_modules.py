"""Fused forwards against the modules' own, in value and gradient; and that what differs is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from posttrain.config import AdapterConfig
from posttrain.cpu.fused_modules import fuse
from posttrain.losses.gradient_accumulation import added_in_place
from posttrain.models.adapters import attach
from posttrain.models.tiny_model import tiny_model

KINDS = [("llama", 5, 2), ("qwen3", 9, 2), ("gemma2", 9, 2), ("granite", 5, 2), ("cohere", 0, 2), ("mixtral", 5, 0)]


def run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of two rows of tokens and the gradient of a random projection of them."""
    model.zero_grad()
    ids = torch.randint(3, 250, (2, 13), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, use_cache=False).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(own: Any, fused: Any) -> None:
    (a, expected), (b, found) = run(own), run(fused)
    torch.testing.assert_close(b, a, atol=5e-5, rtol=1e-5)
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert float((found[name] - g).abs().max()) <= 1e-4 * max(1.0, float(g.abs().max())), name


@pytest.mark.parametrize(("kind", "norms", "mlps"), KINDS)
def test_equal_to_the_models_own(kind: str, norms: int, mlps: int) -> None:
    own = tiny_model(kind)
    torch.manual_seed(0)
    for name, p in own.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, mean=0.5, std=0.3)  # all ones, or zeros, would hide a weight that is left out
    fused = copy.deepcopy(own)
    counts = fuse(fused)
    assert sum(n for t, n in counts.items() if "Norm" in t) == norms
    assert sum(n for t, n in counts.items() if "MLP" in t) == mlps
    check(own, fused)


@pytest.mark.parametrize(("kind", "linears"), [("lora", 14), ("rslora", 14), ("dora", 0)])
def test_adapters_equal_peft_s_own(kind: str, linears: int) -> None:
    own = attach(tiny_model("qwen2"), AdapterConfig(kind=kind, r=4), seed=0)  # type: ignore[arg-type]
    for name, p in own.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)  # zero at first
    fused = copy.deepcopy(own)
    assert fuse(fused).get("LoRA", 0) == linears
    check(own, fused)
    with own.disable_adapter(), fused.disable_adapter():
        ids = torch.arange(3, 12)[None]
        assert torch.equal(own(ids).logits, own.get_base_model()(ids).logits)
        torch.testing.assert_close(fused(ids).logits, own(ids).logits, atol=1e-5, rtol=0)
    merged = own.merge_and_unload()(ids).logits
    torch.testing.assert_close(fused.merge_and_unload()(ids).logits, merged, atol=1e-4, rtol=0)


def test_adapters_in_float32_on_weights_in_bfloat16() -> None:
    """As near to the same numbers in float32 as peft's own way is, without a copy of the inputs for backward."""
    torch.manual_seed(0)
    own = attach(tiny_model("llama").to(torch.bfloat16), AdapterConfig(r=4, target=["up_proj"]), 0)
    layer = next(m for m in own.modules() if hasattr(m, "lora_B") and hasattr(m, "base_layer"))
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    exact = copy.deepcopy(layer).float()
    x, g = (torch.randn(1, 200, n).bfloat16() for n in layer.base_layer.weight.shape[::-1])
    found = []
    for module, fused in ((exact, False), (layer, False), (layer, True)):
        assert not fused or fuse(module)["LoRA"] == 1
        kept: list[torch.Tensor] = []
        leaf = x.to(module.base_layer.weight.dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = module(leaf)
        ends = [leaf, *(m["default"].weight for m in (module.lora_A, module.lora_B))]
        found.append([y, *torch.autograd.grad(y, ends, g.to(y))])
        copies = sum(t.dtype == torch.float32 and t.numel() == x.numel() for t in kept)
        assert module is exact or copies == (0 if fused else 1)
    for exact_one, peft_s, ours in zip(*([t.detach().float() for t in side] for side in found), strict=True):
        theirs, own_error = (float((t - exact_one).square().mean().sqrt()) for t in (peft_s, ours))
        assert own_error <= 1.5 * theirs + 1e-6


@pytest.mark.parametrize("rows", [3, 300])  # few go through a compiled kernel where there is no gradient
def test_rotation_equals_transformers_own_in_value_and_gradient(rows: int) -> None:
    from transformers.models.llama import modeling_llama as home

    fuse(tiny_model("llama"))
    turn = home.apply_rotary_pos_emb
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, rows, heads, 8, generator=g).transpose(1, 2) for heads in (4, 2))
    cos, sin = (torch.randn(1, rows, 8, generator=g) for _ in range(2))  # not of one angle: nothing relies on that
    for training in (True, False):
        found = []
        for function in (turn, turn.original):  # type: ignore[attr-defined]
            leaves = [x.clone().requires_grad_(training) for x in (q, k)]
            with torch.set_grad_enabled(training):
                turned = list(function(*leaves, cos, sin))
            more = torch.autograd.grad([x.sin().sum() for x in turned], leaves) if training else []
            found.append([*turned, *more])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


class OddRMSNorm(nn.Module):
    """Looks like the norm, and clips."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / x.pow(2).mean(-1, keepdim=True).add(self.eps).sqrt()).clamp(-1, 1)


def test_what_differs_is_left_alone() -> None:
    odd = nn.Sequential(OddRMSNorm())
    assert fuse(odd) == {}
    assert "forward" not in odd[0].__dict__


def test_a_layer_that_differs_from_the_first_is_left_alone() -> None:
    """In its activation or in a number: the comparison of one layer holds for its like alone."""
    model = tiny_model("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    second.act_fn = nn.Tanh()
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    own = copy.deepcopy(model)
    fuse(model)
    assert "forward" in vars(first) and "forward" not in vars(second)
    check(own, model)


@pytest.mark.parametrize("padding", [None, 2])
def test_an_embedding_s_gradient_in_its_place_equals_torch_s(padding: int | None) -> None:
    """Repeated tokens add up, the padding token's row learns nothing, and tied weights add to what the head left."""
    own = nn.Embedding(7, 3, padding_idx=padding)
    fused = copy.deepcopy(own)
    assert fuse(fused) == {"Embedding": 1}
    tokens, weights = torch.tensor([[1, 2, 1, 6]]), torch.arange(12.0).view(1, 4, 3)
    place = torch.full((7, 3), torch.nan)
    for _ in range(2):
        (own(tokens) * weights).sum().backward()
        with added_in_place([(fused.weight, place)]):
            (fused(tokens) * weights).sum().backward()
    assert fused.weight.grad is place and own.weight.grad is not None
    assert torch.equal(place, own.weight.grad) and float(place[1].sum()) == 2 * (0 + 1 + 2 + 6 + 7 + 8)
    fused.weight.grad = None
    (fused(tokens) * weights).sum().backward()
    assert torch.equal(fused.weight.grad * 2, own.weight.grad)


def test_embeddings_that_do_more_are_left_alone() -> None:
    for module in (nn.Embedding(7, 3, max_norm=1.0), nn.Embedding(7, 3, sparse=True)):
        assert fuse(module) == {}


def test_two_gelus_are_told_apart_where_weights_are_small() -> None:
    """Near zero they are the same function, up to the tolerance of a comparison on the module itself."""
    own = tiny_model("gemma2")
    with torch.no_grad():
        for layer in own.model.layers:
            layer.mlp.gate_proj.weight.mul_(0.01)
    fused = copy.deepcopy(own)
    fuse(fused)
    with torch.no_grad():
        for model in (own, fused):
            for layer in model.model.layers:
                layer.mlp.gate_proj.weight.mul_(1000)
    check(own, fused)
