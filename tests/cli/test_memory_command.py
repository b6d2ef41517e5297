"""`posttrain memory`: tables of a recipe's stages and of serving, what does not fit; and --dry-run of all commands."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
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
    """Of each command that has it; what the command would refuse before its work is refused."""
    folder = recipe.parent
    monkeypatch.chdir(folder)
    rows = {"kind": "perplexity", "name": "exam", "data": {"source": "rows.jsonl", "chat": False}}
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "evaluate": [rows]}))
    for name, settings in (
        ("adapter", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")),
        ("soft", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    ):
        hf = tiny_model("llama")
        hf.name_or_path = str(folder / "model")
        get_peft_model(hf, settings).save_pretrained(name)
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
    serve = told("serve", "model", "--name", "me", "--port", "0", "--adapter", "x=adapter", "--cache-mb", "64")
    for said in ("x: adapter, rank 2 on q_proj", "64 MiB for keys and values", "/v1, as me, x, without a key"):
        assert said in serve, serve
    lab = told("lab", "--output", "lab", "--steps", "7")
    assert "7 steps of 128 texts (sums, seed 0)" in lab and "lab: new" in lab and "parameters, cpu" in lab
    compose = ("compose", "vit:image_size=32,patch_size=16,hidden_size=32,num_attention_heads=4", "model", "--output")
    made = told(*compose, "seeing")
    assert ": vit, " in made and "4 tokens of a picture of 32 x 32 pixels" in made and "a model of type llava" in made
    baked = told("bake", "soft", "out")
    assert "PROMPT_TUNING, 3 virtual tokens" in baked and "vectors, keys, values, after a pass" in baked
    (folder / "runs" / "two" / "stages").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for args, why in (
            (("run", "recipe.yaml"), "holds stages and no recipe.yaml"),
            (("serve", "model", "--port", str(taken.getsockname()[1])), "can't be listened on"),
            (("serve", "model", "--port", "0", "--adapter", "x=tiny:llama"), "holds a whole model"),
            (("lab", "--output", "model"), "is no laboratory"),
            (("lab", "--steps", "7"), "give it a folder with --output"),
            ((*compose, "model"), "exists already"),
            ((*compose, "seeing", "--layer", "99"), "the vision tower has 12 layers"),
            (("bake", "model", "out"), "is a whole model, and no soft prompt"),
        ):
            refused = CliRunner().invoke(app, [*args, "--dry-run"], env={"COLUMNS": "120"})
            assert refused.exit_code == 1 and why in " ".join(refused.output.split()), refused.output
