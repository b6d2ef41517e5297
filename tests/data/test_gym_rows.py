"""Rows that reasoning-gym makes, to be trained on: its items, its settings, what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from reasoning_gym.factory import create_dataset

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.data.formats import Record
from posttrain.data.gym_rows import gym_source_rows
from posttrain.data.prompt_sources import GymPrompts
from posttrain.data.rows import open_rows
from tests.data.tables import load_prompt_rows, read_table


def config(query: str = "", **given: Any) -> DataConfig:
    return DataConfig(source=f"reasoning-gym:gsm_symbolic{query}", **given)


def records(config: DataConfig) -> list[Record]:
    return open_rows(config).read(lambda row: row.record())


def test_a_row_is_an_item_with_what_is_told_of_it() -> None:
    table = read_table(config("?size=4&seed=5"))
    made = create_dataset("gsm_symbolic", seed=5, size=4)
    assert [r["question"] for r in table.rows] == [x["question"] for x in made]
    assert [r["answer"] for r in table.rows] == [x["answer"] for x in made]
    assert [r["answer_cot"] for r in table.rows] == [x["metadata"]["answer_cot"] for x in made]
    assert [n for _, n in table.places] == [1, 2, 3, 4]


def test_the_rows_are_the_problems_that_a_later_stage_asks() -> None:
    """Same name, same seed: a cold start and reinforcement learning see the same questions in the same words."""
    template = {"prompt": "{question}", "completion": "{answer_cot}"}
    trained = records(config("?size=30", rows=(0, 20), **template))
    problems = load_prompt_rows(GymPrompts.Config(name="gsm_symbolic", size=30))
    assert [r.messages[0]["content"] for r in trained] == [p["prompt"] for p in problems[:20]]
    for record, problem in zip(trained, problems, strict=False):
        worked = re.search(r"#### ?(\S+)", record.messages[1]["content"])
        assert worked and float(worked[1].replace(",", "")) == float(problem["answer"].replace(",", ""))


def test_parts_of_the_shuffled_rows_are_apart() -> None:
    template = {"prompt": "{question}", "completion": "{answer}", "shuffle_seed": 1}
    one, two = (
        {r.messages[0]["content"] for r in records(config("?size=60", rows=rows, **template))}
        for rows in ((0, 40), (40, 60))
    )
    assert (len(one), len(two)) == (40, 20) and not one & two


def test_options_are_read_as_yaml() -> None:
    rows = gym_source_rows("reasoning-gym:leg_counting?min_animals=1&max_animals=1&max_instances=2&size=30")
    assert all(len(r["animals"]) == 1 and max(r["animals"].values()) <= 2 for r in rows)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("reasoning-gym:gsm_symbolik", "did you mean.*gsm_symbolic"),
        ("reasoning-gym:gsm_symbolic?seed", "NAME\\?size=2000&seed=1&OPTION=VALUE"),
        ("reasoning-gym:gsm_symbolic?seed=-1", "seed is -1; expected a whole number"),
        ("reasoning-gym:gsm_symbolic?seed=one", "seed is 'one'"),
        ("reasoning-gym:gsm_symbolic?size=0", "size is 0; expected a whole number from 1"),
        ("reasoning-gym:gsm_symbolic?colour=[", "NAME\\?size=2000&seed=1&OPTION=VALUE"),
        ("reasoning-gym:gsm_symbolic?colour=red", "unexpected keyword argument 'colour'"),
        ("reasoning-gym:", "no data set ''"),
    ],
)
def test_what_is_refused_says_why(source: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_table(DataConfig(source=source))
