"""Set single weights of a model to zero, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.methods.compress.calibration_pass import LayerByLayer, calibrate
from posttrain.methods.compress.input_statistics import InputStatistics
from posttrain.methods.compress.prune_settings import SparseWeightsConfig
from posttrain.methods.compress.sparse_masks import lowest, lowest_of_groups, threshold_of_all, wanda_scores
from posttrain.methods.compress.sparsegpt import sparsegpt
from posttrain.models.adapter_targets import ROUTERS
from posttrain.models.language_model import LanguageModel
from posttrain.models.weight_matrices import LayerMatrix

STATISTICS_OF: dict[str, tuple[str, ...]] = {"magnitude": (), "wanda": ("squares",), "sparsegpt": ("hessian",)}


def prune_weights(
    policy: LanguageModel,
    samples: Sequence[Sample],
    config: SparseWeightsConfig,
    on_layer: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Set weights of the model to zero, in place.

    Args:
        policy: The model.
        samples: Calibration rows.
        config: The settings.
        on_layer: Called with the number of finished layers.

    Returns:
        For each matrix: name, number of weights and of zeros, algorithm (magnitude for experts that no token reached).

    Raises:
        ModelError: The pattern does not fit a matrix, nothing is selected, or the head is tied.
    """
    layers = LayerByLayer(policy)
    wanted = partial(selected, config)
    matrices = [[m for m in own if wanted(m.name)] for own in layers.matrices]
    if config.head:
        matrices.append([_head(policy)])
    for pattern in config.leave:
        if not any(fnmatchcase(m.name, pattern) for own in layers.matrices for m in own):
            example = next((m.name for own in layers.matrices for m in own), "none")
            raise ModelError(f"weights.leave: no matrix has a name like {pattern!r}; one is called {example}")
    everything = [m for own in matrices for m in own]
    check_pattern(config, everything)
    if config.scope == "global":
        return _prune_globally(policy, samples, config, everything)
    records: list[dict[str, Any]] = []
    if config.algorithm == "magnitude":
        for number, own in enumerate(matrices):
            records += [_pruned(m, None, config) for m in own]
            on_layer(number + 1)
        return records
    for layer in calibrate(policy, samples, STATISTICS_OF[config.algorithm], wanted, head=config.head):
        records += [_pruned(m, layer.statistics.get(m.name), config) for m in layer.matrices]
        on_layer(layer.number + 1)
    return records


def selected(config: SparseWeightsConfig, name: str) -> bool:
    """Return True if a matrix of this name is pruned."""
    routes = any(part in ROUTERS for part in name.split(".")[-2:])  # a few weights that decide where everything goes
    return not routes and not any(fnmatchcase(name, pattern) for pattern in config.leave)


def sparsity_of(config: SparseWeightsConfig, name: str) -> float:
    """Return the share of zeros that a matrix is to get."""
    found = (share for pattern, share in config.sparsities.items() if fnmatchcase(name, pattern))
    return next(found, config.sparsity or 0.0)


def check_pattern(config: SparseWeightsConfig, matrices: Sequence[LayerMatrix]) -> None:
    """Check that there is something to prune, that every pattern of names fits one, and n:m every width.

    Raises:
        ModelError: It does not.
    """
    names = [m.name for m in matrices]
    if not names:
        raise ModelError("nothing to prune: the model has no linear layers beside those that weights.leave names")
    for pattern in config.sparsities:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(
                f"weights.sparsities: no matrix has a name like {pattern!r}; there are {names[0]} and so on"
            )
    of = (config.n_of_m() or (1, 1))[1]
    for matrix in matrices:
        if matrix.weight_O_I.shape[1] % of:
            raise ModelError(
                f"weights.pattern {config.pattern}: {matrix.name} has {matrix.weight_O_I.shape[1]} inputs, which groups "
                f"of {of} do not divide. Name it in weights.leave, or choose another pattern"
            )


def _head(policy: LanguageModel) -> LayerMatrix:
    base = policy.base
    head = base.get_output_embeddings()
    if head.weight is base.get_input_embeddings().weight:
        raise ModelError(
            "weights.head: the output head is tied to the embeddings, which it would prune too: leave head out"
        )
    return LayerMatrix(next(n for n, m in base.named_modules() if m is head), head)


def _pruned(matrix: LayerMatrix, statistics: InputStatistics | None, config: SparseWeightsConfig) -> dict[str, Any]:
    """Prune a matrix by what is known of its inputs; without anything by magnitude."""
    weight, pattern = matrix.weight_O_I, config.n_of_m()
    sparsity = sparsity_of(config, matrix.name)
    if config.algorithm == "sparsegpt" and statistics is not None:
        assert statistics.hessian_I_I is not None
        weight.copy_(sparsegpt(weight, statistics.hessian_I_I, sparsity, pattern)[0])
        return _record(matrix, "sparsegpt")
    by_input = config.algorithm == "wanda" and statistics is not None
    scores = weight.abs().float()
    if by_input:
        assert statistics is not None
        scores = wanda_scores(weight, statistics.squares_I)
    if pattern is not None:
        mask = lowest_of_groups(scores, *pattern)
    else:
        mask = lowest(scores, sparsity, "row" if by_input else "matrix")
    weight.masked_fill_(mask, 0.0)
    return _record(matrix, "wanda" if by_input else "magnitude")


def _record(matrix: LayerMatrix, algorithm: str) -> dict[str, Any]:
    weight = matrix.weight_O_I
    zeros = int((weight == 0).sum())
    return {"matrix": matrix.name, "weights": weight.numel(), "zeros": zeros, "algorithm": algorithm}


def _prune_globally(
    policy: LanguageModel, samples: Sequence[Sample], config: SparseWeightsConfig, matrices: Sequence[LayerMatrix]
) -> list[dict[str, Any]]:
    """Compare the scores of all matrices; those of Wanda are of the inputs before anything is pruned."""
    squares: dict[str, Tensor] = {}
    if config.algorithm == "wanda":
        for layer in calibrate(policy, samples, ("squares",), partial(selected, config), head=config.head):
            squares |= {name: s.squares_I / s.tokens for name, s in layer.statistics.items()}
        if unreached := [m.name for m in matrices if m.name not in squares]:
            raise ModelError(
                f"weights.scope global: no calibration token has reached {unreached[0]}, so its scores can't be "
                "compared. Add calibration rows, name it in weights.leave, or set scope to layer"
            )

    def scores(matrix: LayerMatrix) -> Tensor:
        weight = matrix.weight_O_I
        return wanda_scores(weight, squares[matrix.name]) if squares else weight.abs().float()

    assert config.sparsity is not None
    bound = threshold_of_all([partial(scores, m) for m in matrices], config.sparsity)
    for matrix in matrices:
        matrix.weight_O_I.masked_fill_(scores(matrix) <= bound, 0.0)
    return [_record(m, config.algorithm) for m in matrices]


def zeros_in(records: Sequence[dict[str, Any]]) -> float:
    """Return the share of zeros among the weights of all matrices."""
    return float(sum(r["zeros"] for r in records) / max(1, sum(r["weights"] for r in records)))
