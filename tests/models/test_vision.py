"""Models that read images: logits and gradients of a packed ragged batch are those of transformers, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.core.image_tokens import beginning, image_spans
from posttrain.core.types import Message, Sample
from posttrain.data.image_reader import image_reader, use_processor
from posttrain.data.learnt_turns import render_with_loss
from posttrain.data.pictures import read_picture
from posttrain.data.tokenizing import tokenize_rendered
from posttrain.models.language_model import LanguageModel
from posttrain.models.verification import own_attention
from posttrain.sampling.greedy import greedy
from posttrain.sampling.protocol import stop_tokens
from tests import vision

MARK = vision.MARK


def sample(tokenizer: Any, text: str, answer: str, *pictures: Any) -> Sample:
    """Encode a question with pictures and its answer as the rows of a stage are."""
    asked: Message = {"role": "user", "content": text}
    if pictures:
        asked["images"] = [read_picture(p) for p in pictures]
    (rendered,) = render_with_loss(tokenizer, [asked, {"role": "assistant", "content": answer}], "completion")
    ((tokens, weights),) = tokenize_rendered(tokenizer, [rendered])[0]
    if pictures:
        tokens, weights = image_reader(tokenizer).expand(tokens, weights, rendered.pictures)
    return Sample(tokens, weights)


def samples(tokenizer: Any) -> list[Sample]:
    """Two questions on one picture, one on another, one on both, and one without."""
    one, other = vision.picture(1), vision.picture(2, 90, 60)
    return [
        sample(tokenizer, f"{MARK}Which animal is it?", "a cat", one),
        sample(tokenizer, f"{MARK}How many?", "three", one),
        sample(tokenizer, f"{MARK}How many?", "none", other),
        sample(tokenizer, f"Compare {MARK} and {MARK}.", "alike", other, one),
        sample(tokenizer, "And without a picture?", "yes"),
    ]


def their_inputs(model: LanguageModel, processor: Any, tokens: Sequence[int]) -> dict[str, Any]:
    """Return what transformers' own forward pass takes, from the processor."""
    spans = image_spans(tokens)
    inputs: dict[str, Any] = {"input_ids": torch.tensor([list(tokens)])}
    if spans:
        pictures = [span.picture.open() for span in spans]
        text = processor.tokenizer.decode(shortened(tokens, processor))
        given = [pictures] if "Idefics3" in type(processor).__name__ else pictures
        inputs = dict(processor(text=[text], images=given, return_tensors="pt", add_special_tokens=False))
        assert inputs["input_ids"][0].tolist() == list(tokens)
    if hasattr(model.base.model, "get_rope_index"):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.image_token).int()
    return inputs


def their_logprobs(model: LanguageModel, processor: Any, row: Sample) -> Tensor:
    """Compute log-probabilities of a row's tokens by transformers' own forward pass."""
    inputs = their_inputs(model, processor, row.tokens)
    logits = model.base(use_cache=False, **inputs).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, inputs["input_ids"][0, 1:, None])[:, 0]


def their_answer(model: LanguageModel, processor: Any, prompt: list[int], count: int) -> list[int]:
    """Return the likeliest tokens by transformers' `generate`, up to an end token."""
    inputs = their_inputs(model, processor, prompt)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    banned = [model.image_token]  # as the sampler
    out = model.base.generate(**inputs, max_new_tokens=count, do_sample=False, suppress_tokens=banned)[0]
    tokens = out[len(prompt) :].tolist()
    ends = stop_tokens(model.base, processor.tokenizer)
    return tokens[: next((i for i, t in enumerate(tokens) if t in ends), count)]


def shortened(tokens: Sequence[int], processor: Any) -> list[int]:
    """Return tokens with one image token in place of each picture's."""
    out: list[int] = []
    at = 0
    for span in image_spans(tokens):
        out += [*tokens[at : span.start], image_id(processor)]
        at = span.stop
    return [*out, *tokens[at:]]


def image_id(processor: Any) -> int:
    return int(processor.tokenizer.convert_tokens_to_ids(processor.image_token))


@pytest.mark.parametrize("kind", list(vision.MAKERS))
def test_a_packed_batch_computes_what_transformers_does(kind: str) -> None:
    base, processor = vision.make(kind)
    use_processor(processor.tokenizer, processor)
    model, rows = LanguageModel(base), samples(processor.tokenizer)
    assert model.ragged
    calls: list[int] = []
    tower = base.get_image_features
    base.get_image_features = lambda **inputs: calls.append(1) or tower(**inputs)  # type: ignore[func-returns-value]

    batch = model.pack(rows, min_shared=4)
    shown = sum(len(image_spans(row.tokens)) for row in rows)
    assert batch.images is not None and len(batch.images.spans) == 2 < shown == 5
    assert batch.total < sum(map(len, rows)) - min(batch.images.sizes)  # a picture that two begin with is one prefix

    targets = torch.cat([row[1:] for row in batch.rows])
    ours = model(batch, "logprobs", targets)[0]
    assert len(calls) == len({tuple(s.inputs()["pixel_values"].shape[1:]) for s in batch.images.spans})
    weights = torch.randn(len(targets), generator=torch.Generator().manual_seed(1))
    parameters = dict(model.hf.named_parameters())
    our_gradients = torch.autograd.grad((ours * weights).sum(), list(parameters.values()), allow_unused=True)
    base.get_image_features = tower
    with own_attention(model):
        theirs = torch.cat([their_logprobs(model, processor, row) for row in rows])
    their_gradients = torch.autograd.grad((theirs * weights).sum(), list(parameters.values()), allow_unused=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    seen = set()
    for name, mine, other in zip(parameters, our_gradients, their_gradients, strict=True):
        assert (mine is None) == (other is None), name
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max() + 1), msg=name)
            seen.add("vision" if "vis" in name else "language" if "language" in name or "text" in name else "other")
    assert {"vision", "language"} <= seen
    use = [rows[i] for i in (1, 3, 4)]
    prompts = [beginning(row.tokens, next(i for i, w in enumerate(row.weights) if w)) for row in use]
    answers = greedy(model, processor.tokenizer, prompts, 6)
    with own_attention(model):
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer == their_answer(model, processor, prompt, 6)
    base.config.model_type = "other"
    with pytest.raises(ModelError, match="not for this type"):
        model(batch, "hidden")
    with pytest.raises(ModelError, match="lost their pictures"):
        model.pack([Sample(list(rows[0].tokens), rows[0].weights)])
