"""Rewards from outside the package: functions and classes, with settings of their own that are checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.config.rewards import RewardsConfig, read_reward
from posttrain.core.errors import RecipeError, RewardError
from posttrain.core.imports import add_import_folder
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.recipe.parsing import dump_recipe, load_recipe
from posttrain.rewards.reward_log import printed_lines
from posttrain.rewards.stack import RewardStack

FUNCTION = """
def brevity(text, example, *, limit: int = 100) -> float:
    return float(len(text) <= limit)
"""
CLASS = """
from pydantic import BaseModel, Field

class Brevity:
    class Config(BaseModel):
        limit: int = Field(100, ge=1, description="Longest text in characters.")
    def __init__(self, config):
        self.limit = config.limit
    def __call__(self, text, example):
        return float(len(text) <= self.limit)
"""
OTHERS = """
def shortest(texts, example):
    return [float(len(t) == min(map(len, texts))) for t in texts]

def by_name(texts, example):
    return {t: 1.0 for t in texts}

def told(text, example):
    from posttrain.rewards import Explained
    return Explained(0.5, f"of {text}")

def told_oddly(text, example):
    from posttrain.rewards import Explained

    class Reason:
        def __str__(self):
            return f"an object, of {text}" if text else 1 / 0

    return Explained(0.5, Reason())

def loud(text, example):
    print("looking at", text)
    return 1.0

def trl(completions, **kwargs):
    return [0.0 for _ in completions]

def trl_prompts(prompts, completions, **kwargs):
    return [0.0 for _ in completions]

def taken(text, example, *, weight: float = 1.0):
    return 0.0

def three(text, example, more):
    return 0.0

class Uncallable:
    pass
"""
RECIPE = """
name: custom
model: {source: "tiny:llama"}
stages:
- method: grpo
  problems: {kind: lab}
  rewards:
  - {kind: "my_rewards:brevity", limit: 7, weight: 0.5}
  - {kind: exact}
"""


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    monkeypatch.setattr("posttrain.core.imports._FOLDERS", [])
    (tmp_path / "my_rewards.py").write_text(FUNCTION + CLASS + OTHERS)
    add_import_folder(tmp_path)
    return tmp_path


def group(*texts: str) -> RolloutGroup:
    rollouts = [Rollout(tuple(range(len(t))), (0.0,) * len(t), "end", t) for t in texts]
    return RolloutGroup((1,), {"answer": "4", "prompt": "2+2"}, rollouts)


def scores(kind: str, *texts: str, **settings: Any) -> Any:
    with RewardStack(RewardsConfig.model_validate([{"kind": kind, **settings}])) as stack:
        return stack([group(*texts)])


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize(("kind", "title"), [("my_rewards:brevity", "brevity"), ("my_rewards:Brevity", "Brevity")])
def test_a_function_or_class_is_a_reward(kind: str, title: str, isolated: bool) -> None:
    assert len(FUNCTION.strip().splitlines()) <= 10 and len(CLASS.strip().splitlines()) <= 10
    scored = scores(kind, "abc", "abcd", limit=3, weight=0.5, isolated=isolated)
    assert [dict(r.rewards) for r in scored.groups[0].rollouts] == [{title: 1.0}, {title: 0.0}]
    assert [r.reward for r in scored.groups[0].rollouts] == [0.5, 0.0]
    assert scored.metrics[f"reward/{title}/mean"] == 0.5
    named = scores(kind, "abc", limit=3, name="short", isolated=isolated)
    assert dict(named.groups[0].rollouts[0].rewards) == {"short": 1.0}


def test_settings_from_outside_are_checked() -> None:
    assert read_reward({"kind": "my_rewards:brevity"}).limit == 100  # type: ignore[attr-defined]
    for kind in ("my_rewards:brevity", "my_rewards:Brevity"):
        with pytest.raises(ValidationError, match="limti"):
            read_reward({"kind": kind, "limti": 3})
        with pytest.raises(ValidationError, match="valid integer"):
            read_reward({"kind": kind, "limit": "long"})
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        read_reward({"kind": "my_rewards:Brevity", "limit": 0})
    with pytest.raises(ValidationError, match="the setting 'weight' is one that all of its kind have"):
        read_reward({"kind": "my_rewards:taken"})
    with pytest.raises(ValidationError, match="there is no 'brevty' in my_rewards"):
        read_reward({"kind": "my_rewards:brevty"})
    with pytest.raises(ValidationError, match="no reward is called 'exat'. Did you mean exact"):
        read_reward({"kind": "exat"})
    with pytest.raises(ValidationError, match="Did you mean truncation_penalty"):
        read_reward({"kind": "ended"})


def test_a_recipe_names_rewards_in_a_list(outside: Path) -> None:
    path = outside / "custom.yaml"
    path.write_text(RECIPE)
    stage: Any = load_recipe(path, ["stages.rl.rewards.0.limit=8", "stages.rl.rewards.1.weight=2"]).stages[0]
    assert [(t.title, t.weight) for t in stage.rewards.terms] == [("brevity", 0.5), ("exact", 2)]
    assert stage.rewards.terms[0].limit == 8
    changed = load_recipe(path, ["stages.rl.rewards.on_error=exclude", "stages.rl.rewards.terms.0.limit=9"])
    rewards = changed.stages[0].rewards  # type: ignore[union-attr]
    assert rewards.on_error == "exclude" and rewards.terms[0].limit == 9
    (outside / "again.yaml").write_text(dump_recipe(changed))
    assert load_recipe(outside / "again.yaml") == changed
    path.write_text(RECIPE.replace("limit: 7", "limti: 7"))
    with pytest.raises(RecipeError, match=r"rewards\.0\.limti \(.*yaml:8\): no such setting. Did you mean limit"):
        load_recipe(path)
    path.write_text(RECIPE.replace("kind: exact", "kind: exact, labl: x"))
    with pytest.raises(RecipeError, match=r"rewards\.1\.labl \(.*yaml:9\): no such setting. Did you mean label"):
        load_recipe(path)
    path.write_text(RECIPE.replace("  rewards:\n", "  rewards:\n    parts:\n").replace("  - {", "    - {"))
    with pytest.raises(RecipeError, match=r"rewards \(.*: `parts:` is gone: write rewards: \[...\]"):
        load_recipe(path)


def test_a_reward_of_a_group(capfd: pytest.CaptureFixture[str]) -> None:
    scored = scores("my_rewards:shortest", "a", "bb", group=True)
    assert [r.reward for r in scored.groups[0].rollouts] == [1.0, 0.0]
    for isolated in (True, False):
        with pytest.raises(RewardError, match="expected a list of 2 numbers, one for each completion.* a dict: {'a'"):
            scores("my_rewards:by_name", "a", "b", group=True, isolated=isolated)


@pytest.mark.parametrize("isolated", [True, False])
def test_what_a_reward_prints_is_shown_and_kept(
    isolated: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the last lines, and what a completion has put into them moves no cursor."""
    log = tmp_path / "stages/0-rl/rewards.log"
    config = RewardsConfig.model_validate([{"kind": "my_rewards:loud", "isolated": isolated}, {"kind": "exact"}])
    with RewardStack(config, log=log) as stack:
        stack([group("this\x1b[2J", "that")])
    assert sorted(log.read_text().splitlines()) == ["looking at that", "looking at this␛[2J"]
    shown = capsys.readouterr().out
    assert f"rewards printed 2 lines: {log}" in shown and "reward: looking at this␛[2J" in shown and "\x1b" not in shown
    assert printed_lines(tmp_path) == ["rewards printed 2 lines: stages/0-rl/rewards.log"]
    with RewardStack(config, log=log) as stack:
        stack([group("more")])
    assert len(log.read_text().splitlines()) == 3 and "rewards printed 1 line: " in capsys.readouterr().out
    with RewardStack(config) as stack:  # without a file, lines are shown
        stack([group("nowhere")])
    assert "reward: looking at nowhere" in capsys.readouterr().out


@pytest.mark.parametrize("isolated", [True, False])
def test_a_reward_may_say_why(isolated: bool) -> None:
    (scored,) = scores("my_rewards:told", "a\n b\x1b[1m" + "c" * 999, "", isolated=isolated).groups
    first, second = scored.rollouts
    assert first.reward == 0.5 and first.notes["told"].startswith("of a b␛[1mccc") and len(first.notes["told"]) == 300
    assert second.reward == 0.5 and dict(second.notes) == {"told": "of"} and type(first.rewards["told"]) is float
    config = {"terms": [{"kind": "my_rewards:told_oddly", "isolated": isolated}], "on_error": "exclude"}
    with RewardStack(RewardsConfig.model_validate(config)) as stack:
        odd = stack([group("a", "")])
    assert odd.groups[0].rollouts[0].notes == {"told_oddly": "an object, of a"}
    assert "division by zero" in odd.failed[0].failures["told_oddly"]


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("name", ["trl", "trl_prompts", "three"])
@pytest.mark.parametrize("form", ["kind", "function"])
def test_another_signature_is_refused_before_anything_runs(name: str, form: str, isolated: bool) -> None:
    path = f"my_rewards:{name}"
    term = {"kind": path} if form == "kind" else {"kind": "function", "function": path}
    with pytest.raises(RewardError, match=r"a reward gets \(text, example\): the text of one completion"):
        RewardStack(RewardsConfig.model_validate([{**term, "isolated": isolated}]))


def test_an_object_that_is_no_reward_is_refused() -> None:
    with pytest.raises(RewardError, match="makes a Uncallable, not a function"):
        RewardStack(RewardsConfig.model_validate([{"kind": "my_rewards:Uncallable", "isolated": False}]))
    with pytest.raises(RewardError, match="unexpected keyword argument 'wrod'"):
        term = {"kind": "function", "function": "my_rewards:shortest", "options": {"wrod": 1}}
        RewardStack(RewardsConfig.model_validate([term]))
