"""Soft prompts in files: peft's format, the same with virtual tokens inside the input, and forms without peft.

peft's format holds what the network of `prefix` and `p_tuning` makes, in one tensor, `prompt_embeddings`: (tokens,
width), or (tokens, 2 layers heads size) for prefixes. Virtual tokens before the target have no place in it: such a
folder has the peft type `POSTTRAIN_P_TUNING`, which peft refuses, and a `template`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config.adapter_settings import TEMPLATE
from posttrain.core.errors import ModelError
from posttrain.models.adapter_source import AdapterSource
from posttrain.models.cache_names import cache_of
from posttrain.models.soft_prompt import KNOWN, SoftPrompt, split_layers
from posttrain.models.soft_prompt_adapters import layer_shapes, sizes, wrap

FREE_PLACES = "POSTTRAIN_P_TUNING"
TENSOR = "prompt_embeddings"
FREE_PLACES_SETTINGS = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "num_virtual_tokens",
    "token_dim",
    "inference_mode",
)
HEAD_TENSOR = re.compile(r"base_model\.(?:score|classifier)\.")
BAKED_FILE = "soft_prompt.safetensors"


def is_soft_prompt(settings: dict[str, Any]) -> bool:
    """Return True for the settings (adapter_config.json) of a soft prompt that posttrain computes."""
    return settings.get("peft_type") in (*KNOWN, FREE_PLACES)


def saved_settings(peft_model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are written for a soft prompt, from those that peft wrote.

    Args:
        peft_model: The model that is saved.
        settings: Content of adapter_config.json.
    """
    soft = SoftPrompt.of(peft_model)
    if soft is None:
        return settings
    if soft.deep:
        return settings | {"prefix_projection": False}  # what is saved is the result of the projection
    assert soft.virtual is not None
    if not soft.virtual.before_target:
        return settings
    front, between = (f"{{v:{n}}}" if n else "" for n in (soft.virtual.front, soft.virtual.before_target))
    kept = {name: settings.get(name) for name in FREE_PLACES_SETTINGS}
    return {"peft_type": FREE_PLACES, "template": f"{front}{{context}}{between}{{target}}", **kept}


def open_soft_prompt(base: Any, adapter: AdapterSource) -> Any:
    """Return the peft model that a saved soft prompt makes of its base, frozen.

    Args:
        base: The transformers model that the soft prompt belongs to, on its device.
        adapter: The soft prompt.

    Raises:
        ModelError: Its files can't be read, or it does not fit the base.
    """
    from peft import PrefixTuningConfig, PromptTuningConfig, load_peft_weights

    where = {"revision": adapter.revision} if adapter.revision else {}
    try:
        tensors = load_peft_weights(adapter.location, device="cpu", **where)
    except Exception as error:  # whatever a damaged file makes safetensors, torch or the Hub raise
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"adapter {adapter.location}: its weights can't be read: {first[0]}") from error
    values, head = tensors.pop(TENSOR, None), {}
    if adapter.settings.get("task_type") == "SEQ_CLS":
        head = {HEAD_TENSOR.sub("", name): tensors.pop(name) for name in list(tensors) if HEAD_TENSOR.match(name)}
    if values is None or values.ndim != 2 or tensors:
        raise ModelError(
            f"adapter {adapter.location}: expected one matrix, {TENSOR}, in its file, and it has "
            f"{sorted(tensors) + ([] if values is None else [f'{TENSOR} {tuple(values.shape)}'])}"
        )
    settings, task = adapter.settings, adapter.settings.get("task_type") or "CAUSAL_LM"
    count, deep = len(values), settings["peft_type"] == "PREFIX_TUNING"
    front, between = _places(adapter, count)
    if deep:
        layers, heads, size = layer_shapes(base, "PREFIX_TUNING")
        width = 2 * layers * heads * size
    else:
        width = base.get_input_embeddings().weight.shape[1]
    if values.shape[1] != width:
        raise ModelError(
            f"adapter {adapter.location} does not fit its base {adapter.base}: its virtual tokens have "
            f"{values.shape[1]} numbers each, and {width} are needed. Was it trained on another model?"
        )
    if deep:
        shapes = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * size}
        own: Any = PrefixTuningConfig(task_type=task, num_virtual_tokens=count, **shapes)
    else:
        own = PromptTuningConfig(task_type=task, num_virtual_tokens=count, **sizes(base, width))
    opened = wrap(base, own)
    opened.soft_prompt_places = front, between
    with torch.no_grad():
        opened.prompt_encoder[opened.active_adapter].embedding.weight.copy_(values)
    _load_head(opened, head, adapter)
    return opened.requires_grad_(False)


def _load_head(opened: Any, head: dict[str, Tensor], adapter: AdapterSource) -> None:
    """Load the head of a model for classification, which is trained with the soft prompt and saved beside it."""
    if adapter.settings.get("task_type") != "SEQ_CLS":
        return
    base = opened.get_base_model()
    module = getattr(base, "score", None) or base.classifier
    try:
        module.modules_to_save[opened.active_adapter].load_state_dict(head)
    except RuntimeError as error:
        raise ModelError(
            f"adapter {adapter.location}: its head does not fit its base {adapter.base}: {error}"
        ) from error


def _places(adapter: AdapterSource, count: int) -> tuple[int, int]:
    """Return the number of virtual tokens in front and before the target, by a saved soft prompt's settings."""
    if adapter.settings["peft_type"] != FREE_PLACES:
        return count, 0
    found = TEMPLATE.fullmatch(str(adapter.settings.get("template")))
    front, between = (int(found[i] or 0) for i in (1, 2)) if found else (0, 0)
    if front + between != count:
        raise ModelError(
            f"adapter {adapter.location}: its template {adapter.settings.get('template')!r} does not place the {count} "
            "virtual tokens of its file"
        )
    return front, between


def baked_tensors(adapter: AdapterSource) -> tuple[str, ...]:
    """Return the names of the tensors that `bake` writes of a soft prompt, by its settings alone."""
    if adapter.settings["peft_type"] == "PREFIX_TUNING":
        return "keys", "values"
    between = _places(adapter, int(adapter.settings["num_virtual_tokens"]))[1]
    return ("vectors",) if between else ("vectors", "keys", "values")


@torch.no_grad()
def bake(peft_model: Any, folder: Path) -> Path:
    """Write a soft prompt for programs without peft: `soft_prompt.safetensors` in `folder`.

    Its tensors: `vectors` (tokens, width), to be put before the embeddings of a prompt (vLLM's `prompt_embeds`); not
    for prefixes. `keys` and `values`, (layers, heads, tokens, size): what every layer keeps of the virtual tokens, the
    cache that a sequence continues; not with virtual tokens before the target.

    Args:
        peft_model: The model, as `load_model` opens it.
        folder: Where to write.

    Returns:
        The file.

    Raises:
        ModelError: The model has no soft prompt.
    """
    from safetensors.torch import save_file

    soft = SoftPrompt.of(peft_model)
    if soft is None or soft.virtual is None:
        raise ModelError("the model has no soft prompt to bake: name the folder that a stage with one left")
    base = peft_model.get_base_model()
    dtype, tensors = next(base.parameters()).dtype, dict[str, Tensor]()
    if soft.deep:
        parts = split_layers(soft.vectors().to(dtype), soft.config.num_layers, soft.config.num_attention_heads)
        tensors |= {"keys": parts[0::2], "values": parts[1::2]}
    else:
        vectors = soft.vectors().to(dtype)
        tensors["vectors"] = vectors
        if not soft.virtual.before_target:
            cache = cache_of(base(inputs_embeds=vectors[None], use_cache=True))
            for name in ("keys", "values"):
                tensors[name] = torch.stack([getattr(layer, name)[0] for layer in cache.layers])
    folder.mkdir(parents=True, exist_ok=True)
    places = {"front": str(soft.virtual.front), "before_target": str(soft.virtual.before_target)}
    save_file(
        {name: x.detach().cpu().contiguous() for name, x in tensors.items()}, folder / BAKED_FILE, metadata=places
    )
    return folder / BAKED_FILE
