"""The output head of a model, with the adapters of peft that may sit on it.

The head is never run as a module: hidden states of the requested positions go through its weight in chunks. What peft
puts on top of the weight therefore has to be read here; what can't be read is refused when a model is opened.
"""

from __future__ import annotations

from typing import Any

import torch

from posttrain.core.errors import ModelError
from posttrain.losses.linear_logprobs import Head
from posttrain.models.backends import backend_for
from posttrain.models.model_types import logit_transforms


def output_head(base: Any, packed: bool = False) -> Head:
    """Return the output head of a transformers model, with the transforms that its type applies to its logits.

    Args:
        base: The model.
        packed: Leave a weight that is held packed only as it is, for a product that reads it so.

    Raises:
        ModelError: The model has no linear output head.
    """
    config = base.config.get_text_config()
    linear = base.get_output_embeddings()
    if linear is None or not hasattr(linear, "weight"):
        raise ModelError(f"{type(base).__name__} has no linear output head; a causal language model is needed")
    scale, softcap = logit_transforms(config)
    weight, bias, low_rank, rows = _parts(linear)
    used = getattr(config, "unpadded_vocab_size", None)
    cut = used is not None and used < len(weight)
    if cut or not packed:  # a part of a placeholder would not know what it stands for
        weight = backend_for(weight.device).whole(weight)
    if cut:  # Inkling drops the logits of rows that are no tokens
        weight, bias = weight[:used], None if bias is None else bias[:used]
        low_rank = tuple((a, b[:used], factor) for a, b, factor in low_rank)
    return Head(weight, bias, scale, softcap, low_rank, rows)


def head_parameters(base: Any) -> set[int]:
    """Return the ids of the parameters that `output_head` reads."""
    linear = getattr(base, "get_output_embeddings", lambda: None)()
    if linear is None or not hasattr(linear, "weight"):
        return set()
    weight, bias, low_rank, rows = _parts(linear)
    tensors = [weight, bias, *(x for a, b, _ in low_rank for x in (a, b)), None if rows is None else rows[1]]
    return {id(x) for x in tensors if x is not None}


def _parts(linear: Any) -> tuple[Any, Any, tuple[tuple[Any, Any, float], ...], tuple[Any, Any] | None]:
    """Return (weight, bias, low-rank adapters, replaced rows) of a linear layer, as `Head` takes them."""
    kind = f"{type(linear).__module__}.{type(linear).__name__}"
    if not kind.startswith("peft."):
        return linear.weight, getattr(linear, "bias", None), (), None
    on = [] if linear.disable_adapters else list(linear.active_adapters)
    if kind == "peft.utils.other.ModulesToSaveWrapper":
        return _parts(linear.modules_to_save[on[0]] if on else linear.original_module)
    if kind == "peft.utils.other.TrainableTokensWrapper":
        adapter = linear.token_adapter
        weight, bias, low_rank, _ = _parts(adapter.get_base_layer())
        on = (
            [] if adapter.disable_adapters or adapter.merged else [n for n in on if n in adapter.trainable_tokens_delta]
        )
        if not on:
            return weight, bias, low_rank, None
        ids = torch.tensor(adapter.token_indices[on[0]], device=weight.device)
        return weight, bias, low_rank, (ids, adapter.trainable_tokens_delta[on[0]])
    low_rank = ()
    if kind == "peft.tuners.lora.layer.Linear" and not linear.merged:
        plain = [n for n in on if n in linear.lora_A and n not in linear.lora_variant and not linear.lora_bias[n]]
        low_rank = tuple((linear.lora_A[n].weight, linear.lora_B[n].weight, float(linear.scaling[n])) for n in plain)
    inner = linear.get_base_layer()
    return inner.weight, getattr(inner, "bias", None), low_rank, None
