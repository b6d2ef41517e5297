"""Low-rank adapters beside shared weights, each for some rows of a batch (LoRA, arXiv 2106.09685).

    y = x W^T + b, and for the rows of an adapter + s (x A^T) B^T

A model's weights are there once; an adapter adds its A and B. Rows of different adapters, and rows of none, go through
one forward pass together: W is read once for all of them. The sums are made by hooks on the linear layers, which are
there only while some row has an adapter: a batch without is computed as if there were no adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.models.adapter_export import low_rank_factors, variations
from posttrain.models.adapter_source import AdapterSource
from posttrain.models.adapter_targets import is_linear
from posttrain.models.language_model import LanguageModel

WATCHED_TOKENS = 5
ALONE = "Merge it and serve the result (posttrain export ADAPTER --to hf --output FOLDER), or serve it alone"


@dataclass(frozen=True, eq=False)
class RowAdapter:
    """Hold an adapter's matrices. layers: of each linear layer, by its name, A (r, in) and s B (out, r)."""

    layers: Mapping[str, tuple[Tensor, Tensor]]


AdapterRows = tuple[RowAdapter, Tensor | None]
"""An adapter, and the rows of the batch that have it; None: all."""


def check_by_rows(adapter: AdapterSource) -> None:
    """Check, by its settings alone, that an adapter is nothing but A and B of linear layers.

    Raises:
        ModelError: It is more, or of another kind.
    """
    found = variations(adapter.settings)
    if rows := adapter.settings.get("trainable_token_indices"):
        found.append(f"trainable_token_indices: {rows}")
    if found:
        raise ModelError(
            f"adapter {adapter.location}: expected plain LoRA (lora or rslora) on linear layers, which can be added to "
            f"some rows of a batch, found {found[0][:100]}. {ALONE}"
        )


def read_row_adapter(model: LanguageModel, adapter: AdapterSource) -> RowAdapter:
    """Read an adapter's matrices onto the model's device.

    Args:
        model: Its base.
        adapter: The adapter, which `check_by_rows` accepts.

    Raises:
        ModelError: It can't be read, or does not fit the model.
    """
    from peft import load_peft_weights
    from safetensors import SafetensorError

    where = {"revision": adapter.revision} if adapter.revision else {}
    try:
        weights = load_peft_weights(adapter.location, device=str(model.device), **where)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"adapter {adapter.location}: its weights can't be read: {error}") from error
    factors = low_rank_factors(weights, adapter.settings)
    if not factors:
        shown = ", ".join(list(weights)[:3])
        raise ModelError(f"adapter {adapter.location}: expected A and B of linear layers, found {shown}. {ALONE}")
    modules, dtype = dict(model.base.named_modules()), _dtype(model)
    layers = {}
    for name, pair in factors.items():
        module = modules.get(name)
        if module is not None and (not is_linear(module) or module is model.base.get_output_embeddings()):
            raise ModelError(
                f"adapter {adapter.location}: {name} is no linear layer of the decoder, and adapters are added to "
                f"those alone here. {ALONE}"
            )
        a, b = pair.get("lora_A"), pair.get("lora_B")
        own = None if module is None else _features(module)
        if a is None or b is None or own != (a.shape[1], b.shape[0]) or len(a) != b.shape[1]:
            has = "no such layer" if own is None else f"{own[0]} inputs and {own[1]} outputs"
            is_for = "no whole pair A, B" if a is None or b is None else f"{a.shape[1]} inputs and {b.shape[0]} outputs"
            raise ModelError(
                f"adapter {adapter.location} does not fit its base {adapter.base}: for {name} it has {is_for}, and the "
                f"base has {has}. Was it trained on another model?"
            )
        layers[name] = a.to(dtype), b.to(dtype)
    return RowAdapter(layers)


def _dtype(model: LanguageModel) -> torch.dtype:
    """Return the dtype that the model computes in; its weights may be integers."""
    return next((p.dtype for p in model.base.parameters() if p.is_floating_point()), torch.float32)


def _features(module: Any) -> tuple[int, int]:
    """Return the inputs and outputs of a linear layer."""
    if type(module).__name__ == "Conv1D":
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return int(module.in_features), int(module.out_features)


class RowAdapters:
    """Adds adapters to the linear layers of a model, for the passes that come."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.modules = model, dict(model.base.named_modules())
        self.parts: Sequence[AdapterRows] = ()
        self.names: set[str] = set()
        self.hooks: list[Any] = []

    def add(self, adapter: RowAdapter, source: str) -> None:
        """Let an adapter be used, once a few tokens show that its layers see every row of a batch.

        Args:
            adapter: The adapter.
            source: What it is called, for the message.

        Raises:
            ModelError: The model does not run one of its layers as a module, so nothing could be added there.
        """
        calls: dict[str, list[int]] = {name: [] for name in adapter.layers}

        def watch(name: str) -> Any:
            return self.modules[name].register_forward_hook(lambda _, inputs, y: calls[name].append(y.shape[-2]))

        watches = [watch(name) for name in adapter.layers]
        batch = self.model.pack([Sample(list(range(WATCHED_TOKENS)), [0.0] * WATCHED_TOKENS)])
        try:
            with torch.inference_mode():
                self.model.decoder(use_cache=False, **self.model.ragged_inputs(batch))
        finally:
            for hook in watches:
                hook.remove()
        if left := [name for name, rows in calls.items() if rows != [batch.total]]:
            raise ModelError(
                f"adapter {source}: {self.model.base.config.model_type} does not run {left[0]} as a layer on every "
                f"token, so an adapter of some rows can't be added to it. {ALONE}"
            )
        self.names |= adapter.layers.keys()

    def use(self, parts: Sequence[AdapterRows]) -> bool:
        """Set which rows of the coming passes have which adapter; True: fused layers have to be described anew.

        Args:
            parts: Each adapter once, with its rows; none: the model is as it was.
        """
        self.parts = parts
        if bool(parts) == bool(self.hooks):
            return False
        if parts:
            self.hooks = [self.modules[n].register_forward_hook(self._hook(n)) for n in sorted(self.names)]
        else:
            for hook in self.hooks:
                hook.remove()
            self.hooks = []
        return True

    def _hook(self, name: str) -> Callable[..., None]:
        def add(module: Any, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            """Add to a layer's output (1, T, out), in place."""
            for adapter, rows in self.parts:
                if name not in adapter.layers:
                    continue
                a, b = adapter.layers[name]
                x = inputs[0] if rows is None else inputs[0].index_select(-2, rows)
                product = self.model.backend.linear(x.numel() // x.shape[-1])
                more = product(product(x.to(a.dtype), a), b).to(y.dtype)
                if rows is None:
                    y.add_(more)
                else:
                    y.index_add_(-2, rows, more)

        return add
