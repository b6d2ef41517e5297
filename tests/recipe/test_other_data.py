"""Another table in place of the recipe's: what describes the old one goes with it, and every removal is logged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import Recipe
from posttrain.recipe.documents import dump_recipe
from posttrain.recipe.other_data import OF_THE_TABLE, data_sources
from posttrain.recipe.parsing import load_recipe, shipped


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "posttrain")


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    """The recipe kto with held-out rows of the same table, in place of a fraction."""
    path = tmp_path / "reviews.yaml"
    path.write_text(
        "extends: kto\nname: reviews\nstages.kto:\n  held_out:\n    source: packaged:movie_reviews.tsv\n"
        "    prompt: a\n    completion: '{text}'\n    rows: [9000, 9300]\n"
    )
    return str(path)


def test_the_documented_command_of_kto(caplog: pytest.LogCaptureFixture) -> None:
    stage = load_recipe("kto", ["stages.kto.data.source=thumbs.jsonl"]).stages[0]
    data = stage.data  # type: ignore[attr-defined]
    assert (data.prompt, data.completion, data.classes, data.rows) == (None, None, None, None)
    assert data.shuffle_seed == 1 and stage.held_out == 0.1  # type: ignore[attr-defined]
    (only,) = caplog.messages
    assert only.startswith("stages.kto.data: classes, prompt, completion, rows described 'packaged:movie_reviews.tsv'")


def test_held_out_rows_of_the_old_table_go_too(reviews: str, caplog: pytest.LogCaptureFixture) -> None:
    stage = load_recipe(reviews, ["stages.kto.data.source=thumbs.jsonl"]).stages[0]
    assert stage.held_out is None  # type: ignore[attr-defined]
    _, second = caplog.messages
    assert second.startswith("stages.kto.held_out is left out: it held out rows of 'packaged:movie_reviews.tsv'")


def test_what_is_written_with_the_source_stays(reviews: str, caplog: pytest.LogCaptureFixture) -> None:
    given = ["stages.kto.data.rows=[0, 9]", "stages.kto.data.source=t.jsonl", "stages.kto.held_out.source=h.jsonl"]
    stage = load_recipe(reviews, given).stages[0]
    assert stage.data.rows == (0, 9) and stage.data.classes is None  # type: ignore[attr-defined]
    held = stage.held_out  # type: ignore[attr-defined]
    assert (held.source, held.prompt, held.rows) == ("h.jsonl", None, None)
    whole = load_recipe(reviews, ["stages.kto.data={source: t.jsonl, prompt: '{a}', completion: '{b}'}"]).stages[0]
    assert whole.data.prompt == "{a}" and whole.held_out is None  # type: ignore[attr-defined]
    templates = ["stages.sft.data.source=t.tsv", "stages.sft.data.prompt={a}", "stages.sft.data.completion={b}"]
    data = load_recipe("quickstart", templates).stages[0].data  # type: ignore[attr-defined]
    assert (data.prompt, data.completion, data.classes) == ("{a}", "{b}", None)


def test_the_same_source_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    same = load_recipe("kto", ["stages.kto.data.source=packaged:movie_reviews.tsv", "stages.kto.data.rows=[0, 10]"])
    assert same.stages[0].data.classes is not None and same.stages[0].held_out is not None  # type: ignore[attr-defined]
    assert not caplog.messages


@pytest.mark.parametrize("name", shipped())
def test_every_data_block_of_the_recipes(name: str) -> None:
    """In whichever place a shipped recipe names a table, nothing that describes it stays with another one."""
    keys = data_sources(load_recipe(name).model_dump(mode="json"))
    given = [f"{'.'.join(map(str, key))}.source=other{i}.jsonl" for i, key in enumerate(keys)]
    changed = load_recipe(name, given).model_dump(mode="json")
    for key in keys:
        block: Any = changed
        for part in key:
            block = block[part]
        assert not any(block[n] for n in OF_THE_TABLE if n not in ("layout", "split"))


def test_a_recipe_that_extends_another(reviews: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: {reviews}\nname: mine\nstages.kto:\n  data: {{source: thumbs.jsonl, rows: [0, 5]}}\n")
    stage = load_recipe(path).stages[0]
    assert stage.data.rows == (0, 5) and stage.data.prompt is None  # type: ignore[attr-defined]
    assert stage.held_out is None and len(caplog.messages) == 2  # type: ignore[attr-defined]
    (tmp_path / "again.yaml").write_text(dump_recipe(load_recipe(path)))
    caplog.clear()
    assert isinstance(load_recipe(tmp_path / "again.yaml"), Recipe) and not caplog.messages


def test_settings_of_one_of_several_sources_are_no_other_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mixed.yaml"
    path.write_text(
        "name: mixed\nmodel: {source: 'tiny:llama'}\nstages:\n  - method: sft\n    data:\n      prompt: '{a}'\n"
        "      completion: '{b}'\n      source: [a.jsonl, {source: b.jsonl, weight: 2}]\n"
    )
    data = load_recipe(str(path), ["stages.sft.data.source.1.weight=3"]).stages[0].data  # type: ignore[attr-defined]
    assert data.prompt == "{a}" and data.source[1].weight == 3 and not caplog.messages
    data = load_recipe(str(path), ["stages.sft.data.source=[a.jsonl, c.jsonl]"]).stages[0].data  # type: ignore[attr-defined]
    assert data.prompt is None and caplog.messages
