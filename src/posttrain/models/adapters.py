"""Low-rank adapters through peft: attached, saved in its format, merged into the weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

from posttrain.config import AdapterConfig
from posttrain.core.errors import ModelError


def attach(hf: Any, config: AdapterConfig, seed: int, task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM") -> Any:
    """Wrap a transformers model so that only its new adapters train; the same seed gives the same adapters.

    task: SEQ_CLS for models with a head for classification (of sequences or tokens), which then trains whole.
    lora: W + (alpha / r) B A (arXiv 2106.09685). rslora: alpha / sqrt(r) (arXiv 2312.03732). dora: magnitude and
    direction apart (arXiv 2402.09353). Raises ModelError where no module has a name asked for.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
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
            with warnings.catch_warnings():  # peft asks transformers for an attribute that was renamed
                warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
                return get_peft_model(hf, settings)
        except ValueError as error:
            names = sorted(
                {n.rsplit(".", 1)[-1] for n, m in hf.named_modules() if hasattr(m, "weight") and m.weight.ndim == 2}
            )
            raise ModelError(
                f"adapter.target {config.target!r}: {error}; the model's matrices are named {names}"
            ) from error


def save_adapter(peft_model: Any, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft and other tools load them."""
    peft_model.save_pretrained(folder)


def merge(peft_model: Any) -> Any:
    """The transformers model with the adapters added into its weights (the peft model is used up)."""
    return peft_model.merge_and_unload()


def count_parameters(model: Any) -> tuple[int, int]:
    """(all, trainable) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
