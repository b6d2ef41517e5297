"""Open a folder of compressed-tensors as a model whose weights are dense, and know their integers too."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.core.errors import ModelError
from posttrain.models.backends import PackedAlone, backend_for
from posttrain.models.compressed_tensors import open_quantized, stored_settings
from posttrain.models.quantization import forget_quantization
from posttrain.models.quantized_weight import ATTRIBUTE, QuantizedWeight, attach_quantized

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
    alone: dict[str, PackedAlone] = {}
    bits = set()
    skeleton = _modules_like(cls, plain) if inference and dtype == torch.float32 else {}
    for name, weight in found:
        bits.add(weight.bits)
        module = skeleton.get(name)
        packed = backend_for(device).pack_alone(module, weight) if module is not None else None
        if packed is None:
            weights[name], state[f"{name}.weight"] = weight, weight.dense().to(dtype)
        else:
            alone[name], state[f"{name}.weight"] = packed, packed.placeholder
    hf = cls.from_pretrained(None, config=plain, state_dict=state, dtype=dtype, attn_implementation="eager")
    forget_quantization(hf)
    if (folder / "generation_config.json").is_file():
        hf.generation_config = GenerationConfig.from_pretrained(folder)
    hf.config.name_or_path = str(folder)
    lost = _attach(hf, weights)
    if lost and any(weights[name].activation_bits for name in lost):
        raise ModelError(f"{folder}: the inputs of {lost[0]} are to be rounded, and the model has no such layer")
    if lost:
        log.warning("%s: %d quantised weights are opened in full only (%s ...)", folder, len(lost), lost[0])
    note = {"quantization": f"compressed-tensors, {' and '.join(f'int{b}' for b in sorted(bits))}"}
    hf = hf.to(device)
    _attach_alone(hf, alone)
    return hf, note


def _modules_like(cls: Any, settings: Any) -> dict[str, Any]:
    """Return the modules of a model by name, without memory for their weights."""
    with torch.device("meta"):
        return dict(cls(copy.deepcopy(settings)).named_modules())


def _attach_alone(hf: Any, alone: dict[str, PackedAlone]) -> None:
    """Let modules compute with weights that are held packed only, and a head that is tied to such an embedding."""
    modules = dict(hf.named_modules())
    for name, packed in alone.items():
        packed.attach(modules[name])
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    for name, packed in alone.items():
        if modules[name] is embedding and head is not None and head.weight is embedding.weight:
            packed.attach(head)


def _attach(hf: Any, weights: dict[str, QuantizedWeight]) -> list[str]:
    """Attach quantised weights to the modules of their names; return the names that the model does not have."""
    modules, lost = dict(hf.named_modules()), []
    for name, weight in weights.items():
        module = modules.get(name)
        if isinstance(module, nn.Linear | nn.Embedding) and tuple(module.weight.shape) == weight.shape:
            attach_quantized(module, weight)
        else:
            lost.append(name)
    share_with_head(hf)
    return lost


def share_with_head(hf: Any) -> None:
    """Let an output head that is tied to a quantised embedding know the same quantised weight."""
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    weight = getattr(embedding, ATTRIBUTE, None)
    if weight is not None and head is not None and head.weight is embedding.weight:
        setattr(head, ATTRIBUTE, weight)
