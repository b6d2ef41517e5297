"""Quantised weights in files: the layout of compressed-tensors, which transformers reads, and vLLM.

Weights alone in few bits are `pack-quantized`: integers side by side in words of 32 bits. Layers whose inputs are
rounded too are `int-quantized`: one int8 a weight. config.json's `quantization_config` says which modules are which.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.core.files import write_json
from posttrain.models.quantized_weight import QuantizedWeight

METHOD = "compressed-tensors"
PACKED, WHOLE = "pack-quantized", "int-quantized"
READ_HERE = {PACKED, WHOLE, "naive-quantized"}
"""Formats that are read here, without the package compressed-tensors."""
PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
"""What is stored of a module."""
EXPERTS = "re:.*\\.experts\\..*"
"""Target by which transformers finds the scheme of experts where a file has several: it takes the first group else."""
SHARD_INDEX = "model.safetensors.index.json"


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack int8 values (R, C) along the columns into int32 words, the first value in the lowest bits.

    Args:
        values: The values; they are stored with 2^(bits - 1) added.
        bits: 4 or 8.
    """
    # As bytes: words are stored with the lowest byte first, and int64 would take eight times the memory.
    raised = (values + (8 if bits == 4 else -128)).view(torch.uint8)  # -128 is +128 modulo 256
    raised = torch.nn.functional.pad(raised, (0, -values.shape[1] % (32 // bits)))
    if bits == 4:
        raised = raised[:, ::2] | raised[:, 1::2] << 4
    return raised.reshape(-1).view(torch.int32).view(len(values), -1)


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return the int8 values (R, columns) that `pack_words` packed.

    Args:
        words: The words.
        bits: 4 or 8.
        columns: Number of values in a row.
    """
    raised = words.reshape(-1).view(torch.uint8).view(len(words), -1)
    if bits == 4:
        raised = torch.stack((raised & 15, raised >> 4), -1).flatten(1)
    return raised[:, :columns].contiguous().view(torch.int8) - (8 if bits == 4 else -128)


def tensors_of(name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what is stored of a quantised module.

    Args:
        name: Its name.
        weight: Its weight.
        dtype: Dtype of the scales.
    """
    scale = weight.scale_O_G.to(dtype)
    if weight.activation_bits is not None:
        tensors = {"weight": weight.values_O_I, "weight_scale": scale}
        if weight.zero_O_G is not None:
            tensors["weight_zero_point"] = weight.zero_O_G
    else:
        tensors = {
            "weight_packed": pack_words(weight.values_O_I, weight.bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if weight.zero_O_G is not None:
            tensors["weight_zero_point"] = pack_words(weight.zero_O_G.t(), weight.bits).t()
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in tensors.items()}


Scheme = tuple[int, int | None, bool, int | None]
"""Bits, group (None: one scale a row), symmetric, bits of the inputs (None: in full)."""


def schemes_of(weights: Mapping[str, QuantizedWeight]) -> dict[Scheme, list[str]]:
    """Return the schemes by which weights are stored, with the names of the modules of each."""
    found: dict[Scheme, list[str]] = {}
    grouped = {
        (w.bits, w.group, w.zero_O_G is None, w.activation_bits) for w in weights.values() if w.group < w.shape[1]
    }
    for name, weight in weights.items():
        scheme = weight.bits, weight.group, weight.zero_O_G is None, weight.activation_bits
        whole = weight.group == weight.shape[1] and scheme not in grouped  # else a layer as narrow as others' groups
        found.setdefault((scheme[0], None if whole else weight.group, *scheme[2:]), []).append(name)
    return found


def _arguments(bits: int, group: int | None, symmetric: bool) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy}


def quantization_config(
    weights: Mapping[str, QuantizedWeight], linear: list[str], ignored: list[str]
) -> dict[str, Any]:
    """Return config.json's `quantization_config`.

    The scheme that most layers have is that of all linear layers; modules that have another one are named. Experts
    count as linear layers, which they are in the files.

    Args:
        weights: The quantised weights by module.
        linear: Names of the linear layers and experts among them.
        ignored: Names of linear layers that are in full, or patterns after "re:".
    """
    schemes = schemes_of(weights)
    common = max(schemes, key=lambda s: len(set(schemes[s]) & set(linear)))
    groups = []
    for scheme, names in sorted(schemes.items(), key=lambda item: item[0] == common):  # the first match counts
        bits, group, symmetric, inputs = scheme
        others = names if scheme != common else [n for n in names if n not in linear]
        targets = [*others, *(["Linear"] if scheme == common else [])]
        if scheme == common and len(schemes) > 1 and any(".experts." in name for name in names):
            targets.insert(0, EXPERTS)
        activations = None
        if inputs is not None:
            activations = {"num_bits": inputs, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
        groups.append(
            {
                "targets": targets,
                "weights": _arguments(bits, group, symmetric),
                "input_activations": activations,
                "output_activations": None,
                "format": PACKED if inputs is None else WHOLE,
            }
        )
    formats = {group["format"] for group in groups}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def compress_folder(
    folder: Path,
    weights: Mapping[str, QuantizedWeight],
    linear: list[str],
    ignored: list[str],
    wholes: Mapping[str, tuple[Sequence[str], bool]] | None = None,
) -> None:
    """Replace the full weights of quantised modules in a folder that transformers wrote by their integers.

    Args:
        folder: The folder.
        weights: The quantised weights by the names that their modules have in the files.
        linear: Names of the linear layers and experts among them.
        ignored: Names of linear layers that are in full, or patterns after "re:".
        wholes: Names of tensors that hold all experts; of each, what every expert's slice is stored as, and True if
            the tensor holds them as (I, O).

    Raises:
        ModelError: The folder has no weight of that name, or of another shape.
    """
    from safetensors.torch import load_file, save_file

    left, size, wholes = dict(weights), 0, wholes or {}
    where: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for key in list(tensors):
            name, _, part = key.rpartition(".")
            if key in wholes:
                names, transposed = wholes[key]
                for own, dense in zip(names, tensors.pop(key), strict=True):
                    tensors |= _stored(own, left.pop(own, None), dense.t() if transposed else dense)
            elif part == "weight" and name in left:
                tensors |= _stored(name, left.pop(name), tensors.pop(key))
        save_file(tensors, file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file.name)
        size += sum(t.nbytes for t in tensors.values())
    if left:
        raise ModelError(f"{folder}: no weight is stored as {min(left)}.weight, so it can't be written in few bits")
    if (folder / SHARD_INDEX).is_file():
        index = json.loads((folder / SHARD_INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = dict(sorted(where.items()))
        index.setdefault("metadata", {})["total_size"] = size
        write_json(folder / SHARD_INDEX, index)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(weights, linear, ignored)
    write_json(folder / "config.json", config)


def _stored(name: str, weight: QuantizedWeight | None, dense: Tensor) -> dict[str, Tensor]:
    """Return what is stored of a matrix instead of its dense weight; without a quantised one, that."""
    if weight is None:
        return {f"{name}.weight": dense.contiguous()}
    if weight.shape != tuple(dense.shape):
        raise ModelError(f"{name} is stored in shape {tuple(dense.shape)}, and its quantised weight has {weight.shape}")
    return tensors_of(name, weight, dense.dtype)


def stored_settings(folder: Path) -> dict[str, Any] | None:
    """Return the `quantization_config` of a folder whose weights `read_quantized` reads; None: it can't.

    Args:
        folder: A model's folder.
    """
    file = folder / "config.json"
    if not file.is_file() or not any(folder.glob("*.safetensors")):
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != METHOD or found.get("transform_config"):
        return None
    groups = [g for g in (found.get("config_groups") or {}).values() if isinstance(g, dict)]
    return found if groups and all(_is_read_here(g, found) for g in groups) else None


def _is_read_here(group: dict[str, Any], settings: dict[str, Any]) -> bool:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    form = group.get("format") or settings.get("format")
    return (
        form in READ_HERE
        and weights.get("type", "int") == "int"
        and weights.get("num_bits") in (4, 8)
        and (weights.get("strategy") in ("group", "channel") or weights.get("group_size") is not None)
        and not group.get("output_activations")
        and (
            inputs is None
            or (inputs.get("num_bits") == 8 and inputs.get("dynamic") is True and inputs.get("strategy") == "token")
        )
        and (inputs is None or (inputs.get("symmetric", True) and inputs.get("type", "int") == "int"))
        and not settings.get("kv_cache_scheme")
    )


def read_quantized(folder: Path) -> dict[str, QuantizedWeight]:
    """Read the quantised weights of a folder by module, without the package compressed-tensors.

    Args:
        folder: A folder for which `stored_settings` is not None.

    Raises:
        ModelError: Its tensors are not what its settings say.
    """
    return dict(open_quantized(folder)[1])


def open_quantized(folder: Path) -> tuple[dict[str, Tensor], Iterator[tuple[str, QuantizedWeight]]]:
    """Return the tensors of a folder that are in full, by name, and an iterator of (module, quantised weight).

    A weight becomes integers of a byte each when its turn comes, so that those of one module are there at a time.

    Args:
        folder: A folder for which `stored_settings` is not None.

    Raises:
        ModelError: It has no such weights; the iterator: its tensors are not what its settings say.
    """
    from safetensors.torch import load_file

    settings = stored_settings(folder)
    if settings is None:
        raise ModelError(f"{folder} has no weights in {' or '.join(sorted(READ_HERE))} with int4 or int8 values")
    full: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        full |= load_file(file)
    names = [key.removesuffix(".weight_scale") for key in full if key.endswith(".weight_scale")]
    stored = {name: {p: full.pop(f"{name}.{p}") for p in PARTS if f"{name}.{p}" in full} for name in names}

    def weights() -> Iterator[tuple[str, QuantizedWeight]]:
        for name in names:
            try:
                yield name, _weight_from(stored.pop(name), settings)
            except (ValueError, KeyError, RuntimeError, IndexError) as error:
                raise ModelError(f"{folder}: the quantised weight of {name} can't be read: {error}") from error

    return full, weights()


def _weight_from(parts: dict[str, Tensor], settings: dict[str, Any]) -> QuantizedWeight:
    """Return the weight that a module's tensors hold; bits and groups follow from their shapes."""
    scale, packed = parts["weight_scale"].float(), parts.get("weight_packed")
    zero, order = parts.get("weight_zero_point"), parts.get("weight_g_idx")
    bits: Literal[4, 8]
    if packed is None:
        values, bits = parts["weight"], 8
        if values.dtype != torch.int8:
            raise ValueError(f"expected int8, and its dtype is {values.dtype}")
    else:
        rows, columns = (int(n) for n in parts["weight_shape"].tolist())
        bits = 8 if packed.shape[1] == -(-columns // 4) else 4
        values = unpack_words(packed, bits, columns)
        zero = None if zero is None else unpack_words(zero.t().contiguous(), bits, rows).t().contiguous()
    group = values.shape[1] // scale.shape[1]
    inputs = packed is None and any(g.get("input_activations") for g in settings["config_groups"].values())
    order = None if order is None or bool((order < 0).any()) else order.long()
    weight = QuantizedWeight(values, scale, zero, group, bits, order, 8 if inputs else None)
    in_turn = torch.arange(values.shape[1]) // group
    return replace(weight, order_I=None) if order is not None and torch.equal(order, in_turn) else weight
