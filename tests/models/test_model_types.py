"""Model types that compute something of their own: right, or one sentence that says why not; never a traceback."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.models import attention, model_types, verification
from posttrain.models.cache_names import cache_argument, cache_of
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from posttrain.models.verification import verify
from tests.conftest import family

HEADS: list[tuple[str, dict[str, Any]]] = [
    ("falcon_h1", {"lm_head_multiplier": 0.0390625, "embedding_multiplier": 5.656, "key_multiplier": 0.39}),
    ("hyperclovax", {"logits_scaling": 0.125}),
    ("granite", {"logits_scaling": 8.0}),
    ("recurrent_gemma", {"logits_soft_cap": 3.0}),
    ("xlstm", {"output_logit_soft_cap": 3.0}),
    ("minicpm3", {"dim_model_base": 8}),
    ("inkling_text", {"logits_mup_width_multiplier": 4.0}),
]
ALONE = ["llama4_text", "nemotron", "doge", "deepseek_v32", "inkling_text"]
"""Types that take no ragged batch, though their class says that attention goes through transformers' interface."""


def of(kind: str, **changes: Any) -> LanguageModel:
    """A model of this type; its warnings are another test's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LanguageModel(tiny_model(kind, **changes))
        verify(model)
    return model


@pytest.mark.parametrize(("kind", "changes"), HEADS, ids=[t for t, _ in HEADS])
def test_the_head_s_transforms(kind: str, changes: dict[str, Any]) -> None:
    """Multipliers, divisors and soft caps, where logits are large enough to show them."""
    hf = tiny_model(kind, **changes)
    with torch.no_grad():
        hf.get_output_embeddings().weight.mul_(40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LanguageModel(hf)
        assert verify(model) < 1e-4
    plain = dataclasses.replace(model.head(), scale=1.0, softcap=None)
    model.logits_head = lambda packed=False: plain  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="output head differ"):
        verify(model)


@pytest.mark.parametrize("kind", ALONE)
def test_what_takes_no_ragged_batch_is_computed_one_at_a_time(kind: str) -> None:
    """Said so once, and equal to the model's own logits, sequence by sequence."""
    model_types._one_at_a_time.clear()
    with pytest.warns(UserWarning, match=f"{kind}: its attention can't be shared"):
        model = LanguageModel(tiny_model(kind))
        verify(model)
    assert not model.ragged
    samples = family()
    batch = model.pack(samples)
    logprobs = model(batch)[0].detach()
    found = torch.zeros(batch.total).index_copy(0, batch.targets_N, logprobs)
    for sample, row in zip(samples, batch.rows, strict=True):
        tokens = torch.tensor(sample.tokens)
        logits = model.base(tokens[None], use_cache=False).logits[0, :-1]
        own = logits.log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1).detach()
        torch.testing.assert_close(found[row[1:]], own, atol=1e-5, rtol=0)


def test_llama_4_s_chunks_are_honoured() -> None:
    """A token does not see the chunk before its own: changing it changes nothing."""
    model = of("llama4_text", attention_chunk_size=8, layer_types=["chunked_attention"] * 2)
    one, other = [5] * 8 + list(range(20, 28)), [9] * 8 + list(range(20, 28))
    first, second = (model(model.pack([Sample(t, [0.0] * 9 + [1.0] * 7)]))[0] for t in (one, other))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bert", "depend on later tokens"),
        ("xlm-roberta", "depend on later tokens"),
        ("modernbert-decoder", "output head differ"),
        ("rembert", "can't compute log-probabilities"),
    ],
)
def test_what_can_not_be_trained_is_refused_in_a_sentence(kind: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"{kind}: .*{message}"):
        of(kind)


def test_a_ragged_batch_that_goes_wrong_later_is_noticed() -> None:
    """An attention that ignores which segment a token belongs to: computed one at a time, in this process for good."""
    hf = tiny_model("helium")
    model = LanguageModel(hf)
    assert model.ragged

    def mix_neighbours(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        before = torch.nn.functional.pad(out[0], (0, 0, 1, 0))[:, :-1]
        return (out[0] + before, *out[1:]) if kwargs.get("ragged") is not None else out

    hf.model.layers[0].self_attn.register_forward_hook(mix_neighbours, with_kwargs=True)
    with pytest.warns(UserWarning, match="other numbers on a ragged batch"):
        verify(model)
    assert not model.ragged
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not LanguageModel(tiny_model("helium")).ragged
    model_types._one_at_a_time.clear()


def test_a_window_that_is_not_honoured_is_noticed() -> None:
    """Sequences are longer than a small window; of twelve tokens this would be right."""
    own = attention.ragged_attention
    from transformers import AttentionInterface

    model = LanguageModel(tiny_model("mistral", sliding_window=24))
    AttentionInterface.register(
        attention.IMPLEMENTATION_NAME, lambda *args, **kwargs: own(*args, **{**kwargs, "sliding_window": None})
    )
    with pytest.warns(UserWarning, match="mistral: .*other numbers on a ragged batch"):
        verify(model)
    attention.register()
    model_types._one_at_a_time.clear()


def test_in_16_bit_a_head_that_is_a_little_off_is_noticed() -> None:
    """By 5%, where the log-probabilities of a random model differ by 0.02 nats: the head is compared alone."""
    model = LanguageModel(tiny_model("llama").to(torch.bfloat16))
    verify(model)
    off = dataclasses.replace(model.head(), scale=1.05)
    model.logits_head = lambda packed=False: off  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="output head differ"):
        verify(model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lama", r"no model type of transformers; did you mean .*tiny:llama"),
        ("vit", "has no causal language model"),
        ("gemma3n", "no small model of this type could be made.*folder"),
    ],
)
def test_an_unknown_tiny_model_gives_the_nearest_names(kind: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        tiny_model(kind)


def test_a_cache_has_one_of_two_names() -> None:
    """By the model, not by the version of transformers: one with its own code may have the older name."""

    class Older:
        def forward(self, input_ids: Any, past_key_values: Any = None) -> Any:
            return SimpleNamespace(past_key_values="kept")

    class Newer:
        def forward(self, input_ids: Any, cache: Any = None) -> Any:
            return SimpleNamespace(cache="kept")

    assert (cache_argument(Older()), cache_argument(Newer())) == ("past_key_values", "cache")
    assert cache_of(Older().forward(0)) == cache_of(Newer().forward(0)) == "kept"
    made = tiny_model("llama")
    assert cache_of(made(torch.tensor([[5]]), use_cache=True)).get_seq_length() == 1
    assert cache_argument(made) in inspect.signature(type(made).forward).parameters


def test_a_model_that_magnifies_rounding_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a single position passes if rounding the embeddings moves the model's own numbers as far."""
    model = LanguageModel(tiny_model("llama")).eval()
    samples = verification._samples(model)
    ours = verification._own_passes(model, model.pack(samples, min_shared=4))[1]
    their_pass = verification._their_pass
    theirs = their_pass(model, samples)[0]
    error = (ours - theirs).square().mean(-1).sqrt() / theirs.std(-1)
    assert 0 < error.median() < error.max()
    tolerance = float((error.median() * error.max()).sqrt())
    monkeypatch.setattr(verification, "SINGLE_TOLERANCE", tolerance)
    monkeypatch.setattr(verification, "_their_pass", lambda model, samples: (their_pass(model, samples)[0], None))
    verify(model)
    monkeypatch.setattr(verification, "ROUNDING_FACTOR", 0)
    with pytest.raises(ModelError, match="differ from the model's own"):
        verify(model)
