"""`posttrain memory`: tables of a recipe's stages and of serving, what does not fit; and --dry-run of all commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.recipe.parsing import load_recipe
from posttrain.runs import memory_plan


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two stages on a model in a folder: the second trains on what the first samples, and its rows are not known."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a" * 50, "completion": "b" * 20}) + "\n" for _ in range(5)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "name": "two",
                "model": {"source": str(tmp_path / "model")},
                "stages": [
                    {"method": "sft", "name": "sft", "data": {"source": str(rows), "chat": False}},
                    {"method": "rejection_sampling", "name": "mine", "problems": {"kind": "lab", "size": 4},
                     "rewards": {"terms": [{"kind": "length", "max": 60}]}},
                    {"method": "sft", "name": "again", "data": {"source": "stage:mine"}, "adapter": {"r": 4}},
                ],
            }
        )
    )  # fmt: skip
    return path


def test_tables_and_what_does_not_fit(recipe: Path) -> None:
    done = CliRunner().invoke(app, ["memory", str(recipe)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    for said in ("sft: memory in GB", "again: memory in GB", "activations", "nf4 (QLoRA)", "int4", "all stages fit"):
        assert said in done.output
    assert "rows that an earlier stage makes are not known yet" in done.output and "trains nothing" in done.output
    small = CliRunner().invoke(app, ["memory", str(recipe), "--gpu", "0.5"], env={"COLUMNS": "120"})
    served = CliRunner().invoke(app, ["memory", str(recipe), "--int8-cache"], env={"COLUMNS": "120"})
    assert "keys and values (int8)" in served.output
    assert small.exit_code == 1 and "! sft takes" in small.output and "a GPU of 0.5 GiB" in small.output


def test_a_run_warns_of_stages_that_do_not_fit(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = load_recipe(str(recipe))
    assert memory_plan.memory_warning(checked, {}) == []  # the files are small: nothing is estimated
    monkeypatch.setattr(memory_plan, "room_of", lambda device: 200_000.0)
    first, *_ = memory_plan.memory_warning(checked, {})
    assert first.startswith("sft is estimated to take") and "tokens_per_micro_batch" in first


def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of run, sweep, evaluate, export and merge; a folder that a run would refuse is refused."""
    folder = recipe.parent
    monkeypatch.chdir(folder)
    rows = {"kind": "perplexity", "name": "exam", "data": {"source": "rows.jsonl", "chat": False}}
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "evaluate": [rows]}))
    before = sorted(folder.rglob("*"))

    def told(*args: str) -> str:
        done = CliRunner().invoke(app, [*args, "--dry-run"], env={"COLUMNS": "120"})
        assert done.exit_code == 0 and "nothing was written" in done.output, done.output
        assert sorted(folder.rglob("*")) == before
        return done.output

    run = told("run", "recipe.yaml", "stages.0.batch_size=2", "stages.0.epochs=3")
    for said in (
        "model: llama, 0.0 M parameters, float32, cpu",
        "0-sft      Supervised fine-tuning: 8 steps of 2 rows, 3 epochs of 5; trains",
        "2-again    Supervised fine-tuning, on what stage mine makes; trains",
        "exam (perplexity): 5 items, before and after",
        "runs/two: new",
    ):
        assert said in run, run
    sweep = told("sweep", "recipe.yaml", "stages.0.optimizer.lr=[1e-4,1e-3]", "--seeds", "0,1")
    assert "4 runs: 2 combinations, seeds 0, 1" in sweep and "8 steps" not in sweep and "1 step of 16 rows" in sweep
    assert "exam (perplexity): 5 items" in told("evaluate", "model", "-r", "recipe.yaml")
    gguf = told("export", "model", "--output", "out.gguf", "--quantization", "Q8_0")
    assert "5 F32, 16 Q8_0 tensors" in gguf, gguf
    assert "linear" in told("merge", "model", "tiny:llama", "--output", "merged")
    (folder / "runs" / "two" / "stages").mkdir(parents=True)
    refused = CliRunner().invoke(app, ["run", "recipe.yaml", "--dry-run"])
    assert refused.exit_code == 1 and "holds stages and no recipe.yaml" in refused.output
