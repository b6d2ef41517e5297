"""Conversion of GGUF files to the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_converted(gguf: Path, work: Path) -> None:
    """Write the model of a GGUF file to a folder in the Hugging Face layout, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain float32 now; transformers would refuse to save what it still believes quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.name_or_path = gguf.stem
    tokenizer.name_or_path = gguf.stem
    restore_pre_tokenizer(tokenizer, gguf)
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)


def restore_pre_tokenizer(tokenizer: Any, gguf: Path) -> None:
    """Put back what the GGUF names but transformers' converter leaves out: how text is split before merging."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    name = bytes(field.parts[field.data[0]]).decode() if field is not None else ""
    if name in ("smollm", "codeshell", "starcoder", "refact", "command-r"):
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
