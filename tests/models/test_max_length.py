"""Rotary frequencies that depend on the longest sequence of a call: what is computed together changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from posttrain.config import ModelConfig, SamplingConfig
from posttrain.core.errors import DataError, ModelError
from posttrain.core.types import RolloutGroup, Sample
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import context_length
from posttrain.models.max_length import alike_up_to, context
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request

ORIGINAL = 32
SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [2.0, 4.0, 6.0, 8.0]


def phi3(short: list[float] = SHORT) -> Any:
    """Phi-3 with factors for 1 to 32 tokens and for 33 to 256; decided opinions, so that frequencies matter."""
    rope = {"rope_type": "longrope", "short_factor": short, "long_factor": LONG, "factor": 8.0, "rope_theta": 100.0}
    hf = tiny_model(
        "phi3", rope_parameters=rope, original_max_position_embeddings=ORIGINAL, max_position_embeddings=256
    ).eval()
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return hf


def sample(length: int, first: int = 3) -> Sample:
    return Sample([(first + 7 * i) % 250 + 3 for i in range(length)], [0.0] + [1.0] * (length - 1))


def logprobs(model: LanguageModel, samples: list[Sample]) -> list[torch.Tensor]:
    """Of each sample's tokens, computed together."""
    batch = model.pack(samples)
    with torch.no_grad():
        found = torch.zeros(batch.total).index_copy(0, batch.targets_N, model(batch)[0])
    return [found[row[1:]] for row in batch.rows]


def theirs(hf: Any, one: Sample) -> torch.Tensor:
    """transformers' own, alone."""
    tokens = torch.tensor(one.tokens)
    with torch.no_grad():
        logits = hf(tokens[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)


def endless(model: LanguageModel) -> LocalSampler:
    """Nothing but the length ends its completions, and nothing is taken out of its distribution."""
    sampler = LocalSampler(model, tiny_tokenizer())
    sampler.ends = frozenset()
    return sampler


def mismatch(model: LanguageModel, groups: list[RolloutGroup]) -> float:
    """The largest difference between what was sampled with and the learner's."""
    worst = 0.0
    for group in groups:
        for r in group.rollouts:
            whole = Sample([*group.prompt, *r.tokens], [0.0] * len(group.prompt) + [1.0] * len(r.tokens))
            learner = logprobs(model, [whole])[0][len(group.prompt) - 1 :]
            worst = max(worst, float((learner - torch.tensor(r.logprobs)).abs().max()))
    return worst


def test_what_is_short_is_computed_as_alone_and_what_is_long_is_refused() -> None:
    """Up to the original length all is transformers' own; beyond it is an error, alone or beside others."""
    short, edge, long = sample(20), sample(ORIGINAL, 50), sample(ORIGINAL + 1, 90)
    expected = [theirs(phi3(), s) for s in (short, edge)]
    with_long = theirs(phi3(LONG), short)
    assert float((with_long - expected[0]).abs().max()) > 0.01  # it would show
    model = LanguageModel(phi3())
    for found in (logprobs(model, [short, edge]), [logprobs(model, [s])[0] for s in (short, edge)]):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    torch.testing.assert_close(logprobs(model, [short, edge])[0], logprobs(model, [short])[0], atol=1e-6, rtol=0)
    for company in ([long], [short, long]):
        with pytest.raises(ModelError, match=r"33 tokens.*phi3.*Keep sequences to 32.*long_factor.*short_factor"):
            logprobs(model, company)


def test_no_completion_passes_the_length_where_frequencies_change() -> None:
    sampler = endless(LanguageModel(phi3()))
    asked = [Request(sample(20).tokens, n=2, seed=1), Request(sample(30).tokens, n=2, seed=2)]
    groups = sampler.sample(asked, SamplingConfig(max_tokens=40))
    assert [[(len(r.tokens), r.finish) for r in g.rollouts] for g in groups] == [
        [(12, "length")] * 2,
        [(2, "length")] * 2,
    ]
    assert mismatch(sampler.model, groups) < 1e-4
    with pytest.raises(DataError, match=r"context of 32.*rope_type longrope.*short_factor"):
        sampler.sample([Request(sample(40).tokens)], SamplingConfig())


def test_with_the_factors_for_long_text_at_every_length() -> None:
    """What the message says to do: sequences on both sides of the original length, alone and together, learnt and
    sampled; and beyond it the model is the same as it was."""
    short, long = sample(20), sample(77, 50)
    model = LanguageModel(phi3(LONG))
    expected = [theirs(phi3(LONG), short), theirs(phi3(), long)]
    together, alone = logprobs(model, [short, long]), [logprobs(model, [s])[0] for s in (short, long)]
    for a, b, c in zip(together, alone, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        torch.testing.assert_close(a, c, atol=1e-5, rtol=0)
    sampler = endless(model)
    asked = [Request(short.tokens, n=2, seed=1), Request(long.tokens, n=2, seed=2), Request([5, 6], seed=3)]
    params = SamplingConfig(max_tokens=40)
    groups = sampler.sample(asked, params)
    assert mismatch(model, groups) < 1e-4
    for request, group in zip(asked, groups, strict=True):
        assert [r.tokens for r in sampler.sample([request], params)[0].rollouts] == [r.tokens for r in group.rollouts]


@pytest.mark.parametrize(
    ("kind", "changes", "alike", "whole"),
    [
        ("llama", {}, None, 2048),
        ("gpt2", {}, None, 2048),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 2048, 2048),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, None, 2048),
        (
            "phimoe",
            {
                "rope_parameters": {
                    "rope_type": "longrope", "short_factor": SHORT, "long_factor": SHORT, "factor": 32.0,
                    "short_mscale": 1.0, "long_mscale": 1.2, "rope_theta": 1e4, "original_max_position_embeddings": 64,
                },
            },
            64,
            64,
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {
                        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "rope_theta": 1e4,
                        "original_max_position_embeddings": 128, "factor": 16.0,
                    },
                },
            },
            128,
            128,
        ),
    ],
)  # fmt: skip
def test_up_to_which_length_all_is_alike(kind: str, changes: dict[str, Any], alike: int | None, whole: int) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 8}
    length = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    settings = AutoConfig.for_model(kind, **sizes, **{length: 2048}, **changes)
    assert (alike_up_to(settings), context(settings)) == (alike, whole)


def test_a_recipe_learns_of_it_before_anything_is_read(tmp_path: Path) -> None:
    phi3().config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Keep sequences to 32 tokens"):
        assert context_length(ModelConfig(source=str(tmp_path))) == ORIGINAL
    phi3(LONG).config.save_pretrained(tmp_path)
    assert context_length(ModelConfig(source=str(tmp_path))) == 256
