"""Writing a trained model in the ordinary layout, so that every other tool loads it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain.config import AdapterConfig, ModelConfig
from posttrain.core import distributed
from posttrain.core.files import link_or_copy
from posttrain.data.image_reader import save_processor
from posttrain.models.adapter_export import OWN_BASE, write_adapter
from posttrain.models.adapters import attach_to, merge
from posttrain.models.compressed_writing import write_compressed
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import base_settings, load_model, open_model, source_adapter
from posttrain.models.model_types import set_attention
from posttrain.models.portable_files import NEEDS_NEW, finish_folder
from posttrain.models.quantization import write_quantization

log = logging.getLogger("posttrain")


def save_trained(
    policy: LanguageModel,
    tokenizer: Any,
    source: ModelConfig,
    folder: Path,
    adapter: AdapterConfig | None,
    merged: bool,
    seed: int,
    end_token: int | None,
    new_tokens: Sequence[int] = (),
) -> dict[str, Any]:
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
        new_tokens: Ids of tokens that got a row of the embedding when the source was opened.

    Returns:
        Notes for the manifest: what the adapter that was written is based on, and how far merging moved the logits.
    """

    def again() -> Any:
        opened = open_model(source.model_copy(update={"device": "cpu"}), torch.float32)
        return opened.hf if adapter is None else attach_to(opened, adapter, seed)

    hf = gathered(policy, again)
    if hf is None:
        return {}
    restore_attention(hf)
    notes: dict[str, Any] = {}
    if adapter is not None:
        beside = folder.parent / "adapter"
        notes = _save_adapter(hf, tokenizer, source, beside, end_token, merged, new_tokens)
        if not merged:
            shutil.copytree(beside, folder, copy_function=link_or_copy, dirs_exist_ok=True)
            return notes
        hf, notes["merge_difference"] = merge(hf)
    return notes | write_whole(hf, tokenizer, folder, end_token)


def write_whole(hf: Any, tokenizer: Any, folder: Path, end_token: int | None) -> dict[str, Any]:
    """Write a whole model in the Hugging Face layout.

    Args:
        hf: A transformers model.
        tokenizer: Its tokenizer.
        folder: Where to write.
        end_token: Added to the tokens that end generation. None: nothing is added.

    Returns:
        Notes for the manifest.
    """
    _end_at(hf.generation_config, end_token)
    hf.save_pretrained(folder)
    unread = write_compressed(hf, folder)
    _save_tokenizer(hf, tokenizer, folder)
    by_old = finish_folder(folder)
    note = unread or (None if by_old else NEEDS_NEW)
    return {} if note is None else {"transformers": note}


def _save_tokenizer(hf: Any, tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer, and the processor of a model that reads images.

    Args:
        hf: The model.
        tokenizer: Its tokenizer.
        folder: Where to write.
    """
    if getattr(hf.config, "vision_config", None) is not None:
        save_processor(tokenizer, folder)
    tokenizer.save_pretrained(folder)


def _save_adapter(
    peft_model: Any,
    tokenizer: Any,
    source: ModelConfig,
    folder: Path,
    end_token: int | None,
    merged: bool,
    new_tokens: Sequence[int],
) -> dict[str, Any]:
    """Write an adapter, its tokenizer, and its base if that exists nowhere else; return notes for the manifest."""
    start = source_adapter(source)
    made = write_adapter(peft_model, folder, source, start, new_tokens)
    if made == "on start":
        assert start is not None
        reason = f"it was trained on top of {start.location} and does not make one adapter with that"
        if merged:
            log.info("the adapter is not saved alone: %s. The merged model is saved whole", reason)
            shutil.rmtree(folder)
            return {"adapter": f"not saved alone: {reason}"}
        log.info("the adapter is saved with its base, in %s/%s: %s", folder, OWN_BASE, reason)
        base, _ = load_model(source.model_copy(update={"device": "cpu"}), next(peft_model.parameters()).dtype)
        restore_attention(base)
        write_whole(base, tokenizer, folder / OWN_BASE, None)
    own = source if start is None else base_settings(source, start)
    write_quantization(folder, None if made == "on start" else own.quantization)
    _save_tokenizer(peft_model.get_base_model(), tokenizer, folder)
    ends = peft_model.get_base_model().generation_config
    _end_at(ends, end_token)
    ends.save_pretrained(folder)
    finish_folder(folder)
    return {"adapter": made}


def restore_attention(hf: Any) -> None:
    """Let a model compute attention as transformers does, in place of posttrain's ragged attention."""
    base = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    set_attention(base, "sdpa" if base._supports_sdpa else "eager")


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
