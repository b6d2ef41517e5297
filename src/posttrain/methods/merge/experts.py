"""Make a mixture of experts of several models of one type (BTX, arXiv 2403.07816).

The feed-forward part of every model becomes an expert in each layer; all other tensors are averaged. The result is in
the layout of a type of transformers:

    llama, mistral    mixtral
    qwen2             qwen2_moe, with a shared expert that adds nothing until it is trained
    qwen3             qwen3_moe

Routers give the top_k experts weights that sum to 1, so a mixture of one model with itself is that model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.methods.merge.merge_settings import BASE_SOURCE, MergeConfig
from posttrain.methods.merge.merge_weights import Sources, WeightMerge, check_alike, result_dtype, result_names
from posttrain.methods.merge.per_tensor import check_patterns, tensor_value
from posttrain.methods.merge.stored_model import StoredModel
from posttrain.methods.merge.weight_writer import PlannedTensor

MIXTURES = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
"""Type of a model -> type of the mixture of such models."""
MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
SHARED_WIDTH = 32
"""Width of the shared expert of qwen2_moe, whose type has to have one."""
NOT_CARRIED = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "_name_or_path",
    "quantization_config",
)
Routers = Callable[[int], Tensor]
"""The weights of a layer's router, (experts, hidden)."""


def plan_experts(config: MergeConfig, base: StoredModel, sources: Sources, routers: Routers) -> WeightMerge:
    """Check that models fit together, and return how they become a mixture.

    Args:
        config: Settings of the stage.
        base: The model that the stage starts from.
        sources: The other models by (source, revision).
        routers: Weights of the routers.

    Raises:
        ModelError: Models differ in type or shapes, or are of a type that has no mixture.
    """
    models = [base if m.source == BASE_SOURCE else sources[m.source, m.revision] for m in config.models]
    for model in models:
        check_alike(model, base)
    kind = mixture_of(base)
    tied = all(model.layout.tied for model in [base, *models])
    names = result_names(base, models, tied)
    for number, setting in enumerate(config.models):
        check_patterns(setting.weight, names, f"models.{number}.weight")

    def average(name: str) -> Tensor:
        depth = base.layout.depth(name)
        weights = [tensor_value(m.weight, name, depth, 1.0) for m in config.models]
        if abs(sum(weights)) < 1e-8:
            raise ModelError(f"{name} can't be averaged: the weights {weights} sum to zero")
        return sum(w * m.read(name) for w, m in zip(weights, models, strict=True)) / sum(weights)  # type: ignore[return-value]

    planned: list[PlannedTensor] = []
    compute: dict[str, Callable[[], Tensor]] = {}

    def add(name: str, shape: tuple[int, ...], dtype: torch.dtype, values: Callable[[], Tensor]) -> None:
        planned.append(PlannedTensor(name, shape, dtype))
        compute[name] = values

    for name in names:
        dtype, shape = result_dtype(config, base, name), base.entry(name).shape
        layer = base.layout.layer_of(name)
        projection = name.removesuffix(".weight").rpartition(".")[2]
        if layer is None or f"{base.layout.root}.{layer}.mlp.{projection}.weight" != name:
            add(name, shape, dtype, lambda name=name: average(name))  # type: ignore[misc]
            continue
        home = f"{base.layout.root}.{layer}." + ("block_sparse_moe" if kind == "mixtral" else "mlp")
        part = MIXTRAL_NAMES[projection] if kind == "mixtral" else projection
        if projection == "gate_proj":
            width = (len(models), shape[1])
            add(f"{home}.gate.weight", width, dtype, lambda layer=layer: routers(layer))  # type: ignore[misc]
        for number, model in enumerate(models):
            own = lambda model=model, name=name: model.read(name)  # noqa: E731
            add(f"{home}.experts.{number}.{part}.weight", shape, dtype, own)
        if kind == "qwen2_moe":
            _add_shared(add, home, projection, shape, dtype, lambda name=name: average(name))  # type: ignore[misc]
    return WeightMerge(planned, lambda name: compute[name](), [], tied)


def _add_shared(
    add: Callable[..., None],
    home: str,
    projection: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    average: Callable[[], Tensor],
) -> None:
    """Add one matrix of the shared expert: the first rows of the mean, but zeros for what leaves it."""
    width = shared_width(min(shape))
    name = f"{home}.shared_expert.{projection}.weight"
    if projection == "down_proj":
        add(name, (shape[0], width), dtype, lambda: torch.zeros(shape[0], width))
        add(f"{home}.shared_expert_gate.weight", (1, shape[0]), dtype, lambda: torch.zeros(1, shape[0]))
    else:
        add(name, (width, shape[1]), dtype, lambda: average()[:width])


def shared_width(smallest: int) -> int:
    """Return the width of the shared expert, given the smaller side of the model's feed-forward matrices."""
    return min(SHARED_WIDTH, smallest)


def mixture_of(base: StoredModel) -> str:
    """Return the type of a mixture of models like the base.

    Raises:
        ModelError: There is none for its type, or none with these settings.
    """
    config = base.config
    kind = MIXTURES.get(config.model_type)
    if kind is None:
        raise ModelError(
            f"{base.source} is of type {config.model_type}: experts are made of {', '.join(MIXTURES)}, whose mixtures are "
            f"{', '.join(dict.fromkeys(MIXTURES.values()))}"
        )
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    biased = [name for name in biased if not (name == "attention_bias" and kind == "qwen3_moe")]
    if biased:
        raise ModelError(f"{base.source} has {biased[0]}, which a {kind} has no place for: it can't become experts")
    kinds = set(getattr(config, "layer_types", None) or ())
    if kind == "qwen3_moe" and len(kinds) > 1:
        raise ModelError(
            f"{base.source} has layers with {' and with '.join(sorted(kinds))}, and a qwen3_moe has one kind of them"
        )
    return kind


def mixture_settings(settings: Any, base: StoredModel, config: MergeConfig) -> Any:
    """Return the configuration of the mixture.

    Args:
        settings: The configuration that a merge of the models would have.
        base: The base.
        config: Settings of the stage.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert config.experts is not None
    kind, experts = mixture_of(base), config.experts
    target = CONFIG_MAPPING[kind]
    known = {*target().to_dict(), "head_dim", "dtype"} - set(NOT_CARRIED)
    values = {key: value for key, value in settings.to_dict().items() if key in known}
    count = "num_local_experts" if kind == "mixtral" else "num_experts"
    values |= {count: len(config.models), "num_experts_per_tok": experts.top_k}
    values |= {"output_router_logits": experts.balance > 0, "router_aux_loss_coef": experts.balance}
    if kind != "mixtral":
        values |= {"moe_intermediate_size": settings.intermediate_size, "norm_topk_prob": True}
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    if kind == "qwen2_moe":
        values["shared_expert_intermediate_size"] = shared_width(min(settings.intermediate_size, settings.hidden_size))
    made = target(**values)
    made.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]  # vLLM knows a model by this name alone
    return made
