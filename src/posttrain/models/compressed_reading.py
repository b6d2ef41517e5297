"""Open a folder of compressed-tensors as a model whose weights are dense, and know their integers too."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.core.errors import ModelError
from posttrain.models.compressed_tensors import dense_state, stored_settings
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
    kind: Any, folder: Path, settings: Any, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """Open a folder for which `is_read_here`; return the model, on its device, and notes for the manifest.

    Args:
        kind: An Auto class of transformers.
        folder: The folder.
        settings: Its transformers configuration.
        device: Device of the model.
        dtype: Compute dtype.

    Raises:
        ModelError: Its tensors are not what its configuration says.
    """
    from transformers import GenerationConfig

    state, weights = dense_state(folder, dtype)
    plain = copy.deepcopy(settings)
    for part in (plain, plain.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    cls = kind._model_mapping[type(plain)]
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
    bits = sorted({weight.bits for weight in weights.values()})
    note = {"quantization": f"compressed-tensors, {' and '.join(f'int{b}' for b in bits)}"}
    return hf.to(device), note


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
