"""Every layout: recognised by its columns, taken when named, mapped to the conversation that its row means."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.config import ClassesConfig, DataConfig
from posttrain.core.errors import DataError
from posttrain.data.formats import (
    LAYOUTS,
    BadRow,
    FilteredRow,
    check_templates,
    class_label,
    recognise,
    to_record,
)
from posttrain.data.message_trees import open_assistant
from posttrain.data.table_files import FoundRow

CONFIG = DataConfig(source="x.jsonl")
ASK, SAY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CALM = {"role": "system", "content": "Be calm"}
FROM = [{"from": "system", "value": "Be calm"}, {"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
SCORED = [{"response": "5", "overall_score": 2}, {"response": "4", "overall_score": 9.5}, {"response": "x"}]
ROWS: dict[str, list[tuple[dict[str, Any], list[dict[str, str]], dict[str, Any]]]] = {
    "messages": [
        ({"messages": [CALM, ASK, SAY], "id": 7}, [CALM, ASK, SAY], {"id": 7}),
        ({"messages": [{"role": "User", "content": [{"type": "text", "text": "2+2?"}]}, SAY]}, [ASK, SAY], {}),
    ],
    "prompt_completion": [
        ({"prompt": "2+2?", "completion": "4"}, [ASK, SAY], {}),
        ({"prompt": [CALM, ASK], "completion": [SAY]}, [CALM, ASK, SAY], {}),
        ({"prompt": "2+2?", "completion": 4, "choices": ["4", "5"]}, [ASK, SAY], {"choices": ["4", "5"]}),
    ],
    "preference": [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, [ASK, SAY], {"rejected": "5"}),
        ({"prompt": "2+2?", "chosen": [ASK, SAY], "rejected": [ASK]}, [ASK, SAY], {"rejected": [ASK]}),
        ({"prompt": "2+2?", "chosen": [SAY], "rejected": [SAY]}, [ASK, SAY], {"rejected": [SAY]}),
        ({"chosen": [ASK, SAY], "rejected": [ASK]}, [ASK, SAY], {"rejected": [ASK]}),
    ],
    "rated": [({"prompt": "2+2?", "completion": "4", "rating": 3.5, "text": ""}, [ASK, SAY], {"rating": 3.5})],
    "verifiable": [({"prompt": "2+2?", "answer": "4", "id": "a"}, [ASK, SAY], {"id": "a", "answer": "4"})],
    "alpaca": [
        ({"instruction": "2+2?", "input": "", "output": "4"}, [ASK, SAY], {}),
        ({"instruction": "Add", "input": "2 2", "output": "4"}, [{"role": "user", "content": "Add\n\n2 2"}, SAY], {}),
    ],
    "sharegpt": [({"conversations": FROM}, [CALM, ASK, SAY], {})],
    "hh_rlhf": [
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: no"},
         [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, ASK, SAY],
         {"rejected": "\n\nHuman: no"}),
    ],
    "ultrafeedback": [({"instruction": "2+2?", "completions": SCORED}, [ASK, SAY], {})],
    "gsm8k": [
        ({"question": "2+2?", "answer": "Add.\n#### 4"}, [ASK, {"role": "assistant", "content": "Add.\n#### 4"}],
         {"answer": "4"}),
    ],
    "flan": [({"inputs": "2+2?", "targets": "4"}, [ASK, SAY], {})],
}  # fmt: skip
CASES = [(name, *case) for name, cases in ROWS.items() for case in cases]


@pytest.mark.parametrize(("name", "row", "messages", "extra"), CASES)
def test_each_layout(name: str, row: dict[str, Any], messages: list[Any], extra: dict[str, Any]) -> None:
    assert recognise(row, "auto") == recognise(row, name) == name
    record = to_record(row, name, CONFIG)
    assert list(record.messages) == messages and record.extra == extra


def test_text_and_rated_text() -> None:
    assert recognise({"text": "abc"}, "auto") == "text" and to_record({"text": "abc"}, "text", CONFIG).text == "abc"
    row = {"text": "abc", "rating": 4}
    assert recognise(row, "auto") == "rated"
    assert to_record(row, "rated", CONFIG).extra == {"rating": 4}


def test_every_layout_is_tested_here() -> None:
    assert set(ROWS) | {"text", "openassistant"} == set(LAYOUTS)


TREE = [
    ("a", None, "prompter", "2+2?", None),
    ("b", "a", "assistant", "5", 1),
    ("c", "a", "assistant", "4", 0),
    ("d", "c", "prompter", "sure?", None),
    ("e", "d", "assistant", "yes", None),
    ("f", None, "prompter", "nobody answers", None),
    ("g", "lost", "assistant", "orphan", 0),
    ("h", "e", "prompter", "a last question", None),
]
COLUMNS = ("message_id", "parent_id", "role", "text", "rank")


def test_openassistant_trees_follow_the_best_ranked_answers() -> None:
    rows = [dict(zip(COLUMNS, t, strict=True)) for t in TREE]
    assert recognise(rows[0], "auto") == "openassistant"
    trees = open_assistant([FoundRow(i, i + 1, i, row) for i, row in enumerate(rows)], "f")
    assert trees.numbers == [1, 6, 7] and str(trees.rows[2]) == "its parent is not in the file: lost"
    record = to_record(trees.rows[0], "openassistant", CONFIG)  # type: ignore[arg-type]
    said = [(m["role"], m["content"]) for m in record.messages]
    assert said == [("user", "2+2?"), ("assistant", "4"), ("user", "sure?"), ("assistant", "yes")]
    with pytest.raises(BadRow, match="no answer in this tree"):
        to_record(trees.rows[1], "openassistant", CONFIG)
    with pytest.raises(DataError, match="begins a tree"):
        open_assistant([], "f")


BAD = [
    ("messages", {"messages": None}, "missing field 'messages'"),
    ("messages", {"messages": []}, "expected a list of turns"),
    ("messages", {"messages": "hello"}, "expected a list of turns"),
    ("messages", {"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "the user turn has no content"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "places for 1 images, and the row names 0",
    ),
    ("prompt_completion", {"prompt": "x"}, "missing field 'completion'"),
    ("prompt_completion", {"prompt": {"a": 1}, "completion": "x"}, "prompt is dict, expected text"),
    ("preference", {"prompt": "x", "chosen": "y"}, "missing field 'rejected'"),
    ("hh_rlhf", {"chosen": "hello", "rejected": "x"}, "Human:' turn"),
    ("ultrafeedback", {"instruction": "x", "completions": []}, "completions: expected a list"),
    ("ultrafeedback", {"instruction": "x", "completions": [{"response": "a", "overall_score": "good"}]}, "a number"),
    ("ultrafeedback", {"instruction": "x", "completions": [{"overall_score": 3}]}, "missing field 'response'"),
    ("alpaca", {"instruction": True, "output": "x"}, "instruction is bool"),
    ("gsm8k", {"question": "x", "answer": None}, "missing field 'answer'"),
    ("text", {"text": 3.0j}, "text is complex"),
]


@pytest.mark.parametrize(("name", "row", "message"), BAD)
def test_rows_that_cannot_be_used_say_why(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        to_record(row, name, CONFIG)


def test_what_no_layout_fits() -> None:
    with pytest.raises(DataError, match=r"columns \['body', 'prompt'\] are no known layout.*nearest is"):
        recognise({"body": 1, "prompt": 2}, "auto")
    with pytest.raises(DataError, match=r"\(gsm8k: question, answer\)"):
        recognise({"prompt": 1}, "gsm8k")
    with pytest.raises(DataError, match="no known layout"):  # an answer without #### is not GSM8K's
        recognise({"question": "x", "answer": "4"}, "auto")
    assert recognise({"question": "x", "answer": "4"}, "gsm8k") == "gsm8k"


def test_templates() -> None:
    config = DataConfig(source="x", prompt="Is {{this}} {kind}? {text}", completion="{label}", system="Be calm")
    check_templates(config, {"kind", "text", "label"})
    record = to_record({"kind": "good", "text": "a {b}", "label": 1}, "template", config)
    asked = {"role": "user", "content": "Is {this} good? a {b}"}
    assert list(record.messages) == [CALM, asked, {"role": "assistant", "content": "1"}]
    with pytest.raises(BadRow, match="missing field 'text'"):
        to_record({"kind": "good", "text": None, "label": 1}, "template", config)
    for changes, message in (
        ({"prompt": "{txt}"}, r"names \{txt\}, and the columns are \['label', 'text'\]"),
        ({"prompt": "{text"}, "write {{ and }}"),
        ({"prompt": "{text!r}"}, "a column's name alone"),
        ({"completion": None}, "go together"),
    ):
        with pytest.raises(DataError, match=message):
            check_templates(DataConfig(source="x", **{"prompt": "{text}", "completion": "{label}"} | changes),
                            {"text", "label"})  # fmt: skip


def test_a_system_message_replaces_the_row_s_own() -> None:
    config = DataConfig(source="x", system="Be calm")
    for own in ([], [{"role": "system", "content": "Be wild"}]):
        assert list(to_record({"messages": [*own, ASK, SAY]}, "messages", config).messages) == [CALM, ASK, SAY]


def test_classes_from_numbers() -> None:
    classes = ClassesConfig(column="score", cuts=[-1, 1], names=["low", "middle", "high"], margin=0.25)
    at = {-3: "low", -1.25: "low", -1.2: None, -0.75: "middle", "0": "middle", 0.76: None, 1.25: "high", "1e3": "high"}
    for value, name in at.items():
        if name is None:
            with pytest.raises(FilteredRow):
                class_label({"score": value}, classes)
        else:
            assert class_label({"score": value}, classes) == name
    whole = ClassesConfig(column="score", cuts=[0], names=["negative", "positive"])
    assert [class_label({"score": v}, whole) for v in (-0.01, 0, 0.01)] == ["negative", "positive", "positive"]
    for value, message in ((None, "missing field"), ("good", "expected a number"), ("nan", "not a number")):
        with pytest.raises(BadRow, match=message):
            class_label({"score": value}, whole)
