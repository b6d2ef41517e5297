"""Adapters through peft: attach them, save them in its format, merge them into the weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from posttrain.config import AdapterConfig
from posttrain.config.names import ADAPTERS
from posttrain.core.errors import ModelError
from posttrain.core.imports import load_object

Task = Literal["CAUSAL_LM", "SEQ_CLS"]


def attach(hf: Any, config: AdapterConfig, seed: int, task: Task = "CAUSAL_LM") -> Any:
    """Wrap a transformers model so that only its new adapters train; the same seed gives the same adapters.

    Args:
        hf: A transformers model.
        config: Settings. A `kind` from outside is the import path of a function (hf, config, seed, task, **options)
            that returns a peft model: an instance of `peft.PeftModel`, whose trainable parameters are in its modules.
        seed: Seed of the new weights; torch's generator is seeded with it, and restored afterwards.
        task: peft's task type: SEQ_CLS for models with a classification head, which is then trained as a whole.

    Returns:
        The peft model.

    Raises:
        ModelError: No module has one of the target names, or the function returned something else.
    """
    from peft import PeftModel

    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft asks transformers for an attribute that was renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        adapted = load_object(ADAPTERS.get(config.kind, config.kind))(hf, config, seed, task, **config.options)
    if not isinstance(adapted, PeftModel):
        raise ModelError(f"adapter.kind {config.kind}: expected a peft model from it, got {type(adapted).__name__}")
    return adapted


def attach_low_rank(hf: Any, config: AdapterConfig, seed: int, task: Task) -> Any:
    """Attach low-rank adapters.

    lora: W + (alpha / r) B A (arXiv 2106.09685). rslora: alpha / sqrt(r) (arXiv 2312.03732). dora: magnitude and
    direction are separate (arXiv 2402.09353).

    Args:
        hf: A transformers model.
        config: Settings.
        seed: Not used: torch's generator is seeded already.
        task: peft's task type.

    Raises:
        ModelError: No module has one of the target names.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=config.target,
        use_rslora=config.kind == "rslora",
        use_dora=config.kind == "dora",
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in hf.modules()),
        task_type=task,
    )
    try:
        return get_peft_model(hf, settings)
    except ValueError as error:
        matrices = [n for n, m in hf.named_modules() if hasattr(m, "weight") and m.weight.ndim == 2]
        names = sorted({n.rsplit(".", 1)[-1] for n in matrices})
        raise ModelError(
            f"adapter.target {config.target!r}: {error}; the model's matrices are named {names}"
        ) from error


def save_adapter(peft_model: Any, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft and other tools load them."""
    peft_model.save_pretrained(folder)


def merge(peft_model: Any) -> Any:
    """Return the transformers model with the adapters added into its weights (the peft model is used up)."""
    return peft_model.merge_and_unload()


def count_parameters(model: Any) -> tuple[int, int]:
    """Count all parameters, and the trainable ones."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
