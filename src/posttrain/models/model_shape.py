"""Sizes of a model by its configuration alone: no weight is read, and none is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from posttrain.config import AdapterConfig, ModelConfig
from posttrain.models.adapter_targets import default_targets, is_linear
from posttrain.models.loading import base_settings, load_settings, load_tokenizer, resolve, source_adapter
from posttrain.models.max_length import context
from posttrain.models.model_types import auto_class, decoder_of, why_not_ragged
from posttrain.models.opening_errors import explained
from posttrain.models.tiny_model import tiny_model


@dataclass(frozen=True)
class ModelShape:
    """Hold the sizes that memory depends on.

    Attributes:
        kind: Model type of transformers.
        parameters: Number of parameters, tied ones once.
        linear: Of these, in the decoder's linear layers and experts: what is stored in few bits.
        experts: Of these, in parameters that hold all experts of a layer, which some formats and devices keep in full.
        head: Of these, in the output head that the embedding does not share.
        vocabulary, hidden, layers: Rows of the output head, width, decoder layers.
        query, key_value: Widths of all heads together, of queries and of keys.
        heads, key_value_heads: Numbers of heads of queries, and of keys.
        inner: Width of the MLP; of a mixture, of the experts that a token goes through.
        gated: Whether the MLP has a gate.
        normed_heads: Whether queries and keys have norms.
        targets: (matrices, inputs, outputs) of each layer that an adapter of kind all-linear changes, by name.
        context: Longest sequence in tokens. None: the model names none.
        ragged: Whether sequences lie end to end in one pass.
    """

    kind: str
    parameters: int
    linear: int
    experts: int
    head: int
    vocabulary: int
    hidden: int
    layers: int
    query: int
    key_value: int
    heads: int
    key_value_heads: int
    inner: int
    gated: bool
    normed_heads: bool
    targets: dict[str, tuple[int, int, int]]
    context: int | None
    ragged: bool

    def adapter_parameters(self, adapter: AdapterConfig) -> int:
        """Return the number of parameters that an adapter adds and trains; of p_tuning's LSTM the nearest formula."""
        if adapter.is_soft_prompt:
            return self._soft_prompt_parameters(adapter)
        count = 0
        for matrices, inputs, outputs in self.adapted(adapter).values():
            count += matrices * (adapter.r * (inputs + outputs) + (outputs if adapter.kind == "dora" else 0))
        return count

    def adapted(self, adapter: AdapterConfig) -> dict[str, tuple[int, int, int]]:
        """Return those of `targets` that a low-rank adapter changes."""
        if adapter.target == "all-linear":
            return self.targets
        ends = tuple(adapter.target)
        return {n: t for n, t in self.targets.items() if any(n == end or n.endswith(f".{end}") for end in ends)}

    def _soft_prompt_parameters(self, adapter: AdapterConfig) -> int:
        tokens, width = sum(adapter.virtual_tokens()), 2 * self.layers * self.key_value
        if adapter.kind == "prompt":
            return tokens * self.hidden
        if adapter.kind == "p_tuning_v2":
            return tokens * width
        if adapter.kind == "prefix":
            hidden = adapter.hidden or self.key_value
            return tokens * self.hidden + self.hidden * hidden + hidden * width
        half = adapter.hidden or self.hidden // 2
        return tokens * self.hidden + 16 * half * (half + self.hidden) + 4 * half * self.hidden


def model_shape(config: ModelConfig) -> ModelShape:
    """Return the sizes of the model at a source, with the rows that its tokenizer and the recipe add.

    Raises:
        ModelError: The source can't be found, or its configuration can't be read.
    """
    return shape_of_model(meta_model(config), len(load_tokenizer(config)))


def meta_model(config: ModelConfig) -> Any:
    """Return the transformers model at a source without its weights, on the device `meta` (a tiny one as it is).

    Raises:
        ModelError: The source can't be found, or its configuration can't be read.
    """
    import torch

    # Sizes do not depend on the bits of the weights, whose reader may be missing on the machine that plans.
    settings = load_settings(config.model_copy(update={"quantization": None}))
    if settings is None:
        while (adapter := source_adapter(config)) is not None:
            config = base_settings(config, adapter)
        return tiny_model(resolve(config.source).location, len(load_tokenizer(config)))
    with explained(config.source), torch.device("meta"):
        return auto_class(settings).from_config(settings, trust_remote_code=config.trust_remote_code)


def shape_of_model(hf: Any, tokens: int = 0) -> ModelShape:
    """Return the sizes of a transformers model, on any device (`meta` has no memory).

    Args:
        hf: The model.
        tokens: Size of its tokenizer: an embedding with fewer rows gets as many.
    """
    settings = hf.config.get_text_config()
    hf.tie_weights()
    parameters = {id(p): p for p in hf.parameters()}
    embedding, head = hf.get_input_embeddings().weight, hf.get_output_embeddings()
    rows = len(embedding) if head is None else len(head.weight)
    own_head = 0 if head is None or head.weight is embedding else head.weight.numel()
    more = max(0, tokens - len(embedding)) * embedding.shape[1] * (2 if own_head else 1)
    targets = _targets(hf, head)
    heads = int(getattr(settings, "num_attention_heads", 0) or 1)
    size = int(getattr(settings, "head_dim", 0) or settings.hidden_size // heads)
    shared = int(getattr(settings, "num_key_value_heads", 0) or heads)
    names = {name.rsplit(".", 1)[-1] for name, _ in hf.named_modules()}
    inner, gated = _inner(settings, targets)
    return ModelShape(
        kind=str(settings.model_type),
        parameters=sum(p.numel() for p in parameters.values()) + more,
        linear=sum(m * i * o for m, i, o in targets.values()),
        experts=sum(m * i * o for m, i, o in targets.values() if m > 1),
        head=own_head,
        vocabulary=max(rows, tokens),
        hidden=int(settings.hidden_size),
        layers=int(settings.num_hidden_layers),
        query=heads * size,
        key_value=shared * size,
        heads=heads,
        key_value_heads=shared,
        inner=inner,
        gated=gated,
        normed_heads=bool({"q_norm", "k_norm"} & names),
        targets=targets,
        context=context(hf.config),
        ragged=why_not_ragged(hf) is None,
    )


def _targets(hf: Any, head: Any) -> dict[str, tuple[int, int, int]]:
    """Return (matrices, inputs, outputs) of every linear layer and matrix of experts in the decoder, by name."""
    modules, parameters = default_targets(hf)
    inside = {id(m) for m in decoder_of(hf).modules()} - {id(head)}
    out = {}
    for name, module in hf.named_modules():
        if is_linear(module) and id(module) in inside:
            wanted = modules == "all-linear" or any(name == end or name.endswith(f".{end}") for end in modules)
            shape = module.weight.shape
            turned = type(module).__name__ == "Conv1D"  # holds (inputs, outputs)
            if wanted:
                out[name] = (1, *(shape if turned else shape[::-1]))
    for name, parameter in hf.named_parameters():
        if parameter.ndim == 3 and any(name == end or name.endswith(f".{end}") for end in parameters):
            out[name] = (parameter.shape[0], *sorted(parameter.shape[1:]))
    return {name: tuple(int(v) for v in sizes) for name, sizes in out.items()}  # type: ignore[misc]


def _inner(settings: Any, targets: dict[str, tuple[int, int, int]]) -> tuple[int, bool]:
    """Return the width of the MLP that one token goes through, and whether it has a gate."""
    gated = any(name.endswith(("gate_proj", "gate_up_proj", ".w1")) for name in targets)
    inner = int(getattr(settings, "intermediate_size", 0) or getattr(settings, "n_inner", 0) or 0)
    chosen = int(getattr(settings, "num_experts_per_tok", 0) or 0)
    routed = chosen * int(getattr(settings, "moe_intermediate_size", 0) or (inner if chosen else 0))
    widest = max((max(i, o) for _, i, o in targets.values()), default=4 * settings.hidden_size)
    found = max(inner if not chosen else 0, routed) or widest
    return int(math.ceil(found)), gated
