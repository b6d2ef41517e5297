"""The quality checks of instruction rows: what is left out before rows are made, and what is measured of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import Recipe
from posttrain.config.settings import ModelConfig
from posttrain.core.errors import RecipeError
from posttrain.core.files import write_lines
from posttrain.data.instruction_builder import InstructionBuilder
from posttrain.data.instruction_settings import InstructionSettings
from posttrain.data.instruction_tasks import InstructionTask
from posttrain.data.quality_settings import QualitySettings
from posttrain.methods.data.instruction_quality import HELD_OUT, NEAR_DUPLICATE, InstructionQuality, read_rows
from posttrain.methods.data.row_difficulty import first_rows_of_tasks, measure_difficulty
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.recipe import machine_checks
from posttrain.recipe.machine_checks import check_machine
from posttrain.trainer.stage import StageContext

WORDS = [f"word{i}" for i in range(500)]


def sentence(seed: int, count: int = 20) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def task(folder: Path, name: str, inputs: list[str], **more: Any) -> InstructionTask:
    table = folder / f"{name}.jsonl"
    table.write_text("".join(json.dumps({"text": t, "label": "ab"[i % 2]}) + "\n" for i, t in enumerate(inputs)))
    settings = {"type": "classification", "data": str(table), "fields": {"input": "{text}"}, "output": "{label}"}
    return InstructionTask.model_validate({"name": name, "cluster": name, **settings, **more})


def evaluations(folder: Path, texts: list[str]) -> tuple[Any, ...]:
    (folder / "e.jsonl").write_text("".join(json.dumps({"prompt": t, "completion": "a"}) + "\n" for t in texts))
    stage = {"method": "sft", "name": "s", "data": {"source": "packaged:movie_reviews.tsv"}}
    tests = [{"kind": "perplexity", "name": "test", "data": {"source": str(folder / "e.jsonl")}}]
    recipe = {"name": "r", "model": {"source": "tiny:llama"}, "stages": [stage], "evaluate": tests}
    return tuple(Recipe.model_validate(recipe).evaluate)


def checked(folder: Path, tasks: list[InstructionTask], context: StageContext, **settings: Any) -> tuple[Any, ...]:
    quality = InstructionQuality(QualitySettings.model_validate(settings), tasks, context)
    builder = InstructionBuilder(tasks, 0, InstructionSettings(held_out=4, shots={"share": 0.0}), folder / "work")
    builder.read()
    quality.drop(builder)
    builder.split()
    quality.drop_held_out(builder)
    out = folder / "out"
    out.mkdir()
    write_lines(out / "rows.jsonl", list(builder.rows()))
    write_lines(out / "seen.jsonl", list(builder.held_out_rows(False)))
    return quality, builder, out


def test_near_duplicates_and_leaks_are_left_out_counted_and_not_in_the_rows(tmp_path: Path) -> None:
    inputs = [sentence(i) for i in range(40)]
    inputs[10] = inputs[2] + " more"
    inputs[11] = f"{sentence(100)}. {inputs[4].upper()} after"  # leaks, as 4 does, and is no near duplicate
    tasks = [task(tmp_path, "one", inputs)]
    context = StageContext(tiny_tokenizer(), 2048, evaluations=evaluations(tmp_path, [inputs[4], "a text of its own"]))
    quality, builder, out = checked(tmp_path, tasks, context)
    dropped = builder.dropped().counts
    assert dropped[NEAR_DUPLICATE] == 1 and dropped["text of evaluation test"] == 2
    written = " ".join((out / name).read_text() for name in ("rows.jsonl", "seen.jsonl"))
    assert inputs[4] not in written and inputs[10] not in written and inputs[5] in written
    stats = quality.measure(out)
    assert stats["duplicates"]["near"] == 1 and stats["duplicates"]["tasks"]["one"]["texts"] == 40
    (pair,) = stats["duplicates"]["examples"]
    assert (pair["place"], pair["earlier"]["place"]) == ("one.jsonl:11", "one.jsonl:3") and pair["similarity"] == 0.9474
    assert stats["leaks"]["examples"] == {"test": {"one": 2}}
    assert stats["leaks"]["rows"] == 0
    assert {name: s["items"] for name, s in stats["leaks"]["evaluations"].items()} == {"test": 2, "seen.jsonl": 4}
    assert stats["breadth"]["rows"] == 40 - 3 - 4 and stats["truncated"]["rows"] == 0


def test_what_is_only_counted_stays_and_is_found_in_the_rows(tmp_path: Path) -> None:
    inputs = [sentence(i) for i in range(30)]
    inputs[10] = inputs[2] + " more"
    tasks = [task(tmp_path, "one", inputs)]
    context = StageContext(tiny_tokenizer(), 60, evaluations=evaluations(tmp_path, [inputs[4], inputs[5]]))
    keep = {"near_duplicates": {"drop": False}, "leaks": {"drop": False}}
    quality, builder, out = checked(tmp_path, tasks, context, **keep)
    assert not builder.dropped().counts["text of evaluation test"]
    stats = quality.measure(out)
    trained = {row["input"] for row in read_rows(out / "rows.jsonl")}
    assert stats["leaks"]["evaluations"]["test"]["leaked_items"] == len(trained & {inputs[4], inputs[5]}) > 0
    assert stats["duplicates"] | {"dropped": False} == stats["duplicates"] and stats["duplicates"]["near"] == 1
    assert stats["truncated"]["rows"] == stats["breadth"]["rows"]  # the tiny tokenizer has few words


def test_leaks_by_demonstrations_of_a_task_file_are_found_in_the_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = [sentence(i) for i in range(30)]
    shown = [{"input": f"so: {sentence(100).title()}", "output": "a"}]
    tasks = [task(tmp_path, "one", inputs, demonstrations=shown)]
    context = StageContext(None, None, evaluations=evaluations(tmp_path, [sentence(100), sentence(101)]))
    quality = InstructionQuality(QualitySettings(), tasks, context)
    settings = InstructionSettings(held_out=2, shots={"share": 1.0, "counts": [1]})
    builder = InstructionBuilder(tasks, 0, settings, tmp_path / "work")
    builder.read()
    quality.drop(builder)
    builder.split()
    write_lines(tmp_path / "rows.jsonl", list(builder.rows()))
    leaks = quality.measure(tmp_path)["leaks"]
    assert (leaks["rows"], leaks["evaluations"]["test"]["leaked_items"]) == (28, 1)
    assert "28 rows have text of test (row 1" in caplog.text


def test_examples_with_text_of_held_out_rows_of_another_task_are_left_out(tmp_path: Path) -> None:
    shared = [sentence(i) for i in range(10)]
    tasks = [
        task(tmp_path, "unseen", shared),
        task(tmp_path, "seen", [f"In the text {t} there is" for t in shared] + [sentence(i) for i in range(50, 80)]),
    ]
    quality = InstructionQuality(QualitySettings(), tasks, StageContext(None, None))
    settings = InstructionSettings(held_out=2, held_out_clusters=["unseen"])
    builder = InstructionBuilder(tasks, 0, settings, tmp_path / "work")
    builder.read()
    quality.drop(builder)
    builder.split()
    held = set(builder.held[1].tolist())
    quality.drop_held_out(builder)
    assert builder.dropped().counts[HELD_OUT] == 10 - len(held & set(range(10)))
    assert not builder.usable[1][:10].any()


def test_nothing_is_looked_for_if_the_settings_say_so(tmp_path: Path) -> None:
    tasks = [task(tmp_path, "one", [sentence(i) for i in range(20)])]
    quality, _, out = checked(tmp_path, tasks, StageContext(None, None), near_duplicates=None, leaks=None)
    stats = quality.measure(out)
    assert not {"duplicates", "leaks", "difficulty"} & stats.keys() and stats["truncated"] is None
    with pytest.raises(ValueError, match="greater than or equal to 0.5"):
        QualitySettings.model_validate({"near_duplicates": {"threshold": 0.2}})


def test_difficulty_is_the_mean_loss_per_token_of_the_outputs() -> None:
    import torch

    from posttrain.models.loading import load_model

    rows = [
        {"task": name, "prompt": f"Say {i}", "completion": "good film", "place": f"f:{i}"}
        for name in ("a", "b")
        for i in range(5)
    ]
    chosen = first_rows_of_tasks(rows, 3)
    assert {name: len(r) for name, r in chosen.items()} == {"a": 3, "b": 3}
    config = ModelConfig(source="tiny:llama")
    found = measure_difficulty(config, {"a": chosen["a"]}, None)["a"]
    hf, tokenizer = load_model(config)
    total, count = 0.0, 0
    for row in chosen["a"]:
        turns = [{"role": "user", "content": row["prompt"]}]
        before = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(before, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = hf(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)
        total -= sum(float(logits[len(ids) + k - 1, token]) for k, token in enumerate(answer))
        count += len(answer)
    assert found["tokens"] == count and found["rows"] == 3
    assert found["nll"] == pytest.approx(total / count, abs=1e-5)
    assert found["low"] <= found["nll"] <= found["high"]
    assert measure_difficulty(config, {"a": chosen["a"]}, 3)["a"] == {"rows": 0, "too_long": 3, "tokens": 0}


def test_the_package_for_near_duplicates_is_asked_for_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = task(tmp_path, "one", [sentence(i) for i in range(20)])
    stage = {"method": "instructions", "name": "build", "tasks": [one.model_dump(exclude_unset=True)]}
    recipe = Recipe.model_validate({"name": "r", "model": {"source": "tiny:llama"}, "stages": [stage]})
    without = Recipe.model_validate(
        {"name": "r", "model": {"source": "tiny:llama"}, "stages": [{**stage, "near_duplicates": None}]}
    )
    check_machine(recipe)
    monkeypatch.setattr(machine_checks, "is_installed", lambda package: package != "rensa")
    with pytest.raises(RecipeError, match=r"near_duplicates: needs rensa.*posttrain\[instructions\]"):
        check_machine(recipe)
    check_machine(without)
