"""The stage that builds instructions: task files, what it writes, what a run notes, and problems found early."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import posttrain
from posttrain.core.errors import DataError, RecipeError
from posttrain.core.files import read_lines
from posttrain.data.instruction_tasks import InstructionTask
from posttrain.methods.data.instruction_files import read_tasks
from posttrain.methods.data.instructions import Instructions, InstructionsConfig
from posttrain.recipe.machine_checks import check_machine
from posttrain.recipe.parsing import load_recipe
from posttrain.runs.inputs import changed_inputs, find_inputs
from posttrain.trainer.stage import StageContext

TASK = {"name": "colours", "type": "question_answering", "cluster": "facts", "output": "{answer}"}
TASK |= {"fields": {"question": "{question}"}, "data": {"source": "colours.tsv"}}


def write_table(path: Path, count: int = 40, colour: str = "blue") -> None:
    rows = [f"what colour has item{i} of box{i * 3}\t{colour} {i}" for i in range(count)]
    path.write_text("question\tanswer\n" + "\n".join(rows) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    write_table(tmp_path / "tasks/colours.tsv")
    write_table(tmp_path / "tasks/shapes.tsv", colour="round")
    (tmp_path / "tasks/colours.yaml").write_text(yaml.safe_dump(TASK))
    other = {**TASK, "name": "shapes", "cluster": "shapes", "data": {"source": "shapes.tsv"}}
    (tmp_path / "tasks/more.yaml").write_text(yaml.safe_dump([other]))
    return tmp_path


def recipe(folder: Path, **stage: Any) -> dict[str, Any]:
    settings = {"method": "instructions", "name": "build", "tasks": ["tasks/*.yaml"], "held_out": 5, **stage}
    settings |= {"held_out_clusters": ["shapes"]} if "tasks" not in stage else {}
    return {"name": "r", "model": {"source": "tiny:llama"}, "stages": [settings], "output": str(folder / "runs")}


def save(folder: Path, content: dict[str, Any]) -> str:
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "r.yaml")


def test_held_out_rows_are_also_written_by_what_measures_them(folder: Path) -> None:
    (folder / "tasks/labels.tsv").write_text(
        "text\tlabel\n" + "".join(f"text {i} of {i * 7}\tl{i % 2}\n" for i in range(30))
    )
    (folder / "tasks/long.tsv").write_text(
        "text\tlabel\n" + "".join(f"what is {i * 7}\tone two three four five {i}\n" for i in range(30))
    )
    more = [
        {**TASK, "name": "labelled", "type": "classification", "cluster": "", "data": "labels.tsv"},
        {**TASK, "name": "long", "cluster": "", "data": "long.tsv", "fields": {"question": "{text}"}},
    ]
    for task in more:
        task |= {"output": "{label}"}
    more[0]["fields"] = {"input": "{text}"}
    (folder / "tasks/labels.yaml").write_text(yaml.safe_dump(more))
    done = posttrain.run(save(folder, recipe(folder)))
    data = done.folder / "stages/0-build/data"
    split = {path.stem: {row["task"] for row in read_lines(path)} for path in data.glob("*seen_*.jsonl")}
    assert split == {
        "seen_answers": {"colours"},
        "seen_choices": {"labelled"},
        "seen_texts": {"long"},
        "unseen_answers": {"shapes"},
    }
    assert sum(len(read_lines(path)) for path in data.glob("seen_*")) == len(read_lines(data / "seen.jsonl")) == 15


def test_a_run_trains_on_rows_and_measures_seen_and_unseen_tasks(folder: Path) -> None:
    content = recipe(folder)
    content["stages"].append({"method": "sft", "max_steps": 1, "data": {"source": "stage:build", "chat": False}})
    content["evaluate"] = [
        {"name": name, "kind": "perplexity", "data": {"source": f"stage:build/data/{name}.jsonl", "chat": False}}
        for name in ("seen", "unseen")
    ]
    done = posttrain.run(save(folder, content))
    assert {row["task"] for row in done.comparison} == {"seen", "unseen"}
    data = done.folder / "stages/0-build/data"
    rows = {name: read_lines(data / f"{name}.jsonl") for name in ("rows", "seen", "unseen")}
    assert {name: len(made) for name, made in rows.items()} == {"rows": 35, "seen": 5, "unseen": 40}
    assert {row["task"] for row in rows["rows"] + rows["seen"]} == {"colours"}
    assert not {row["input"] for row in rows["rows"]} & {row["input"] for row in rows["seen"]}
    stats = json.loads((data / "stats.json").read_text())
    assert stats["tasks"]["colours"]["rows"] == 35 and stats["tasks"]["shapes"]["held out"] is True
    assert not (done.folder / "stages/0-build/examples").exists()
    manifest = json.loads((done.folder / "manifest.json").read_text())
    noted = [Path(name).name for name in manifest["inputs"]]
    assert {"colours.yaml", "more.yaml", "colours.tsv", "shapes.tsv"} <= set(noted)

    write_table(folder / "tasks/colours.tsv", colour="red")  # a run is not resumed with another table, or another task
    (folder / "tasks/more.yaml").write_text((folder / "tasks/more.yaml").read_text() + "# changed\n")
    changed = changed_inputs(manifest["inputs"], find_inputs(load_recipe(str(folder / "r.yaml")), {}))
    assert {Path(name).name for name in changed} == {"colours.tsv", "more.yaml"}


def test_an_interrupted_stage_starts_over_and_writes_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = InstructionsConfig(tasks=[str(folder / "tasks/colours.yaml")], held_out=5, name="build")
    contents = []
    for name in ("whole", "resumed"):
        stage = Instructions(config, StageContext(None, None))
        stage.prepare()
        if name == "resumed":
            with monkeypatch.context() as patch:
                patch.setattr("posttrain.methods.data.instructions.write_json", _interrupt)
                with pytest.raises(KeyboardInterrupt):
                    stage.build(folder / name / "data", folder / name / "examples", 3)
            assert not (folder / name / "data").exists()
            (folder / name / "examples").mkdir()
            (folder / name / "examples/0.examples").write_text("left behind")
        else:
            (folder / name).mkdir()
        stage.build(folder / name / "data", folder / name / "examples", 3)
        contents.append({p.name: p.read_bytes() for p in sorted((folder / name / "data").iterdir())})
    assert contents[0] == contents[1] and len(contents[0]) == 5


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_task_files_are_checked_with_file_line_and_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = folder / "tasks/bad.yaml"
    bad.write_text("- name: a\n  typ: classification\n  data: {sorce: x.tsv}\n  fields: {input: '{x}'}\n  weight: -1\n")
    with pytest.raises(DataError) as told:
        read_tasks([str(bad)])
    for part in ("data.sorce", "bad.yaml:3): no such setting. Did you mean source?", "typ (", "Did you mean type?"):
        assert part in str(told.value)
    assert "weight" in str(told.value) and "expected more than 0, got -1" in str(told.value)
    for text, message in (
        ("- 3", "item 1 is no task"),
        ("", "expected a task"),
        ("a: [", "bad.yaml:1: not valid YAML"),
        (yaml.safe_dump({**TASK, "data": "stage:x"}), "a file can't name a stage"),
        (yaml.safe_dump({**TASK, "type": "poetry"}), "type .*expected 'classification', 'translation'"),
        (yaml.safe_dump([TASK, TASK]), "two tasks are named 'colours'"),
        (yaml.safe_dump([{**TASK, "wordings": ["{inptu}"]}]), r"task 'colours'( \(.*\))?: wordings.0 names \{inptu\}"),
    ):
        bad.write_text(text)
        with pytest.raises(DataError, match=message):
            read_tasks([str(bad)])
    for entry, message in (
        ("tasks/none.yaml", "there is no such file"),
        ("tasks/*.yml", "there is no such file"),
        ("tasks", r"is a folder; name its files: tasks/\*.yaml"),
    ):
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            with pytest.raises(DataError, match=message):
                read_tasks([entry])


def test_a_recipe_finds_task_files_beside_it_and_reports_their_problems(folder: Path) -> None:
    checked = load_recipe(save(folder, recipe(folder)))
    check_machine(checked)
    (stage,) = checked.stages
    assert [Path(p).name for p in stage.named_files()] == ["colours.yaml", "more.yaml"]  # type: ignore[attr-defined]
    (folder / "tasks/colours.yaml").write_text(yaml.safe_dump({**TASK, "data": {"source": "none.tsv"}}))
    with pytest.raises(RecipeError, match=r"colours.data.source: .*there is no such file"):
        check_machine(load_recipe(str(folder / "r.yaml")))
    (folder / "tasks/colours.yaml").write_text(yaml.safe_dump({**TASK, "type": "x"}))
    with pytest.raises(RecipeError, match=r"colours.yaml has 1 problem"):
        check_machine(load_recipe(str(folder / "r.yaml")))
    inline = {**TASK, "data": {"source": "tasks/colours.tsv"}}
    checked = load_recipe(save(folder, recipe(folder, tasks=[inline])))
    check_machine(checked)
    with pytest.raises(RecipeError, match=r"tasks.colours.typ .*no such setting"):
        load_recipe(save(folder, recipe(folder, tasks=[{**inline, "typ": "x"}])))


def test_a_recipe_is_checked_without_torch_or_numpy(folder: Path) -> None:
    code = (
        "import sys\nfrom posttrain.recipe.parsing import load_recipe\n"
        "from posttrain.recipe.machine_checks import check_machine\n"
        f"check_machine(load_recipe({save(folder, recipe(folder))!r}))\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_demonstrations_that_do_not_fit_the_context_are_left_out(folder: Path) -> None:
    from posttrain.config import ModelConfig
    from posttrain.models.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(source="tiny:llama"))
    shots = {"share": 1, "counts": [8]}
    sizes = {}
    for limit in (None, 400):
        config = InstructionsConfig(
            tasks=[str(folder / "tasks/colours.yaml")], held_out=5, max_tokens=limit, shots=shots
        )
        stage = Instructions(config, StageContext(tokenizer, None))
        stage.prepare()
        stage.build(folder / "data", folder / "examples", 0)
        rows = read_lines(folder / "data/rows.jsonl")
        sizes[limit] = max(len(tokenizer(row["prompt"])["input_ids"]) for row in rows)
        assert len(rows) == 35 and ({row["shots"] for row in rows} == {8}) == (limit is None)
    assert sizes[400] <= 400 < sizes[None]


def test_rows_of_a_long_template_are_no_duplicates_nor_leaks(tmp_path: Path) -> None:
    begin = "you are given a problem that was written for pupils and your task is to find what the expression yields:"
    rows = [f"{begin} {i * 37 % 101} + {i * 53 % 97} =\t{i * 37 % 101 + i * 53 % 97}" for i in range(100)]
    (tmp_path / "sums.tsv").write_text("question\tanswer\n" + "\n".join(rows) + "\n")
    task = InstructionTask.model_validate({**TASK, "data": str(tmp_path / "sums.tsv")})
    for held_out in (5, 30):
        stage = Instructions(InstructionsConfig(tasks=[task], held_out=held_out), StageContext(None, None))
        stage.prepare()
        stats = stage.build(tmp_path / "data", tmp_path / "examples", 0)
        assert stats["tasks"]["colours"]["rows"] + held_out >= 98 and not stats["quality"]["leaks"]["rows"]


@pytest.mark.parametrize("style", ["text", "turns"])
def test_a_row_is_as_long_as_it_is_trained_on(folder: Path, style: str) -> None:
    """The limit is exact: with one token less the longest rows lose a demonstration, and none is too long for SFT."""
    from posttrain.config import DataConfig, ModelConfig
    from posttrain.data.sft_rows import prepare
    from posttrain.models.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(source="tiny:llama"))
    shots = {"share": 1, "counts": [2], "style": style}

    def lengths(limit: int | None) -> list[int]:
        config = InstructionsConfig(
            tasks=[str(folder / "tasks/colours.yaml")], held_out=5, max_tokens=limit, shots=shots
        )
        stage = Instructions(config, StageContext(tokenizer, None))
        stage.prepare()
        stage.build(folder / "data", folder / "examples", 0)
        data = DataConfig(source=str(folder / "data/rows.jsonl"), ignore=["choices"])
        return [len(sample) for sample in prepare(data, tokenizer).samples]

    longest = max(lengths(None))
    assert max(lengths(longest)) == longest > max(lengths(longest - 1))


def test_patterns_and_brackets_in_paths_beside_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a [1]"
    (folder / "tasks/deep").mkdir(parents=True)
    (folder / "rows[1].tsv").write_text("text\tcolour\nthe sky\tblue\ngrass\tgreen\n")
    task = {**TASK, "data": {"source": "../../rows[1].tsv"}}
    (folder / "tasks/deep/one.yaml").write_text(yaml.safe_dump(task))
    stages = [{"method": "instructions", "tasks": ["tasks/**/*.yaml"]}, {"method": "sft", "data": "rows[1].tsv"}]
    stages[1]["data"] = {"source": "rows[1].tsv", "prompt": "{text}", "completion": "{colour}"}
    text = yaml.safe_dump({"name": "r", "model": {"source": "tiny:llama"}, "stages": stages})
    (folder / "r.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    checked = load_recipe(str(folder / "r.yaml"))
    assert Path(checked.stages[1].data.source) == folder / "rows[1].tsv"  # type: ignore[attr-defined]
    (named,) = checked.stages[0].named_files()  # type: ignore[attr-defined]
    assert named == folder / "tasks/deep/one.yaml"
