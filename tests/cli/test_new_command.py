"""`posttrain new`: the recipe of each goal runs as it is (two steps, a tiny model), and the choices follow the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import posttrain
from posttrain.cli.main import app
from posttrain.core.errors import DataError
from posttrain.core.files import read_lines
from posttrain.runs.data_look import look_at_data
from posttrain.runs.recipe_draft import method_for

ROWS: dict[str, Any] = {
    "chats": lambda i: {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}]},
    "exchanges": lambda i: {"instruction": f"Say {i}", "output": f"{i}"},
    "pairs": lambda i: {"prompt": f"Say {i}", "chosen": f"{i}", "rejected": f"{i + 1}"},
    "thumbs": lambda i: {"prompt": f"Say {i}", "completion": f"{i}", "label": i % 2 == 0},
    "answers": lambda i: {"prompt": f"{i} + 1 =", "answer": f"{i + 1}"},
    "classes": lambda i: {"review": f"I found number {i} {'good' if i % 2 else 'bad'}", "stars": f"{i % 2}", "id": i},
    "documents": lambda i: {"text": f"All that is known of number {i}. " * 4},
}


def write(folder: Path, kind: str, count: int = 48) -> Path:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(ROWS[kind](i)) + "\n" for i in range(count)))
    return path


def new(*args: str, stdin: str = "") -> str:
    done = CliRunner().invoke(app, ["new", *args], input=stdin, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    ("kind", "goal", "method"),
    [
        ("classes", "answer", "sft"),
        ("pairs", "prefer", "dpo"),
        ("pairs", "score", "reward_model"),
        ("answers", "reason", "grpo"),
        ("documents", "read", "pretrain"),
    ],
)
def test_the_recipe_of_each_goal_runs_as_it_is(
    kind: str, goal: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, kind)
    said = new("mine.yaml", "--data", f"{kind}.jsonl", "--goal", goal, "--model", "tiny:llama")
    assert f"48 rows, {look_at_data(f'{kind}.jsonl').notes[0].split('48 rows, ')[1]}" in said and "rows are few" in said
    written = Path("mine.yaml").read_text()
    assert yaml.safe_load(written)["stages"][0]["method"] == method and "memory: about" in written
    small = ["steps=2", "prompts_per_step=2", "sampler.max_tokens=4"] if method == "grpo" else ["max_steps=2"]
    result = posttrain.run(posttrain.load_recipe("mine.yaml", [f"stages.0.{s}" for s in small]))
    (stage,) = (result.folder / "stages").iterdir()
    assert read_lines(stage / "metrics.jsonl")[-1]["step"] == 2


def test_kinds_are_recognised_and_goals_that_do_not_go_with_them_refused(tmp_path: Path) -> None:
    for kind in ROWS:
        assert look_at_data(str(write(tmp_path, kind))).kind == kind
    assert look_at_data(str(tmp_path / "answers.jsonl")).rewards == "numeric"
    look = look_at_data(str(tmp_path / "classes.jsonl"))
    assert look.classes == ("0", "1") and look.settings["completion"] == "{stars}"
    assert "{review}" in look.settings["prompt"]
    assert method_for(None, look_at_data(str(tmp_path / "thumbs.jsonl"))) == "kto"
    assert method_for("answer", look_at_data(str(tmp_path / "answers.jsonl"))) == "sft"
    odd = tmp_path / "odd.jsonl"
    odd.write_text("".join(json.dumps({"a": i, "b": -i}) + "\n" for i in range(9)))
    with pytest.raises(DataError, match="are no known layout"):
        look_at_data(str(odd))
    done = CliRunner().invoke(app, ["new", "--data", str(tmp_path / "chats.jsonl"), "--goal", "reason"])
    assert done.exit_code == 2 and "needs rows of kind answers" in done.output and "go with answer" in done.output


def test_questions_memory_length_and_time_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows train every weight, adapters if memory is short; long rows are cut, steps limited by the time."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "exchanges", 1998)
    with path.open("a") as file:
        file.write(json.dumps({"instruction": "x" * 1500, "output": "y"}) + "\n")
        file.write(json.dumps({"instruction": "x" * 2500, "output": "longer than the context"}) + "\n")
    said = new("--dry-run", stdin="exchanges.jsonl\nanswer\ntiny:llama\n24\nany\n")
    assert "Data (a file" in said and "exchanges.yaml was not written" in said and not Path("exchanges.yaml").exists()
    assert "adapter:" not in said and "lr: 2e-5" in said and "epochs: 3" in said and "batch_size: 16" in said
    assert (
        "max_tokens: 64 " in said
        and "1 rows can't be used" in said
        and "on_long: truncate" in said
        and "of 25.8 on a GPU of 24 GiB" in said
    )
    assert "1 rows can't be used" in said
    given = ("--data", "exchanges.jsonl", "--model", "tiny:llama", "--goal", "answer", "--dry-run")
    short = new(*given, "--gpu", "0.1", "--time", "any")
    assert "adapter:" in short and "! it does not fit" in short and "quantization: nf4" in short
    limited = new(*given, "--gpu", "here", "--time", "0.001s")
    assert "max_steps: 1 " in limited and "375 are 3 epochs" in limited
    for option, value in (("--gpu", "big"), ("--time", "soon")):
        wrong = CliRunner().invoke(app, ["new", *given, option, value])
        assert wrong.exit_code == 2 and "expected" in wrong.output
