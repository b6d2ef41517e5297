"""Greedy answers, for evaluation and for looking at what a model says: by the sampler, else by `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from posttrain.config import SamplingConfig
from posttrain.core.errors import ModelError
from posttrain.core.image_tokens import image_spans
from posttrain.models.language_model import LanguageModel
from posttrain.models.vocabulary import output_rows, textless_ids
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request, stop_tokens


def greedy(
    model: LanguageModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: Sequence[int] = (),
) -> list[list[int]]:
    """Return the likeliest tokens until an end token (left out of the answer) or `max_new_tokens`.

    Models whose attention the sampler can't reach use transformers' `generate`.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Token ids, generation prompt included.
        max_new_tokens: Longest answer.
        stops: Tokens that end an answer, besides the model's own.

    Returns:
        The answers, in order.
    """
    if not model.ragged:
        if any(map(image_spans, prompts)):
            raise ModelError(f"{model.base.config.model_type}: answers to images need the local sampler")
        return _generated(model, tokenizer, prompts, max_new_tokens, stops)
    sampler = LocalSampler(model, tokenizer)
    requests = [Request(p, 1, 0) for p in prompts]
    params = SamplingConfig(temperature=0.0, max_tokens=max_new_tokens, stop_tokens=list(stops))
    groups = sampler.sample(requests, params)
    rollouts = [g.rollouts[0] for g in groups]
    return [list(r.tokens[:-1] if r.finish in ("end", "stop") else r.tokens) for r in rollouts]


@torch.no_grad()
def _generated(
    model: LanguageModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: Sequence[int] = (),
    batch_size: int = 16,
) -> list[list[int]]:
    """Return greedy answers by `generate`: prompts of like length together, padded on the left, which it masks."""
    base = model.base
    ends = list(dict.fromkeys([*stop_tokens(base, tokenizer), *stops]))
    textless = textless_ids(tokenizer, output_rows(base)) or None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in chosen)
            ids = torch.full((len(chosen), width), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
                mask[row, width - len(prompts[i]) :] = 1
            out = base.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends or None,
                pad_token_id=pad,
                suppress_tokens=textless,
            )
            for row, i in enumerate(chosen):
                answer = out[row, width:].tolist()
                stop = next((k for k, t in enumerate(answer) if t in ends), len(answer))
                answers[i] = answer[:stop]
    finally:
        model.train(training)
    return answers
