"""Algorithms of merging by name (imports no torch by itself).

`algorithm:` in a recipe names a function here or ``module:function`` of your own. It takes a `MergeInputs`, which has one
tensor of each model, and returns the merged tensor; keyword-only parameters are its settings. A setting of type `Values`
may differ by layer and by name; the function gets its number for the tensor. Formulas and sources are in
`posttrain.methods.merge.averages` and `posttrain.methods.merge.task_vectors`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from posttrain.methods.merge.merge_settings import Values, within

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Thin = Callable[[Tensor, float, torch.Generator], Tensor]

Density = Annotated[Values, within(0, 1), Field(description="Share of the changes of each model that stay.")]
ChangeScale = Annotated[Values, within(), Field(description="Factor of the merged changes (lambda).")]
Normalize = Annotated[bool, Field(description="Divide by the sum of the weights, of those models that take part.")]
Epsilon = Annotated[
    Values,
    within(0, 0.5),
    Field(
        description="How far the probability to stay goes below and above the density; less where it would leave 0 to 1."
    ),
]
Gamma = Annotated[Values, within(0, 1), Field(description="Share of the largest changes that are dropped.")]


@dataclass(frozen=True)
class MergeInputs:
    """Hold one tensor of each model, in float32.

    Attributes:
        name: Name of the tensor.
        tensors: Its values in the models, in their order in the recipe.
        weights: The models' weights for this tensor.
        densities: Their own densities; None: the algorithm's.
        seed: Decides random masks, with the tensor's name and the model's number: in whatever order tensors are merged.
        read_base: Reads the base's values.
    """

    name: str
    tensors: Sequence[Tensor]
    weights: Sequence[float]
    densities: Sequence[float | None]
    seed: int
    read_base: Callable[[], Tensor]

    @cached_property
    def base(self) -> Tensor:
        """Return the base's values."""
        return self.read_base()

    def thinned(self, density: float, thin: Thin) -> list[Tensor]:
        """Return the differences from the base, thinned out.

        Args:
            density: Share that stays of models without their own.
            thin: Function of (difference, density, generator of random numbers).
        """
        import torch

        out = []
        for number, (tensor, own) in enumerate(zip(self.tensors, self.densities, strict=True)):
            seed = zlib.crc32(f"{self.seed} {number} {self.name}".encode())  # torch takes 32 bits on a CPU
            generator = torch.Generator().manual_seed(seed)
            out.append(thin(tensor - self.base, density if own is None else own, generator))
        return out


def linear_merge(merge: MergeInputs, *, normalize: Normalize = True) -> Tensor:
    """Compute the weighted mean, or with `normalize: false` the weighted sum."""
    from posttrain.methods.merge import averages

    return averages.weighted_mean(merge.tensors, merge.weights, normalize)


def slerp_merge(
    merge: MergeInputs,
    *,
    t: Annotated[
        Values, within(), Field(description="Place between the first model (0) and the second (1), along the arc.")
    ] = 0.5,
) -> Tensor:
    """Interpolate along the arc between two models."""
    from posttrain.methods.merge import averages

    assert isinstance(t, float)
    return averages.slerp(merge.tensors[0], merge.tensors[1], t)


def multi_slerp_merge(merge: MergeInputs) -> Tensor:
    """Average directions, and give the result the models' average length."""
    from posttrain.methods.merge import averages

    return averages.multi_slerp(merge.tensors, merge.weights)


def karcher_merge(
    merge: MergeInputs,
    *,
    steps: Annotated[int, Field(ge=1, description="Most iterations.")] = 100,
    tolerance: Annotated[float, Field(gt=0, description="Angle by which the last one moves the mean.")] = 1e-8,
) -> Tensor:
    """Compute the mean on the sphere.

    Args:
        merge: The tensor of each model.
        steps: Most iterations.
        tolerance: Angle by which the last one moves the mean.
    """
    from posttrain.methods.merge import averages

    return averages.karcher_mean(merge.tensors, merge.weights, steps, tolerance)


def model_stock_merge(
    merge: MergeInputs,
    *,
    by_rows: Annotated[bool, Field(description="Choose the place for each row of a matrix.")] = False,
) -> Tensor:
    """Move the average towards the base by the angle between the models."""
    from posttrain.methods.merge import averages

    return averages.model_stock(merge.base, merge.tensors, by_rows)


def _add(merge: MergeInputs, deltas: Sequence[Tensor], signs: bool, normalize: bool, scale: Values) -> Tensor:
    from posttrain.methods.merge.task_vectors import combine

    assert isinstance(scale, float)
    return merge.base + scale * combine(deltas, merge.weights, signs, normalize)


def task_arithmetic_merge(merge: MergeInputs, *, scale: ChangeScale = 1.0, normalize: Normalize = False) -> Tensor:
    """Add the weighted changes of the models to the base.

    Args:
        merge: The tensor of each model.
        scale: Factor of the merged changes.
        normalize: Divide by the sum of the weights that take part.
    """
    return _add(merge, [x - merge.base for x in merge.tensors], False, normalize, scale)


def ties_merge(
    merge: MergeInputs, *, density: Density = 0.5, scale: ChangeScale = 1.0, normalize: Normalize = True
) -> Tensor:
    """Keep the largest changes, elect a sign for each weight, and average those that have it.

    Args:
        merge: The tensor of each model.
        density: Share of the changes that stay.
        scale: Factor of the merged changes.
        normalize: Divide by the sum of the weights that take part.
    """
    from posttrain.methods.merge.task_vectors import keep_largest

    assert isinstance(density, float)
    return _add(merge, merge.thinned(density, lambda d, p, _: keep_largest(d, p)), True, normalize, scale)


def _dropped(merge: MergeInputs, density: Values) -> list[Tensor]:
    from posttrain.methods.merge.task_vectors import draw_mask, drop_random

    assert isinstance(density, float)
    return merge.thinned(density, lambda d, p, generator: drop_random(d, draw_mask(d, p, generator), p))


def dare_linear_merge(
    merge: MergeInputs, *, density: Density = 0.5, scale: ChangeScale = 1.0, normalize: Normalize = False
) -> Tensor:
    """Drop changes at random and scale up the others, then add them.

    Args:
        merge: The tensor of each model.
        density: Share of the changes that stay.
        scale: Factor of the merged changes.
        normalize: Divide by the sum of the weights that take part.
    """
    return _add(merge, _dropped(merge, density), False, normalize, scale)


def dare_ties_merge(
    merge: MergeInputs, *, density: Density = 0.5, scale: ChangeScale = 1.0, normalize: Normalize = False
) -> Tensor:
    """Drop changes at random and scale up the others, then add those that agree on a sign.

    Args:
        merge: The tensor of each model.
        density: Share of the changes that stay.
        scale: Factor of the merged changes.
        normalize: Divide by the sum of the weights that take part.
    """
    return _add(merge, _dropped(merge, density), True, normalize, scale)


def _pruned(merge: MergeInputs, density: Values, epsilon: Values) -> list[Tensor]:
    from posttrain.methods.merge.task_vectors import della_probabilities, draw_mask, drop_random

    assert isinstance(density, float) and isinstance(epsilon, float)

    def thin(delta: Tensor, share: float, generator: torch.Generator) -> Tensor:
        probabilities = della_probabilities(delta, share, min(epsilon, share, 1 - share))
        return drop_random(delta, draw_mask(delta, probabilities, generator), probabilities)

    return merge.thinned(density, thin)


def della_linear_merge(
    merge: MergeInputs,
    *,
    density: Density = 0.5,
    epsilon: Epsilon = 0.15,
    scale: ChangeScale = 1.0,
    normalize: Normalize = False,
) -> Tensor:
    """Drop changes at random, large ones less often, scale up the others, and add them.

    Args:
        merge: The tensor of each model.
        density: Share of the changes that stay.
        epsilon: How far the probability to stay goes below and above it.
        scale: Factor of the merged changes.
        normalize: Divide by the sum of the weights that take part.
    """
    return _add(merge, _pruned(merge, density, epsilon), False, normalize, scale)


def della_merge(
    merge: MergeInputs,
    *,
    density: Density = 0.5,
    epsilon: Epsilon = 0.15,
    scale: ChangeScale = 1.0,
    normalize: Normalize = True,
) -> Tensor:
    """Drop changes at random, large ones less often, scale up the others, and average those that agree on a sign.

    Args:
        merge: The tensor of each model.
        density: Share of the changes that stay.
        epsilon: How far the probability to stay goes below and above it.
        scale: Factor of the merged changes.
        normalize: Divide by the sum of the weights that take part.
    """
    return _add(merge, _pruned(merge, density, epsilon), True, normalize, scale)


def breadcrumbs_merge(
    merge: MergeInputs,
    *,
    density: Density = 0.9,
    gamma: Gamma = 0.01,
    scale: ChangeScale = 1.0,
    normalize: Normalize = False,
) -> Tensor:
    """Drop the largest and the smallest changes, and add the others.

    Args:
        merge: The tensor of each model.
        density: Share of the changes that stay.
        gamma: Share of the largest changes that are dropped.
        scale: Factor of the merged changes.
        normalize: Divide by the sum of the weights that take part.
    """
    return _add(merge, _without_outliers(merge, density, gamma), False, normalize, scale)


def breadcrumbs_ties_merge(
    merge: MergeInputs,
    *,
    density: Density = 0.9,
    gamma: Gamma = 0.01,
    scale: ChangeScale = 1.0,
    normalize: Normalize = False,
) -> Tensor:
    """Drop the largest and the smallest changes, and add those of the others that agree on a sign.

    Args:
        merge: The tensor of each model.
        density: Share of the changes that stay.
        gamma: Share of the largest changes that are dropped.
        scale: Factor of the merged changes.
        normalize: Divide by the sum of the weights that take part.
    """
    return _add(merge, _without_outliers(merge, density, gamma), True, normalize, scale)


def _without_outliers(merge: MergeInputs, density: Values, gamma: Values) -> list[Tensor]:
    from posttrain.methods.merge.task_vectors import drop_outliers

    assert isinstance(density, float) and isinstance(gamma, float)
    return merge.thinned(density, lambda d, p, _: drop_outliers(d, p, gamma))
