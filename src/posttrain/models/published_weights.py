"""The weights of a policy as other processes read them: whole, merged, under the names of the Hugging Face model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from posttrain.core.errors import ModelError
from posttrain.models.language_model import LanguageModel
from posttrain.models.portable_files import finish_folder
from posttrain.models.quantization import is_quantized

INNER = re.compile(r"(?:\.token_adapter|\.base_layer|\.modules_to_save\.default)+\.")
"""What peft puts into the names of a model's own weights."""
FACTOR, ACTIVE = re.compile(r"\.lora_[AB]\.default\.weight$"), re.compile(r"\.default(?=\.weight$)")
"""An adapter's factor, and what peft's files leave out of its name."""
ADAPTER = "adapter"
"""Folder beside a model's weights with the factors of its adapter."""


def check_publishable(policy: LanguageModel) -> None:
    """Raise ModelError for a policy whose weights are no set of ordinary ones, which other processes could read."""
    reason = None
    if policy.soft_prompt is not None:
        reason = "a soft prompt is no change of any weight"
    elif is_quantized(policy.hf):
        reason = "this model's weights are in 4 or 8 bits"
    elif policy.image_token is not None:
        reason = "this model reads images"
    if reason is not None:
        raise ModelError(
            f"sampler workers take full weights and text, and {reason}: sample in this process (leave out "
            "sampler.workers, sampler.backend and systems.samplers)"
        )


@torch.no_grad()
def published_weights(
    policy: LanguageModel, *, every: bool = False, stored: bool = False, merged_in: bool = True
) -> dict[str, Tensor]:
    """Return a policy's weights by the names of the Hugging Face state dict; adapters are merged into them.

    A tensor that nothing was merged into is the policy's own, not a copy. Of tied weights one name is there, or a copy
    under each name with `stored`. The policy stays as it is. Ranks must be within `distributed.summon_full_params` if
    it is sharded.

    Args:
        policy: The policy.
        every: All weights; False: those that training changes.
        stored: Names and layouts of saved files, which for some types (mixtures of experts) are not those of the state
            dict; needs `every`.
        merged_in: False: weights as they are without their adapters.

    Raises:
        ModelError: An adapter changes only one of two tied weights.
    """
    base, out = policy.base, dict[str, Tensor]()
    adapters = [f"{name}." for name, module in base.named_modules() if _is_adapter(module)]
    layers = [m for m in base.modules() if merged_in and _can_merge(m)]
    merged = {id(p): tensor for layer in layers for p, tensor in _merged(layer)}
    _check_tied(base, merged)
    seen: set[int] = set()
    for name, tensor in _stored_tensors(base):
        if any(name.startswith(a) and not INNER.search(name, len(a) - 1) for a in adapters):
            continue
        changed, again = merged.get(id(tensor)), id(tensor) in seen
        seen.add(id(tensor))
        if (changed is not None or every or tensor.requires_grad) and (stored or not again):
            values = tensor.detach() if changed is None else changed
            out[INNER.sub(".", name)] = values.clone() if again else values
    if stored:
        from transformers.core_model_loading import revert_weight_conversion

        out = revert_weight_conversion(base, out)
    return out


def _stored_tensors(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what `state_dict` has, tied weights under each name. `state_dict` itself would shard weights again."""
    yield from base.named_parameters(remove_duplicate=False)
    for prefix, module in base.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer


def published_adapter(policy: LanguageModel) -> dict[str, Tensor]:
    """Return the factors of a policy's LoRA adapter by the names of peft's files; they are the policy's own tensors."""
    named = policy.base.named_parameters()
    return {f"base_model.model.{ACTIVE.sub('', n)}": p.detach() for n, p in named if FACTOR.search(n)}


def adapter_settings(policy: LanguageModel) -> dict[str, Any]:
    """Return the settings of a policy's LoRA adapter as peft's file has them, for factors that are sent alone.

    Raises:
        ModelError: More or something else is trained than the two factors of linear layers.
    """
    from peft.tuners.lora import Linear

    base = policy.base
    layers = [m for m in base.modules() if _is_adapter(m)]
    config = getattr(policy.hf, "peft_config", {}).get("default")
    if (
        config is None or not layers or getattr(config, "use_dora", True) or config.fan_in_fan_out
        or not all(isinstance(m, Linear) for m in layers) or any(m is base.get_output_embeddings() for m in layers)
        or not all(FACTOR.search(n) for n, p in base.named_parameters() if p.requires_grad)
    ):  # fmt: skip
        raise ModelError(
            "sampler.separate_adapter sends the factors of lora or rslora in linear layers, and this policy trains "
            "something else (all weights, another adapter, new tokens, experts, the output head): leave it out, and "
            "adapters are merged into the weights that are sent"
        )
    # However the factors began, the weights beside them are sent as they are now.
    settings = {**config.to_dict(), "init_lora_weights": True, "base_model_name_or_path": None}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}


def write_published(
    policy: LanguageModel, tokenizer: Any, folder: Path, *, untied: bool = False, separate: bool = False
) -> None:
    """Write a policy as it is now, adapters merged, in the ordinary layout; the policy can be trained on.

    Args:
        policy: The policy; whole on this rank.
        tokenizer: Its tokenizer.
        folder: Where to write.
        untied: Make two weights of input and output embeddings that are one. vLLM packs the output's on a CPU, and does
            not pack it again when only the input's name is loaded anew.
        separate: Write the weights without the adapter, and its factors to `adapter/model.safetensors`.
    """
    base = policy.base
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__.removeprefix("FSDP")]  # sharding gives the class another name
    config.dtype = next(policy.parameters()).dtype
    if untied:
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save(published_weights(policy, every=True, stored=True, merged_in=not separate), folder)
    if separate:
        (folder / ADAPTER).mkdir()
        _save(published_adapter(policy), folder / ADAPTER)
    finish_folder(folder)


def _save(weights: Mapping[str, Tensor], folder: Path) -> None:
    tensors = {name: w.cpu().contiguous() for name, w in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _is_adapter(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _can_merge(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and hasattr(module, "merge")


def _merged(layer: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield the weights that an adapter changes, with their values when it is merged, summed in float32.

    The sum is made on copies: subtracting it again would leave rounding in the weights, and moving them would break
    views that an optimizer holds.
    """
    storages = {p: p.data for p in layer.parameters()}
    inner = {id(p) for p in layer.get_base_layer().parameters()}
    try:
        for p, storage in storages.items():
            p.data = storage.to(torch.float32, copy=True)
        layer.merge()
        changed = [(p, p.data) for p in storages if id(p) in inner]
    finally:
        for p, storage in storages.items():
            p.data = storage
        layer.merged_adapters.clear()
    for p, tensor in changed:
        values = tensor.to(p.dtype)
        if not torch.equal(values, p.data):
            yield p, values


def _check_tied(base: Any, merged: dict[int, Tensor]) -> None:
    """Raise ModelError if an adapter makes input and output embeddings differ that share their weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in (base.get_input_embeddings(), base.get_output_embeddings()) if m is not None]
    adapted = [isinstance(m, BaseTunerLayer) for m in layers]
    weights = [m.get_base_layer().weight if a else m.weight for m, a in zip(layers, adapted, strict=True)]
    if len(weights) == 2 and weights[0] is weights[1] and adapted[0] != adapted[1] and id(weights[0]) in merged:
        raise ModelError(
            "an adapter changes one of the input and output embeddings, which share their weights: sample in this "
            "process (leave out sampler.workers and sampler.backend), or leave it out of adapter.target"
        )
