"""Differences between transformers' model types: where the decoder is, what its head does, which batches it takes."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

STATEFUL = ("linear_attention", "mamba", "conv", "recurrent", "rwkv", "chunked_attention")
"""Layer types whose state runs through a sequence: segments can't share a prefix or lie end to end."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of a soft cap on the logits in transformers' configurations."""
MULTIPLIED = ("logit_scale", "lm_head_multiplier")
"""Names of a factor on the logits."""
DIVIDED = ("logits_scaling", "logits_mup_width_multiplier")
"""Names of a divisor of the logits."""
MULTIPLIED_BY_DIVISOR = ("hyperclovax",)
"""Types that multiply by what others divide by."""

_one_at_a_time: set[type] = set()
"""Classes found, in this process, to compute other numbers on a ragged batch than on single sequences."""


def auto_class(settings: Any) -> Any:
    """Return the Auto class of transformers for a configuration: of a language model, or of one that reads images."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = settings.model_type
    reads_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM


def decoder_of(base: Any) -> Any:
    """Return the part of a transformers model that turns tokens into final hidden states."""
    decoder = base.get_decoder()
    if decoder is base or not hasattr(decoder, "get_input_embeddings"):  # Llama 4 returns itself, ModernBERT its head
        prefix = getattr(base, "base_model_prefix", "")
        decoder = getattr(base, prefix, None) or getattr(base, "model", None) or decoder
    return decoder


def set_attention(base: Any, name: str) -> None:
    """Let the language part of a transformers model compute attention by a registered function.

    A vision tower keeps its own: its tokens are no part of a ragged batch.
    """
    composite = getattr(base.config, "vision_config", None) is not None and hasattr(base.config, "text_config")
    base.set_attn_implementation({"text_config": name} if composite else name)


def logit_transforms(config: Any) -> tuple[float, float | None]:
    """Return the factor and the soft cap (None: none) that a type applies to the product of its output head.

    Args:
        config: The transformers configuration of the text model.
    """
    scale = 1.0
    for names, divides in ((MULTIPLIED, False), (DIVIDED, config.model_type not in MULTIPLIED_BY_DIVISOR)):
        for name in names:
            factor = float(getattr(config, name, None) or 1.0)
            scale *= 1 / factor if divides else factor
    return scale, next((float(c) for name in SOFT_CAPS if (c := getattr(config, name, None))), None)


def why_not_ragged(base: Any) -> str | None:
    """Return why the type can't take a ragged batch, as its class and configuration show; None: it may be able to."""
    if hasattr(base, "pooled_head"):  # an ensemble
        return next((reason for member in base.members if (reason := why_not_ragged(member))), None)
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    stateful = sorted(k for k in kinds if any(s in k for s in STATEFUL))
    if stateful:
        return f"layers of {', '.join(stateful)}"
    if getattr(base, "_is_stateful", False):
        return "a state that runs through the sequence"
    if not getattr(base, "_supports_attention_backend", False):
        return "attention outside transformers' interface"
    if type(base) in _one_at_a_time:
        return "other numbers than for single sequences"
    return None


def remember_one_at_a_time(base: Any) -> None:
    """Let every later model of this class in this process be computed one sequence at a time."""
    _one_at_a_time.add(type(base))


def warn_one_at_a_time(base: Any, reason: str) -> None:
    """Warn that a model is computed one sequence at a time, and say why."""
    warnings.warn(
        f"{base.config.get_text_config().model_type}: its attention can't be shared ({reason}); sequences are computed "
        "one at a time, which is right but slow",
        stacklevel=4,
    )


def still(model: nn.Module) -> None:
    """Put a transformers model into evaluation mode, in which it also trains.

    Dropout, layerdrop, router jitter and sampled routing act in training mode alone, in every model type, whatever
    attribute holds their strength. With them a step would depend on how its batch is split, the ratio of a policy to
    itself would not be 1, and a resumed run would need the random states of all layers.
    """
    model.eval()
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled"):  # RWKV divides its weights in evaluation mode, in place
            module.training = True


def decoder_layers(base: Any) -> list[nn.Module]:
    """Return the repeated layers of the decoder, as the model type lists them in `_no_split_modules`.

    A vision tower's are not among them: a pass without pictures does not run it.
    """
    names = set(getattr(base, "_no_split_modules", None) or ())
    # FSDP gives each a class that inherits from its own.
    return [m for m in decoder_of(base).modules() if any(c.__name__ in names for c in type(m).__mro__)]
