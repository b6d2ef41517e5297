"""The folder of a run: taken over while nothing was done in it, kept once something was, finished once."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import posttrain
from posttrain.core.errors import CheckpointError, DataError, NonFiniteError, RecipeError
from posttrain.core.imports import import_folders
from posttrain.recipe.parsing import dump_recipe, load_recipe
from posttrain.runs.run_folder import has_results, open_run, run_path

ROWS = [{"prompt": f"What is {i} plus {i}?", "completion": str(2 * i)} for i in range(8)]


def recipe_for(tmp_path: Path, *overrides: str) -> posttrain.Recipe:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "small.yaml"
    path.write_text(
        f"name: small\nmodel: {{source: 'tiny:llama', device: cpu}}\noutput: {tmp_path}/runs\n"
        f"stages: [{{data: {{source: {tmp_path}/rows.jsonl}}, max_steps: 1}}]\n"
    )
    return load_recipe(path, overrides)


def run(recipe: posttrain.Recipe, fresh: bool = False) -> tuple[posttrain.runs.runner.RunResult, str]:
    out = io.StringIO()
    result = posttrain.run(recipe, fresh=fresh, console=Console(file=out, width=500))
    return result, out.getvalue()


def test_a_command_that_is_corrected_takes_the_folder_over(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"unknown": 1}\n')
    with pytest.raises(DataError, match="unknown"):
        run(recipe_for(tmp_path, f"stages.sft.data.source={tmp_path}/other.jsonl"))
    folder = tmp_path / "runs" / "small"
    assert json.loads((folder / "manifest.json").read_text())["status"] == "failed"
    result, printed = run(recipe_for(tmp_path))
    assert result.folder == folder and (result.model / "config.json").is_file() and "resuming" not in printed
    assert load_recipe(folder) == recipe_for(tmp_path)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["small"]


def test_a_folder_with_results_is_kept_for_its_recipe(tmp_path: Path) -> None:
    run(recipe_for(tmp_path))
    with pytest.raises(CheckpointError, match=r"another recipe \(stages.sft.batch_size: 16 there, 4 now\)"):
        run(recipe_for(tmp_path, "stages.sft.batch_size=4"))
    result, printed = run(recipe_for(tmp_path))
    assert "already finished" in printed and "--fresh" in printed and "name=NEW_NAME" in printed
    assert "has changed since" not in printed
    recipe = recipe_for(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    _, printed = run(recipe)
    assert "rows.jsonl, which the run has read, has changed since: sha256" in printed
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert str(tmp_path) in manifest["import_folders"] and set(manifest["import_folders"]) <= set(import_folders())
    again, printed = run(recipe_for(tmp_path, "stages.sft.batch_size=4"), fresh=True)
    assert "already" not in printed and (tmp_path / "runs" / "small.1" / "model").is_dir()
    assert again.folder == result.folder and load_recipe(again.folder).stages[0].batch_size == 4


def test_evaluations_stay_where_only_training_was_corrected(tmp_path: Path) -> None:
    first = recipe_for(tmp_path)
    folder = tmp_path / "runs" / "small"

    def leave(written: str, text: str) -> None:
        with open_run(folder, first, fresh=True) as manifest:
            manifest.update(status="failed")
            for name, content in (("evaluations/before/a.jsonl", "{}"), (written, text)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(content)

    leave("stages/0-sft/method.json", "{}")
    with open_run(folder, recipe_for(tmp_path, "stages.sft.batch_size=4"), fresh=False) as manifest:
        assert not manifest.values and (folder / "evaluations/before/a.jsonl").is_file()
        assert not (folder / "stages").exists()
    leave("stages/0-sft/metrics.jsonl", "")  # opened, and no step written
    with open_run(folder, recipe_for(tmp_path, "seed=4"), fresh=False):
        assert not (folder / "evaluations").exists()
    leave("stages/0-sft/metrics.jsonl", "{}\n")
    with pytest.raises(CheckpointError, match="another recipe"):
        open_run(folder, recipe_for(tmp_path, "seed=4"), fresh=False).__enter__()


def test_a_folder_that_is_no_run_is_never_cleared(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_for(tmp_path)))
    (tmp_path / "stages").mkdir()
    with pytest.raises(CheckpointError, match="another recipe"):
        open_run(tmp_path, recipe_for(tmp_path, "seed=4"), fresh=False).__enter__()
    assert (tmp_path / "stages").is_dir() and load_recipe(tmp_path).seed == 0


def test_one_process_works_in_a_folder(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    with open_run(tmp_path / "runs" / "small", recipe, fresh=False):
        for fresh in (False, True):
            with pytest.raises(CheckpointError, match="another process"):
                open_run(tmp_path / "runs" / "small", recipe, fresh=fresh).__enter__()


def test_a_reward_beside_the_recipe_is_found_by_its_worker_and_on_resume(tmp_path: Path, monkeypatch) -> None:
    beside = tmp_path / "project"
    beside.mkdir()
    (beside / "my_own_rewards.py").write_text("def count(text, example):\n    return len(text) / 10\n")
    path = beside / "own.yaml"
    path.write_text(
        f"extends: lab\nname: own\noutput: {tmp_path}/runs\nmodel: {{source: 'tiny:llama', device: cpu}}\n"
        "evaluate: []\nstages.rl: {steps: 1, held_out: null}\n"
        "stages.rl.rewards: [{kind: function, function: 'my_own_rewards:count'}]\n"
        "stages.rl.problems: {kind: rows, data: {source: problems.jsonl, chat: false}}\n"
        "stages.rl.sampler.max_tokens: 4\n"
    )
    problems = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(40)]
    (beside / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    result, _ = run(load_recipe(path))
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert str(beside) in manifest["import_folders"] and manifest["status"] == "done"


def test_fresh_leaves_a_run_alone_that_is_running(tmp_path: Path) -> None:
    """The lock comes before the renaming: the process that works in the folder keeps it, and its files."""
    recipe = recipe_for(tmp_path)
    folder = tmp_path / "runs" / "small"
    with open_run(folder, recipe, fresh=False) as manifest:
        manifest.update(status="running")
        with pytest.raises(CheckpointError, match="another process is working"):
            open_run(folder, recipe, fresh=True).__enter__()
        assert [p.name for p in (tmp_path / "runs").iterdir()] == ["small"]
        assert json.loads((folder / "manifest.json").read_text())["status"] == "running"
        folder.rename(tmp_path / "moved")  # as another process may do between opening the lock's file and locking it
        (folder).mkdir()
        (folder / ".lock").symlink_to(tmp_path / "moved" / ".lock")
        with pytest.raises(CheckpointError, match="can't be written"):
            open_run(folder, recipe, fresh=False).__enter__()


def test_fresh_renames_runs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(tmp_path)
    home = tmp_path / "home"
    (home / "runs" / "precious").mkdir(parents=True)
    (home / "runs" / "precious" / "recipe.yaml").write_text("")
    monkeypatch.chdir(home)
    for folder in (home, Path("."), Path("runs"), Path("runs/..")):
        with pytest.raises(CheckpointError, match="holds no run"):
            open_run(run_path(folder), recipe, fresh=True).__enter__()
    assert (home / "runs" / "precious" / "recipe.yaml").is_file() and len(list(tmp_path.iterdir())) == 3
    run_folder = home / "runs" / "x"
    with open_run(run_folder, recipe, fresh=False) as manifest:
        manifest.update(status="failed")
    monkeypatch.chdir(run_folder)
    with open_run(run_path(Path(".")), recipe, fresh=True):
        assert sorted(p.name for p in (home / "runs").iterdir()) == ["precious", "x", "x.1"]


@pytest.mark.parametrize("name", [".", "..", "-x", "--fresh", ".hidden", "a" * 101, "a/b", "a\\b", "a\n", "ä"])
def test_names_that_are_no_names_of_folders_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "named.yaml"
    good = 'name: {}\nmodel: {{source: "tiny:llama"}}\nstages: [{{name: {}, data: {{source: a.jsonl}}}}]\n'
    good += "evaluate: [{{kind: perplexity, name: {}, data: {{source: a.jsonl}}}}]\n"
    for place in range(3):
        values = ["a" * 100, "b" * 100, "c_.-9"]
        values[place] = name
        path.write_text(good.format(*map(json.dumps, values)))
        with pytest.raises(RecipeError, match="expected at most 100 letters"):
            load_recipe(path)
    path.write_text(good.format("a", "b", "c"))
    load_recipe(path)


def test_a_run_does_not_mix_with_what_lies_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "small"
    (folder / "model").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"holds model and no recipe\.yaml"):
        open_run(folder, recipe_for(tmp_path), fresh=False).__enter__()
    assert [p.name for p in folder.iterdir()] == [".lock", "model"] or not (folder / "recipe.yaml").exists()


def test_a_wrong_path_is_reported_before_another_recipe(tmp_path: Path) -> None:
    run(recipe_for(tmp_path))
    with pytest.raises(RecipeError, match=r"source: '.*nope\.jsonl': there is no such file"):
        run(recipe_for(tmp_path, f"stages.sft.data.source={tmp_path}/nope.jsonl"))


def test_measurements_before_the_first_step_are_no_results(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "small"
    stage = folder / "stages" / "0-sft"
    with open_run(folder, recipe_for(tmp_path), fresh=False) as manifest:
        manifest.update(status="failed")
        (stage / "held_out").mkdir(parents=True)
        (stage / "held_out" / "step-000000.parquet").write_text("x")
        (stage / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n')
    assert not has_results(folder)
    (stage / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n{"step": 1, "loss": 1}\n')
    assert has_results(folder)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "inf", "NaN"])
def test_settings_are_finite(tmp_path: Path, value: str) -> None:
    recipe_for(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(path.read_text().replace("max_steps: 1", f"max_steps: 1, optimizer: {{lr: {value}}}"))
    with pytest.raises(RecipeError, match=r"stages\.sft\.optimizer\.lr \(.*finite number"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"stages\.sft\.epochs \(override.*finite number|at least|more than"):
        recipe_for(tmp_path, f"stages.sft.epochs={value}")


def test_weights_that_are_not_finite_after_the_last_step_end_the_run(tmp_path: Path) -> None:
    """The loss of each step was finite: only what the last step left is not."""
    recipe = recipe_for(tmp_path, "stages.sft.optimizer.lr=1e38", "stages.sft.optimizer.warmup=0")
    recipe = recipe.model_copy(update={"stages": [recipe.stages[0].model_copy(update={"epochs": 0.5})]})
    with pytest.raises(NonFiniteError, match=r"after step 1 \d+ of \d+ trained weights .*not finite"):
        run(recipe)
    manifest = json.loads((tmp_path / "runs" / "small" / "manifest.json").read_text())
    assert manifest["status"] == "failed" and "not finite" in manifest["error"]
    assert not (tmp_path / "runs" / "small" / "model").exists()
