"""An interrupted run resumes with what it began with, or says what has changed; finished results are checked."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import posttrain
from posttrain.config import Recipe
from posttrain.core import imports
from posttrain.core.errors import CheckpointError, DataError
from posttrain.core.progress import Track
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.recipe.parsing import load_recipe
from posttrain.runs.inputs import changed_inputs, find_inputs, note_inputs
from posttrain.runs.run_folder import Manifest

ROWS = [{"prompt": f"What is {i} plus {i}?", "completion": str(2 * i)} for i in range(12)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small(folder: Path) -> Recipe:
    """Two stages of three steps, and an evaluation, each with a file of its own."""
    for name in ("one", "two", "asked"):
        if not (folder / f"{name}.jsonl").exists():
            write_rows(folder / f"{name}.jsonl", ROWS)
    path = folder / "small.yaml"
    stage = "batch_size: 4, checkpoint_every: 1, optimizer: {lr: 0.01}"
    path.write_text(
        f"name: small\nmodel: {{source: 'tiny:llama', device: cpu}}\nstages:\n"
        f"  - {{name: first, data: {{source: one.jsonl}}, {stage}}}\n"
        f"  - {{name: second, data: {{source: two.jsonl}}, {stage}}}\n"
        "evaluate: [{name: asked, kind: perplexity, data: {source: asked.jsonl}}]\n"
    )
    return load_recipe(path)


def run(recipe: Recipe, **options: Any) -> tuple[Path, str]:
    out = io.StringIO()
    result = posttrain.run(recipe, console=Console(file=out, width=500), **options)
    return result.folder, out.getvalue()


def stop_at(monkeypatch: pytest.MonkeyPatch, title: str, step: int) -> None:
    """Ask the process to stop after a step, as Ctrl-C does."""
    update = Track.update

    def watched(self: Track, done: int, **values: Any) -> None:
        update(self, done, **values)
        if self.what == title and done == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Track, "update", watched)


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        stop_at(patched, "second", 1)
        with pytest.raises(KeyboardInterrupt):
            run(small(folder))
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, Path]:
    """A copy of a run that was stopped in its second stage, below the current folder."""
    shutil.copytree(stopped_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return small(tmp_path), Path("runs/small")


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["one", "two", "asked"])
def test_a_changed_file_of_any_stage_is_named_and_its_hash_stays(
    stopped: tuple[Recipe, Path], tmp_path: Path, name: str
) -> None:
    recipe, folder = stopped
    file = tmp_path / f"{name}.jsonl"
    before = manifest(folder)["inputs"]
    write_rows(file, [*ROWS[:-1], {"prompt": "What is new?", "completion": "this"}])
    for _ in range(2):  # and again: nothing is noted of the attempt
        with pytest.raises(CheckpointError, match=rf"(?s){name}\.jsonl: sha256 .*, now .*--accept-changed-data"):
            run(recipe)
        assert manifest(folder)["inputs"] == before
    if name == "two":
        return
    _, printed = run(recipe, accept_changed_data=True)
    after = manifest(folder)
    old, new = after["inputs"][file.name]
    assert before[file.name] == [old] and new["accepted"] and new["value"] != old["value"] and after["status"] == "done"
    read = next(e for e in after["data"] if e["stage"] == {"one": "first", "two": "second"}.get(name, "evaluate asked"))
    assert read["sha256"][file.name] == new["value"].split()[1]
    assert [e["sha256"][file.name] for e in read["earlier"]] == [old["value"].split()[1]]
    page = (folder / "report.html").read_text()
    assert f"{name}.jsonl" in page and "changed while the run was under way" in page


def test_what_is_put_back_resumes_to_the_same_bits(stopped: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = stopped
    whole = (tmp_path / "two.jsonl").read_bytes()
    (tmp_path / "two.jsonl").write_bytes(whole + b" ")
    with pytest.raises(CheckpointError, match=r"two\.jsonl"):
        run(recipe)
    (tmp_path / "two.jsonl").write_bytes(whole)
    run(recipe)
    calm, _ = run(recipe, folder=tmp_path / "calm")
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (calm / weights).read_bytes()
    assert "earlier" not in json.dumps(manifest(folder)["data"])


def test_a_run_without_results_takes_a_corrected_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = small(tmp_path)
    write_rows(tmp_path / "two.jsonl", [{"prompt": "no completion"}])
    with pytest.raises(DataError):
        run(recipe)
    write_rows(tmp_path / "two.jsonl", ROWS)
    folder, _ = run(recipe)
    history = manifest(folder)["inputs"]["two.jsonl"]
    assert len(history) == 2 and not history[1]["accepted"] and manifest(folder)["status"] == "done"


def test_measurements_are_made_again_if_what_they_measured_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = small(tmp_path)
    wrong = load_recipe(tmp_path / "small.yaml", ["stages.first.adapter={target: [nowhere]}"])
    items = tmp_path / "runs" / "small" / "evaluations" / "before" / "asked.jsonl"
    for count in (12, 5):
        write_rows(tmp_path / "asked.jsonl", ROWS[:count])
        with pytest.raises(ValueError, match="nowhere"):  # the measurement is done, and no step is made
            run(wrong)
        assert len(items.read_text().splitlines()) == count
    made = items.stat().st_mtime_ns
    folder, _ = run(recipe)  # the corrected recipe takes over the measurement, and what it is of
    assert items.stat().st_mtime_ns == made and len(manifest(folder)["inputs"]["asked.jsonl"]) == 2


def test_a_changed_recipe_file_of_a_run_is_named(stopped: tuple[Recipe, Path]) -> None:
    _, folder = stopped
    stored = folder / "recipe.yaml"
    stored.write_text(stored.read_text().replace("lr: 0.01", "lr: 0.02", 1))
    with pytest.raises(CheckpointError, match=r"recipe\.yaml was changed since the run began"):
        run(load_recipe(folder), folder=folder)


@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "model/config.json", "model/tokenizer.json", "model/tokenizer_config.json"]
)
def test_one_flipped_byte_in_a_finished_stage_is_noticed(stopped: tuple[Recipe, Path], name: str) -> None:
    recipe, folder = stopped
    file = folder / "stages" / "0-first" / name
    shutil.rmtree(folder / "stages" / "1-second")  # as if it had been stopped before
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(bytes(whole))
    with pytest.raises(CheckpointError, match=rf"0-first/{name} is not what the stage wrote .*last checkpoint"):
        run(recipe)
    if name == "model/config.json":
        shutil.rmtree(file.parent)
        run(recipe)  # the way out that the message names
        assert manifest(folder)["status"] == "done"


def test_files_beside_a_result_are_noticed_too(stopped: tuple[Recipe, Path]) -> None:
    recipe, folder = stopped
    shutil.rmtree(folder / "stages" / "1-second")
    (folder / "stages" / "0-first" / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json was not written by the stage"):
        run(recipe)
    (folder / "stages" / "0-first" / "model" / "adapter_config.json").unlink()
    metrics = folder / "stages" / "0-first" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("loss", "lass"))
    _, printed = run(recipe)
    assert "0-first/metrics.jsonl is not what the stage wrote; nothing that follows reads it" in printed


def test_a_run_that_was_killed_at_its_very_end_is_finished(stopped: tuple[Recipe, Path]) -> None:
    recipe, _ = stopped
    folder, _ = run(recipe)
    assert (folder / "stages" / "0-first" / "model" / "README.md").is_file()  # written after the checksums
    Manifest(folder).update(status="running")
    run(recipe)
    assert manifest(folder)["status"] == "done"


def test_a_changed_evaluation_is_noticed(stopped: tuple[Recipe, Path]) -> None:
    recipe, folder = stopped
    items = folder / "evaluations" / "before" / "asked.jsonl"
    items.write_text(items.read_text().replace("0", "1", 1))
    with pytest.raises(CheckpointError, match=r"before/asked\.jsonl is not what was written .*measured again"):
        run(recipe)
    shutil.rmtree(items.parent)
    run(recipe)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"a": 1', "\x00\x01", '"done"', "[" * 5000])
def test_a_broken_manifest_is_a_message(stopped: tuple[Recipe, Path], text: str) -> None:
    recipe, folder = stopped
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"(?s)manifest\.json is damaged.*--fresh"):
        run(recipe)


def test_an_edited_manifest_is_a_message(stopped: tuple[Recipe, Path]) -> None:
    recipe, folder = stopped
    values = manifest(folder)
    (folder / "manifest.json").write_text(json.dumps({**values, "status": "done"}))
    with pytest.raises(CheckpointError, match="was changed"):
        run(recipe)


MODULES = {
    "my_graders.py": "import my_helper\nfrom my_parts.inner import half\ndef right(text, example):\n    return 1\n",
    "my_helper.py": "def one():\n    return 1.0\n",
    "my_parts/__init__.py": "",
    "my_parts/inner.py": "from . import deeper\n\ndef half():\n    return 0.5\n",
    "my_parts/deeper.py": "x = 1\n",
}


def everything(folder: Path) -> Recipe:
    """A recipe that reads one input of each kind."""
    for name, text in MODULES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    write_rows(folder / "problems.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}])
    write_rows(folder / "held.jsonl", [{"prompt": "2 + 2 =", "answer": "4"}])
    (folder / "rules.txt").write_text("Be short.\n")
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = tiny_tokenizer()
    tiny_model("llama", len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "judge")
    path = folder / "all.yaml"
    rows = "{{kind: rows, data: {{source: {}, chat: false}}}}".format
    path.write_text(
        "name: all\nmodel: {source: base, chat_template: chat.jinja}\nstages:\n"
        f"  - method: grpo\n    problems: {rows('problems.jsonl')}\n"
        f"    held_out: {{problems: {rows('held.jsonl')}}}\n"
        "    rewards: [{kind: 'my_graders:right'}, {kind: judge, judge: {mode: score, model: {source: judge}, "
        "principles: rules.txt}}]\n"
    )
    return load_recipe(path)


def change(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes() + text.encode())


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("problems.jsonl", "problems.jsonl"),
        ("held.jsonl", "held.jsonl"),
        ("rules.txt", "rules.txt"),
        ("chat.jinja", "chat.jinja"),
        ("base/model.safetensors", "base/model.safetensors"),
        ("base/tokenizer.json", "base/tokenizer.json"),
        ("base/chat_template.jinja", "base/chat_template.jinja"),
        ("judge/config.json", "judge/config.json"),
        ("my_graders.py", "module my_graders"),
        ("my_helper.py", "module my_helper"),
        ("my_parts/inner.py", "module my_parts.inner"),
        ("my_parts/deeper.py", "module my_parts.deeper"),
        ("my_parts/__init__.py", "module my_parts"),
    ],
)
def test_every_kind_of_input_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(imports, "_FOLDERS", [])  # other tests have modules of the same names
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "pytest-of" not in p])
    recipe = everything(tmp_path)
    noted = note_inputs({}, find_inputs(recipe, {}), "t0")
    assert not changed_inputs(noted, find_inputs(recipe, {}))
    change("\n")(tmp_path / file)
    found = find_inputs(recipe, {})
    (changed,) = changed_inputs(noted, found)
    assert changed == named or changed.endswith(f"/{named}")
    again = note_inputs(noted, found, "t1", accepted=True)
    assert [e["since"] for e in again[changed]] == ["t0", "t1"] and again[changed][0] == noted[changed][0]
    (tmp_path / file).unlink()
    assert changed_inputs(noted, find_inputs(recipe, {}))[changed] == "it is gone"


def test_versions_of_packages_and_functions_from_python_are_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(tmp_path)
    noted = note_inputs({}, find_inputs(recipe, {"f": stop_at}), "t0")
    assert {"package torch", "package posttrain", "package python", "package transformers", "function f"} <= set(noted)
    assert "package openai" not in noted
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.0.1" if n == "tokenizers" else real(n))
    changed = changed_inputs(noted, find_inputs(recipe, {"f": write_rows}))
    assert set(changed) == {"package tokenizers", "function f"} and "now 0.0.1" in changed["package tokenizers"]


def test_functions_with_arguments_and_objects_from_python_are_inputs(tmp_path: Path) -> None:
    class Grader:
        def __call__(self, text: str, example: Any) -> float:
            return 1.0

    class Other(Grader):
        limit = 3

    def found(function: Any) -> str:
        return find_inputs(recipe, {"f": function})["function f"]

    recipe = small(tmp_path)
    assert found(Grader()) == found(Grader()) != found(Other())
    assert found(partial(stop_at, step=3)) == found(partial(stop_at, step=3)) != found(partial(stop_at, step=4))
    assert found(partial(stop_at, Grader())) == found(partial(stop_at, Grader())) != found(stop_at)
