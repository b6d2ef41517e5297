"""Open a folder of compressed-tensors as a model whose weights are dense, and know their integers too."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.models.backends import DeviceBackend, PackedAlone, backend_for
from posttrain.models.compressed_tensors import open_quantized, stored_settings
from posttrain.models.quantization import forget_quantization
from posttrain.models.quantized_weight import ATTRIBUTE, QuantizedWeight, attach_to_matrix, forget_integers
from posttrain.models.stored_parts import StoredPart, joined_weights, parts_of_wholes, stored_parts

log = logging.getLogger("posttrain")


def is_read_here(location: str, settings: Any) -> bool:
    """Return True if a model's folder has quantised weights that posttrain reads itself.

    Args:
        location: Folder, or name on the Hub.
        settings: Its transformers configuration.
    """
    folder = Path(location)
    return folder.is_dir() and not getattr(settings, "auto_map", None) and stored_settings(folder) is not None


def read_compressed(
    kind: Any, folder: Path, settings: Any, device: torch.device, dtype: torch.dtype, inference: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Open a folder for which `is_read_here`; return the model, on its device, and notes for the manifest.

    Args:
        kind: An Auto class of transformers.
        folder: The folder.
        settings: Its transformers configuration.
        device: Device of the model.
        dtype: Compute dtype.
        inference: Hold weights packed only where the device can compute with them so; nothing is trained or saved.

    Raises:
        ModelError: Its tensors are not what its configuration says.
    """
    from transformers import GenerationConfig

    plain = copy.deepcopy(settings)
    for part in (plain, plain.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    cls = kind._model_mapping[type(plain)]
    state, found = open_quantized(folder)
    weights: dict[str, QuantizedWeight] = {}
    alone: list[tuple[str, PackedAlone]] = []
    bits = set()
    parts, backend = _parts_of(cls, plain), backend_for(device)
    packable = parts if inference and dtype == torch.float32 else []
    matrices = {part.name: part.matrix for part in packable if _is_module(part)}
    of_experts = [part for part in packable if part.matrix.expert is not None]
    waiting = {part.name for part in of_experts}
    for name, weight in found:
        bits.add(weight.bits)
        packed = backend.pack_alone(matrices[name].module, weight) if name in matrices else None
        if packed is not None:
            alone.append((matrices[name].name, packed))
            state[f"{name}.weight"] = packed.placeholder
            continue
        weights[name] = weight
        if name not in waiting:
            state[f"{name}.weight"] = weight.dense().to(dtype)
    for name, packed in _pack_experts(backend, of_experts, weights):
        alone.append((name.rpartition(".")[0], packed))
        state[name] = packed.placeholder
    state |= {f"{name}.weight": weights[name].dense().to(dtype) for name in waiting & weights.keys()}
    _join_slices(state, parts)
    hf = cls.from_pretrained(None, config=plain, state_dict=state, dtype=dtype, attn_implementation="eager")
    forget_quantization(hf)
    if (folder / "generation_config.json").is_file():
        hf.generation_config = GenerationConfig.from_pretrained(folder)
    hf.config.name_or_path = str(folder)
    lost = _attach(hf, weights, parts)
    if lost and any(weights[name].activation_bits for name in lost):
        raise ModelError(f"{folder}: the inputs of {lost[0]} are to be rounded, and the model has no such layer")
    if lost:
        log.warning("%s: %d quantised weights are opened in full only (%s ...)", folder, len(lost), lost[0])
    if inference and not (device.type == "cpu" and dtype == torch.float32):  # no kernel reads integers there
        forget_integers(hf)
        share_with_head(hf)
    note = {"quantization": f"compressed-tensors, {' and '.join(f'int{b}' for b in sorted(bits))}"}
    hf = hf.to(device)
    if alone and not _attach_alone(hf, alone):  # a layer's weight is read without the layer, as Mamba's dt_proj
        return read_compressed(kind, folder, settings, device, dtype)
    return hf, note


def _parts_of(cls: Any, settings: Any) -> list[StoredPart]:
    """Return where the matrices of a model are stored, in modules without memory for their weights."""
    with torch.device("meta"):
        empty = cls(copy.deepcopy(settings))
    return stored_parts(empty)


def _pack_experts(
    backend: DeviceBackend, parts: list[StoredPart], weights: dict[str, QuantizedWeight]
) -> Iterator[tuple[str, PackedAlone]]:
    """Yield the parameters whose experts can be held packed only, by name.

    Args:
        backend: Computes with them.
        parts: Where the matrices of experts are stored.
        weights: The weights by their names in the files; those of what is yielded are removed.
    """
    by_parameter: dict[str, list[StoredPart]] = {}
    for part in parts:
        by_parameter.setdefault(part.matrix.parameter_name, []).append(part)
    for name, own in by_parameter.items():
        found, _ = joined_weights(own, {part.name: weights[part.name] for part in own if part.name in weights})
        first = own[0].matrix
        if len(found) != len(getattr(first.module, first.parameter)):
            continue
        in_order = [weight for _, weight in sorted(found, key=lambda pair: pair[0].expert or 0)]
        packed = backend.pack_experts(first.module, first.parameter, in_order)
        if packed is not None:
            for part in own:
                del weights[part.name]
            yield name, packed


def _is_module(part: StoredPart) -> bool:
    """Return True if a stored tensor is the whole weight of a module, as it is."""
    rows = torch.arange(part.matrix.weight_O_I.shape[0])
    return part.matrix.expert is None and torch.equal(part.rows, rows)


def _join_slices(state: dict[str, Tensor], parts: list[StoredPart]) -> None:
    """Put the slices of tensors that hold all experts together, as transformers reads them.

    Args:
        state: Tensors by their names in the folder; changed in place.
        parts: Where the model's matrices are stored.
    """
    for whole, slices in parts_of_wholes(parts).items():
        keys = [f"{part.name}.weight" for part in slices]
        if all(key in state for key in keys):
            tensors = [state.pop(key) for key in keys]
            state[whole] = torch.stack([t.t() for t in tensors] if slices[0].matrix.transposed else tensors)


@torch.no_grad()
def _attach_alone(hf: Any, alone: list[tuple[str, PackedAlone]]) -> bool:
    """Let modules compute with weights that are held packed only, and a head that is tied to such an embedding.

    Return False if the model reads a placeholder all the same: these are NaN, and so are its logits then. One that does
    with experts what is unknown is an error inside.
    """
    modules = dict(hf.named_modules())
    for name, packed in alone:
        packed.attach(modules[name])
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    for name, packed in alone:
        if modules[name] is embedding and head is not None and head.weight is embedding.weight:
            packed.attach(head)
    hf.eval()
    try:
        return not bool(hf(torch.zeros(1, 1, dtype=torch.long)).logits.isnan().any())
    except (NotImplementedError, AttributeError, TypeError):
        return False


@torch.no_grad()
def _attach(hf: Any, weights: dict[str, QuantizedWeight], parts: list[StoredPart]) -> list[str]:
    """Attach quantised weights to the matrices of their names; return the names that the model does not have.

    Args:
        hf: The model.
        weights: The weights by their names in the files.
        parts: Where the matrices are stored, in a model of the same type without memory for its weights.
    """
    found, lost = joined_weights(parts, weights)
    modules = dict(hf.named_modules())
    for empty, weight in found:
        matrix = replace(empty, module=modules[empty.parameter_name.rpartition(".")[0]])
        if matrix.expert is not None and weight.activation_bits is not None:
            raise ModelError(f"{matrix.name}: the inputs of experts are to be rounded (W8A8), which is not done here")
        attach_to_matrix(matrix, weight)
    share_with_head(hf)
    return lost


def share_with_head(hf: Any) -> None:
    """Let an output head that is tied to a quantised embedding know the same quantised weight."""
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    weight = getattr(embedding, ATTRIBUTE, None)
    if weight is not None and head is not None and head.weight is embedding.weight:
        setattr(head, ATTRIBUTE, weight)
