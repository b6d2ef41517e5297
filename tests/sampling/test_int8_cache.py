"""Keys and values in int8: the rounding by hand, the sampler against a slow loop, the kernels to the bit, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.config.settings import SamplerConfig
from posttrain.core.errors import ModelError
from posttrain.cpu import decoder_layer
from posttrain.cpu import library as native
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from posttrain.sampling.engine import LocalSampler, Session, SessionPrompt
from posttrain.sampling.int8_cache import dequantize_rows, quantize_rows
from posttrain.sampling.kv_cache import DecodingStep, Region
from posttrain.sampling.protocol import Request
from tests.sampling.test_engine import TOKENIZER, prompts, sampler, spread, tokens

compiled = pytest.mark.skipif(native.kernels() is None, reason=f"no compiled kernels here: {native.why()}")
Row = list[float]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(kind: str, **settings: Any) -> LanguageModel:
    """In float64: no number is so near to the middle of two integers that two ways of computing it round it apart."""
    return LanguageModel(spread(tiny_model(kind, **settings)).double())


def test_rounding_by_hand() -> None:
    rows = torch.tensor([[127, -63.5, 0.5, 1.5, 3.2], [31.75, -0.125, 0.375, -31.75, 0.1], [0.0] * 5])
    integers, scales = quantize_rows(rows)
    assert scales.tolist()[:2] == [1.0, 0.25]
    assert integers.tolist() == [[127, -64, 0, 2, 3], [127, 0, 2, -127, 0], [0] * 5]  # ties to even
    back = dequantize_rows(integers, scales, torch.float32)
    assert back.tolist() == [[127, -64, 0, 2, 3], [31.75, 0, 0.5, -31.75, 0], [0] * 5]


def test_the_error_is_half_a_step_at_most_and_what_is_broken_shows() -> None:
    x = randn(50, 3, 16) * torch.logspace(-6, 6, 50)[:, None, None]
    integers, scales = quantize_rows(x)
    error = (dequantize_rows(integers, scales, torch.float32) - x).abs()
    assert bool((error <= scales[..., None] * 0.50001).all()) and bool((error.amax(-1) > 0).all())
    assert integers.abs().amax(-1).unique().tolist() == [127]
    assert dequantize_rows(integers, scales, torch.bfloat16).dtype == torch.bfloat16
    for broken in (math.nan, math.inf):
        x[7, 1, 3] = broken
        back = dequantize_rows(*quantize_rows(x), torch.float32)
        assert back.isfinite().all(-1).logical_not().nonzero().tolist() == [[7, 1]]


# --------------------------------------------------------------------------------------------------------- slow loop
def rounded_row(x: Tensor) -> Row:
    """One token's key or value of one head, rounded number by number."""
    row = x.float()
    scale = row.abs().max() / 127
    return [round(float(v / scale)) * float(scale) for v in row]


def slow_attention(q: Tensor, keys: list[Row], values: list[Row], window: int | None, scale: float) -> Tensor:
    first = 0 if window is None else max(0, len(keys) - window)
    scores = [scale * sum(a * b for a, b in zip(q.tolist(), k, strict=True)) for k in keys[first:]]
    weights = [math.exp(s - max(scores)) for s in scores]
    out = [0.0] * len(q)
    for w, value in zip(weights, values[first:], strict=True):
        out = [o + w / sum(weights) * v for o, v in zip(out, value, strict=True)]
    return torch.tensor(out, dtype=torch.float64)


@torch.no_grad()
def slow_logprobs(model: LanguageModel, prompt: list[int], answer: Sequence[int], window: int | None) -> list[float]:
    """Log-probabilities of an answer's tokens after the first: one token, layer and head at a time."""
    base = model.base.model
    stored: list[tuple[list[list[Row]], list[list[Row]]]] = []

    def keep(key: Tensor, value: Tensor) -> None:
        stored.append(tuple([[rounded_row(t) for t in head[: len(prompt)]] for head in x] for x in (key, value)))  # type: ignore[arg-type]

    LocalSampler(model, TOKENIZER).prefill([prompt], keep)
    out = []
    for i, token in enumerate(answer[:-1]):
        x = base.embed_tokens(torch.tensor([token]))
        cosine, sine = (t[0, 0] for t in base.rotary_emb(x, torch.tensor([[len(prompt) + i]])))
        for layer, (keys, values) in zip(base.layers, stored, strict=True):
            a, y = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (p(y)[0].view(-1, a.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))
            half = a.head_dim // 2
            q, k = (t * cosine + torch.cat([-t[:, half:], t[:, :half]], 1) * sine for t in (q, k))
            heads = []
            for head in range(len(k)):
                keys[head].append(rounded_row(k[head]))
                values[head].append(rounded_row(v[head]))
            for number, query in enumerate(q):
                head = number * len(k) // len(q)
                heads.append(slow_attention(query, keys[head], values[head], window, a.scaling))
            x = x + a.o_proj(torch.cat(heads)[None])
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits = model.base.lm_head(base.norm(x))[0]
        out.append(float(logits.log_softmax(-1)[answer[i + 1]]))
    return out


@pytest.mark.parametrize(
    ("kind", "window", "n", "temperature"),
    [("llama", None, 1, 0.0), ("llama", None, 2, 1.0), ("mistral", 4, 1, 1.0), ("mistral", 4, 2, 0.0)],
)
def test_decoding_equals_a_slow_loop(kind: str, window: int | None, n: int, temperature: float) -> None:
    """Prompts in their own region and in the completions', with a window and without."""
    model = exact(kind, **({"sliding_window": window} if window else {}))
    prompt = [5, 90, 41, 7, 133, 22, 60]
    params = SamplingConfig(temperature=temperature, max_tokens=6)
    groups = []
    for kv_cache in ("int8", None):
        s = LocalSampler(model, TOKENIZER, kv_cache=kv_cache)
        s.ends = frozenset()
        groups += s.sample([Request(prompt, n, 3)], params)
    group, full = groups
    for rollout, other in zip(group.rollouts, full.rollouts, strict=True):
        expected = slow_logprobs(model, prompt, rollout.tokens, window)
        torch.testing.assert_close(torch.tensor(rollout.logprobs[1:]), torch.tensor(expected), atol=1e-5, rtol=0)
        assert rollout.logprobs[0] == other.logprobs[0]  # the prompt's own pass reads no cache
        assert rollout.logprobs[1:] != other.logprobs[1:]


# ----------------------------------------------------------------------------------------------------------- kernels
@compiled
@pytest.mark.parametrize(("size", "groups", "window"), [(12, 3, None), (64, 1, None), (80, 6, 37), (32, 2, None)])
def test_kernels_store_what_torch_does_and_read_it_as_numbers(size: int, groups: int, window: int | None) -> None:
    """What is stored is equal to the bit, and attention is that over float32 regions with the same numbers."""
    k = native.kernels()
    assert k is not None
    columns, lengths = torch.tensor([0, 36, 69]), torch.tensor([50, 7, 50])
    places = (columns, (torch.tensor([1, 0, 1]), lengths))
    q, key, value = (randn(3, n, size, seed=s).transpose(0, 1) for n, s in ((2 * groups, 4), (2, 5), (2, 6)))
    value[1, 2, 3] = math.nan
    own, shared = ([quantize_rows(randn(3, 2, c, size, seed=c + i)) for i in (0, 1)] for c in (70, 50))
    full = [[(dequantize_rows(*part, torch.float32),) for part in region] for region in (own, shared)]
    out = k.attend(q, key, value, tuple(own), tuple(shared), *places, window, 0.3)
    for (integers, scales), (plain,), x in zip(own, full[0], (key, value), strict=True):
        expected = quantize_rows(x.transpose(0, 1))
        for m in range(3):
            assert torch.equal(scales[m, :, columns[m]].nan_to_num(-1), expected[1][m].nan_to_num(-1))
            sound = expected[1][m].isfinite()
            assert torch.equal(integers[m, sound, columns[m]], expected[0][m, sound])
            plain[m, :, columns[m]] = dequantize_rows(expected[0][m], expected[1][m], torch.float32)
    k_in, v_in = (torch.stack([p[m, :, columns[m]] for m in range(3)], 1) for (p,) in full[0])
    floats = k.attend(q, k_in, v_in, tuple(full[0]), tuple(full[1]), *places, window, 0.3)
    torch.testing.assert_close(out, floats, atol=1e-6, rtol=1e-5, equal_nan=True)
    assert int(out.isnan().sum()) == groups * size  # the queries that see the broken value


@compiled
@pytest.mark.parametrize("window", [None, 5])
def test_kernels_and_torch_compute_the_same(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, key, value = (randn(1, 3, n, 16, seed=n + s).transpose(1, 2) for n, s in ((4, 0), (2, 1), (2, 2)))
    columns, lengths = torch.tensor([3, 0, 7]), torch.tensor([6, 9, 6])
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(native, "_state", {"kernels": None, "why": "a test"})
        own, shared = Region(3, 8, int8=True), Region(2, 9, int8=True)
        for region, seed in ((own, 7), (shared, 8)):
            for (integers, scales), s in zip(region.at(0, key[0], value[0]), (0, 100), strict=True):
                for tensor, part in zip(
                    (integers, scales), quantize_rows(randn(*integers.shape, seed=seed + s)), strict=True
                ):
                    tensor.copy_(part)
        step = DecodingStep(own, torch.arange(3), columns, lengths + columns, 8, shared, torch.tensor([1, 0, 1]))
        step.rank_M, step.prompt_length_M = torch.tensor([0, 0, 1]), lengths
        step.prompt_slots, step.prompt_columns, step.ranks = 2, 9, 2
        found.append((step.attend(q, key, value, window, 0.25, None, None), own))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    for a, b in zip(found[0][1].stored[0], found[1][1].stored[0], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@compiled
def test_a_layer_in_one_call_reads_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit what its parts give one by one."""
    model, params = LanguageModel(spread(tiny_model("llama"))), SamplingConfig(max_tokens=12)
    asked = [Request(p, n, i) for n in (1, 3) for i, p in enumerate(prompts(4))]
    layers = [m for m in model.base.modules() if hasattr(m, "in_one_call")]
    found = []
    for in_one in (None, False):
        for x in layers:
            x.in_one_call = in_one
        found.append(LocalSampler(model, TOKENIZER, kv_cache="int8").sample(asked, params))
        assert [x.in_one_call for x in layers] == [True if in_one is None else False] * 2
        monkeypatch.setattr(decoder_layer, "_computed", None)  # it is not called any more
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------------- the sampler
def test_it_is_close_to_the_full_cache_and_company_changes_nothing() -> None:
    model, params = exact("llama"), SamplingConfig(max_tokens=10, min_tokens=10)
    asked = [Request(p, 2, i) for i, p in enumerate(prompts(5))]

    def sampled(**options: Any) -> tuple[list[list[tuple[int, ...]]], Tensor]:
        groups = LocalSampler(model, TOKENIZER, **options).sample(asked, params)
        return tokens(groups), torch.tensor([r.logprobs for g in groups for r in g.rollouts])

    (full, at_full), (found, at_int8) = sampled(), sampled(kv_cache="int8")
    same = torch.tensor(full).view(10, -1) == torch.tensor(found).view(10, -1)
    difference = (at_full - at_int8).abs()[same]
    assert int(same.sum()) > 70 and 1e-6 < float(difference.mean()) < 0.02
    for options in ({"max_running": 3}, {"static_shapes": True, "max_running": 4}):
        again, logprobs = sampled(kv_cache="int8", **options)
        assert again == found
        torch.testing.assert_close(logprobs, at_int8, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("gemma2", torch.float32), ("gpt_oss", torch.bfloat16), ("deepseek_v3", torch.float32)]
)
def test_every_kind_of_attention(kind: str, dtype: torch.dtype) -> None:
    """Soft caps, sinks, keys wider than values: greedy answers' numbers are near the full cache's, and not equal."""
    model, params = LanguageModel(spread(tiny_model(kind)).to(dtype)), SamplingConfig(temperature=0, max_tokens=4)
    asked = [Request(p, 2) for p in prompts(3)]
    full, found = (LocalSampler(model, TOKENIZER, kv_cache=c).sample(asked, params) for c in (None, "int8"))
    pairs = [(a.rollouts[0], b.rollouts[0]) for a, b in zip(full, found, strict=True)]
    second = torch.tensor([[r.logprobs[1] for r in pair] for pair in pairs if pair[0].tokens[:2] == pair[1].tokens[:2]])
    difference = (second[:, 0] - second[:, 1]).abs()
    assert len(second) and 0 < float(difference.max()) < 0.2


def test_memory_and_how_many_completions_fit() -> None:
    full, small = sampler(), sampler(kv_cache="int8")
    size = full.model.base.config.hidden_size // full.model.base.config.num_attention_heads
    assert small.bytes_per_token() / full.bytes_per_token() == (size + 4) / (4 * size)
    static = sampler(kv_cache="int8", static_shapes=True)
    static.sample([Request([5, 6, 7], 3)], SamplingConfig(max_tokens=5))
    ((layout, steps),) = static.kept.known.items()
    assert steps.bytes() == layout.tokens * small.bytes_per_token()
    slots = []
    for kind in (None, "int8"):
        s = sampler(memory_mb=100 * 20 * full.bytes_per_token() / 2**20, kv_cache=kind)
        waiting = [SessionPrompt(i, Request([3] * 11), 9) for i in range(1000)]
        s.max_running = 1000
        slots.append(Session(s, waiting, SamplingConfig(max_tokens=9), None).own.slots)
    assert slots == [100, int(100 * 4 * size / (size + 4))]
    with pytest.raises(ModelError, match=r"raise memory_mb \(in a recipe: cache_mb\), set kv_cache: int8, or lower"):
        sampler(memory_mb=0.001).sample([Request([5] * 50)], SamplingConfig())


def test_settings() -> None:
    assert SamplerConfig(kv_cache="int8").options()["kv_cache"] == "int8"
    with pytest.raises(ValidationError, match="Input should be 'int8'"):
        SamplerConfig.model_validate({"kv_cache": "int4"})
    with pytest.raises(ModelError, match="kv_cache is 'int4', and can be 'int8' or None"):
        sampler(kv_cache="int4")
