"""Open a model so that it answers requests."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.config import ModelConfig
from posttrain.models.adapter_source import AdapterSource
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.models.verification import verify
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.served_adapters import open_served
from posttrain.serving.batcher import Batcher
from posttrain.serving.model_api import ModelApi


def open_model_api(
    config: ModelConfig,
    name: str,
    max_tokens: int = 512,
    max_waiting: int = 256,
    max_running: int | None = None,
    cache_mb: float | None = None,
    int8_cache: bool = False,
) -> ModelApi:
    """Load a model and start the thread that computes for it; `batcher.close` of the result ends it.

    Args:
        config: The model.
        name: Its name in answers.
        max_tokens: Longest answer if a request names no length.
        max_waiting: Prompts that may wait.
        max_running: Completions computed together. None: 128 on a CPU, 512 on a GPU.
        cache_mb: MiB for keys and values. None: a fifth of the memory.
        int8_cache: Keep keys and values in 8 bits.

    Raises:
        ModelError: It can't be loaded, or the sampler can't reach its attention.
    """
    hf, tokenizer = load_model(config, inference=True)
    opened = LanguageModel(hf).eval().requires_grad_(False)
    verify(opened)
    cache = "int8" if int8_cache else None
    sampler = LocalSampler(opened, tokenizer, max_running=max_running, memory_mb=cache_mb, kv_cache=cache)
    return ModelApi(name, Batcher(sampler, max_waiting), max_tokens)


def open_adapters(
    api: ModelApi, config: ModelConfig, sources: Mapping[str, str], adapters: Mapping[str, AdapterSource]
) -> list[ModelApi]:
    """Open adapters that clients choose by name, beside the model that they belong to.

    Args:
        api: The model, of which no request is computed yet.
        config: Its settings.
        sources: Source of each adapter, by its name for clients.
        adapters: What `find_served` found there.

    Raises:
        ModelError: One of them can't be served beside it.
    """
    out = []
    for name, adapter in adapters.items():
        opened = open_served(api.sampler.model, config, sources[name], adapter)
        api.batcher.adapters.add(opened.matrices, name)
        out.append(ModelApi(name, api.batcher, api.default_tokens, opened))
    return out
