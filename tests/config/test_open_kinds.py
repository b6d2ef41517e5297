"""Kinds of settings by name, or from outside the package by their import path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import ValidationError

from posttrain.config import Config
from posttrain.config.names import PROMPT_SOURCES
from posttrain.config.open_kinds import open_kind
from posttrain.core.errors import RecipeError
from posttrain.core.imports import add_import_folder
from posttrain.recipe.parsing import dump_recipe, load_recipe
from posttrain.recipe.schema import dotted, settings

OUTSIDE = """
from pydantic import BaseModel, Field

class Words:
    class Config(BaseModel):
        count: int = Field(3, ge=1, description="Number of words.")

    def __init__(self, config):
        self.config = config

class Bare:
    pass
"""
RECIPE = """
name: open
model: {source: "tiny:llama"}
stages:
- method: grpo
  problems: {kind: KIND, SETTINGS}
  rewards: [{kind: exact}]
"""


class Holder(Config):
    problems: Annotated[Any, open_kind(PROMPT_SOURCES, "source of prompts")]
    more: list[Annotated[Any, open_kind(PROMPT_SOURCES, "source of prompts", default="lab")]] = []


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "outside_prompts.py").write_text(OUTSIDE)
    monkeypatch.delitem(sys.modules, "outside_prompts", raising=False)
    monkeypatch.setattr("posttrain.core.imports._FOLDERS", [])
    add_import_folder(tmp_path)
    return tmp_path


def recipe(tmp_path: Path, kind: str, text: str) -> Path:
    path = tmp_path / "open.yaml"
    path.write_text(RECIPE.replace("KIND", kind).replace("SETTINGS", text))
    return path


def test_a_kind_is_checked_by_its_own_settings() -> None:
    held = Holder.model_validate({"problems": {"kind": "lab", "size": 7}, "more": [{"size": 8}]})
    assert (held.problems.kind, held.problems.size, held.more[0].size) == ("lab", 7, 8)
    again = Holder(problems=held.problems, more=held.more)
    assert again == held and again.problems is held.problems
    dumped = held.model_dump(mode="json")
    assert dumped["problems"]["size"] == 7 and dumped["problems"]["held_out"] is False
    assert Holder.model_validate(dumped) == held


def test_errors_keep_their_place_and_name_the_nearest_kinds() -> None:
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"problems": {"kind": "lab", "size": 0}, "more": [{"kind": "human-evl"}]})
    size, kind = caught.value.errors()
    assert size["loc"] == ("problems", "size") and size["input"] == 0
    assert kind["loc"] == ("more", 0, "kind")
    assert "no source of prompts is called 'human-evl'. Did you mean human_eval?" in kind["msg"]
    assert (
        "There are rows, reasoning-gym, lab, lab_programs, human_eval, and package.module:name for one of yours"
        in kind["msg"]
    )
    for wrong, said in (({}, "required: the name of a source of prompts"), ("lab", "expected a mapping with the key")):
        with pytest.raises(ValidationError, match=said):
            Holder.model_validate({"problems": wrong})


def test_a_kind_from_outside(outside: Path) -> None:
    loaded = load_recipe(recipe(outside, '"outside_prompts:Words"', "count: 5"), ["stages.rl.problems.count=6"])
    problems = loaded.stages[0].problems  # type: ignore[union-attr]
    assert (problems.kind, problems.count) == ("outside_prompts:Words", 6)
    again = outside / "again.yaml"
    again.write_text(dump_recipe(loaded))
    assert load_recipe(again) == loaded


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ('"outside_prompts:Words"', "count: 0", r"problems.count \(.*open.yaml:6\): expected at least 1"),
        ('"outside_prompts:Words"', "cuont: 1", "problems.cuont .*Did you mean count"),
        ('"outside_prompts:Wrods"', "", r"problems.kind \(.*there is no 'Wrods' in outside_prompts"),
        ('"no_such_module:Words"', "", "problems.kind .*no_such_module"),
        ('"outside_prompts:Bare"', "", "has no settings: expected a function, or a class with a nested class Config"),
        ("lab", "sise: 3", "Did you mean size"),
        ("labs", "size: 3", r"problems.kind \(.*Did you mean lab"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_a_kind(outside: Path, kind: str, text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe(outside, kind, text))


def test_the_reference_lists_the_settings_of_the_kind_that_is_named() -> None:
    data = load_recipe("lab").model_dump(mode="json")
    keys = {dotted(s.key, data) for s in settings(data)}
    assert {"stages.rl.problems.size", "stages.rl.held_out.problems.kind"} <= keys
    assert "stages.rl.problems.data.source" not in keys
    data["stages"][0]["problems"] = {"kind": "rows"}
    assert "stages.rl.problems.data.source" in {dotted(s.key, data) for s in settings(data)}
