"""posttrain push: what would leave is shown, keys and paths of the machine stay, and the Hub's own client uploads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import posttrain
from posttrain.cli.main import app
from posttrain.core.errors import CheckpointError, ModelError
from posttrain.runs.hub_push import plan_push
from tests.runs.hub_server import TOKEN, hub


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT of every weight, then with an adapter that is merged, and an evaluation."""
    folder = tmp_path_factory.mktemp("private")
    rows = [{"prompt": f"Say {c}", "completion": c} for c in "abcdefgh"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"source": str(folder / "rows.jsonl")}
    values = {
        "name": "two",
        "model": {"source": "tiny:llama"},
        "stages": [{"method": "sft", "data": data, "max_steps": 1, "adapter": {"r": 2}}],
        "evaluate": [{"kind": "perplexity", "name": "loss", "data": data}],
    }
    return posttrain.run(posttrain.Recipe.model_validate(values), folder / "runs" / "two").folder


def push(*args: str) -> str:
    done = CliRunner().invoke(app, ["push", *args], env={"COLUMNS": "200"})
    return f"{done.exit_code} {done.output}"


def test_a_dry_run_shows_all_that_would_be_uploaded(run: Path) -> None:
    shown = push(str(run), "me/two", "--dry-run", "--license", "apache-2.0")
    assert shown.startswith("0 private repository me/two: posttrain")
    sizes = plan_push(str(run), "me/two", licence="apache-2.0").sizes()
    assert {"README.md", "recipe.yaml", "config.json", "tokenizer.json", "model.safetensors"} <= set(sizes)
    assert all(f"{size:,} B  {name}\n" in shown for name, size in sizes.items())
    card = shown.partition("README.md\n---\n")[2]
    assert "license: apache-2.0" in card and 'from_pretrained("me/two")' in card and "FOLDER" not in card
    assert "| loss | perplexity | 8 |" in card and "- Bias, refusals of harmful prompts and other" in card
    assert str(run.parent) not in shown and shown.endswith("dry run: nothing was uploaded\n")
    recipe = yaml.safe_load(bytes(plan_push(str(run), "me/two").files["recipe.yaml"]))
    assert recipe["stages"][0]["data"]["source"] == "rows.jsonl" and "output" not in recipe


def test_adapters_alone_and_merged(run: Path, tmp_path: Path) -> None:
    alone = plan_push(str(run), "me/two", what="adapter")
    assert "adapter_model.safetensors" in alone.files and "config.json" not in alone.files
    assert "library_name: peft" in alone.card and "`posttrain chat me/two` opens both" in alone.card
    adapter = run / "model" / "adapter_config.json"
    assert not adapter.exists()
    for name in ("config.json", "model.safetensors"):
        (run / "model" / name).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"model/config.json, model/model.safetensors changed or went missing"):
        plan_push(str(run), "me/two")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).rename(run / "model" / name)


def test_what_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for args, message in (
        ((str(run), "two"), "'two': expected a repository of the Hub as OWNER/NAME"),
        ((str(run.parent), "me/two"), "is no run: expected a folder with manifest.json"),
        ((str(run), "me/two", "--stage", "dpo"), "no finished stage 'dpo' made a model; these did: sft"),
        ((str(run), "me/two", "--adapter", "--merged"), "--adapter and --merged: choose one"),
    ):
        assert push(*args, "--dry-run").startswith("1 error: ") and message in push(*args, "--dry-run")
    assert "HF_HUB_OFFLINE is set" in push(str(run), "me/two")

    monkeypatch.setenv("MY_API_KEY", "a-value-that-nobody-may-see")
    template = run / "model" / "chat_template.jinja"
    manifest, text = (run / "manifest.json").read_text(), template.read_text()
    noted = json.loads(manifest)
    noted["artifacts"] = {}
    (run / "manifest.json").write_text(json.dumps(noted))  # as of a run whose files are not known
    try:
        template.write_text(f"{{# {run.resolve()}/notes #}}{text}")
        plan = plan_push(str(run), "me/two")
        assert str(run.parent.name) not in bytes(plan.files["chat_template.jinja"]).decode()
        assert plan.notes == ["chat_template.jinja: 1 paths of this machine are only names there"]
        for key in ("a-value-that-nobody-may-see", TOKEN):
            template.write_text(f"{text}\n{{# {key} #}}")
            with pytest.raises(ModelError, match=r"looks like a key or password stands in chat_template.jinja:\d") as e:
                plan_push(str(run), "me/two")
            assert key not in str(e.value)
    finally:
        template.write_text(text)
        (run / "manifest.json").write_text(manifest)


UPLOADS = """
import sys
from typer.testing import CliRunner
from posttrain.cli.main import app
run = sys.argv[1]
for args in ([], [], ["--yes", "--adapter"], ["--public"], ["--yes", "--stage", "sft"]):
    done = CliRunner().invoke(app, ["push", run, "me/" + ("open" if "--public" in args else "two"), *args])
    print(done.exit_code, done.output.strip().splitlines()[-1])
done = CliRunner().invoke(app, ["push", run, "me/open", "--yes"])
print(done.exit_code, done.output.strip().splitlines()[-1])
done = CliRunner().invoke(app, ["push", run, "me/two"], env={"HF_TOKEN": "hf_wrong"})
print(done.exit_code, done.output.strip().splitlines()[-1])
"""


def test_the_hub_gets_what_was_shown(run: Path, tmp_path: Path) -> None:
    """With huggingface_hub's own client, against a server with the Hub's interface."""
    with hub() as (address, state):
        env = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }
        env |= {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", UPLOADS, str(run)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
    assert [line[0] for line in lines] == ["0", "1", "0", "0", "0", "1", "1"], lines
    assert f"uploaded {address}/me/two/commit/" in lines[0]
    assert "nothing was uploaded: --yes replaces files of me/two without a question" in lines[1]
    assert "me/open is public: to upload to it, say so with --public" in lines[5]
    assert "hf auth login" in lines[6] and "hf_wrong" not in lines[6]
    assert state.private == {"me/two": True, "me/open": False} and len(state.commits) == 4
    plan = plan_push(str(run), "me/two", stage="sft")
    expected = {n: f.read_bytes() if isinstance(f, Path) else f for n, f in plan.files.items()}
    assert state.files["me/two"] == expected  # the adapter's files are gone
