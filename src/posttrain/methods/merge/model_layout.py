"""Names of a model's tensors: which layer they belong to, which are tied, which have a row for each token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.core.errors import ModelError
from posttrain.models.adapter_targets import is_linear
from posttrain.models.model_types import decoder_layers


@dataclass(frozen=True)
class ModelLayout:
    """Hold what a configuration says of a model's tensors.

    Attributes:
        shapes: Shape by name, in the order of the model.
        layers: Number of decoder layers.
        root: Name of the list of layers, such as model.layers.
        prefix: Name of the model without its head, such as model: older files leave it out.
        tied: Tensors that are others: name -> name of the tensor that is stored.
        vocabulary: Names of the tensors with a row for each token: embedding, output head, its bias.
        linear: Names of the matrices of linear layers.
        transposed: Those of them that are stored as (inputs, outputs), as GPT-2 has them.
    """

    shapes: dict[str, tuple[int, ...]]
    layers: int
    root: str
    prefix: str
    tied: dict[str, str]
    vocabulary: tuple[str, ...]
    linear: frozenset[str]
    transposed: frozenset[str]

    def canonical(self, name: str) -> str:
        """Return the model's name of a tensor in a file, which may lack the prefix."""
        full = f"{self.prefix}.{name}"
        known = name in self.shapes or not (full in self.shapes or full.startswith(f"{self.root}."))
        return name if known else full

    def layer_of(self, name: str) -> int | None:
        """Return the number of the layer that a tensor belongs to; None for those outside of layers."""
        found = re.match(rf"{re.escape(self.root)}\.(\d+)\.", name)
        return int(found[1]) if found else None

    def in_layer(self, name: str, number: int) -> str:
        """Return the name of a layer's tensor in another layer."""
        return re.sub(rf"^{re.escape(self.root)}\.\d+\.", f"{self.root}.{number}.", name)

    def depth(self, name: str) -> float:
        """Return where a tensor is between the first layer (0) and the last (1).

        What comes before the layers, embeddings above all, is at 0; what comes after them, the last norm and the head, at 1.
        """
        number, last = self.layer_of(name), self.layers - 1
        if number is not None:
            return number / last if last else 0.0
        names = list(self.shapes)
        first = next((i for i, n in enumerate(names) if self.layer_of(n) is not None), 0)
        return 0.0 if name in names[:first] else 1.0


def layout_of(config: Any, source: str, trust_remote_code: bool = False) -> ModelLayout:
    """Return the layout of the causal language model that a configuration describes; no memory is allocated.

    Args:
        config: A transformers configuration.
        source: Name of the model, for messages.
        trust_remote_code: Run code that ships with the model.

    Raises:
        ModelError: transformers has no causal language model for it, or none with repeated layers.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"model source {source!r} is no causal language model: {first}") from error
    modules = {id(module): name for name, module in hf.named_modules()}
    repeated = [modules[id(layer)] for layer in decoder_layers(hf)]
    if not repeated:
        raise ModelError(
            f"model source {source!r}: the layers of {config.model_type} are not known, so it can't be merged"
        )
    root = repeated[0].rsplit(".", 1)[0]
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    names = [f"{modules[id(embedding)]}.weight"]
    if head is not None:
        names += [f"{modules[id(head)]}.{kind}" for kind in ("weight", "bias") if getattr(head, kind, None) is not None]
    return ModelLayout(
        {name: tuple(value.shape) for name, value in hf.state_dict().items()},
        sum(name.rsplit(".", 1)[0] == root for name in repeated),
        root,
        hf.base_model_prefix,
        dict(getattr(hf, "all_tied_weights_keys", None) or {}),
        tuple(names),
        frozenset(f"{name}.weight" for name, m in hf.named_modules() if is_linear(m)),
        frozenset(f"{name}.weight" for name, m in hf.named_modules() if type(m).__name__ == "Conv1D"),
    )
