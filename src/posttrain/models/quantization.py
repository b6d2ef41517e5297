"""Models whose weights are stored in few bits: opening them, what can be trained on them, and full weights again.

Two ways lead to one. `model.quantization` quantises a model in 16 or 32 bits while it is read (QLoRA,
arXiv 2305.14314). Or the checkpoint is quantised already: then transformers' reader for its method opens it. Weights in
few bits have no gradient, so adapters are trained on them; merging an adapter first turns them into full weights.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from posttrain.config import ModelConfig, QuantizationConfig
from posttrain.core.errors import MissingExtraError, ModelError

READERS: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "compressed-tensors": ("compressed-tensors",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel", "accelerate"),
    "fp8": ("accelerate",),
    "mxfp8": ("accelerate",),
    "mxfp4": ("accelerate",),
    "fbgemm_fp8": ("fbgemm-gpu", "accelerate"),
    "hqq": ("hqq", "accelerate"),
    "quanto": ("optimum-quanto", "accelerate"),
    "torchao": ("torchao",),
    "auto-round": ("auto-round",),
    "aqlm": ("aqlm", "accelerate"),
    "vptq": ("vptq", "accelerate"),
    "spqr": ("spqr-quant", "accelerate"),
    "eetq": ("kernels", "accelerate"),
    "higgs": ("flute-kernel", "hadamard-transform", "accelerate"),
    "quark": ("amd-quark",),
    "fp_quant": ("fp-quant",),
    "bitnet": ("accelerate",),
}
"""Method of a quantised checkpoint -> the packages that transformers reads it with."""
IMPORTED_AS = {
    "optimum-quanto": "optimum.quanto", "auto-round": "auto_round", "spqr-quant": "spqr_quant", "flute-kernel": "flute",
    "hadamard-transform": "fast_hadamard_transform", "amd-quark": "quark", "fbgemm-gpu": "fbgemm_gpu",
    "compressed-tensors": "compressed_tensors", "fp-quant": "fp_quant",
}  # fmt: skip
"""Packages that are imported by another name."""
OPENED_IN_FULL = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
"""Methods whose weights transformers turns into full ones while it reads them: their kernels have no gradient."""
FILE = "quantization.json"
"""File in an adapter's folder that names the quantisation of the base that it was trained on."""


def method_of(settings: Any) -> str | None:
    """Return the method by which a transformers configuration says that its checkpoint is quantised; None: it is not.

    Args:
        settings: The configuration of the model.
    """
    found = getattr(settings, "quantization_config", None)
    if found is None:
        found = getattr(settings.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method") or "bitsandbytes"))
    return "bitsandbytes" if method.startswith("bitsandbytes") else method


def check_readable(config: ModelConfig, settings: Any) -> None:
    """Check, before weights are read, that a model can be opened in the bits that it has or is to get.

    Args:
        config: The model's settings in the recipe.
        settings: Its transformers configuration.

    Raises:
        MissingExtraError: A package is missing; with the line that installs it.
        ModelError: A quantised checkpoint is to be quantised again.
    """
    method = method_of(settings)
    if method is not None and config.quantization is not None:
        raise ModelError(
            f"model source {config.source!r} is quantised already ({method}): remove model.quantization, or name the "
            "model in 16 bit"
        )
    method = method or (None if config.quantization is None else "bitsandbytes")
    missing = [p for p in READERS.get(method or "", ()) if not _installed(p)]
    if missing:
        own = {"bitsandbytes", "compressed-tensors"} & set(missing)
        line = "pip install 'posttrain[quantized]'" if own else f"pip install {' '.join(missing)}"
        raise MissingExtraError(
            f"model source {config.source!r} needs {' and '.join(missing)} to read {method} weights, which "
            f"{'are' if len(missing) > 1 else 'is'} not installed: {line}"
        )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(IMPORTED_AS.get(package, package.replace("-", "_"))) is not None
    except ModuleNotFoundError:  # the parent of optimum.quanto
        return False


def reading_arguments(config: ModelConfig, settings: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` needs beside the usual arguments.

    Args:
        config: The model's settings in the recipe.
        settings: Its transformers configuration.
        device: Device of the model.
        dtype: Its compute dtype.
    """
    method = method_of(settings)
    if config.quantization is not None:
        return {"quantization_config": _bitsandbytes(config.quantization, dtype), "device_map": {"": device}}
    if method is None:
        return {}
    if method not in OPENED_IN_FULL:
        return {"device_map": {"": device}}
    from transformers.quantizers.auto import AutoQuantizationConfig

    stored = settings.quantization_config
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    return {"quantization_config": AutoQuantizationConfig.from_dict({**stored, "dequantize": True})}


def _bitsandbytes(config: QuantizationConfig, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    compute = dtype if config.compute_dtype == "auto" else getattr(torch, config.compute_dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.kind,
        bnb_4bit_use_double_quant=config.double,
        bnb_4bit_compute_dtype=compute,
    )


def finish_reading(hf: Any, config: ModelConfig, method: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Set up a model after it was read; return notes for the manifest.

    Args:
        hf: The transformers model.
        config: The model's settings in the recipe.
        method: Method by which the checkpoint is quantised (`method_of`).
        dtype: Its compute dtype.
    """
    if method is None and config.quantization is None:
        return {}
    if method in OPENED_IN_FULL:
        forget_quantization(hf)
        return {"quantization": f"{method}, opened as {str(dtype).removeprefix('torch.')}"}
    for module in hf.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes repacks weights for inference on such processors, and has no backward pass for them then.
            module.support_avx512bf16_for_cpu = False
        if config.quantization is None and hasattr(module, "quant_state") and hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
    for parameter in hf.parameters():
        if not parameter.is_floating_point():
            parameter.requires_grad_(False)
    if config.quantization is not None:
        _leave_file(hf)
    return {"quantization": method if config.quantization is None else config.quantization.model_dump()}


def _leave_file(hf: Any) -> None:
    """Copy the weights that are not quantised out of the mapped file: for their sake all of it would stay in memory."""
    for parameter in hf.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def forget_quantization(hf: Any) -> None:
    """Remove what marks a model as quantised, whose weights are full ones now."""
    for settings in (hf.config, hf.config.get_text_config()):
        if getattr(settings, "quantization_config", None) is not None:
            del settings.quantization_config
    hf.hf_quantizer = None
    hf.is_quantized = False
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        if hasattr(hf, name):
            setattr(hf, name, None if name == "quantization_method" else False)


def is_quantized(hf: Any) -> bool:
    """Return True if weights of a model, adapters around it or not, are in few bits."""
    base = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    return method_of(base.config) is not None


def check_training(hf: Any, merge: bool, ranks: int) -> None:
    """Check that a quantised model can be trained as asked; models with full weights pass.

    Args:
        hf: The model, adapters attached.
        merge: Adapters are to be merged into the weights afterwards.
        ranks: Number of processes that train it.

    Raises:
        ModelError: It has no adapters, can't be merged into, or would be sharded.
    """
    if not is_quantized(hf):
        return
    base = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    method = method_of(base.config)
    if base is hf:
        raise ModelError(
            f"every weight was to be trained, and the weights are quantised ({method}), which have no gradient: train "
            "adapters on them (adapter: {kind: lora}), or start from a model in 16 bit"
        )
    if ranks > 1:
        raise ModelError(
            f"a quantised model ({method}) is trained in one process, and there are {ranks}: its weights can't be "
            "sharded. Start one process, or use a model in 16 bit"
        )
    if merge and not can_dequantize(base):
        raise ModelError(
            f"merge: true, but adapters can't be merged into weights that are quantised by {method}: set merge: false "
            "to keep the adapter alone"
        )


def can_dequantize(base: Any) -> bool:
    """Return True if transformers can turn a quantised model's weights into full ones."""
    from transformers.quantizers.base import HfQuantizer

    quantizer = getattr(base, "hf_quantizer", None)
    return quantizer is not None and type(quantizer)._dequantize is not HfQuantizer._dequantize


def dequantized(peft_model: Any) -> Any:
    """Return a peft model with the same adapters on the full weights that its quantised ones stand for.

    The values are those that the adapters were trained on, rounded to the model's dtype. A model that is not quantised
    is returned as it is; else it is used up.

    Raises:
        ModelError: transformers can't do that for the method.
    """
    if not is_quantized(peft_model):
        return peft_model
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers.utils import logging

    base = peft_model.get_base_model()
    if not can_dequantize(base):
        raise ModelError(f"weights that are quantised by {method_of(base.config)} can't be turned into full ones")
    settings = peft_model.peft_config["default"]
    weights = {k: v.clone() for k, v in get_peft_model_state_dict(peft_model, save_embedding_layers=False).items()}
    base, verbosity = peft_model.unload(), logging.get_verbosity()
    logging.set_verbosity_error()  # names the dtype, which is the model's
    try:
        base = base.dequantize(dtype=next(base.parameters()).dtype)
    finally:
        logging.set_verbosity(verbosity)
    forget_quantization(base)
    with torch.random.fork_rng():
        full = get_peft_model(base, settings)
    set_peft_model_state_dict(full, weights)
    return full.eval()


def as_saved(config: ModelConfig) -> ModelConfig:
    """Return settings that open a result as it was saved: a merged model in full, an adapter on its own base."""
    return config.model_copy(update={"quantization": None})


def write_quantization(folder: Path, config: QuantizationConfig | None) -> None:
    """Write how the base of the adapter in `folder` was quantised while it was read, so that it is again."""
    (folder / FILE).unlink(missing_ok=True)
    if config is not None:
        (folder / FILE).write_text(json.dumps(config.model_dump()) + "\n", encoding="utf-8")


def stored_quantization(folder: Path) -> QuantizationConfig | None:
    """Return what `write_quantization` wrote; None: nothing."""
    file = folder / FILE
    return QuantizationConfig(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
