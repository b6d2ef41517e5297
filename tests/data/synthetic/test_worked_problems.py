"""Word problems with worked answers: by hand, right in every style, and apart from those that are trained on."""

from __future__ import annotations

import re

import pytest

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.data.readers import find_sources
from posttrain.data.sft_rows import prepare
from posttrain.data.synthetic import worked_problems as worked
from posttrain.models.tiny_model import tiny_tokenizer

THINGS = [(3, "ant", 6), (2, "ostrich", 2), (5, "cat", 4)]
NAMED = re.compile(r"(\d+) ([a-z]+)")


def test_answers_by_hand() -> None:
    lines = "3 ants: 3 x 6 = 18\n2 ostriches: 2 x 2 = 4\n5 cats: 5 x 4 = 20\n"
    assert worked.worked_answer(THINGS, "bare") == "42"
    assert worked.worked_answer(THINGS, "one sum") == lines + "18 + 4 + 20 = 42"
    assert worked.worked_answer(THINGS) == lines + "18 + 4 = 22\n22 + 20 = 42"


@pytest.mark.parametrize("kind", worked.PROBLEM_KINDS)
def test_every_line_of_an_answer_is_true_and_the_last_number_is_the_answer(kind: str) -> None:
    for row in worked.problem_rows(kind)[:300]:
        *_, last = re.findall(r"\d+", row["completion"])
        assert last == row["answer"]
        for line in row["completion"].splitlines():
            if "=" in line:
                left, right = line.rsplit(": ", 1)[-1].split(" = ")
                assert eval(left.replace("x", "*")) == int(right)  # digits and operators that were made above


def test_held_out_problems_have_no_numbers_and_things_of_the_trained_ones() -> None:
    def asked(kind: str) -> set[tuple[tuple[str, str], ...]]:
        return {tuple(sorted(NAMED.findall(r["prompt"]))) for r in worked.problem_rows(kind)}

    trained = asked("legs")
    for kind in ("legs_held_out", "legs_reworded", "legs_longer"):
        assert not trained & asked(kind)
    assert len(trained) == 4000
    words = {re.sub(r"\d.*\d+ \w+", "", r["prompt"]) for r in worked.problem_rows("legs")}
    assert not words & {re.sub(r"\d.*\d+ \w+", "", r["prompt"]) for r in worked.problem_rows("legs_reworded")}


def test_styles_have_their_shares() -> None:
    rows = worked.problem_rows("legs")
    bare = sum("\n" not in r["completion"] for r in rows) / len(rows)
    assert abs(bare - worked.ANSWER_STYLES["bare"]) < 0.03


def test_the_rows_are_a_source_and_a_misspelt_kind_names_them() -> None:
    data = DataConfig(source="lab:prices", rows=[0, 5], chat=False)
    assert prepare(data, tiny_tokenizer()).stats["used"] == 5
    assert [s.name for s in find_sources(data)] == ["lab:prices"]
    with pytest.raises(DataError, match="lab:legs_reworded"):
        prepare(DataConfig(source="lab:leggs", chat=False), tiny_tokenizer())
