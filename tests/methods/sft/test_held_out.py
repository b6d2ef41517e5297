"""Supervised fine-tuning measures held-out rows: the right numbers, nothing else changed, the best step kept."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import posttrain
from posttrain.config import ModelConfig, SystemsConfig
from posttrain.core.files import read_lines
from posttrain.core.types import Sample
from posttrain.methods import sft_measurement
from posttrain.methods.sft import SFT, SFTConfig
from posttrain.methods.sft_measurement import before_answer, measurements, score_rows
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_tokenizer
from posttrain.models.tiny_model import tiny_model
from posttrain.report.load import read
from posttrain.report.terminal import answer_tables
from posttrain.runs.held_out_tasks import write_held_out_tasks
from posttrain.runs.registry import prepare_stage
from posttrain.sampling.greedy import greedy
from posttrain.trainer.stage import StageContext
from tests.conftest import random_samples

MODEL = ModelConfig(source="tiny:llama")
TOKENIZER = load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters without a rule; other.jsonl has other letters too, so that its loss soon rises."""
    folder = tmp_path_factory.mktemp("rows")
    for name, letters, count in (("rows", "abcdefgh ", 48), ("other", "abcdefgh  ijk", 12)):
        rng = random.Random(name)
        texts = ["".join(rng.choice(letters) for _ in range(20)) for _ in range(count)]
        lines = [json.dumps({"prompt": f"say {i}", "completion": t}) + "\n" for i, t in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder / "rows.jsonl"


def stage_of(rows: Path, **changes: Any) -> SFT:
    base: dict[str, Any] = {"method": "sft", "data": {"source": str(rows)}, "batch_size": 8, "max_steps": 12}
    base |= {"held_out": {"source": str(rows.with_name("other.jsonl"))}, "evaluate_every": 2, "checkpoint_every": 99}
    base |= {"optimizer": {"lr": 0.01, "schedule": "constant", "warmup": 0}, "held_out_answers": 2, "answer_tokens": 6}
    stage = prepare_stage(SFTConfig.model_validate(base | changes), StageContext(TOKENIZER, 2048))
    assert isinstance(stage, SFT)
    return stage


LORA = {"adapter": {"r": 4}, "max_steps": 8, "optimizer": {"lr": 0.1, "schedule": "constant", "warmup": 0}}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl")


def slow_loss(model: Any, samples: list[Sample]) -> tuple[float, float]:
    """The mean loss of all loss tokens, and their accuracy, by transformers' own forward, a row at a time."""
    nll, hits, count = 0.0, 0, 0
    for s in samples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(s.tokens)])).logits[0, :-1].double()
        for place, (token, weight) in enumerate(zip(s.tokens, s.weights, strict=True)):
            if weight:
                nll -= float(logits[place - 1].log_softmax(-1)[token])
                hits += int(logits[place - 1].argmax()) == token
                count += 1
    return nll / count, hits / count


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mamba"])
def test_the_loss_is_that_of_all_loss_tokens_for_any_micro_batch(kind: str) -> None:
    samples = random_samples(9, seed=1)
    expected = slow_loss(tiny_model(kind).eval(), samples)
    model = LanguageModel(tiny_model(kind)).train()
    for budget in (1, 70, 10_000):
        scores = score_rows(model, samples, SystemsConfig(tokens_per_micro_batch=budget))
        weight = sum(s.weight for s in scores)
        found = (sum(s.nll for s in scores) / weight, sum(s.hits for s in scores) / weight)
        assert found == pytest.approx(expected, abs=1e-5)
        assert [s.tokens for s in scores] == [int(sum(s.weights)) for s in samples]
    assert model.training


def test_tokens_count_by_their_weight() -> None:
    samples = [Sample([5, 6, 7, 8], [0.0, 0.5, 0.0, 2.0]), Sample([5, 9], [0.0, 1.0])]
    plain = [Sample(s.tokens, [float(w != 0) for w in s.weights]) for s in samples]
    model = LanguageModel(tiny_model("llama"))
    weighted, single = (score_rows(model, part, SystemsConfig()) for part in (samples, plain))
    halves = score_rows(model, [Sample([5, 6], [0.0, 1.0])], SystemsConfig())
    first = halves[0].nll
    assert weighted[0].nll == pytest.approx(0.5 * first + 2 * (single[0].nll - first), abs=1e-6)
    assert [(s.weight, s.tokens) for s in weighted] == [(2.5, 2), (1.0, 1)]


def test_measuring_changes_neither_the_training_nor_the_random_state(rows: Path, tmp_path: Path) -> None:
    """The same training rows, measured at every step or never: the same bits and the same metrics of the steps."""
    for name, changes in (("never", {"held_out": None}), ("always", {"evaluate_every": 1, "keep_best": False})):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        stage_of(rows, max_steps=4, **changes).run(MODEL, tmp_path / name, 3)
        states = torch.get_rng_state().sum(), np.random.rand(), random.random()
        (tmp_path / name / "states.json").write_text(json.dumps([float(x) for x in states]))
    never, always = (metrics_of(tmp_path / name) for name in ("never", "always"))
    without = [{k: v for k, v in m.items() if not k.startswith("held_out")} for m in always]
    assert without == [{"step": 0}, *never] and all("held_out/loss" in m for m in always)
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("never", "always"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert len({(tmp_path / name / "states.json").read_text() for name in ("never", "always")}) == 1


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_the_model_has_the_weights_of_the_step_with_the_lowest_loss(
    changes: dict[str, Any], rows: Path, tmp_path: Path
) -> None:
    stage = stage_of(rows, **changes)
    done, last = stage.run(MODEL, tmp_path, 0), stage.config.max_steps
    losses = {m["step"]: m["held_out/loss"] for m in metrics_of(tmp_path) if "held_out/loss" in m}
    assert list(losses) == list(range(0, last + 1, 2))
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < last and losses[last] > losses[best] + 1e-3  # or this tests nothing
    assert (done["best_step"], done["model_step"], done["steps"]) == (best, best, last)
    assert done["held_out_loss"] == {"before": losses[0], "best": losses[best]}
    assert done["epochs"] == pytest.approx(last * 8 / 48, abs=1e-4) and done["held_out_seconds"] > 0
    model, held_out = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32), stage.held_out
    assert held_out is not None
    loss, accuracy = slow_loss(model, list(held_out.samples))
    assert loss == pytest.approx(losses[best], abs=1e-4)
    kept = json.loads(measurements(tmp_path / "held_out")[best].read_text())
    assert (kept["loss"], kept["accuracy"]) == (losses[best], pytest.approx(accuracy, abs=1e-6))
    assert sum(r["nll"] for r in kept["rows"]) / sum(r["tokens"] for r in kept["rows"]) == pytest.approx(kept["loss"])
    timings = read_lines(tmp_path / "timings.jsonl")
    assert [t["step"] for t in timings if "held_out_seconds" in t] == list(losses)[1:]


def test_16_bit_weights_of_the_best_step_are_restored(rows: Path, tmp_path: Path) -> None:
    """Training keeps float32 masters: what is restored are the 16-bit weights that were measured."""
    model = MODEL.model_copy(update={"dtype": "bfloat16"})
    stage = stage_of(rows, held_out_answers=0)
    done = stage.run(model, tmp_path, 0)
    assert done["model_step"] < done["steps"] and stage.held_out is not None
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert next(hf.parameters()).dtype == torch.bfloat16
    scores = score_rows(LanguageModel(hf), stage.held_out.samples, SystemsConfig())
    loss = sum(s.nll for s in scores) / sum(s.weight for s in scores)
    assert loss == pytest.approx(done["held_out_loss"]["best"], abs=1e-4)


def test_it_stops_early_and_keeps_the_best(rows: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 200, "early_stopping": {"patience": 2}}
    done = stage_of(rows, **settings).run(MODEL, tmp_path, 0)
    losses = {m["step"]: m["held_out/loss"] for m in metrics_of(tmp_path) if "held_out/loss" in m}
    taken = max(losses)
    assert done["steps"] == taken == metrics_of(tmp_path)[-1]["step"] < 200
    assert done["stopped_early"] == {"planned_steps": 200, "patience": 2}
    assert done["model_step"] == taken - 4 == min(losses, key=lambda step: losses[step])
    again = stage_of(rows, **settings).run(MODEL, tmp_path, 0)
    assert (again["steps"], again["model_step"]) == (taken, taken - 4)  # resumed, it stays where it stopped


class Killed(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_what_was_killed_ends_in_the_same_bits_and_with_the_same_step(
    changes: dict[str, Any], rows: Path, tmp_path: Path
) -> None:
    """Killed between a better step and the checkpoint that names it, after the best one, and within the patience."""
    settings = {**changes, "max_steps": 40, "early_stopping": {"patience": 2}, "checkpoint_every": 5}
    calm = stage_of(rows, **settings).run(MODEL, tmp_path / "calm", 0)
    best, taken = calm["best_step"], calm["steps"]
    assert taken < 40
    for at in (best + 1,) if changes else (2, best - 1, best, best + 1, taken - 1):

        def on_step(step: int, *_: Any, at: int = at) -> None:
            if step == at:
                raise Killed

        with pytest.raises(Killed):
            stage_of(rows, **settings).run(MODEL, tmp_path / "killed", 0, on_step)
    killed = stage_of(rows, **settings).run(MODEL, tmp_path / "killed", 0)
    timing = ("seconds", "tokens_per_second", "held_out_seconds", "peak_memory_mb")
    assert {k: v for k, v in killed.items() if k not in timing} == {k: v for k, v in calm.items() if k not in timing}
    kept = [[p.name for p in measurements(tmp_path / side / "held_out").values()] for side in ("calm", "killed")]
    assert kept[0] == kept[1]
    for name in ("metrics.jsonl", "best_step.json", *(f"held_out/{n}" for n in kept[0])):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "calm" / name).read_text(), name
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("calm", "killed"))
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_answers_are_greedy_ones_to_the_same_prompts(kind: str, rows: Path, tmp_path: Path) -> None:
    """By the sampler, and where it can't reach the attention by `generate`; as the model before training gives them."""
    model = ModelConfig(source=f"tiny:{kind}")
    stage = stage_of(rows, max_steps=4)
    stage.run(model, tmp_path, 0)
    kept = [json.loads(path.read_text()) for path in measurements(tmp_path / "held_out").values()]
    assert [k["step"] for k in kept] == [0, 2, 4] and all(k["no_answers"] == "" for k in kept)
    asked = [[(a["prompt"], a["expected"]) for a in k["answers"]] for k in kept]
    held_out = stage.held_out
    assert held_out is not None
    assert asked[0] == asked[1] == asked[2] == [(r["prompt_text"], r["completion"]) for r in held_out.rows[:2]]
    prompts = [
        TOKENIZER.apply_chat_template(r["messages"], add_generation_prompt=True, return_dict=False)
        for r in held_out.rows[:2]
    ]
    answers = greedy(LanguageModel(tiny_model(kind)), TOKENIZER, prompts, 6)
    assert [a["output"] for a in kept[0]["answers"]] == [TOKENIZER.decode(a, skip_special_tokens=True) for a in answers]
    assert kept[0]["answers"] != kept[2]["answers"]


def test_a_model_that_can_not_be_sampled_from_trains_and_says_why(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise NotImplementedError("this type has no cache")

    monkeypatch.setattr(sft_measurement, "greedy", fails)
    stage_of(rows, max_steps=2).run(MODEL, tmp_path, 0)
    kept = json.loads(measurements(tmp_path / "held_out")[2].read_text())
    assert kept["answers"] == [] and kept["no_answers"] == "NotImplementedError: this type has no cache"
    assert caplog.text.count("sft: held-out prompts are not answered: NotImplementedError: this type has no cache") == 1


def test_texts_without_a_prompt_are_measured_and_not_answered(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"a text, number {i}"}) + "\n" for i in range(20)))
    stage_of(path, data={"source": str(path), "loss_on": "all"}, held_out=0.2, max_steps=2).run(
        MODEL, tmp_path / "out", 0
    )
    kept = json.loads(measurements(tmp_path / "out" / "held_out")[2].read_text())
    assert kept["loss"] > 0 and kept["answers"] == [] and "texts without a prompt" in kept["no_answers"]


def test_a_run_without_evaluations_compares_the_held_out_rows(rows: Path, tmp_path: Path) -> None:
    """Loss and answers before and after, in the table, in the terminal and on the page."""
    given = ["model.source=tiny:llama", f"stages.sft.data.source={rows}", "stages.sft.max_steps=4", "name=r"]
    given += [
        "stages.sft.optimizer={lr: 0.01, schedule: constant}",
        "stages.sft.batch_size=8",
        "stages.sft.held_out=0.2",
    ]
    with (tmp_path / "log").open("w") as file:
        console = Console(file=file, width=160)
        result = posttrain.run(posttrain.load_recipe("sft", given), tmp_path / "run", console=console)
    (compared,) = result.comparison
    folder = result.folder / "stages" / "0-sft"
    step = json.loads((folder / "best_step.json").read_text())["model_step"]
    losses = {m["step"]: m["held_out/loss"] for m in metrics_of(folder) if "held_out/loss" in m}
    assert compared["task"] == "sft-held_out" and compared["n"] == 10 and 0 < step
    for side, measured in (("before", losses[0]), ("after", losses[step])):
        assert compared[side]["value"] == pytest.approx(float(np.exp(measured)), rel=1e-6)
    sides = [
        json.loads((result.folder / "evaluations" / side / "sft-held_out.samples.json").read_text())
        for side in ("before", "after")
    ]
    assert [len(side) for side in sides] == [5, 5]
    (table,) = answer_tables(read(result.folder))
    assert table.row_count == 5
    log, page = (tmp_path / "log").read_text(), result.report.read_text()
    assert "greedy answers to the same prompts" in log and "sft-held_out" in log
    assert f"sft: held-out loss {losses[0]:.3f} before training, {losses[step]:.3f} at step {step}"[:50] in log
    assert "no evaluations" not in page and "not been evaluated" not in page
    taken = {"name": "sft-held_out", "kind": "perplexity", "data": {"source": str(rows)}}
    again = posttrain.Recipe.model_validate({**posttrain.load_recipe("sft", given).model_dump(), "evaluate": [taken]})
    assert write_held_out_tasks(again, result.folder) == [("sft-held_out-rows", "perplexity")]
    assert 'id="measured"' in page and "before training" in page and sides[0][0]["expected"] in page


def test_a_number_of_its_own_for_the_old_form_and_what_does_not_go_together() -> None:
    old = {"method": "sft", "data": {"source": "a.jsonl"}, "held_out": {"data": {"source": "b.jsonl"}, "every": 7}}
    config = SFTConfig.model_validate(old)
    assert config.evaluate_every == 7 and getattr(config.held_out, "source", "") == "b.jsonl"
    assert SFTConfig.model_validate(json.loads(config.model_dump_json())) == config
    for changes, message in (
        ({"held_out": None, "early_stopping": {}}, "early_stopping needs a held-out loss"),
        *(({"held_out": wrong}, "expected a fraction of the rows between 0 and 1") for wrong in (0, 1.0, 5, True, "a")),
        ({"held_out": {"source": "b.jsonl", "evry": 1}}, "Extra inputs"),
        ({"held_out": 0.1, "early_stopping": {"patience": 0}}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SFTConfig.model_validate({**old, "held_out": None, **changes})


def test_the_prompt_is_what_stands_before_the_last_answer() -> None:
    def before(*weights: float) -> list[int]:
        return before_answer(Sample(list(range(len(weights))), weights))

    assert before(0, 0, 1, 1, 0) == [0, 1] and before(0, 0, 1, 0, 0, 0.5) == [0, 1, 2, 3, 4]
    assert before(0, 1, 1) == [] == before(0, 0) == before(0, 1)
    assert before(0, 1, 0, 1) == [0, 1, 2]
