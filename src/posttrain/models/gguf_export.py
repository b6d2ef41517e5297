"""Write a model as a GGUF file, which llama.cpp and the programs around it run.

Weights of two dimensions get the type that is asked for, norms and biases stay float32. The embedding and the output
head are Q8_0 beside weights of 4 bits, as llama.cpp writes them: they take most of the harm. A weight that posttrain
quantised keeps its integers where the type has the same grid; else it is rounded anew.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.config import ModelConfig
from posttrain.core.errors import MissingExtraError, ModelError
from posttrain.models.gguf_blocks import GGUF_TYPES, exact_blocks, exact_type, ggml_type, gguf_blocks, type_for
from posttrain.models.gguf_tokenizer import add_tokenizer
from posttrain.models.model_shape import meta_model
from posttrain.models.quantized_weight import QuantizedWeight, quantized_modules, quantized_of

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model type -> llama.cpp's architecture."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 14}
"""Type of most tensors -> `general.file_type` (llama.h: LLAMA_FTYPE; Q4_K is its Q4_K_S)."""
TENSORS = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""transformers' module -> llama.cpp's tensor."""
OUTER = ("token_embd", "output")


@dataclass
class GGUFSummary:
    """Tell what was written.

    Attributes:
        file: The file.
        bytes: Its size.
        types: Type -> number of tensors.
        exact: Tensors whose integers were kept.
        rounded_again: Names of quantised weights that were rounded to another grid.
        notes: What a reader must know.
    """

    file: Path
    bytes: int = 0
    types: dict[str, int] = field(default_factory=dict)
    exact: int = 0
    rounded_again: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_gguf(hf: Any) -> str:
    """Check that a model can be written as a GGUF file, and return llama.cpp's name of its architecture.

    Raises:
        MissingExtraError: The package gguf is missing.
        ModelError: The model's type can't be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("writing a GGUF file needs the package gguf: pip install 'posttrain[gguf]'")
    return _architecture(hf.config.get_text_config())


def export_gguf(
    hf: Any, tokenizer: Any, file: Path, quantization: str = "auto", embeddings: str | None = None
) -> GGUFSummary:
    """Write a model as a GGUF file, whole or not at all.

    Args:
        hf: A transformers model.
        tokenizer: Its tokenizer.
        file: Where to write; it must not exist.
        quantization: One of `GGUF_TYPES`. auto: what the model's weights were quantised to, else F16.
        embeddings: Type of the embedding and the output head. None: Q8_0 beside 4 bits, else `quantization`.

    Raises:
        MissingExtraError: The package gguf is missing.
        ModelError: The model's type, its tokenizer or a type of weights can't be written, or the file exists.
    """
    architecture, config = check_gguf(hf), hf.config.get_text_config()
    if file.exists():
        raise ModelError(f"{file} exists already: name another file, or remove it first")
    quantization = _default_type(hf) if quantization == "auto" else quantization
    quantization, embeddings = gguf_types(quantization, embeddings)
    summary = GGUFSummary(file)
    from gguf import GGUFWriter

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".gguf-") as folder:
        fresh = Path(folder) / "model.gguf"
        writer = GGUFWriter(fresh, architecture)
        writer.add_name(Path(str(config.name_or_path or file.stem)).name or file.stem)
        writer.add_file_type(FILE_TYPES[quantization])
        writer.add_quantization_version(2)
        _add_sizes(writer, config, summary)
        ends = getattr(hf.generation_config, "eos_token_id", None)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        add_tokenizer(writer, tokenizer, hf.get_input_embeddings().weight.shape[0], ends)
        for name, array, kind in _tensors(hf, config, architecture, quantization, embeddings, summary):
            writer.add_tensor(name, array, raw_dtype=ggml_type(kind) if array.dtype == np.uint8 else None)
            summary.types[kind] = summary.types.get(kind, 0) + 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(fresh, file)
    summary.bytes = file.stat().st_size
    return summary


def planned_gguf(config: ModelConfig, quantization: str, embeddings: str | None) -> tuple[int, str]:
    """Return the bytes of the tensors that `export_gguf` would write, and their types in words; no weights are read.

    Args:
        config: Source of the model.
        quantization: As there. auto: F16, also of quantised weights, whose types their files name.
        embeddings: As there.

    Raises:
        MissingExtraError, ModelError: It can't be written.
    """
    hf = meta_model(config)
    check_gguf(hf)
    from gguf import GGML_QUANT_SIZES

    quantization, embeddings = gguf_types("F16" if quantization == "auto" else quantization, embeddings)
    hf.tie_weights()
    total, counts = 0, dict[str, int]()
    for name, tensor in hf.named_parameters():
        outer = any(part in ("embed_tokens", "lm_head") for part in name.split("."))
        wanted = embeddings if outer else quantization
        kind = "F32" if tensor.ndim == 1 else type_for(tensor.shape[-1], wanted)
        block, size = GGML_QUANT_SIZES[ggml_type(kind)]
        total, counts[kind] = total + tensor.numel() * size // block, counts.get(kind, 0) + 1
    return total, ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) + " tensors"


def gguf_types(quantization: str, embeddings: str | None) -> tuple[str, str]:
    """Return the types of linear layers, and of the embedding and the head. Raises ModelError for an unknown one."""
    for name in (quantization, embeddings or quantization):
        if name not in GGUF_TYPES:
            raise ModelError(f"GGUF type {name!r} can't be written: choose one of {', '.join(GGUF_TYPES)}")
    return quantization, embeddings or ("Q8_0" if quantization.startswith("Q4") else quantization)


def _architecture(config: Any) -> str:
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"a GGUF file can be written of the types {', '.join(ARCHITECTURES)} (SmolLM and SmolLM2 are llama), and "
            f"this model is {config.model_type}: save it in the Hugging Face layout and convert it with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"llama.cpp computes {found} with silu, and this model has {config.hidden_act}")
    return found


def _default_type(hf: Any) -> str:
    """Return the type that holds most quantised weights as they are; F16 if there are none."""
    kinds = [exact_type(w) or ("Q8_0" if w.bits == 8 else "Q4_1") for _, _, w in quantized_modules(hf)]
    return max(set(kinds), key=kinds.count) if kinds else "F16"


def _add_sizes(writer: Any, config: Any, summary: GGUFSummary) -> None:
    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < context:
        context = int(window)
        summary.notes.append(
            f"context_length is the sliding window, {window}: beyond it llama.cpp would attend to all of the text"
        )
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind not in ("default", "llama3"):
        raise ModelError(
            f"rotary positions of kind {kind!r} can't be written to a GGUF file: default, linear, yarn, llama3 can"
        )


def _tensors(
    hf: Any, config: Any, architecture: str, quantization: str, embeddings: str, summary: GGUFSummary
) -> Iterator[tuple[str, np.ndarray, str]]:
    """Yield (name, data, type) of each tensor."""
    seen: dict[int, str] = {}
    for module_name, module in hf.named_modules():
        for kind, tensor in module.named_parameters(recurse=False):
            name = _tensor_name(module_name, kind)
            if seen.setdefault(tensor.data_ptr(), name) != name:
                continue  # a tied head
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            count = heads.get(name.split(".")[-2], 0) if architecture == "llama" else 0
            if tensor.ndim == 1:
                values = _interleaved(tensor.detach().float().cpu(), count)
                yield name, values.numpy(), "F32"
                continue
            wanted = embeddings if name.split(".")[0] in OUTER else quantization
            yield name, *_matrix(module, tensor, count, wanted, name, summary)
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        yield "rope_freqs.weight", _rope_factors(config), "F32"


def _tensor_name(module: str, kind: str) -> str:
    parts = module.split(".")
    if "layers" in parts:
        at = parts.index("layers")
        found, block = TENSORS.get(".".join(parts[at + 2 :])), f"blk.{parts[at + 1]}."
    else:
        found, block = TENSORS.get(parts[-1]), ""
    if found is None or kind not in ("weight", "bias"):
        raise ModelError(
            f"{module}.{kind} has no place in a GGUF file: merge adapters first; layers must be those of transformers"
        )
    return f"{block}{found}.{kind}"


def _matrix(
    module: Any, tensor: torch.Tensor, count: int, wanted: str, name: str, summary: GGUFSummary
) -> tuple[np.ndarray, str]:
    """Return (data, type) of a matrix."""
    quantized = quantized_of(module)
    if quantized is not None and not torch.equal(quantized.dense(), tensor.detach().float().cpu()):
        quantized = None  # changed since
    if quantized is not None and exact_type(quantized) == wanted:
        summary.exact += 1
        zero = None if quantized.zero_O_G is None else _interleaved(quantized.zero_O_G, count)
        values, scale = (_interleaved(x, count) for x in (quantized.values_O_I, quantized.scale_O_G))
        return exact_blocks(QuantizedWeight(values, scale, zero, quantized.group, quantized.bits)), wanted
    kind = type_for(tensor.shape[1], wanted)
    if quantized is not None and kind not in ("F16", "F32"):
        summary.rounded_again.append(name)
    rows = _interleaved(tensor.detach().float().cpu(), count).numpy()
    return gguf_blocks(rows, kind), kind


def _interleaved(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Put rows of queries and keys in the order in which llama.cpp's `llama` turns pairs; heads 0: leave them.

    transformers turns row i of a head with row i + half, llama.cpp row 2 i with row 2 i + 1.
    """
    if not heads:
        return x.contiguous()
    return x.view(heads, 2, len(x) // heads // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape).contiguous()


def _rope_factors(config: Any) -> np.ndarray:
    """Return what Llama 3 divides each rotary frequency by, from transformers' own frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    factors: np.ndarray = (plain / scaled.double()).float().numpy()
    return factors
