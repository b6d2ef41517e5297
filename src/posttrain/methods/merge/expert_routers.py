"""Weights of the routers of a mixture of experts before they are trained: from prompts, at random, or zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.config.settings import DataConfig, ModelConfig
from posttrain.core.errors import DataError
from posttrain.core.progress import Track
from posttrain.methods.merge.merge_settings import MergeConfig
from posttrain.models.model_types import decoder_layers

MOST_PROMPTS = 256
"""Rows of an expert that are read; more change a mean by little."""
SPREAD = 0.02
"""Standard deviation of random weights, as transformers initialises routers."""


def expert_routers(config: MergeConfig, model: ModelConfig, hidden: int, seed: int) -> Callable[[int], Tensor]:
    """Return the weights of a layer's router by its number, (experts, hidden) in float32.

    Row e of a router from prompts is the mean, over the prompts of model e, of the mean over a prompt's tokens of what
    the layer's feed-forward part takes in the base, divided by its norm: a token goes to the experts whose prompts it is
    most like there. mergekit-moe's mode `hidden` does so with what the layer takes, before its attention.

    Args:
        config: Settings of the stage.
        model: The base, which is opened for prompts.
        hidden: Size of its hidden states.
        seed: Seed of random weights.

    Raises:
        DataError: Prompts can't be read.
    """
    assert config.experts is not None
    count, kind = len(config.models), config.experts.router
    if kind == "prompts":
        rows = prompt_means(model, [m.prompts or [] for m in config.models])
        rows /= rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return lambda layer: rows[layer]
    if kind == "zeros":
        return lambda layer: torch.zeros(count, hidden)

    def random(layer: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 100_003 + layer)
        return torch.randn(count, hidden, generator=generator) * SPREAD

    return random


@torch.no_grad()
def prompt_means(model: ModelConfig, prompts: Sequence[list[str] | DataConfig]) -> Tensor:
    """Compute the mean input of each layer's feed-forward part for each list of prompts, (layers, lists, hidden).

    Args:
        model: The model.
        prompts: Texts as they are; or rows, whose prompts with their answers are taken as they would be trained on.

    Raises:
        DataError: A list has no text.
    """
    from posttrain.models.loading import context_length, load_model

    hf, tokenizer = load_model(model, inference=True)
    longest = context_length(model)
    tokens = [_tokens(given, tokenizer, longest, number) for number, given in enumerate(prompts)]
    layers = decoder_layers(hf.eval())
    sums = torch.zeros(len(layers), len(prompts), hf.config.get_text_config().hidden_size)
    place = [0]

    def hook(layer: int) -> Callable[[Any, Any], None]:
        def add(module: Any, given: Any) -> None:
            sums[layer, place[0]] += given[0][0].float().mean(0).cpu()

        return add

    hooks = [layer.mlp.register_forward_pre_hook(hook(i)) for i, layer in enumerate(layers)]  # type: ignore[union-attr, operator]
    try:
        with Track("prompts of the experts", sum(map(len, tokens))) as track:
            for number, rows in enumerate(tokens):
                place[0] = number
                for row in rows:
                    hf(input_ids=torch.tensor([row], device=hf.device), use_cache=False)
                track.update(sum(map(len, tokens[: number + 1])))
    finally:
        for each in hooks:
            each.remove()
    return sums / torch.tensor([len(rows) for rows in tokens])[:, None]


def _tokens(given: list[str] | DataConfig, tokenizer: Any, longest: int | None, number: int) -> list[list[int]]:
    """Return the prompts of an expert as token ids."""
    if isinstance(given, DataConfig):
        from posttrain.data.sft_rows import prepare

        samples = prepare(given, tokenizer, context=longest).samples
        rows = [list(samples[i].tokens) for i in range(min(len(samples), MOST_PROMPTS))]
    else:
        rows = [list(tokenizer(text)["input_ids"])[:longest] for text in given]
    rows = [row for row in rows if row]
    if not rows:
        raise DataError(f"models.{number}.prompts has no text: a router from prompts needs some of every expert")
    return rows
