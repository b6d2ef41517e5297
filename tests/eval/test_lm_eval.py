"""Tasks of lm-eval on the engine, against lm-eval's own Hugging Face backend on the same model and local data."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.core.errors import DataError, MissingExtraError, ModelError, RecipeError
from posttrain.core.files import read_lines, read_object
from posttrain.recipe.parsing import load_recipe

WORDS = "apple river stone bright window garden music paper silver cloud".split()
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "num_fewshot": 2,
    "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{ question }} {{ question }}",
    "metric_list": [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_target": "{{choices[answer]}}",
    "num_fewshot": 1,
    "generation_kwargs": {"until": ["\n", "Q:"], "max_gen_toks": 12, "do_sample": False},
    "filter_list": [
        {"name": "word", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]},
        {"name": "raw", "filter": [{"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tasks over six local documents."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"Which word follows {w} {i}?", "choices": [WORDS[i], WORDS[-i], w], "answer": i % 3}
        for i, w in enumerate(WORDS[:6])
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    for name, task in (("choose", CHOICE), ("roll", ROLLING), ("write", GENERATE)):
        whole = {"task": name, **source, "test_split": "test", "fewshot_split": "test", **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    return folder


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    from posttrain.config import ModelConfig
    from posttrain.models.loading import load_model

    return load_model(ModelConfig(source="tiny:llama"))


def test_lm_eval_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from posttrain.eval.lm_eval_tasks import require_lm_eval

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"posttrain\[lm-eval\]"):
        require_lm_eval()


def test_figures_are_those_of_the_hugging_face_backend(
    tasks: Path, model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likelihoods, whole texts in windows of the context, and greedy answers; as plain text and as a conversation."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from posttrain.eval import lm_eval_model
    from posttrain.models.language_model import LanguageModel

    hf, tokenizer = model
    theirs = HFLM(pretrained=copy.deepcopy(hf), tokenizer=tokenizer, batch_size=4, max_length=64)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    of_choices: dict[bool, Any] = {}
    for chat in (False, True):
        how = {
            "task_manager": manager,
            "bootstrap_iters": 10,
            "apply_chat_template": chat,
            "fewshot_as_multiturn": chat,
        }
        names = ["choose", "write"] if chat else ["choose", "roll", "write"]
        expected = lm_eval.simple_evaluate(model=theirs, tasks=names, **how)
        monkeypatch.setattr(lm_eval_model, "CHUNK_TOKENS", 200)  # several batches
        ours = lm_eval_model.EngineLM(LanguageModel(hf).eval(), tokenizer)
        ours.max_length = 64  # shorter than the prompts and the texts: both are cut, or read in windows
        found = lm_eval.simple_evaluate(model=ours, tasks=names, **how)
        for name in names:
            for one, two in zip(found["samples"][name], expected["samples"][name], strict=True):
                assert one["arguments"] == two["arguments"]
                for (got,), (wanted,) in zip(one["resps"], two["resps"], strict=True):
                    if isinstance(wanted, tuple):
                        assert got[0] == pytest.approx(wanted[0], abs=1e-4) and got[1] == wanted[1]
                    else:
                        assert got == (wanted if isinstance(wanted, str) else pytest.approx(wanted, abs=1e-4, rel=1e-6))
            for key, value in expected["results"][name].items():
                near = pytest.approx(value, rel=1e-6) if name == "roll" and isinstance(value, float) else value
                assert found["results"][name][key] == near, key
        of_choices[chat] = found["samples"]["choose"][0]["arguments"]
    assert of_choices[True] != of_choices[False] and "<|" in of_choices[True][0][0]


def test_a_recipe_measures_tasks_of_lm_eval(tasks: Path, tmp_path: Path) -> None:
    """Items, lm-eval's own results, the comparison of two models, and a second call that computes nothing again."""
    from typer.testing import CliRunner

    from posttrain.cli.main import app

    folders = [tmp_path / name for name in ("one", "two")]
    shared = ["--lm-eval", f"choose,{tasks}/write.yaml,roll", "--lm-eval-folder", str(tasks), "--limit", "4"]
    for folder in folders:
        done = CliRunner().invoke(app, ["evaluate", "tiny:llama", *shared, "--folder", str(folder)])
        assert done.exit_code == 0, done.output
    again = CliRunner().invoke(
        app, ["evaluate", "tiny:llama", *shared, "--folder", str(folders[1]), "--against", str(folders[0])]
    )
    assert again.exit_code == 0 and "acc_norm" in again.output and "difference" in again.output
    items = read_lines(folders[0] / "choose.jsonl")
    summary = read_object(folders[0] / "choose.json")
    assert [i["id"] for i in items] == [f"choose:{n}" for n in range(4)]
    assert summary["n"] == 4 and summary["value"] == summary["lm_eval"]["results"]["choose"]["acc,none"]
    assert all(i["output"].strip() in WORDS and i["metrics"].keys() == {"acc,none", "acc_norm,none"} for i in items)
    assert summary["lm_eval"]["shots"] == {"choose": 2}
    written = read_lines(folders[0] / "write.jsonl")
    assert all(i["metrics"].keys() == {"exact_match,word", "exact_match,raw"} for i in written)
    assert all(i["value"] < 0 for i in read_lines(folders[0] / "roll.jsonl"))  # log-likelihood of a byte


def test_what_can_not_be_run_is_named(tasks: Path, model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.eval import lm_eval_tasks
    from posttrain.eval.evaluation_tasks import make_evaluation
    from posttrain.eval.lm_eval_model import EngineLM
    from posttrain.models.language_model import LanguageModel

    def read(**settings: Any) -> Any:
        task = {"kind": "lm_eval", "name": "t", "tasks_folder": str(tasks), **settings}
        recipe = load_recipe({"name": "r", "model": {"source": "tiny:llama"}, "evaluate": [task]})
        return make_evaluation(recipe.evaluate[0]).read(model[1], None)

    index = lm_eval_tasks._task_manager
    monkeypatch.setattr(lm_eval_tasks, "_task_manager", lambda folder, with_own: index(folder, False))
    with pytest.raises(RecipeError, match="no task, group or tag 'choos'.*with that in their name: choose"):
        read(task="choos")
    broken = tasks / "broken.yaml"
    broken.write_text(yaml.safe_dump({"task": "broken", "dataset_path": "nobody/nothing", **CHOICE, "test_split": "t"}))
    with pytest.raises(DataError, match="can't load the task .*broken.yaml.*data_files"):
        read(task=str(broken))
    broken.unlink()
    with pytest.raises(RecipeError, match="validation divides rows"):
        read(task="choose", validation=0.5)
    sample = {"metrics": ["acc"], "acc": 1.0}
    config = load_recipe(
        {
            "name": "r",
            "model": {"source": "tiny:llama"},
            "evaluate": [{"kind": "lm_eval", "name": "t", "task": "x", "metric": "f1"}],
        }
    ).evaluate[0]
    with pytest.raises(RecipeError, match="'f1' is not one.*set metric to one of acc"):
        lm_eval_tasks._headline(config, {"higher_is_better": {}}, "x", {"none": sample})  # type: ignore[arg-type]
    engine = EngineLM(LanguageModel(model[0]).eval(), model[1])
    with pytest.raises(ModelError, match="num_beams: 4.*expected until"):
        engine._sampling({"num_beams": 4})
    with pytest.raises(ModelError, match="answers of 100000 tokens"):
        engine._answers(["a"], {"max_gen_toks": 100_000})
