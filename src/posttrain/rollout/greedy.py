"""Greedy answers through transformers' own `generate`: for evaluation and for looking at what a model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from posttrain.models import attention
from posttrain.models.lm import LanguageModel


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a turn: the model's and tokenizer's end tokens, and what the chat template puts behind a turn."""
    ends = model.generation_config.eos_token_id
    found = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return sorted(set(found))


@torch.no_grad()
def greedy(
    model: LanguageModel, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int = 16
) -> list[list[int]]:
    """The likeliest token each time, until an end token (left out of the answer) or `max_new_tokens`.

    prompts: token ids, generation prompt included. Prompts of like length run together, padded on the left, which
    `generate` masks. Order is kept. No prompts: no answers.
    """
    base = model.base
    ends = stop_tokens(base, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    before = base.config._attn_implementation
    training = model.training
    model.eval()
    base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
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
            )
            for row, i in enumerate(chosen):
                answer = out[row, width:].tolist()
                stop = next((k for k, t in enumerate(answer) if t in ends), len(answer))
                answers[i] = answer[:stop]
    finally:
        base.set_attn_implementation(before if model.ragged else base.config._attn_implementation)
        model.train(training)
    assert not model.ragged or base.config._attn_implementation == attention.NAME
    return answers
