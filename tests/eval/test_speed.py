"""The evaluation of size and speed: what is counted is what the model holds, and rates are tokens over time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from posttrain.config import ModelConfig
from posttrain.core.errors import DataError
from posttrain.eval import speed
from posttrain.eval.evaluation_tasks import EvaluationRun
from posttrain.eval.speed_evaluation import SpeedTask
from posttrain.eval.tasks import evaluate_model
from posttrain.models.backends import backend_for
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.models.quantized_weight import QuantizedWeight, attach_quantized
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer

MODEL = ModelConfig(source="tiny:llama")


def settings(**values: object) -> SpeedTask.Config:
    given = {"prompt_tokens": 12, "answer_tokens": 4, "batch": 2, "repeats": 2, "memory": False}
    return SpeedTask.Config.model_validate(given | values)


@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_repeats_are_items_and_the_summary_is_their_spread(
    tmp_path: Path, kv_cache: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = []

    class Sampler(speed.LocalSampler):
        def sample(self, *args: object) -> object:  # type: ignore[override]
            caches.append(self.int8)
            return super().sample(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(speed, "LocalSampler", Sampler)
    (summary,) = evaluate_model(MODEL, [settings(repeats=3, kv_cache=kv_cache)], tmp_path)
    assert list(summary["rates"]) == list(speed.SPEED_RATES)[: 5 if kv_cache else 3]
    assert caches.count(False) == 1 + 3 * 4 and caches.count(True) == (1 + 3 * 4 if kv_cache else 0)
    assert summary["kind"] == "speed" and summary["n"] == 3 and summary["metric"] == "tokens/s"
    for rate in summary["rates"].values():
        assert 0 < rate["low"] <= rate["value"] <= rate["high"]
    assert summary["value"] == summary["rates"]["decode"]["value"]
    hf, _ = load_model(MODEL)
    assert summary["parameters"] == sum(p.numel() for p in hf.parameters())
    assert summary["memory_bytes"] >= 4 * summary["parameters"]


def test_rates_are_tokens_over_the_time_that_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt: 0.5 s, and 0.1 s for each token behind the first; two prompts: 0.8 s, and 0.125 s."""
    monkeypatch.setattr(
        speed, "_seconds", lambda _, prompts, n: (0.5 + 0.1 * (n - 1)) if len(prompts) == 1 else (0.8 + 0.125 * (n - 1))
    )
    found = speed.rates(SimpleNamespace(), [[1] * 20, [2] * 20], 8)  # type: ignore[arg-type]
    assert found == pytest.approx({"value": 10.0, "decode": 10.0, "prefill": 40.0, "batch": 16.0})
    monkeypatch.setattr(speed, "_seconds", lambda _, prompts, n: 3.0 if n == 1 else 2.0)  # a busy neighbour
    found = speed.rates(SimpleNamespace(), [[1] * 20, [2] * 20], 8)  # type: ignore[arg-type]
    assert found["decode"] == 4.0 and found["batch"] == 8.0


def test_answers_have_their_length_whatever_ends_them() -> None:
    hf, tokenizer = load_model(MODEL)
    model = LanguageModel(hf).eval()
    made = []

    class Sampler(speed.LocalSampler):
        def sample(self, *args: object, **more: object):  # type: ignore[no-untyped-def]
            made.extend(super().sample(*args, **more))  # type: ignore[arg-type]
            return made

    with torch.no_grad():  # the end token is the likeliest always
        hf.get_output_embeddings().weight.zero_()
        hf.get_output_embeddings().weight[tokenizer.eos_token_id] = 1.0
    speed._seconds(Sampler(model, tokenizer), [[5, 6, 7]], 9)
    assert len(made[0].rollouts[0].tokens) == 9


def test_memory_of_a_model_with_a_larger_vocabulary_is_measured(tmp_path: Path) -> None:
    """The tiny model that is served first has 259 tokens; the prompt's are the model's."""
    tiny_model("llama", 400).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    given = {"model": {"source": str(tmp_path)}, "prompt": [399, 300], "new": 2}
    assert speed.measure_serving(given) >= 0


def test_packed_weights_count_packed() -> None:
    values, scale = torch.zeros(32, 64, dtype=torch.int8), torch.ones(32, 2)
    layer, head = torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(32, 8, bias=False)
    weight = QuantizedWeight(values, scale, None, 32, 4)
    attach_quantized(layer, weight)
    model = SimpleNamespace(hf=torch.nn.Sequential(layer, head), backend=backend_for(torch.device("cpu")))
    found = speed.sizes_of(model, None)  # type: ignore[arg-type]
    assert found["memory_bytes"] == 4 * (64 * 32 + 32 * 8) + 64 * 32 + 4 * 32 * 2
    assert found["packed_bytes"] == weight.nbytes + 4 * 32 * 8 == 64 * 32 // 2 + 4 * 32 * 2 + 4 * 32 * 8


def test_what_does_not_fit_into_the_context_is_refused() -> None:
    hf, tokenizer = load_model(MODEL)
    with ExitStack() as until:
        run = EvaluationRun(LanguageModel(hf).eval(), tokenizer, None, 0, {}, until)
        with pytest.raises(DataError, match="lower prompt_tokens or answer_tokens"):
            list(speed.speed_chunks(run, settings(prompt_tokens=100_000)))
