"""Products with weights in few bits: those of the dense weight they stand for, whatever is beside in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posttrain.config import SamplingConfig
from posttrain.cpu import decoder_layer
from posttrain.cpu import library as native
from posttrain.cpu.matmul import linear
from posttrain.cpu.packed_experts import PackedExperts
from posttrain.cpu.quantized_matmul import pack_modules, pack_weight, packed_of, placeholder
from posttrain.models.language_model import LanguageModel
from posttrain.models.quantized_weight import QuantizedWeight, attach_quantized
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request

pytestmark = pytest.mark.skipif(native.kernels() is None, reason=f"no compiled kernels here: {native.why()}")


def random_weight(rows: int, columns: int, group: int, bits: Any, asymmetric: bool, order: bool) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(rows + columns + bits)
    half, shape = 2 ** (bits - 1), (rows, columns // group)

    def integers(*size: int) -> torch.Tensor:
        return torch.randint(-half, half, size, generator=generator).to(torch.int8)

    zero = integers(*shape) if asymmetric else None
    groups = (torch.arange(columns) // group)[torch.randperm(columns, generator=generator)] if order else None
    scale = torch.rand(shape, generator=generator) + 0.1
    return QuantizedWeight(integers(rows, columns), scale, zero, group, bits, groups)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_those_of_the_dense_weight(bits: int, order: bool, asymmetric: bool) -> None:
    kernels = native.kernels()
    assert kernels is not None
    # Rows that fill no tile, groups that fill no word, one group a row, more tiles than lie side by side.
    for rows, columns, group in ((50, 64, 32), (8, 40, 20), (33, 30, 6), (16, 96, 96), (150, 48, 8)):
        weight = random_weight(rows, columns, group, bits, asymmetric, order)
        packed = pack_weight(weight.values_O_I, weight.scale_O_G, weight.zero_O_G, bits, weight.order_I)
        x, bias = torch.randn(13, columns), torch.randn(rows)
        found, dense = kernels.quantized_linear(x, packed, bias), weight.dense().double()
        expected = x.double() @ dense.t() + bias.double()
        size = 1 if weight.zero_O_G is None else 2 ** (bits - 1)  # of integers, what a zero is taken off
        scale = x.double().abs() @ (dense.abs() + size * weight.scale_O_G.max()).t() + bias.double().abs()
        assert float(((found.double() - expected).abs() / scale).max()) < 1e-6
        for count in (1, 2, 3, 4, 5, 8, 9):
            assert torch.equal(kernels.quantized_linear(x[:count], packed, bias), found[:count])
        assert torch.equal(kernels.dequantize(packed), weight.dense())
        some = torch.tensor([[rows - 1, 0], [3, 3]])
        assert torch.equal(kernels.dequantize(packed, some), weight.dense()[some])
        assert torch.equal(kernels.dequantize(packed, some.int()), weight.dense()[some])
        with pytest.raises(IndexError, match=f"must be 0 to {rows - 1}"):
            kernels.dequantize(packed, torch.tensor([rows]))


def test_a_placeholder_that_lost_its_weight_is_an_error() -> None:
    weight = torch.nn.Parameter(placeholder(16, 32))
    assert weight.untyped_storage().nbytes() == 4 and bool(weight.isnan().all())
    for rows in (3, 400):
        with torch.no_grad(), pytest.raises(RuntimeError, match="open the model again"):
            linear(torch.ones(rows, 32), weight)


@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_an_expert_multiplies_as_it_is_packed(transposed: bool) -> None:
    """As transformers' forwards do it; whatever else is done with its matrix is refused."""
    weights = [random_weight(48, 32, 16, bits, False, False) for bits in (4, 8)]
    experts = PackedExperts([pack_weight(w.values_O_I, w.scale_O_G, None, w.bits) for w in weights], transposed)
    for rows, number in ((1, torch.tensor(0)), (3, torch.tensor(1)), (300, 1)):
        x, bias = torch.randn(rows, 32), torch.randn(48)
        expected, matrix = x @ weights[int(number)].dense().t(), experts[number]
        if transposed:
            found = [x @ matrix, torch.matmul(x, matrix)]
        else:
            found = [torch.nn.functional.linear(x, matrix), torch.nn.functional.linear(x, matrix, bias) - bias]
        for product in found:
            torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="held packed only"):
        torch.nn.functional.linear(x, matrix) if transposed else x @ matrix
    with pytest.raises(NotImplementedError, match="held packed only"):
        torch.add(x, matrix)
    assert experts.nbytes == 48 * 32 // 2 + 48 * 32 + 2 * 4 * 48 * 2


def test_groups_of_different_sizes_are_not_packed() -> None:
    weight = random_weight(16, 32, 8, 4, False, False)
    groups = torch.tensor([0] * 9 + [1] * 7 + [2] * 8 + [3] * 8)
    assert pack_weight(weight.values_O_I, weight.scale_O_G, None, 4, groups) is None


def quantized(name: str, bits: Any, **changes: Any) -> Any:
    model = tiny_model(name, **changes)
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            w = module.weight.detach().view(module.weight.shape[0], -1, 16)
            scale = w.abs().amax(-1) / (2 ** (bits - 1) - 0.5)
            values = (w / scale[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
            attach_quantized(module, QuantizedWeight(values.view_as(module.weight), scale, None, 16, bits))
    return model


@pytest.mark.parametrize(
    ("name", "changes"), [("llama", {"tie_word_embeddings": True}), ("qwen2", {"tie_word_embeddings": False})]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_sampler_reads_packed_weights(name: str, changes: Any, bits: int, monkeypatch: Any) -> None:
    requests = [Request(list(range(5, 9 + i)), 3, i) for i in range(3)]
    params = SamplingConfig(max_tokens=10, min_tokens=10)
    calls = []
    computed = decoder_layer._computed
    monkeypatch.setattr(decoder_layer, "_computed", lambda *args: calls.append(args[1]) or computed(*args))

    def rollouts(hf: Any) -> list[Any]:
        sampler = LocalSampler(LanguageModel(hf), tiny_tokenizer())
        return [r for g in sampler.sample(requests, params) for r in g.rollouts]

    hf = quantized(name, bits, **changes)
    packed = rollouts(hf)
    assert calls and all(getattr(layer, m).packed for layer in calls for m in native.Layer.MATRICES)
    assert packed_of(hf.get_output_embeddings().weight) is not None
    dense = quantized(name, bits, **changes)
    for module in dense.modules():
        vars(module).pop("quantized", None)
    for a, b in zip(packed, rollouts(dense), strict=True):
        assert a.tokens == b.tokens
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=2e-5)


def test_a_weight_that_is_trained_is_packed_no_longer() -> None:
    layer = torch.nn.Linear(32, 16, bias=False)
    weight = random_weight(16, 32, 16, 8, False, False)
    attach_quantized(layer, weight)
    assert pack_modules([(layer, weight)]) == 1
    x = torch.eye(2, 32)
    with torch.no_grad():
        layer.weight.mul_(2)
        assert packed_of(layer.weight) is None
        torch.testing.assert_close(linear(x, layer.weight), 2 * (x @ weight.dense().t()))
    assert pack_modules([(layer, weight)]) == 0  # the integers do not stand for it any more
