"""Sizes of a decoder: what its configuration calls them, and which sizes have a number of parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from posttrain.core.errors import ModelError
from posttrain.methods.compress.prune_settings import StructureConfig

CLOSE_TO_RATIO = 0.03
"""How far the number of parameters may be from the ratio that was asked for, as a share of all."""
STEPS = 400
"""Factors between 0 and 1 that are tried."""


@dataclass(frozen=True)
class DecoderSizes:
    """Hold the sizes that pruning changes; those of MLPs and heads are the same in every layer."""

    layers: int
    mlp: int
    heads: int
    kv_heads: int
    hidden: int


NAMES_IN_CONFIG = {
    "layers": "num_hidden_layers",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "hidden_size",
}


def decoder_sizes(config: Any) -> DecoderSizes:
    """Return the sizes that a transformers configuration names.

    Raises:
        ModelError: The type names them in another way, or the decoder is a part of a larger model.
    """
    if config.get_text_config() is not config:
        raise ModelError(
            f"{config.model_type}: structure can't be removed from a decoder that is a part of a larger model"
        )
    found = {}
    for ours, name in NAMES_IN_CONFIG.items():
        value = getattr(config, name, None)
        if ours == "kv_heads" and value is None:
            value = getattr(config, NAMES_IN_CONFIG["heads"], None)
        if ours == "mlp" and value is None:
            value = 0  # of another build; its layers can be removed all the same
        if not isinstance(value, int):
            raise ModelError(
                f"{config.model_type}: its configuration has no single {name}, so structure can't be removed"
            )
        found[ours] = value
    return DecoderSizes(**found)


def resized(config: Any, sizes: DecoderSizes, kept_layers: Sequence[int]) -> Any:
    """Return a copy of a configuration with other sizes; lists with an entry for each layer keep those of `kept_layers`.

    Args:
        config: The configuration.
        sizes: Sizes of the result.
        kept_layers: Numbers of the layers that stay.
    """
    before, new = decoder_sizes(config), copy.deepcopy(config)
    head_dim = getattr(config, "head_dim", None) or before.hidden // before.heads
    if sizes.layers != before.layers:
        for name, value in vars(config).items():
            if isinstance(value, list | tuple) and len(value) == before.layers:
                setattr(new, name, [value[i] for i in kept_layers])
    for ours, name in NAMES_IN_CONFIG.items():
        if getattr(sizes, ours) != getattr(before, ours):
            setattr(new, name, getattr(sizes, ours))
    if sizes.hidden // sizes.heads != head_dim or sizes.hidden % sizes.heads or getattr(config, "head_dim", None):
        new.head_dim = head_dim  # some types derive it from the other sizes unless it is set
    if sizes.hidden != before.hidden and getattr(config, "rms_norm_eps", None):
        new.rms_norm_eps = config.rms_norm_eps * before.hidden / sizes.hidden  # added to a mean over fewer channels
    return new


def count_parameters_of(model_class: Any, config: Any) -> int:
    """Return the number of parameters of a model of this configuration, without making its weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())


def chosen_sizes(base: Any, structure: StructureConfig) -> DecoderSizes:
    """Return the sizes of the result, as they are given or by the ratio.

    Args:
        base: The transformers model.
        structure: The settings.

    Raises:
        ModelError: A size is not smaller than it is, does not fit another, or the ratio can't be reached.
    """
    before = decoder_sizes(base.config)
    if not before.mlp and (structure.mlp or (structure.ratio and "mlp" in structure.remove)):
        raise ModelError(
            f"{base.config.model_type}: its configuration has no intermediate_size, so units of its MLPs can't be "
            "removed. Whole layers can be: structure: {ratio: 0.7, remove: [layers]}"
        )
    if structure.ratio is None:
        return _given_sizes(before, structure)
    all_parameters = sum(p.numel() for p in base.parameters())
    target, tried = structure.ratio * all_parameters, dict[DecoderSizes, int]()
    low, high = 0, STEPS  # the count rises with the factor
    while high - low > 1:
        middle = (low + high) // 2
        sizes = _scaled(before, structure, middle / STEPS)
        if sizes not in tried:
            tried[sizes] = count_parameters_of(type(base), resized(base.config, sizes, range(sizes.layers)))
        low, high = (middle, high) if tried[sizes] <= target else (low, middle)
    best = min(tried, key=lambda sizes: abs(tried[sizes] - target))
    if abs(tried[best] - target) > CLOSE_TO_RATIO * all_parameters or best == before:
        raise ModelError(
            f"structure.ratio {structure.ratio:g}: with remove: [{', '.join(structure.remove)}] the nearest model has "
            f"{tried[best] / all_parameters:.3f} of the {all_parameters:,} parameters. Name more in remove, lower "
            f"round_to ({structure.round_to}), or choose another ratio"
        )
    return best


def _scaled(before: DecoderSizes, structure: StructureConfig, factor: float) -> DecoderSizes:
    def multiple(size: int) -> int:
        unit = structure.round_to
        return min(size, max(unit, round(size * factor / unit) * unit))

    sizes = before
    if "mlp" in structure.remove:
        sizes = replace(sizes, mlp=multiple(before.mlp))
    if "hidden" in structure.remove:
        sizes = replace(sizes, hidden=multiple(before.hidden))
    if "heads" in structure.remove:
        groups = max(1, round(before.kv_heads * factor))
        sizes = replace(sizes, kv_heads=groups, heads=groups * before.heads // before.kv_heads)
    if "layers" in structure.remove:
        sizes = replace(sizes, layers=max(1, round(before.layers * factor)))
    return sizes


def _given_sizes(before: DecoderSizes, structure: StructureConfig) -> DecoderSizes:
    given = {n: v for n in NAMES_IN_CONFIG if (v := getattr(structure, n)) is not None}
    for name, value in given.items():
        if value > getattr(before, name):
            raise ModelError(
                f"structure.{name} is {value}, and the model has {getattr(before, name)}: only less can stay"
            )
    queries = before.heads // before.kv_heads
    if "heads" in given and "kv_heads" not in given:
        if given["heads"] % queries:
            raise ModelError(
                f"structure.heads is {given['heads']}: {queries} heads share keys and values, so whole groups are a "
                "multiple of that. Set kv_heads too, to remove heads within groups"
            )
        given["kv_heads"] = given["heads"] // queries
    if "kv_heads" in given and "heads" not in given:
        given["heads"] = given["kv_heads"] * queries
    sizes = replace(before, **given)
    if sizes.heads % sizes.kv_heads or sizes.heads // sizes.kv_heads > queries:
        raise ModelError(
            f"structure: {sizes.heads} heads and {sizes.kv_heads} kv_heads do not fit: each head of keys has {queries} "
            "heads now, and all are to have the same number, at most that"
        )
    if sizes == before:
        raise ModelError("structure: the sizes are those of the model already")
    return sizes
