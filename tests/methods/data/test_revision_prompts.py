"""What is asked, word for word; and principles drawn by nothing but the prompt and the seed."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.core.errors import DataError
from posttrain.judge.principles import read_principles
from posttrain.methods.data.critique_revision import RefineConfig
from posttrain.methods.data.revision_prompts import FinishedRound, draw_principles, read_examples, revision_turns

SYSTEM = {"role": "system", "content": "Be good."}
ASKED = [SYSTEM, {"role": "user", "content": "Hello?"}]
SHORT = FinishedRound("Hi?", "Hi, hi, hi.", "Be short.", "Three words too many.", "Hi.")
KIND = FinishedRound("Who?", "None of you.", "Be kind.", "It is rude.", "A friend.")


def settings(**changes: Any) -> RefineConfig:
    return RefineConfig.model_validate({"problems": {"kind": "lab"}, "principles": "p.txt", **changes})


def said(messages: list[Any]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in messages]


def test_a_critique_and_a_revision_are_asked_for_in_these_words() -> None:
    critique = "Name the specific ways in which your last answer goes against this principle: Be short."
    revision = "Write your answer again so that it keeps to this principle: Be short. Reply with the new answer alone."
    first = [
        ("system", "Be good."),
        ("user", "Hello?"),
        ("assistant", "Hello there, you."),
        ("user", critique),
    ]
    assert said(revision_turns(settings(), [], ASKED, "Hello there, you.", "Be short.")) == first
    assert said(revision_turns(settings(), [], ASKED, "Hello there, you.", "Be short.", "It is long.")) == [
        *first,
        ("assistant", "It is long."),
        ("user", revision),
    ]


def test_words_of_one_s_own_and_none_of_a_principle() -> None:
    own = settings(critique="Is it {principle}?", revision="Mend {{it}}.")
    assert said(revision_turns(own, [], ASKED[1:], "a", "Be short.", "No."))[1:] == [
        ("assistant", "a"), ("user", "Is it Be short.?"), ("assistant", "No."), ("user", "Mend {it}."),
    ]  # fmt: skip
    plain = revision_turns(settings(principles=None), [KIND], ASKED, "a", None, "c")
    assert said(plain) == [
        ("system", "Be good."),
        ("user", "Who?"),
        ("assistant", "None of you."),
        ("user", "Name the specific ways in which your last answer could be better."),
        ("assistant", "It is rude."),
        ("user", "Write your answer again, better by what you said of it. Reply with the new answer alone."),
        ("assistant", "A friend."),
        ("user", "Hello?"),
        ("assistant", "a"),
        ("user", "Name the specific ways in which your last answer could be better."),
        ("assistant", "c"),
        ("user", "Write your answer again, better by what you said of it. Reply with the new answer alone."),
    ]


def test_examples_of_the_principle_come_first_and_all_where_it_has_none() -> None:
    def shown(principle: str) -> list[str]:
        asked = revision_turns(settings(), [SHORT, KIND], ASKED, "a", principle)
        return [m["content"] for m in asked if m["content"] in ("Hi?", "Who?")]

    assert shown("Be short.") == ["Hi?"] and shown("Be kind.") == ["Who?"] and shown("Be true.") == ["Hi?", "Who?"]


def test_principles_are_drawn_by_content_and_seed_alone() -> None:
    prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(300)]
    drawn = [draw_principles(5, p, 3, 0) for p in prompts]
    for i in np.random.default_rng(1).permutation(len(prompts)):  # in any order, again
        assert draw_principles(5, prompts[i], 3, 0) == drawn[i]
        assert draw_principles(5, prompts[i], 2, 0) == drawn[i][:2]  # more rounds change none before them
    assert all(len(set(d)) == 3 for d in drawn)
    counts = Counter(d[0] for d in drawn)
    assert set(counts) == set(range(5)) and max(counts.values()) < 90  # 60 each; 90 is 4.3 standard deviations off
    assert sum(draw_principles(5, p, 3, 1) != d for p, d in zip(prompts, drawn, strict=True)) > 250
    seven = draw_principles(3, prompts[0], 7, 0)
    assert sorted(seven[:3]) == sorted(seven[3:6]) == [0, 1, 2] and seven[6] == seven[0]
    assert draw_principles(0, prompts[0], 4, 0) == []


def test_what_ships_is_read_and_fits_together() -> None:
    principles = read_principles("packaged:constitution.txt")
    examples = read_examples("packaged:constitution_examples.jsonl")
    assert len(principles) == 3
    assert {e.principle for e in examples} == set(principles)
    with pytest.raises(DataError, match=r"posttrain ships \[.*'constitution.txt', .*not this"):
        read_principles("packaged:none.txt")


def test_a_bad_example_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    good = {"prompt": "p", "answer": "a", "principle": "q", "critique": "c", "revision": "r"}
    for bad, message in (
        (json.dumps({**good, "critique": " "}), r"examples.jsonl:2: 'critique' is missing or no text"),
        ("{", r"examples.jsonl:2: no JSON"),
        ("[" * 99_999, r"examples.jsonl:2: no JSON"),
        ("9" * 5_000, r"examples.jsonl:2: no JSON"),
        ("[]", r"examples.jsonl:2: 'prompt' is missing"),
    ):
        path.write_text(json.dumps(good) + "\n" + bad + "\n")
        with pytest.raises(DataError, match=message):
            read_examples(str(path))
    path.write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_examples(str(path))
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    for name in ("none.jsonl", "pipe", "huge", "/dev/zero"):  # neither waits for ever nor fills the memory
        for read in (read_examples, read_principles):
            with pytest.raises(DataError, match="can't be read"):
                read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critique": "{rule}"}, "has the field 'rule', and there may be: {principle}"),
        ({"critique": "{"}, "for braces that are meant as such"),
        ({"critique": "{principle}", "principles": None}, "none without principles"),
        ({"critique": "Better?", "revision": "Again."}, "neither critique nor revision names {principle}"),
        ({"stop_at": 1}, "stop_at is a reward, and there is none"),
        ({"sampler": {"min_tokens": 200}}, "no critique could end"),
        ({"model": {"source": "m"}, "server": {"model": "s"}}, "leave one out"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("{", r"\{").replace("}", r"\}")):
        settings(**changes)
