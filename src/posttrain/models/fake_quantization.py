"""Train with weights that are rounded in every pass, so that quantising them afterwards changes nothing.

Each linear layer multiplies with what `round_to_nearest` makes of its weight; with low-rank adapters, of the sum of
weight and adapter, which is what merging leaves. Gradients pass through rounding as if it were not there. What is
trained and saved is the weight in full; quantising it on the same grid gives the model as it was trained.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.config.quantization_settings import QuantizedTrainingConfig
from posttrain.core.errors import ModelError
from posttrain.models.adapter_targets import is_experts_weight
from posttrain.models.quantization_grid import Grid, check_group, fake_quantized

FILE_NAME = "quantized_training.json"
"""File beside a model's weights that names the grid that it was trained on."""
GRID = "fake_grid"
NOT_QUANTIZED = ("*.gate", "*.router", "*shared_expert_gate", "*classifier", "*score")
"""Names of linear layers that choose experts or score: small, and never quantised."""


class RoundedLinear(nn.Linear):
    """A linear layer that multiplies with its rounded weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, fake_quantized(self.weight, getattr(self, GRID)), self.bias)


def _rounded_sum(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a low-rank layer with its rounded sum: what it is once it is merged and quantised."""
    base = self.get_base_layer()
    if self.disable_adapters:
        return F.linear(x, base.weight, base.bias)
    weight = base.weight
    for name in self.active_adapters:
        weight = weight + self.get_delta_weight(name)
    return F.linear(x, fake_quantized(weight.to(base.weight.dtype), getattr(self, GRID)), base.bias)


_rounded_kinds: dict[type, type] = {}


def _rounded_kind(kind: type) -> type:
    """Return the class of peft's low-rank layers with another forward pass."""
    if kind not in _rounded_kinds:
        _rounded_kinds[kind] = type(f"Rounded{kind.__name__}", (kind,), {"forward": _rounded_sum, "whole": kind})
    return _rounded_kinds[kind]


def quantizable(hf: Any, skip: list[str]) -> dict[str, nn.Linear]:
    """Return the linear layers of a model that quantisation is for, by name: all but its head, routers and `skip`.

    Args:
        hf: The transformers model, adapters around its layers or not.
        skip: Patterns of names.
    """
    base = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    inside = {id(m) for layer in [head] if layer is not None for m in layer.modules()}
    found: dict[str, nn.Linear] = {}
    for name, module in base.named_modules():
        plain = name.removesuffix(".base_layer")
        is_part = any(part in name for part in (".lora_A.", ".lora_B.", "lora_embedding"))
        if not isinstance(module, nn.Linear) or id(module) in inside or is_part or plain == "lm_head":
            continue
        if not any(fnmatch.fnmatchcase(plain, pattern) for pattern in (*NOT_QUANTIZED, *skip)):
            found[plain] = module
    return found


def round_while_training(hf: Any, config: QuantizedTrainingConfig | None) -> None:
    """Let a model's linear layers multiply with rounded weights; None: leave it as it is.

    Args:
        hf: The transformers model, adapters attached.
        config: Settings of quantisation-aware training.

    Raises:
        ModelError: The groups do not divide the widths, or the adapters are of a kind whose sum is not known.
    """
    if config is None:
        return
    layers = quantizable(hf, config.skip)
    if not layers:
        raise ModelError("qat: the model has no linear layers that can be quantised")
    by_module = {id(module): name for name, module in layers.items()}
    around = {id(m.get_base_layer()): m for m in hf.modules() if hasattr(m, "get_base_layer")}
    check_group(Grid(config.bits, config.group), [m.in_features for m in layers.values()], "qat.")
    for module in layers.values():
        grid = Grid(config.bits, config.group, config.symmetric, False, module.weight.dtype)
        outer = around.get(id(module))
        if outer is None:
            if type(module) is not nn.Linear:
                raise ModelError(f"qat: {by_module[id(module)]} is a {type(module).__name__}, not a plain linear layer")
            module.__class__ = RoundedLinear
            setattr(module, GRID, grid)
            continue
        if not hasattr(outer, "lora_A") or any(getattr(outer, "use_dora", {}).values()):
            raise ModelError("qat goes with every weight, or with adapters of kind lora or rslora")
        outer.__class__ = _rounded_kind(type(outer))
        setattr(outer, GRID, grid)


def train_in_full(hf: Any) -> None:
    """Undo `round_while_training`: the model computes with its weights in full again."""
    for module in hf.modules():
        if hasattr(module, GRID):
            module.__class__ = nn.Linear if type(module) is RoundedLinear else type(module).whole
            delattr(module, GRID)


def experts_in_full(hf: Any) -> list[str]:
    """Return patterns of the parameters that hold all experts of a layer: training never rounds them.

    Args:
        hf: The transformers model, adapters around its experts or not.
    """
    base = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    names = [name for name, p in base.named_parameters() if is_experts_weight(base, name, p)]
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name.replace(".base_layer", "")) for name in names))


def note_grid(folder: Path, config: QuantizedTrainingConfig | None, full: Sequence[str] = ()) -> None:
    """Write, beside a model's weights, on which grid it was trained.

    Args:
        folder: The model's folder.
        config: The settings; None: nothing is written.
        full: Patterns of what was not rounded in training, beside the settings' `skip`.
    """
    if config is not None:
        noted = config.model_copy(update={"skip": [*config.skip, *full]})
        (folder / FILE_NAME).write_text(json.dumps(noted.model_dump()) + "\n", encoding="utf-8")


def noted_grid(folder: Path) -> QuantizedTrainingConfig | None:
    """Return what `note_grid` wrote; None: nothing."""
    file = folder / FILE_NAME
    return QuantizedTrainingConfig(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
