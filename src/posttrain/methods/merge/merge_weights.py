"""Merge stored models tensor by tensor, or stack layers of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.config.names import MERGE_ALGORITHMS
from posttrain.core.errors import ModelError
from posttrain.methods.merge.algorithms import MergeInputs
from posttrain.methods.merge.merge_settings import BASE_SOURCE, MergeConfig, SliceConfig, Values
from posttrain.methods.merge.per_tensor import check_patterns, tensor_value
from posttrain.methods.merge.stored_model import StoredModel
from posttrain.methods.merge.weight_writer import PlannedTensor

SHOWN_NAMES = 3

LowRankTerm = tuple[float, Tensor, Tensor]
"""(factor, B, A)."""
Sources = Mapping[tuple[str, str | None], StoredModel]


@dataclass(frozen=True)
class WeightMerge:
    """Hold what is written, and how each tensor of it is computed.

    Attributes:
        tensors: The tensors of the result, in the base's order.
        compute: Returns the values of one by its name.
        from_layers: Of a stack, (source, layer) of each layer; empty for a merge.
        tied: False if the result holds a separate output head.
        low_rank: Returns terms (factor, B, A) whose sum of factor * B A is the difference of a tensor from the base's, for
            merges of adapters that have such a sum. None: the merge has none.
    """

    tensors: list[PlannedTensor]
    compute: Callable[[str], Tensor]
    from_layers: list[tuple[StoredModel, int]]
    tied: bool
    low_rank: Callable[[str], list[LowRankTerm]] | None = None


class _Numbers:
    """Return the weights, densities and settings of a merge for one tensor."""

    def __init__(self, config: MergeConfig, base: StoredModel) -> None:
        self.models, self.layout = config.models, base.layout
        algorithm: Any = config.algorithm
        fields = type(algorithm).model_fields
        names = [name for name, field in fields.items() if field.annotation == Values]
        self.of_algorithm: dict[str, Values] = {name: getattr(algorithm, name) for name in names}
        self.defaults: dict[str, Values] = {n: 1.0 if fields[n].is_required() else fields[n].default for n in names}

    def check(self, names: Sequence[str]) -> None:
        """Raise ModelError for a pattern that fits no tensor."""
        given = {f"models.{i}.weight": m.weight for i, m in enumerate(self.models)}
        given |= {f"models.{i}.density": m.density for i, m in enumerate(self.models) if m.density is not None}
        for setting, values in {**given, **{f"algorithm.{n}": v for n, v in self.of_algorithm.items()}}.items():
            check_patterns(values, names, setting)

    def _at(self, values: Values, name: str, default: Values) -> float:
        return tensor_value(values, name, self.layout.depth(name), default)

    def weights(self, name: str) -> list[float]:
        return [self._at(m.weight, name, 1.0) for m in self.models]

    def densities(self, name: str) -> list[float | None]:
        return [None if m.density is None else self._at(m.density, name, 1.0) for m in self.models]

    def settings(self, name: str) -> dict[str, float]:
        return {key: self._at(values, name, self.defaults[key]) for key, values in self.of_algorithm.items()}


def plan_merge(config: MergeConfig, base: StoredModel, sources: Sources, seed: int) -> WeightMerge:
    """Check that models fit together, and return how they are merged.

    Args:
        config: Settings of the stage.
        base: The model that the stage starts from.
        sources: The other models by (source, revision).
        seed: Decides random masks.

    Raises:
        ModelError: Types, names or shapes of tensors differ, or a pattern of a setting fits no tensor.
    """
    models = [base if m.source == BASE_SOURCE else sources[m.source, m.revision] for m in config.models]
    for model in models:
        check_alike(model, base)
    tied = all(model.layout.tied for model in [base, *models])
    names = result_names(base, models, tied)
    dtypes = {name: result_dtype(config, base, name) for name in names}
    algorithm: Any = config.algorithm
    numbers = _Numbers(config, base)
    numbers.check(names)
    function = algorithm.load(MERGE_ALGORITHMS)

    def compute(name: str) -> Tensor:
        if base.has(name) and base.entry(name).dtype is None:  # integers, which nothing trains
            return base.read(name)
        tensors = [model.read(name) for model in models]
        weights, densities = numbers.weights(name), numbers.densities(name)
        inputs = MergeInputs(name, tensors, weights, densities, seed, lambda: base.read(name))
        try:
            merged: Tensor = function(inputs, **numbers.settings(name))
        except ValueError as error:
            raise ModelError(f"{name} can't be merged: {error}") from error
        return merged

    planned = [PlannedTensor(name, base.entry(name).shape, dtypes[name]) for name in names]
    low_rank = _low_rank(algorithm, numbers, base, models)
    return WeightMerge(planned, compute, [], tied, low_rank)


def _low_rank(
    algorithm: Any, numbers: _Numbers, base: StoredModel, models: Sequence[StoredModel]
) -> Callable[[str], list[LowRankTerm]] | None:
    """Return what `WeightMerge.low_rank` is: of sums and means of plain adapters on the base."""
    normalized = getattr(algorithm, "normalize", False)
    is_sum = algorithm.name == "task_arithmetic" or (algorithm.name == "linear" and normalized)
    # Rows that are arranged for another tokenizer differ from the base's without an adapter.
    if not is_sum or base.deltas or any(m.tensors != base.tensors or m.rows is not None for m in models):
        return None

    def terms(name: str) -> list[LowRankTerm]:
        weights, scale = numbers.weights(name), numbers.settings(name).get("scale", 1.0)
        total = sum(weights) if normalized else 1.0
        if abs(total) < 1e-8:
            raise ModelError(f"{name} can't be merged: weights {weights} sum to zero, so they can't be normalised")
        stored = [(w, model.deltas.get(name)) for w, model in zip(weights, models, strict=True)]
        return [(w * scale / total, *delta) for w, delta in stored if delta is not None]

    return terms


def plan_stack(config: MergeConfig, base: StoredModel, sources: Sources) -> WeightMerge:
    """Check that layers of several models fit together, and return how they are stacked.

    Args:
        config: Settings of the stage.
        base: The model that the stage starts from.
        sources: The other models by (source, revision).

    Raises:
        ModelError: Types, names or shapes of tensors differ, or there is no such layer.
    """
    layers: list[tuple[StoredModel, int]] = []
    slice_of: list[tuple[SliceConfig, float]] = []
    for number, piece in enumerate(config.slices):
        model = base if piece.source == BASE_SOURCE else sources[piece.source, piece.revision]
        check_type(model, base)
        first, end = piece.layers
        if end > model.layout.layers:
            raise ModelError(
                f"slices.{number}: layers {first} to {end} of {piece.source}, which has {model.layout.layers} layers"
            )
        layers += [(model, layer) for layer in range(first, end)]
        slice_of += [(piece, i / max(end - first - 1, 1)) for i in range(end - first)]
    layout = base.layout
    outside = [name for name in _ordered(base) if layout.layer_of(name) is None]
    before = [name for name in outside if layout.depth(name) == 0.0]
    where: dict[str, tuple[StoredModel, str, SliceConfig | None, float]] = {n: (base, n, None, 0.0) for n in before}
    for place, ((model, layer), (piece, depth)) in enumerate(zip(layers, slice_of, strict=True)):
        for name in [name for name in _ordered(model) if model.layout.layer_of(name) == layer]:
            where[layout.in_layer(_renamed(name, model, base), place)] = (model, name, piece, depth)
    where |= {name: (base, name, None, 0.0) for name in outside if name not in before}
    for number, piece in enumerate(config.slices):
        check_patterns(piece.scale, [n for n, (_, _, p, _) in where.items() if p is piece], f"slices.{number}.scale")

    def compute(name: str) -> Tensor:
        model, own, piece, depth = where[name]
        value = model.read(own)
        factor = 1.0 if piece is None else tensor_value(piece.scale, name, depth, 1.0)
        return value if factor == 1.0 else value * factor

    planned = []
    for name, (model, own, _, _) in where.items():
        planned.append(PlannedTensor(name, model.entry(own).shape, result_dtype(config, model, own)))
    return WeightMerge(planned, compute, layers, bool(layout.tied))


def _renamed(name: str, model: StoredModel, base: StoredModel) -> str:
    return base.layout.root + name.removeprefix(model.layout.root)


def _ordered(model: StoredModel) -> list[str]:
    """Return the names of stored tensors in the order of the model; those that it does not know come last."""
    known = [name for name in model.layout.shapes if name in model.tensors]
    return known + sorted(set(model.tensors) - set(known))


def result_names(base: StoredModel, models: Sequence[StoredModel], tied: bool) -> list[str]:
    """Return the names of a merge's tensors, in the base's order.

    Args:
        base: The base.
        models: The models that are merged.
        tied: The result has no output head of its own.
    """
    names = _ordered(base)
    if tied:
        return names
    heads = {name for model in [base, *models] for name in model.layout.tied}
    return names + sorted(heads - set(names))  # the result has a head of its own where one of the models has one


def result_dtype(config: MergeConfig, model: StoredModel, name: str) -> torch.dtype:
    """Return the dtype in which a tensor is written.

    Args:
        config: Settings of the stage.
        model: The model whose dtype is kept, if none is set.
        name: Name of the tensor.
    """
    stored = model.entry(name).dtype
    if stored is None:
        return model.read(name).dtype
    if config.dtype == "auto":
        return stored
    named: torch.dtype = getattr(torch, config.dtype)
    return named


def check_type(model: StoredModel, base: StoredModel) -> None:
    """Raise ModelError if a model is of another type than the base."""
    kinds = model.config.model_type, base.config.model_type
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"{model.source} is of type {kinds[0]}, and the base {base.source} of type {kinds[1]}: models that are merged "
            "are of one type"
        )


def check_alike(model: StoredModel, base: StoredModel) -> None:
    """Check that a model has the base's tensors.

    Raises:
        ModelError: Its type differs, a tensor is missing, or has another shape.
    """
    check_type(model, base)
    if model.layout.layers != base.layout.layers:
        raise ModelError(
            f"{model.source} has {model.layout.layers} layers, and the base {base.source} has {base.layout.layers}: "
            "models that are merged have the same. Layers of different models can be stacked by slices"
        )
    missing = [name for name in base.tensors if not model.has(name)]
    more = [name for name in model.tensors if not base.has(name)]
    if missing or more:
        words = [f"lacks {', '.join(missing[:SHOWN_NAMES])}"] if missing else []
        words += [f"has {', '.join(more[:SHOWN_NAMES])} too"] if more else []
        raise ModelError(
            f"{model.source} does not have the tensors of the base {base.source}: it {' and '.join(words)}"
        )
    for name in base.tensors:
        theirs, ours = model.entry(name).shape, base.entry(name).shape
        if theirs != ours:
            raise ModelError(
                f"{name} is {list(theirs)} in {model.source} and {list(ours)} in the base {base.source}: models that are "
                "merged have the same shapes"
            )
