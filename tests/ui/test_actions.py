"""Forms of recipes, and what the buttons refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.core.errors import CheckpointError, DataError, PosttrainError, RecipeError
from posttrain.recipe.parsing import load_recipe, shipped
from posttrain.ui.actions import ACTIONS
from posttrain.ui.pages import UiState
from posttrain.ui.recipe_form import override, recipe_blocks, recipe_choices
from posttrain.ui.run_index import RunIndex


def test_the_fields_of_a_form_are_the_settings_of_the_recipe() -> None:
    fields = {f.key: f for block in recipe_blocks("dpo") for f in block.fields}
    recipe = load_recipe("dpo")
    (stage,) = recipe.stages
    assert fields["name"].value == "dpo" and not fields["name"].at_default
    assert float(fields[f"stages.{stage.name}.optimizer.lr"].value) == stage.optimizer.lr
    assert fields["model.dtype"].choices and "auto" in fields["model.dtype"].choices
    assert fields["evaluate_stages"].choices == ("true", "false") and "output" not in fields
    # Values are shown as overrides take them.
    kept = [override(f.key, f.value) for f in fields.values() if not f.at_default and not f.value.endswith("…")]
    assert len(kept) > 5 and load_recipe("dpo", kept) == recipe
    assert dict(recipe_choices()).keys() == shipped().keys() and all(about for _, about in recipe_choices())


def test_what_actions_refuse(root: Path, tmp_path: Path) -> None:
    state = UiState(RunIndex([root]), tmp_path / "sub" / "votes.jsonl")
    first, vote = str(root / "first"), {"messages": [{"role": "user", "content": "Q"}], "chosen": "a", "rejected": "b"}
    refused: list[tuple[str, dict, type[PosttrainError], str]] = [
        ("/start", {"recipe": "nothing"}, RecipeError, "no recipe"),
        ("/start", {"recipe": "sft", "settings": []}, RecipeError, "settings by name"),
        ("/start", {"recipe": "quickstart", "settings": {"name": "../x"}}, RecipeError, "name"),
        ("/start", {"recipe": "quickstart", "settings": {"name": "first"}}, RecipeError, "there already"),
        ("/stop", {"run": first}, CheckpointError, "was not started here"),
        ("/resume", {"run": "/etc"}, CheckpointError, "no run"),
        ("/inspect", {"run": first, "rows": 0}, DataError, "expected 1 to 200"),
        ("/inspect", {"run": first, "stage": "sft"}, RecipeError, "required, and missing"),
        ("/vote", {**vote, "rejected": "a "}, DataError, "the same"),
        ("/vote", {**vote, "rejected": ""}, DataError, "rejected"),
        ("/vote", {"chosen": "a"}, DataError, "messages"),
    ]
    for path, body, kind, words in refused:
        with pytest.raises(kind, match=words):
            ACTIONS[path](state, body)
    assert not (root / "quickstart").exists() and not state.votes.exists()
    assert [ACTIONS["/vote"](state, vote)["votes"] for _ in range(2)] == [1, 2]
    assert json.loads(state.votes.read_text().splitlines()[0])["prompt"] == vote["messages"]
