"""Evaluations and environments from outside the package: named by import path, with settings that are checked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from posttrain.config import EnvironmentConfig, EvaluationConfig, ModelConfig
from posttrain.core.errors import RecipeError
from posttrain.core.imports import add_import_folder
from posttrain.eval.tasks import evaluate_model
from posttrain.sampling.environments import environment

OUTSIDE = """
from posttrain.config.evaluation import EvaluationBase
from posttrain.eval.evaluation_tasks import EvaluationTask
from posttrain.sampling.greedy import greedy

class Lengths(EvaluationTask):
    class Config(EvaluationBase):
        texts: list[str]

    def read(self, tokenizer, context):
        return self.config.texts

    def chunks(self, run):
        def compute(track):
            prompts = [run.tokenizer(text).input_ids for text in run.data]
            answers = greedy(run.model, run.tokenizer, prompts, 4)
            return [{"id": i, "prompt": t, "value": len(a)} for i, (t, a) in enumerate(zip(run.data, answers))]
        yield len(run.data), compute

class Echo:
    def __init__(self, *, suffix: str = "!"):
        self.suffix = suffix
    def start(self, example):
        return None
    def step(self, state, text):
        return text + self.suffix, False

class Nothing:
    pass
"""


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "outside_parts", raising=False)
    monkeypatch.setattr("posttrain.core.imports._FOLDERS", [])
    (tmp_path / "outside_parts.py").write_text(OUTSIDE)
    add_import_folder(tmp_path)
    return tmp_path


def checked(annotation: Any, **settings: Any) -> Any:
    return TypeAdapter(annotation).validate_python(settings)


def test_an_evaluation_from_outside(tmp_path: Path) -> None:
    task = checked(EvaluationConfig, kind="outside_parts:Lengths", name="lengths", texts=["a b", "c"])
    (summary,) = evaluate_model(ModelConfig(source="tiny:llama"), [task], tmp_path)
    assert (summary["task"], summary["kind"], summary["metric"], summary["n"]) == ("lengths", "score", "score", 2)
    items = [json.loads(line) for line in (tmp_path / "lengths.jsonl").read_text().splitlines()]
    assert [i["prompt"] for i in items] == ["a b", "c"] and all(0 <= i["value"] <= 4 for i in items)
    with pytest.raises(ValidationError, match="textz"):
        checked(EvaluationConfig, kind="outside_parts:Lengths", name="lengths", textz=[])
    with pytest.raises(ValidationError, match="no evaluation is called 'perplexty'. Did you mean perplexity"):
        checked(EvaluationConfig, kind="perplexty", name="p")


def test_an_environment_from_outside() -> None:
    config = checked(EnvironmentConfig, kind="outside_parts:Echo", stop=["?"], suffix="?!")
    assert config.stop_strings == ["?"] and environment(config).step(None, "so") == ("so?!", False)
    with pytest.raises(ValidationError, match="sufix"):
        checked(EnvironmentConfig, kind="outside_parts:Echo", stop=["?"], sufix="?!")
    with pytest.raises(RecipeError, match="which has no start and no step"):
        environment(checked(EnvironmentConfig, kind="outside_parts:Nothing", stop=["?"]))
    with pytest.raises(ValidationError, match="no environment is called 'calculater'. Did you mean calculator"):
        checked(EnvironmentConfig, kind="calculater")
