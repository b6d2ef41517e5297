"""Remove units, heads, channels and layers of a decoder: an ordinary, smaller model of the same type is left.

Sources: Minitron, arXiv 2407.14679; ShortGPT, arXiv 2403.03853. What is removed is chosen by `importance`; the result
is compared with the model in which the same parts are set to zero before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.methods.compress.calibration_pass import CHECKED_TOKENS, LayerByLayer
from posttrain.methods.compress.importance import (
    Importance,
    channel_norms,
    is_standard,
    measure_importance,
    measure_norm_scales,
)
from posttrain.methods.compress.prune_settings import StructureConfig
from posttrain.methods.compress.structure_sizes import DecoderSizes, chosen_sizes, decoder_sizes, resized
from posttrain.models.language_model import LanguageModel

TOLERANCE_OF_ZEROS = 2e-3
"""Largest difference of the result from the model with zeros, relative to the largest hidden state."""


@dataclass(frozen=True)
class KeptParts:
    """Hold the numbers of what stays, ascending; `mlp`, `heads` and `kv_heads` have an entry for each layer that stays."""

    layers: list[int]
    mlp: list[Tensor]
    heads: list[Tensor]
    kv_heads: list[Tensor]
    hidden: Tensor


def prune_structure(policy: LanguageModel, samples: Sequence[Sample], config: StructureConfig) -> dict[str, Any]:
    """Replace the model by a smaller one, in place (`policy.hf`).

    Args:
        policy: The model.
        samples: Calibration rows.
        config: The settings.

    Returns:
        The sizes before and after, and the numbers of the layers that were removed.

    Raises:
        ModelError: The model's type is not understood, or the sizes do not fit it.
    """
    base = policy.base
    before, after = decoder_sizes(base.config), chosen_sizes(base, config)
    narrower = any(getattr(before, n) != getattr(after, n) for n in ("mlp", "heads", "kv_heads", "hidden"))
    if narrower:
        check_narrowing(policy)
    kept = choose_parts(measure_importance(policy, samples, config.importance), before, after)
    scales = measure_norm_scales(policy, samples, kept.hidden) if after.hidden != before.hidden else {}
    pruned = build(policy, kept, after)
    check_against_zeros(policy, pruned, kept, samples[0])
    set_norm_scales(pruned.base, kept, scales, before, after, policy)
    policy.hf = pruned.hf
    removed = sorted(set(range(before.layers)) - set(kept.layers))
    return {"before": asdict(before), "after": asdict(after), "removed_layers": removed}


def check_narrowing(policy: LanguageModel) -> None:
    """Check that every parameter of a model is one that can be made narrower.

    Raises:
        ModelError: It is not.
    """
    passes, kind = LayerByLayer(policy), policy.base.config.model_type
    if not all(map(is_standard, passes.layers)):
        raise ModelError(
            f"{kind}: units and heads can be removed from layers with q_proj, k_proj, v_proj, o_proj and gate_proj, "
            "up_proj, down_proj alone (no mixture of experts). Whole layers can be removed: structure: {ratio: 0.7, "
            "remove: [layers]}"
        )
    known = _Slices(policy, None)
    for name, _ in policy.base.named_parameters():
        known.axes(name)


def choose_parts(importance: Importance, before: DecoderSizes, after: DecoderSizes) -> KeptParts:
    """Return the most important parts of the sizes `after`.

    Args:
        importance: Of all parts.
        before: Sizes of the model.
        after: Sizes of the result.
    """
    layers = _best(torch.tensor(importance.layers), after.layers).tolist()
    mlp, heads, groups = [], [], []
    queries, left = before.heads // before.kv_heads, after.heads // after.kv_heads
    for number in layers if importance.mlp else ():
        mlp.append(_best(importance.mlp[number], after.mlp))
        by_group = importance.heads[number].view(before.kv_heads, queries)
        best = by_group.topk(left, dim=1)  # what a group would be worth with the heads that it keeps
        own = _best(best.values.sum(1), after.kv_heads)
        heads.append(torch.cat([g * queries + best.indices[g].sort().values for g in own]))
        groups.append(own)
    hidden = importance.hidden_H
    all_channels = torch.arange(before.hidden, device=hidden.device)
    return KeptParts(
        layers, mlp, heads, groups, _best(hidden, after.hidden) if after.hidden != before.hidden else all_channels
    )


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the numbers of the highest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


class _Slices:
    """Say which numbers of each axis of a parameter stay."""

    def __init__(self, policy: LanguageModel, kept: KeptParts | None) -> None:
        base = policy.base
        names = {id(m): name for name, m in base.named_modules()}
        self.root = LayerByLayer(policy).names[0].rsplit(".", 1)[0]
        self.kept, self.kind = kept, base.config.model_type
        self.size = int(
            getattr(base.config, "head_dim", None) or base.config.hidden_size // base.config.num_attention_heads
        )
        self.norms = set(channel_norms(base))
        self.tables = {names[id(base.get_input_embeddings())], names[id(base.get_output_embeddings())]}

    def axes(self, name: str) -> tuple[str | None, ...]:
        """Return what each axis of a parameter counts; None: what stays as it is.

        Raises:
            ModelError: The parameter is unknown.
        """
        module, _, parameter = name.rpartition(".")
        if module in self.norms:
            return ("hidden",)
        if module in self.tables:
            return (None, "hidden") if parameter == "weight" else (None,)
        out = {"q_proj": "heads", "k_proj": "kv_heads", "v_proj": "kv_heads", "gate_proj": "mlp", "up_proj": "mlp"}
        into = {"o_proj": "heads", "down_proj": "mlp"}
        linear = module.rsplit(".", 1)[-1]
        if linear in out or linear in into:
            rows, columns = out.get(linear, "hidden"), into.get(linear, "hidden")
            return (rows, columns) if parameter == "weight" else (rows,)
        if linear in ("q_norm", "k_norm"):
            return (None,)
        raise ModelError(f"{self.kind}: its parameter {name} is unknown, so units, heads or channels can't be removed")

    def source(self, name: str) -> tuple[str, int]:
        """Return the name that a parameter of the result has in the model, and its place among the kept layers."""
        assert self.kept is not None
        found = re.match(rf"{re.escape(self.root)}\.(\d+)\.", name)
        if found is None:
            return name, -1
        place = int(found[1])
        return f"{self.root}.{self.kept.layers[place]}.{name[found.end() :]}", place

    def cut(self, name: str, value: Tensor, place: int) -> Tensor:
        """Return what stays of a parameter."""
        for axis, what in enumerate(self.axes(name)):
            if what is not None:
                value = value.index_select(axis, self.numbers(what, place).to(value.device))
        return value

    def numbers(self, what: str, place: int) -> Tensor:
        """Return the numbers that stay of an axis; those of heads are of their single values."""
        assert self.kept is not None
        if what == "hidden":
            return self.kept.hidden
        numbers: Tensor = getattr(self.kept, what)[place]
        if what == "mlp":
            return numbers
        return (numbers[:, None] * self.size + torch.arange(self.size, device=numbers.device)).flatten()


def build(policy: LanguageModel, kept: KeptParts, sizes: DecoderSizes) -> LanguageModel:
    """Return a model of these sizes with the weights of the parts that stay.

    Args:
        policy: The model; it is not changed.
        kept: What stays.
        sizes: Sizes of the result.
    """
    base, slices = policy.base, _Slices(policy, kept)
    own = dict(base.state_dict())
    dtype = next(base.parameters()).dtype
    with torch.random.fork_rng(devices=[]):
        new = type(base)._from_config(resized(base.config, sizes, kept.layers), dtype=dtype).to(policy.device)
    weights = {}
    for name, value in new.state_dict().items():
        source, place = slices.source(name)
        old = own.get(source)
        if old is not None and old.shape != value.shape:
            old = slices.cut(source, old, place)
        if old is None or old.shape != value.shape:
            raise ModelError(
                f"{base.config.model_type}: a smaller model has {name} of {tuple(value.shape)}, for which the model has "
                f"{'nothing' if old is None else tuple(old.shape)}: its structure can't be removed"
            )
        weights[name] = old
    new.load_state_dict(weights)
    new.generation_config = base.generation_config
    new.eval()
    return LanguageModel(new)


def check_against_zeros(policy: LanguageModel, pruned: LanguageModel, kept: KeptParts, sample: Sample) -> None:
    """Compare the result with the model in which what is removed is zero. The model is used up.

    Args:
        policy: The model.
        pruned: The result, norms not rescaled yet.
        kept: What stayed.
        sample: A calibration row.

    Raises:
        ModelError: They differ: the type does something with its sizes that is not understood.
    """
    short = Sample(sample.tokens[:CHECKED_TOKENS], sample.weights[:CHECKED_TOKENS])
    with torch.no_grad():
        set_to_zero(policy, kept)
        passes = LayerByLayer(policy)
        passes.check(short)
        one = passes.begin([short], len(short))[0]
        for number in kept.layers:
            one.hidden = passes.advance(number, one)
        expected = passes.finish(one)[:, kept.hidden]
        norms = channel_norms(pruned.base)
        factor = (policy.base.get_input_embeddings().weight.shape[1] / len(kept.hidden)) ** 0.5
        _multiply_gains(norms, dict.fromkeys(norms, factor))
        found = LayerByLayer(pruned).decode(pruned.pack([short]))
        _multiply_gains(norms, dict.fromkeys(norms, 1 / factor))
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    allowed = TOLERANCE_OF_ZEROS if found.dtype == torch.float32 else 0.1
    if not error <= allowed:
        raise ModelError(
            f"{policy.base.config.model_type}: the smaller model computes other values than the model in which the "
            f"removed parts are zero (difference {error:.2g} of the largest value), so the type does something with its "
            "sizes that is not understood here. Try other parts: structure.remove: [layers], or [mlp]"
        )


def set_to_zero(policy: LanguageModel, kept: KeptParts) -> None:
    """Set what does not stay to zero, so that it has no effect; layers that do not stay are left as they are."""
    base, slices = policy.base, _Slices(policy, kept)
    channels = torch.ones(base.get_input_embeddings().weight.shape[1], dtype=torch.bool, device=policy.device)
    channels[kept.hidden] = False
    embedding = base.get_input_embeddings().weight.data
    embedding[:, channels] = 0
    layers = LayerByLayer(policy).layers
    for place, number in enumerate(kept.layers if kept.mlp else ()):
        layer: Any = layers[number]
        for linear, what in ((layer.self_attn.o_proj, "heads"), (layer.mlp.down_proj, "mlp")):
            gone = torch.ones(linear.in_features, dtype=torch.bool, device=policy.device)
            gone[slices.numbers(what, place)] = False
            linear.weight.data[:, gone] = 0
            linear.weight.data[channels] = 0
            if linear.bias is not None:
                linear.bias.data[channels] = 0


def set_norm_scales(
    base: Any,
    kept: KeptParts,
    scales: dict[str, float],
    before: DecoderSizes,
    after: DecoderSizes,
    policy: LanguageModel,
) -> None:
    """Let norms over fewer channels give values of the size that they had.

    Args:
        base: The result.
        kept: What stays of the model.
        scales: By name of the norm in the model: see `measure_norm_scales`.
        before: Sizes of the model.
        after: Sizes of the result.
        policy: The model.
    """
    if before.hidden == after.hidden:
        return
    slices = _Slices(policy, kept)
    norms = channel_norms(base)
    _multiply_gains(norms, {name: scales[slices.source(f"{name}.weight")[0].rpartition(".")[0]] for name in norms})


def _multiply_gains(norms: dict[str, Any], factors: dict[str, float]) -> None:
    """Multiply what norms give; of some types (Gemma) the factor of a channel is 1 + weight."""
    for name, norm in norms.items():
        if factors[name] == 1.0:
            continue
        weight = norm.weight.data
        shift = _shift_of(name, norm)
        weight.copy_((weight.float() + shift) * factors[name] - shift)


def _shift_of(name: str, norm: nn.Module) -> float:
    """Return s where a norm multiplies by s + weight."""
    weight: Any = norm.weight
    x = torch.ones(1, 1, len(weight), device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        gain = norm(x).flatten().float()
    for shift in (0.0, 1.0):
        if bool((gain - shift - weight.float()).abs().max() <= 0.02 * (1 + gain.abs().max())):
            return shift
    raise ModelError(f"{type(norm).__name__} {name} is no RMS norm, so channels can't be removed")
