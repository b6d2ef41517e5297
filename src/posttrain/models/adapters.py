"""Adapters through peft: attach them, and merge them into the weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch

from posttrain.config import AdapterConfig
from posttrain.config.adapter_settings import NOT_MERGED
from posttrain.config.names import ADAPTERS
from posttrain.core.errors import ModelError
from posttrain.core.imports import load_object
from posttrain.models.adapter_targets import default_targets
from posttrain.models.quantization import dequantized, is_quantized
from posttrain.models.soft_prompt import SoftPrompt
from posttrain.models.vocabulary import trainable_rows

log = logging.getLogger("posttrain")
NOT_ON_A_SOFT_PROMPT = (
    "{what} can't be trained on top of the soft prompt of the model to start from: a stage continues a soft prompt "
    "with adapter kind prompt (vectors) or p_tuning_v2 (prefixes). Name one of these, or start from the base model"
)
Task = Literal["CAUSAL_LM", "SEQ_CLS"]
MERGE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest difference of merged and unmerged logits, relative to the size of the logits: of the median token."""
QUANTIZED_TOLERANCE = 0.02
"""The same at least, where the weights were quantised."""
PROBE_TOKENS = 24


def attach(
    hf: Any,
    config: AdapterConfig,
    seed: int,
    task: Task = "CAUSAL_LM",
    new_tokens: Sequence[int] = (),
    tokenizer: Any = None,
) -> Any:
    """Wrap a transformers model so that only its new adapters train; the same seed gives the same adapters.

    Args:
        hf: A transformers model.
        config: Settings. A `kind` from outside is the import path of a function (hf, config, seed, task, **options)
            that returns a peft model: an instance of `peft.PeftModel`, whose trainable parameters are in its modules.
        seed: Seed of the new weights; torch's generator is seeded with it, and restored afterwards.
        task: peft's task type: SEQ_CLS for models with a classification head, which is then trained as a whole.
        new_tokens: Ids of tokens without a trained row in the embedding. lora, rslora and dora train these rows too;
            with a kind from outside they stay as they are.
        tokenizer: The model's tokenizer, from which soft prompts get their initial values.

    Returns:
        The peft model.

    Raises:
        ModelError: No module has one of the target names, or the function returned something else; the model has a soft
            prompt, or new tokens, which this kind can't be trained with.
    """
    from peft import PeftModel

    options = dict(config.options)
    if config.is_soft_prompt:
        options["tokenizer"] = tokenizer
        if new_tokens:
            raise ModelError(
                f"adapter.kind {config.kind}: the tokenizer has {len(new_tokens)} tokens without a trained row of the "
                "embedding, and a soft prompt is saved without rows. Train them first (lora, or every weight), or "
                "leave model.add_tokens out"
            )
    elif SoftPrompt.of(hf) is not None:
        raise ModelError(NOT_ON_A_SOFT_PROMPT.format(what=f"adapter.kind {config.kind}"))
    elif new_tokens and config.kind in ADAPTERS:
        options["new_tokens"] = new_tokens
    elif new_tokens:
        log.warning(
            "adapter.kind %s does not train the rows of %d new tokens: they stay at the mean of the others. lora, "
            "rslora and dora train them", config.kind, len(new_tokens),
        )  # fmt: skip

    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft asks transformers for an attribute that was renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        adapted = load_object(ADAPTERS.get(config.kind, config.kind))(hf, config, seed, task, **options)
    if not isinstance(adapted, PeftModel):
        raise ModelError(f"adapter.kind {config.kind}: expected a peft model from it, got {type(adapted).__name__}")
    return adapted


def attach_to(opened: Any, config: AdapterConfig, seed: int, task: Task = "CAUSAL_LM") -> Any:
    """Do what `attach` does, to a model with its tokenizer and its new tokens.

    Args:
        opened: An `OpenedModel` of `posttrain.models.loading`.
        config: Settings.
        seed: Seed of the new weights.
        task: peft's task type.
    """
    return attach(opened.hf, config, seed, task, opened.new_tokens, opened.tokenizer)


def attach_low_rank(hf: Any, config: AdapterConfig, seed: int, task: Task, *, new_tokens: Sequence[int] = ()) -> Any:
    """Attach low-rank adapters.

    lora: W + (alpha / r) B A (arXiv 2106.09685). rslora: alpha / sqrt(r) (arXiv 2312.03732). dora: magnitude and
    direction are separate (arXiv 2402.09353).

    Args:
        hf: A transformers model.
        config: Settings.
        seed: Not used: torch's generator is seeded already.
        task: peft's task type.
        new_tokens: Ids of tokens whose rows of the embedding and of the output head are trained as they are.

    Raises:
        ModelError: No module has one of the target names.
    """
    from peft import LoraConfig, get_peft_model

    modules, parameters = default_targets(hf) if config.target == "all-linear" else (config.target, [])
    if parameters and config.kind == "dora":
        raise ModelError(
            "adapter.kind dora: DoRA can't adapt the experts of this model, which are one tensor a layer. Use lora or "
            f"rslora, or name linear layers in adapter.target (such as {modules})"
        )
    settings = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=modules,
        target_parameters=parameters or None,
        use_rslora=config.kind == "rslora",
        use_dora=config.kind == "dora",
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in hf.modules()),
        task_type=task,
        trainable_token_indices=trainable_rows(hf, new_tokens, [] if isinstance(modules, str) else modules) or None,
    )
    try:
        return get_peft_model(hf, settings)
    except ValueError as error:
        matrices = [n for n, m in hf.named_modules() if hasattr(m, "weight") and m.weight.ndim == 2]
        names = sorted({n.rsplit(".", 1)[-1] for n in matrices})
        raise ModelError(
            f"adapter.target {config.target!r}: {error}; the model's matrices are named {names}"
        ) from error


def merge(peft_model: Any, subject: str = "the adapters") -> tuple[Any, float]:
    """Return the transformers model with the adapters added into its weights, and how far its logits moved by it.

    The sum is made in float32 and rounded to the weights' dtype once. Quantised weights become full ones first. Input
    and output embeddings that share their weights are separated first if an adapter changes one of them alone: the
    trained model has two different matrices.

    Args:
        peft_model: The peft model; it is used up.
        subject: What is merged, for the message.

    Returns:
        The model, and the largest absolute difference between its logits before and after, on a few tokens.

    Raises:
        ModelError: peft can't merge this kind of adapter into these weights, or the merged model computes something
            else.
    """
    base = peft_model.get_base_model()
    if peft_model.active_peft_config.is_prompt_learning:
        raise ModelError(f"{subject}: {NOT_MERGED}")
    before = _probe_logits(peft_model, base)
    # Kernels for weights in few bits round otherwise (in 8 bit the activations too).
    least = QUANTIZED_TOLERANCE if is_quantized(peft_model) else 0.0
    peft_model = dequantized(peft_model)
    base = peft_model.get_base_model()
    _separate_embeddings(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "already merged": layer by layer, below
            for layer in [m for m in base.modules() if _is_tuner_layer(m)]:
                _merge_layer(layer)
            merged = peft_model.merge_and_unload()
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        kind = getattr(peft_model.active_peft_config.peft_type, "value", "")
        raise ModelError(f"{subject}: {kind} can't be merged into this model's weights ({error})") from error
    difference = (_probe_logits(merged, merged) - before).abs()
    # By token and relative to the size of logits, the median: one token of a mixture of experts may change its expert.
    moved = (difference.amax(-1) / before.abs().amax(-1).clamp_min(1.0)).median()
    dtype = next(merged.parameters()).dtype
    allowed = max(least, MERGE_TOLERANCE.get(dtype, 0.1))
    if not float(moved) <= allowed:
        raise ModelError(
            f"{subject}: the merged model is not the trained one. Its logits differ by up to "
            f"{float(difference.max()):.3g} ({float(moved):.2g} of their size; {allowed:g} is "
            f"allowed in {dtype}). Keep the adapter unmerged (merge: false), and please report its kind and the model"
        )
    return merged, float(difference.max())


def _is_tuner_layer(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and hasattr(module, "merge")


def _merge_layer(layer: Any) -> None:
    """Merge one layer's adapters, in float32 if its weights have fewer digits."""
    inner = layer.get_base_layer()
    dtypes = {p.dtype for p in inner.parameters()}
    low = dtypes.pop() if len(dtypes) == 1 else None
    if low not in (torch.bfloat16, torch.float16):
        layer.merge()
        return
    layer.float()
    layer.merge()
    layer.to(low)


def _separate_embeddings(base: Any) -> None:
    """Give the output head its own copy of shared embeddings if adapters change input and output differently."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [get() for get in (base.get_input_embeddings, base.get_output_embeddings)]
    if None in layers or not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return
    inner = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
    if inner[0].weight is not inner[1].weight:
        return
    inner[1].weight = torch.nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
    for settings in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
        settings.tie_word_embeddings = False


@torch.no_grad()
def _probe_logits(model: Any, base: Any) -> torch.Tensor:
    """Return (tokens, outputs) of a few tokens from the whole vocabulary, float32 on the CPU."""
    rows = base.get_input_embeddings().weight.shape[0]
    order = torch.randperm(PROBE_TOKENS, generator=torch.Generator().manual_seed(0))
    tokens = torch.linspace(1, rows - 1, PROBE_TOKENS).long()[order]
    training = model.training
    model.eval()
    try:
        logits = model(input_ids=tokens[None].to(next(base.parameters()).device), use_cache=False).logits
    finally:
        model.train(training)
    return logits.float().cpu().reshape(-1, logits.shape[-1])


def count_parameters(model: Any) -> tuple[int, int]:
    """Count all parameters, and the trainable ones."""
    # Two weights of 4 bit are a byte.
    sizes = [(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
