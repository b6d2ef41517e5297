"""A sampler over a model that is not trained (light: torch is imported when it is opened)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.config.settings import ModelConfig, SamplerConfig

if TYPE_CHECKING:
    from posttrain.sampling.engine import LocalSampler


def open_sampler(model: ModelConfig, config: SamplerConfig) -> LocalSampler:
    """Return a sampler over a model that is not trained, checked against the model's own forward pass."""
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model, pick_device, pick_dtype
    from posttrain.models.verification import verify
    from posttrain.sampling.engine import LocalSampler

    hf, tokenizer = load_model(model, pick_dtype(model.dtype, pick_device(model.device)), inference=True)
    policy = LanguageModel(hf).eval().requires_grad_(False)
    verify(policy)
    return LocalSampler(policy, tokenizer, **config.options())
