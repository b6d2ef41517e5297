"""Attach a new soft prompt to a model: its parameters, and the values that they start from."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from posttrain.config import AdapterConfig
from posttrain.config.adapter_settings import NOT_MERGED
from posttrain.core.errors import ModelError
from posttrain.models.cache_names import cache_of
from posttrain.models.model_types import decoder_of
from posttrain.models.soft_prompt import SoftPrompt

FREQUENT = 5000
"""Vocabulary from which initial tokens are drawn: the first ids, which most tokenizers order by frequency (arXiv
2104.08691, section 3.2, takes the 5,000 most common tokens)."""
log = logging.getLogger("posttrain")


def attach_prompt(hf: Any, config: AdapterConfig, seed: int, task: str, *, tokenizer: Any = None) -> Any:
    """Attach trained vectors before the input (arXiv 2104.08691).

    Args:
        hf: A transformers model, or a peft model with a soft prompt of vectors, which is trained further.
        config: Settings.
        seed: Not used: torch's generator is seeded already.
        task: peft's task type.
        tokenizer: The model's tokenizer.

    Raises:
        ModelError: The model starts with another adapter, or the initial values can't be made.
    """
    from peft import PromptTuningConfig

    start = starting_values(hf, config, deep=False)
    if start is not None:
        hf = hf.get_base_model()
    values = _initial_vectors(hf, config, tokenizer) if start is None else start
    settings = PromptTuningConfig(task_type=task, num_virtual_tokens=len(values), **sizes(hf, values.shape[1]))
    return _with_values(wrap(hf, settings), values, start)


def attach_prefix(hf: Any, config: AdapterConfig, seed: int, task: str, *, tokenizer: Any = None) -> Any:
    """Attach trained keys and values of every layer.

    prefix: from an MLP while they are trained (arXiv 2101.00190): E -> tanh(E W1) W2. p_tuning_v2: trained themselves
    (arXiv 2110.07602).

    Args:
        hf: A transformers model, or (p_tuning_v2) a peft model with a prefix, which is trained further.
        config: Settings.
        seed: Not used: torch's generator is seeded already.
        task: peft's task type.
        tokenizer: The model's tokenizer.

    Raises:
        ModelError: The model starts with another adapter, its layers have keys of several shapes, or the initial values
            can't be made.
    """
    from peft import PrefixTuningConfig

    start = starting_values(hf, config, deep=True)
    if start is not None:
        hf = hf.get_base_model()
    layers, heads, size = layer_shapes(hf, config.kind)
    projected = config.kind == "prefix"
    settings = PrefixTuningConfig(
        task_type=task,
        num_virtual_tokens=config.tokens if start is None else len(start),
        num_layers=layers,
        num_attention_heads=heads,
        token_dim=heads * size,
        prefix_projection=projected,
        encoder_hidden_size=config.hidden or heads * size,
    )
    values = start
    if values is None and not projected:
        values = _initial_prefix(hf, config, tokenizer, 2 * layers * heads * size)
    return _with_values(wrap(hf, settings), values, start)


def attach_p_tuning(hf: Any, config: AdapterConfig, seed: int, task: str, *, tokenizer: Any = None) -> Any:
    """Attach trained vectors before and inside the input, from a two-layer bidirectional LSTM and an MLP.

    The vectors are MLP([LSTM forward; LSTM backward]) with one ReLU in the MLP (arXiv 2103.10385, equation 5).

    Args:
        hf: A transformers model.
        config: Settings.
        seed: Not used: torch's generator is seeded already.
        task: peft's task type.
        tokenizer: Not used: the vectors start at what the network makes of random ones.

    Raises:
        ModelError: The model starts with another adapter.
    """
    from peft import PromptEncoderConfig

    starting_values(hf, config, deep=None)
    width = _vectors(hf, torch.zeros(1, dtype=torch.long)).shape[1]
    front, before_target = config.virtual_tokens()
    settings = PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=front + before_target,
        **sizes(hf, width),
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=config.hidden or max(1, width // 2),
        encoder_num_layers=2,
        encoder_dropout=0.0,
    )
    adapted = wrap(hf, settings)
    adapted.soft_prompt_places = front, before_target
    return adapted


def sizes(hf: Any, width: int) -> dict[str, int]:
    """Return peft's settings of sizes for virtual tokens that are vectors of this width; it reads the width alone."""
    config = hf.config.get_text_config()
    named = {"num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads"}
    return {"token_dim": width, **{name: getattr(config, ours, 1) for name, ours in named.items()}}


def wrap(hf: Any, settings: Any) -> Any:
    """Return the peft model of a transformers model with a soft prompt by peft's settings."""
    from peft import get_peft_model

    adapted = get_peft_model(hf, settings)
    adapted.prompt_encoder.float()
    # peft looks for these on transformers' model, and says that it has no such attribute.
    adapted.merge_and_unload = adapted.merge_adapter = _refuse_merging  # type: ignore[method-assign]
    return adapted


def _refuse_merging(*args: Any, **kwargs: Any) -> None:
    raise ModelError(NOT_MERGED)


def starting_values(hf: Any, config: AdapterConfig, deep: bool | None) -> Tensor | None:
    """Return the values of the soft prompt that a model starts with, to be trained further; None: it has none.

    Args:
        hf: The model that is to get a soft prompt.
        config: Settings of that soft prompt.
        deep: It has keys and values for every layer; None: it can't start from another soft prompt.

    Raises:
        ModelError: The model starts with a soft prompt of another kind or length.
    """
    soft = SoftPrompt.of(hf)
    if soft is None:
        return None
    kind, there = soft.config.peft_type.value, soft.config.num_virtual_tokens
    if deep is None or soft.deep != deep or (deep and config.kind == "prefix") or soft.virtual.before_target:  # type: ignore[union-attr]
        fitting = "p_tuning_v2" if soft.deep else "prompt"
        how = f"continue it with adapter kind {fitting}" if soft.virtual.before_target == 0 else "train from its base"  # type: ignore[union-attr]
        raise ModelError(
            f"the model to start from has a soft prompt ({kind}, {there} virtual tokens), and {config.kind} can't be "
            f"trained on top of it: {how}, or start from its base model"
        )
    if "tokens" in config.model_fields_set and config.tokens != there:
        raise ModelError(
            f"adapter.tokens is {config.tokens}, but the soft prompt to start from has {there} virtual tokens: leave "
            "tokens out, or start from its base model"
        )
    if config.model_fields_set & {"init", "text", "labels"}:
        log.warning("adapter.init is not used: the soft prompt starts at that of the model to start from")
    return soft.vectors().detach().float().clone()


def layer_shapes(hf: Any, kind: str) -> tuple[int, int, int]:
    """Return (layers, key heads, head size) of a model whose layers all keep keys and values of one shape.

    Args:
        hf: A transformers model.
        kind: Kind of adapter, for the message.

    Raises:
        ModelError: Layers differ, share keys, or keep something else; or transformers' gradient checkpointing is on.
    """
    if getattr(hf, "is_gradient_checkpointing", False):
        raise ModelError(
            f"{kind}: the model has transformers' gradient checkpointing on, with which it keeps no keys and values, "
            "and peft refuses a prefix: call gradient_checkpointing_disable() first. systems.activation_checkpointing "
            "recomputes layers with prefixes too"
        )
    name = hf.config.get_text_config().model_type
    try:
        with torch.no_grad():
            tokens = torch.zeros(1, 1, dtype=torch.long, device=hf.device)
            cache = cache_of(decoder_of(hf)(input_ids=tokens, use_cache=True))
        shapes = [(layer.keys.shape, layer.values.shape) for layer in cache.layers]
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{kind}: {name} keeps no keys and values for each layer ({first})") from error
    wanted = getattr(hf.config.get_text_config(), "num_hidden_layers", len(shapes))
    if len({*shapes}) != 1 or shapes[0][0] != shapes[0][1] or len(shapes) != wanted:
        raise ModelError(
            f"{kind}: the layers of {name} keep keys and values of several shapes, or share them, which peft's format "
            "of a prefix can't hold. Use prompt or p_tuning"
        )
    _, heads, _, size = shapes[0][0]
    return len(shapes), heads, size


def _with_values(peft_model: Any, values: Tensor | None, start: Tensor | None) -> Any:
    """Set the trained values of a new soft prompt, and remember those that the stage started from."""
    if values is not None:
        with torch.no_grad():
            peft_model.prompt_encoder[peft_model.active_adapter].embedding.weight.copy_(values)
    peft_model.soft_prompt_start = start
    return peft_model


def _vectors(hf: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        vectors: Tensor = hf.get_input_embeddings()(ids.to(hf.device)[None])[0]
    return vectors.float()


def _initial_vectors(hf: Any, config: AdapterConfig, tokenizer: Any) -> Tensor:
    """Return the first values of a prompt's vectors, (tokens, width) float32."""
    count = config.tokens
    if config.init == "random":
        width = _vectors(hf, torch.zeros(1, dtype=torch.long)).shape[1]
        return torch.rand(count, width) - 0.5
    if tokenizer is None:
        raise ModelError(f"adapter.init {config.init} needs the model's tokenizer")
    if config.init == "text":
        ids = tokenizer(config.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ModelError(f"adapter.text {config.text!r} has no tokens")
        return _vectors(hf, torch.tensor((ids * -(-count // len(ids)))[:count]))
    special = set(tokenizer.all_special_ids)
    frequent = [i for i in range(min(FREQUENT, len(tokenizer))) if i not in special]
    rows = [_label_vector(hf, tokenizer, label) for label in config.labels]
    drawn = torch.tensor(frequent)[torch.randint(len(frequent), (count - len(rows),))]
    return torch.cat([*rows, _vectors(hf, drawn)]) if len(drawn) else torch.cat(rows)


def _label_vector(hf: Any, tokenizer: Any, label: str) -> Tensor:
    """Return the mean vector of a label's tokens, (1, width)."""
    ids = tokenizer(label, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ModelError(f"adapter.labels: {label!r} has no tokens")
    return _vectors(hf, torch.tensor(ids)).mean(0, keepdim=True)


def _initial_prefix(hf: Any, config: AdapterConfig, tokenizer: Any, width: int) -> Tensor:
    """Return the first values of a prefix without an MLP, (tokens, width) float32: what the model keeps of tokens."""
    if config.init == "random":
        return torch.randn(config.tokens, width)
    vectors = _initial_vectors(hf, config, tokenizer)
    with torch.no_grad():
        inputs = vectors.to(next(hf.parameters()).dtype)[None]
        cache = cache_of(decoder_of(hf)(inputs_embeds=inputs, use_cache=True))
    parts = [x[0].transpose(0, 1).flatten(1).float() for layer in cache.layers for x in (layer.keys, layer.values)]
    return torch.cat(parts, 1)
