"""Statistics of calibration are those of a slow loop over rows, for layers that come after compressed ones."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.methods.compress import calibration_pass
from posttrain.methods.compress.awq import search_column_scales
from posttrain.methods.compress.calibration_pass import AFTER_LAYERS, calibrate
from posttrain.methods.compress.input_statistics import InputStatistics
from posttrain.models.language_model import LanguageModel
from posttrain.models.quantization_grid import Grid, round_to_nearest
from posttrain.models.tiny_model import tiny_model
from tests.conftest import family


def opened(kind: str, **changes: Any) -> LanguageModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LanguageModel(tiny_model(kind, **changes))


def inputs_row_by_row(
    kind: str, samples: list[Sample], weights: dict[str, Tensor], **changes: Any
) -> dict[str, Tensor]:
    """Return the inputs of every linear module by transformers alone, a row at a time."""
    hf = tiny_model(kind, **changes).eval()
    hf.load_state_dict(weights)
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, module in hf.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(lambda m, args, name=name: found[name].append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for sample in samples:
            hf(torch.tensor([sample.tokens]))
    return {name: torch.cat(parts) for name, parts in found.items()}


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2", "bloom"])
def test_statistics_are_those_of_a_loop_over_rows(kind: str) -> None:
    """Rows share prefixes; layer 0 is changed before layer 1 is measured; bloom goes a sequence at a time."""
    samples, model = family(), opened(kind)
    original = {name: value.clone() for name, value in model.hf.state_dict().items()}
    seen = {}
    for layer in calibrate(model, samples, ("hessian", "absolute", "inputs"), head=True, tokens_at_once=64):
        seen[layer.number] = layer
        for matrix in layer.matrices if layer.number == 0 else ():
            matrix.weight_O_I.mul_(0.5)
    assert [seen[n].name for n in sorted(seen)][-1] == AFTER_LAYERS and len(seen) == 3
    changed = dict(model.hf.state_dict())
    assert any(not torch.equal(changed[name], original[name]) for name in changed)
    before = inputs_row_by_row(kind, samples, original)
    after = inputs_row_by_row(kind, samples, changed)
    for number, layer in seen.items():
        rows = before if number == 0 else after
        assert layer.matrices and not layer.unreached
        for matrix in layer.matrices:
            statistics, x = layer.statistics[matrix.name], rows[matrix.name]
            assert statistics.tokens == len(x)
            assert statistics.hessian_I_I is not None and near(statistics.hessian_I_I, x.t() @ x)
            assert near(statistics.squares_I, x.double().square().sum(0))
            assert near(statistics.mean_absolute_I, x.double().abs().mean(0))
            assert len(statistics.inputs_N_I) <= len(x)


def with_massive_token() -> LanguageModel:
    """A model in which token 5 alone reads channel 7, and layer 0 makes its hidden state a hundred times larger."""
    model = opened("llama", hidden_size=64, intermediate_size=96)
    layer, table = model.base.model.layers[0], model.base.get_input_embeddings().weight.data
    table[:, 7], table[5] = 0.0, 0.0
    table[5, 7] = 1.0
    layer.self_attn.o_proj.weight.data[7] = 0.0
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
        linear.weight.data[1:4] *= 8.0  # columns of down_proj with large inputs, which scales are for
        linear.weight.data[0] = 0.0
        linear.weight.data[0, 7] = 40.0
    return model


def test_a_token_with_massive_activations_does_not_outweigh_all_others() -> None:
    """Errors count relative to the hidden state after the layer, whatever the batches; AWQ's scales fit the rest."""
    generator = torch.Generator().manual_seed(0)
    samples = [Sample([5, *torch.randint(6, 200, (14,), generator=generator).tolist()], [0.0] * 15) for _ in range(12)]
    model, grid, found = with_massive_token(), Grid(4, 32), {}
    hf, name = model.hf, "model.layers.0.mlp.down_proj"
    for relative, tokens in ((True, 40), (True, 4096), (False, 4096)):
        layer = next(iter(calibrate(model, samples, ("hessian", "absolute"), tokens_at_once=tokens, relative=relative)))
        found[relative, tokens] = layer.statistics[name]
    inputs, outputs = [], []
    hooks = [
        hf.get_submodule(name).register_forward_pre_hook(lambda m, args: inputs.append(args[0].flatten(0, -2))),
        hf.model.layers[0].register_forward_hook(lambda m, args, out: outputs.append(out.flatten(0, -2))),
    ]
    with torch.no_grad():
        for sample in samples:
            model.hidden_T_H(model.pack([sample]))
    for hook in hooks:
        hook.remove()
    x, h = (torch.cat([part[:15] for part in parts]) for parts in (inputs, outputs))
    share = 1.0 / h.square().mean(-1)
    share = share / share.mean()
    assert float(share[::15].max()) < 1e-3 < float(share.min() + 1) and len(x) == 180
    for tokens in (40, 4096):
        statistics = found[True, tokens]
        assert statistics.hessian_I_I is not None and near(statistics.hessian_I_I, (x * share[:, None]).t() @ x)
        assert near(statistics.mean_absolute_I, (share[:, None] * x).double().abs().mean(0))
    weight = hf.get_submodule(name).weight.detach()
    others = torch.cat([x[i::15] for i in range(1, 15)])

    def error(scales_I: Tensor) -> float:
        rounded = round_to_nearest(weight * scales_I, grid).dense() / scales_I
        return float((others @ (rounded - weight).t()).square().sum())

    scales = {
        key: search_column_scales([weight], s.hessian_I_I, s.mean_absolute_I, grid).scales_I for key, s in found.items()
    }
    assert error(scales[True, 40]) < 0.9 * error(torch.ones(96))
    assert error(scales[False, 4096]) > error(torch.ones(96))


def test_squares_alone_are_the_hessian_s_diagonal() -> None:
    layers = list(calibrate(opened("llama"), family(), ("squares",), wanted=lambda name: name.endswith("down_proj")))
    again = list(calibrate(opened("llama"), family(), ("hessian",)))
    for one, other in zip(layers, again, strict=True):
        assert [m.name.split(".")[-1] for m in one.matrices] == ["down_proj"]
        name = one.matrices[0].name
        assert one.statistics[name].hessian_I_I is None
        assert near(one.statistics[name].squares_I, other.statistics[name].squares_I)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_in_one_parameter_have_statistics_of_their_own_tokens(kind: str) -> None:
    model, samples = opened(kind), family()
    layer = next(iter(calibrate(model, samples, ("hessian",), tokens_at_once=64)))
    hf, given = tiny_model(kind).eval(), []
    experts = next(m for n, m in hf.named_modules() if n.endswith("layers.0.mlp.experts"))
    experts.register_forward_pre_hook(lambda m, args, kwargs: given.append((*args, *kwargs.values())), with_kwargs=True)
    with torch.no_grad():
        for sample in samples:
            hf(torch.tensor([sample.tokens]))
    hidden = torch.cat([g[0].reshape(-1, g[0].shape[-1]) for g in given])
    chosen = torch.cat([g[1].reshape(-1, g[1].shape[-1]) for g in given])
    assert len([m for m in layer.matrices if m.expert is not None]) == 2 * len(experts.gate_up_proj)
    for matrix in layer.matrices:
        if matrix.parameter != "gate_up_proj":
            continue
        x = hidden[(chosen == matrix.expert).any(-1)]
        hessian = layer.statistics[matrix.name].hessian_I_I
        assert hessian is not None and near(hessian, x.t() @ x) and layer.statistics[matrix.name].tokens == len(x)
        assert f"{matrix.name.replace('gate_up_proj', 'down_proj')}" in layer.statistics


def test_experts_without_tokens_are_named_and_forwards_are_as_before() -> None:
    model = opened("mixtral")
    model.base.model.layers[0].mlp.gate.weight.data.zero_()  # all tokens go to the same two of four experts
    before = {name: set(vars(m)) for name, m in model.hf.named_modules()}
    layers = list(calibrate(model, [Sample([5, 6, 7], [0.0] * 3)], ("squares",)))
    assert before == {name: set(vars(m)) for name, m in model.hf.named_modules()}
    reached = {m.expert for m in layers[0].matrices if m.name in layers[0].statistics and m.expert is not None}
    named = {int(name.rsplit(".", 1)[1]) for name in layers[0].unreached}
    assert len(reached) == len(named) == 2 and reached | named == {0, 1, 2, 3}


def test_layers_that_hand_on_more_than_hidden_states_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llama")
    second, kept = model.base.model.layers[1], {}
    model.base.model.layers[0].register_forward_hook(lambda m, args, out: kept.update(out=args[0]))
    own = type(second).forward
    second.forward = lambda x, *args, **kwargs: own(second, x, *args, **kwargs) + kept.pop("out", 0.0)
    with pytest.raises(ModelError, match="hand each other more than hidden states"):
        monkeypatch.setattr(calibration_pass.LayerByLayer, "advance", forgetting(kept))
        next(iter(calibrate(model, family(), ())))


def forgetting(kept: dict[str, Tensor]) -> Any:
    advance = calibration_pass.LayerByLayer.advance

    def without(self: Any, number: int, one: Any) -> Tensor:
        kept.clear()
        return advance(self, number, one)

    return without


def test_unknown_statistics_and_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no statistic of inputs is called 'hessians'"):
        InputStatistics(["hessians"])
    with pytest.raises(ValueError, match="'absolute' was not collected"):
        _ = InputStatistics(["hessian"]).mean_absolute_I
    with pytest.raises(ModelError, match="at least one row"):
        next(iter(calibrate(opened("llama"), [], ("hessian",))))
