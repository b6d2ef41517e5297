"""Writing a trained model in the ordinary layout, so that every other tool loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posttrain.config import AdapterConfig, ModelConfig
from posttrain.core import distributed
from posttrain.models.adapters import attach, merge, save_adapter
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model


def save_trained(
    policy: LanguageModel,
    tokenizer: Any,
    source: ModelConfig,
    folder: Path,
    adapter: AdapterConfig | None,
    merged: bool,
    seed: int,
    end_token: int | None,
) -> None:
    """Write weights, configuration and tokenizer to `folder`; adapters, if any, to `folder`/../adapter.

    Every rank must call; rank 0 writes.

    Args:
        policy: The trained model; it can't be used afterwards.
        tokenizer: Its tokenizer.
        source: The source that was trained.
        folder: Where to write.
        adapter: Settings of its adapters, if any.
        merged: False leaves the adapter alone in `folder` (peft's format, naming its base).
        seed: Seed of the stage.
        end_token: Added to the tokens that end generation: a model trained to close its turn must stop there.
    """

    def again() -> Any:
        hf, _ = load_model(source.model_copy(update={"device": "cpu"}), torch.float32)
        return hf if adapter is None else attach(hf, adapter, seed)

    hf = gathered(policy, again)
    if hf is None:
        return
    if adapter is not None:
        save_adapter(hf, folder.parent / "adapter")
        tokenizer.save_pretrained(folder.parent / "adapter")
        if not merged:
            save_adapter(hf, folder)
            tokenizer.save_pretrained(folder)
            return
        hf = merge(hf)
    hf.set_attn_implementation("sdpa" if hf._supports_sdpa else "eager")
    _end_at(hf.generation_config, end_token)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def gathered(policy: LanguageModel, again: Callable[[], Any]) -> Any:
    """Return the transformers model with its trained weights, whole; None on ranks that write nothing.

    Every rank must call. again: opens what was trained once more, in float32 on the CPU, for weights that are sharded.
    """
    if distributed.world() == 1:
        return policy.hf
    weights = {n: distributed.full_tensor(p.detach()).cpu() for n, p in policy.named_parameters() if p.requires_grad}
    if not distributed.is_main():
        return None
    hf = again()
    hf_weights = {name.removeprefix("hf."): w for name, w in weights.items()}
    missing = hf.load_state_dict(hf_weights, strict=False).unexpected_keys
    assert not missing, f"trained weights that the model does not have: {missing}"
    return hf


def _end_at(generation_config: Any, token: int | None) -> None:
    ends = generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if token is not None and token not in ends:
        generation_config.eos_token_id = [*ends, token] if ends else token
