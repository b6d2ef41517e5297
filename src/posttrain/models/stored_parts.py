"""Know under which names a model's matrices are stored: files split what transformers computes with in one parameter.

A layer's experts are one parameter in memory, and in the files of most types three matrices for each expert:
"model.layers.0.mlp.experts.gate_up_proj" is stored as "model.layers.0.mlp.experts.3.gate_proj.weight" and so on. Which
row is stored where follows from transformers' own rules of saving, which numbers in place of the weights go through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.quantized_weight import QuantizedWeight
from posttrain.models.weight_matrices import LayerMatrix, matrices_of


@dataclass(frozen=True)
class StoredPart:
    """Say which rows of which matrix a tensor in a model's files holds.

    Attributes:
        name: Name of the tensor without its last part, ".weight". If the tensor holds all experts, that and the number
            of an expert: "model.layers.0.mlp.experts.down_proj.3".
        matrix: The matrix.
        rows: (R,) the rows of the matrix, in the order of the tensor.
        whole: Name of a tensor that holds all experts, of which this is one slice. None: the tensor holds this alone.
    """

    name: str
    matrix: LayerMatrix
    rows: Tensor
    whole: str | None = None

    def of(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Return the rows of the matrix's quantised weight that the part holds."""
        zero = weight.zero_O_G
        return replace(
            weight,
            values_O_I=weight.values_O_I[self.rows],
            scale_O_G=weight.scale_O_G[self.rows],
            zero_O_G=None if zero is None else zero[self.rows],
        )


def stored_parts(hf: Any) -> list[StoredPart]:
    """Return where the matrices of a model are stored: of linear layers, embeddings, routers and experts.

    A matrix that its type stores in one tensor with others is left out.

    Args:
        hf: A transformers model, on any device (`meta` too).
    """
    from transformers.core_model_loading import revert_weight_conversion

    in_parameter: dict[str, list[LayerMatrix]] = {}
    own_matrices = [m for m in matrices_of(hf) if m.expert is not None or not m.transposed]  # without Conv1D
    for matrix in (*own_matrices, *_other_tables(hf)):
        in_parameter.setdefault(matrix.parameter_name, []).append(matrix)
    probes, matrices, starts = {}, [], [0]
    for name, own in in_parameter.items():
        rows = own[0].weight_O_I.shape[0]
        numbers = starts[-1] + torch.arange(len(own) * rows)
        shape = (len(own), 1, rows) if own[0].transposed else (len(own), rows, 1)
        probes[name] = numbers.view(shape if own[0].expert is not None else shape[1:])
        matrices += own
        starts += [starts[-1] + (i + 1) * rows for i in range(len(own))]
    first = torch.tensor(starts[:-1])
    places = {matrix.name: place for place, matrix in enumerate(matrices)}
    found = []
    for key, numbers in revert_weight_conversion(hf, probes).items():
        name = key.removesuffix(".weight")
        all_experts = numbers.ndim == 3
        for expert, rows_R in enumerate(numbers.flatten(1) if all_experts else numbers.flatten()[None]):
            owners = torch.bucketize(rows_R, first, right=True) - 1
            if len(owners) and bool((owners == owners[0]).all()):
                matrix, held_R = matrices[int(owners[0])], rows_R - first[owners[0]]
                names = (f"{name}.{expert}", key) if all_experts else (name, None)
                found.append(StoredPart(names[0], matrix, held_R, names[1]))
    return sorted(found, key=lambda part: places[part.matrix.name])


def _other_tables(hf: Any) -> Iterable[LayerMatrix]:
    """Yield the weights (rows, columns) of modules that are no linear layers: embeddings, and routers of most types."""
    for name, module in hf.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if weight is not None and weight.ndim == 2 and not linear:
            yield LayerMatrix(name, module)


def parts_of_wholes(parts: Iterable[StoredPart]) -> dict[str, list[StoredPart]]:
    """Return, by name, the tensors that hold all experts, with the part of each expert in their order."""
    found: dict[str, list[StoredPart]] = {}
    for part in parts:
        if part.whole is not None:
            found.setdefault(part.whole, []).append(part)
    return {key: sorted(own, key=lambda part: int(part.name.rpartition(".")[2])) for key, own in found.items()}


def joined_weights(
    parts: Iterable[StoredPart], weights: Mapping[str, QuantizedWeight]
) -> tuple[list[tuple[LayerMatrix, QuantizedWeight]], list[str]]:
    """Return the matrices whose parts are all quantised, with their weights, and the names of what fits no matrix.

    Args:
        parts: Where the model's matrices are stored.
        weights: The quantised weights by their names in the files.
    """
    by_matrix: dict[str, list[StoredPart]] = {}
    for part in parts:
        by_matrix.setdefault(part.matrix.name, []).append(part)
    found, left = [], set(weights)
    for own in by_matrix.values():
        held = [weights[part.name] for part in own if part.name in weights]
        matrix, rows = own[0].matrix, torch.cat([part.rows for part in own])
        kinds = {(w.bits, w.group, w.zero_O_G is None, w.order_I is None, w.activation_bits) for w in held}
        if len(held) != len(own) or len(kinds) != 1 or (len(own) > 1 and held[0].order_I is not None):
            continue
        order = rows.argsort()
        zeros = [w.zero_O_G for w in held if w.zero_O_G is not None]
        if tuple(matrix.weight_O_I.shape) != (len(rows), held[0].shape[1]):
            continue
        weight = replace(
            held[0],
            values_O_I=torch.cat([w.values_O_I for w in held])[order],
            scale_O_G=torch.cat([w.scale_O_G for w in held])[order],
            zero_O_G=torch.cat(zeros)[order] if zeros else None,
        )
        found.append((matrix, weight))
        left -= {part.name for part in own}
    return found, sorted(left)
