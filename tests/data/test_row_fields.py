"""Columns beside a conversation: honoured, counted as having no effect, or refused by name. Nothing vanishes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli.inspect_rows import _facts, fields_in_words
from posttrain.config import ClassesConfig, DataConfig
from posttrain.config.feedback import CandidatesConfig, ThumbsConfig
from posttrain.core.errors import DataError
from posttrain.data.bad_rows import BadRow
from posttrain.data.cells import is_good_label
from posttrain.data.formats import to_record
from posttrain.data.human_feedback import read_answers
from posttrain.data.preference_rows import prepare_pairs, prepare_unpaired
from posttrain.data.process_rows import read_step_chains
from posttrain.data.prompt_sources import RowPrompts
from posttrain.data.prompts import load_prompts
from posttrain.data.rows import open_rows
from posttrain.data.sft_rows import prepare
from posttrain.eval.evaluation_tasks import ChoiceTask
from tests.data.tokenizers import byte_level

TOKENIZER = byte_level("chatml")
CONFIG = DataConfig(source="x.jsonl")
SYSTEM, EARLIER, REPLY, ASK, SAY, WORSE = (
    {"role": role, "content": content}
    for role, content in (
        *(("system", "Be calm"), ("user", "1+1?"), ("assistant", "2")),
        *(("user", "2+2?"), ("assistant", "4"), ("assistant", "5")),
    )
)
WHOLE = [SYSTEM, EARLIER, REPLY, ASK, SAY]
BESIDE = {"system": "Be calm", "history": [["1+1?", "2"]]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "2+2?", "output": "4"},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "messages": {"messages": [ASK, SAY]},
    "prompt_completion": {"prompt": "2+2?", "completion": "4"},
    "preference": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "hh_rlhf": {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    "ultrafeedback": {"instruction": "2+2?", "completions": [{"response": "4", "overall_score": 2},
                                                              {"response": "5", "overall_score": 1}]},
    "rated": {"prompt": "2+2?", "completion": "4", "rating": 3},
    "verifiable": {"prompt": "2+2?", "answer": "4"},
    "gsm8k": {"question": "2+2?", "answer": "4"},
    "flan": {"inputs": "2+2?", "targets": "4"},
}  # fmt: skip


def config_of(tmp_path: Path, rows: list[Any], **settings: Any) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return DataConfig(source=str(path), **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_system_and_history_columns_become_turns(layout: str) -> None:
    row = LAYOUTS[layout]
    assert list(to_record({**row, **BESIDE}, layout, CONFIG).messages) == WHOLE
    turns = {"system_prompt": "Be calm", "history": json.dumps([EARLIER, REPLY])}
    assert list(to_record({**row, **turns}, layout, CONFIG).messages) == WHOLE
    for empty in ({"system": "", "history": []}, {"system": None, "history": "[]"}, {"system": " "}):
        assert list(to_record({**row, **empty}, layout, CONFIG).messages) == [ASK, SAY]


def test_a_system_column_and_a_system_turn() -> None:
    row = {"messages": [SYSTEM, ASK, SAY], "system": "Be calm\n"}
    assert list(to_record(row, "messages", CONFIG).messages) == [SYSTEM, ASK, SAY]
    assert list(to_record({**row, "history": [["1+1?", "2"]]}, "messages", CONFIG).messages) == WHOLE
    for other in ({"system": "Be wild"}, {"system_prompt": "Be wild"}):
        with pytest.raises(BadRow, match=r"two different system messages \(column system.* and a first turn\)"):
            to_record({**row, **other}, "messages", CONFIG)
    earlier = {"messages": [ASK, SAY], "history": [SYSTEM, EARLIER, REPLY]}
    assert list(to_record(earlier, "messages", CONFIG).messages) == WHOLE
    with pytest.raises(BadRow, match="two different system messages .column system and a first turn"):
        to_record({**earlier, "system": "Be wild"}, "messages", CONFIG)
    mine = CONFIG.model_copy(update={"system": "Be brief"})  # of the recipe: it replaces both
    assert to_record({**row, "system": "Be wild"}, "messages", mine).messages[0]["content"] == "Be brief"


@pytest.mark.parametrize(
    "history", [["a", "b"], [["a"]], [["a", None]], [["a", "b"], {"role": "user"}], "2", [["a", True]]]
)
def test_history_that_is_none(history: Any) -> None:
    with pytest.raises(BadRow, match="history"):
        to_record({**LAYOUTS["alpaca"], "history": history}, "alpaca", CONFIG)


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    "given",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": [TOOL["function"]]},
        {"functions": [TOOL["function"]]},
        {"tools": [TOOL], "functions": [TOOL["function"]]},
        {"tools": [{"name": "weather", "input_schema": {"type": "object", "properties": {}}}]},
        {"tools": [{"name": "weather", "parameters": '{"type": "object", "properties": {}}'}]},
        {"tools": TOOL},
    ],
)
def test_tools(given: dict[str, Any]) -> None:
    record = to_record({**LAYOUTS["messages"], **given}, "messages", CONFIG)
    assert record.tools == (TOOL,)


def test_tools_and_template_arguments_that_can_be_used_or_not() -> None:
    for empty in ("[]", "", None, []):
        assert to_record({**LAYOUTS["sharegpt"], "tools": empty}, "sharegpt", CONFIG).tools == ()
    for args in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        record = to_record({**LAYOUTS["messages"], "chat_template_kwargs": args}, "messages", CONFIG)
        assert record.template_args == {"enable_thinking": False}
    for column, message in (
        ({"tools": "weather"}, "tools is str, expected a list of tools"),
        ({"tools": [3]}, "tools: expected tools with a name"),
        ({"tools": [{"type": "web_search"}]}, "tools: expected tools with a name"),
        ({"tools": [{"type": "web_search", "name": "x"}]}, "a tool of type 'web_search'"),
        ({"tools": "[{'name': 'weather'}]"}, "tools is a list or object of Python written as text"),
        ({"tools": [{"name": "w", "parameters": "city"}]}, "parameters of 'w' are text"),
        ({"tools": [TOOL], "functions": [{"name": "other"}]}, "columns tools and functions differ"),
        ({"chat_template_kwargs": ["x"]}, "chat_template_kwargs is list, expected an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "has 'tokenize', which is no argument"),
    ):
        with pytest.raises(BadRow, match=message):
            to_record({**LAYOUTS["messages"], **column}, "messages", CONFIG)


def test_both_answers_of_a_pair_get_the_same_context(tmp_path: Path) -> None:
    rows = [
        {**LAYOUTS["preference"], **BESIDE},
        {"prompt": [ASK], "chosen": [ASK, SAY], "rejected": [ASK, WORSE], **BESIDE},
        {"instruction": "2+", "input": "2?", "chosen": "4", "rejected": "5", **BESIDE},
        {"conversations": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"},
         "rejected": {"from": "gpt", "value": "5"}, **BESIDE},
        {**LAYOUTS["ultrafeedback"], **BESIDE},
    ]  # fmt: skip
    for row in rows:
        (pair,) = prepare_pairs(config_of(tmp_path, [row]), TOKENIZER).items
        before = WHOLE[:-1] if "input" not in row else [*WHOLE[:3], {"role": "user", "content": "2+\n\n2?"}]
        assert pair.row["messages"] == before
        texts = [TOKENIZER.decode(list(s.tokens)) for s in (pair.chosen, pair.rejected)]
        assert texts[0].replace("4<|im_end|>", "5<|im_end|>") == texts[1] and "Be calm" in texts[0]


def test_flags_have_no_place_on_answers_that_are_compared(tmp_path: Path) -> None:
    unmarked, marked = {**SAY, "weight": 1}, {**SAY, "weight": 0}
    pair = {"chosen": [{**EARLIER}, {**REPLY, "train": False}, ASK, unmarked], "rejected": [EARLIER, REPLY, ASK, WORSE]}
    assert prepare_pairs(config_of(tmp_path, [pair]), TOKENIZER).items[0].row["messages"] == [EARLIER, REPLY, ASK]
    for name, row in (
        ("the chosen answer", {**pair, "chosen": [ASK, marked], "rejected": [ASK, WORSE]}),
        ("the rejected answer", {**pair, "chosen": [ASK, SAY], "rejected": [ASK, {**WORSE, "train": False}]}),
    ):
        with pytest.raises(DataError, match=f"{name} is marked as having no loss"):
            prepare_pairs(config_of(tmp_path, [row]), TOKENIZER)
    with pytest.raises(DataError, match="the answer is marked as having no loss"):
        prepare_unpaired(config_of(tmp_path, [{"messages": [ASK, marked], "label": 1}]), TOKENIZER)


def test_a_flag_that_asks_for_loss_on_the_user_s_turn(tmp_path: Path) -> None:
    rows = [{"messages": [{**ASK, "train": True}, SAY]}]
    with pytest.raises(DataError, match=r"a turn of the user asks for loss \(turn 1\)"):
        prepare(config_of(tmp_path, rows, loss_on="assistant"), TOKENIZER)
    everything = prepare(config_of(tmp_path, rows, loss_on="all"), TOKENIZER)
    assert "train" not in everything.rows[0]["messages"][0]
    ignoring = prepare(config_of(tmp_path, rows, ignore=["train"]), TOKENIZER)
    assert ignoring.stats["ignored"] == {"messages[].train": 1}


def test_every_column_without_effect_is_counted(tmp_path: Path) -> None:
    """By hand, for each kind of rows: what no token and no label depends on, and nothing else."""
    more = {"id": 3, "source": "web", "note": None, "tags": [], "score": float("nan")}
    turns = [{**ASK, "tone": "dry"}, SAY]
    rows = [{"messages": turns, **more}, {"messages": turns, "lang": "en", "id": 4, "rejected": "x", "choices": ["4"]}]
    stats = prepare(config_of(tmp_path, rows), TOKENIZER).stats
    expected = {"id": 2, "messages[].tone": 2, "choices": 1, "lang": 1, "rejected": 1, "source": 1}
    assert stats["unused"] == expected and list(stats["unused"])[:2] == ["id", "messages[].tone"]
    facts = dict(_facts(stats))
    assert facts["no effect"] == ("columns id 2, choices 1, lang 1, rejected 1, source 1; field messages[].tone 2")
    assert prepare(config_of(tmp_path, [{"text": "a", "label": 0}]), TOKENIZER).stats["unused"] == {"label": 1}
    assert "unused" not in prepare(config_of(tmp_path, [LAYOUTS["alpaca"]]), TOKENIZER).stats
    rated = prepare(config_of(tmp_path, [{**LAYOUTS["rated"]}]), TOKENIZER).stats
    assert rated["unused"] == {"rating": 1}


def test_columns_of_templates_classes_and_renamed_ones(tmp_path: Path) -> None:
    rows = [{"body": "a", "stars": 5, "weight": 3, "system": "Be calm", "kind": "film"}]
    classes = ClassesConfig(column="stars", cuts=[3], names=["bad", "good"])
    settings: dict[str, Any] = {"prompt": "{text}?", "completion": "{label}", "columns": {"text": "body"}}
    stats = prepare(config_of(tmp_path, rows, classes=classes, **settings), TOKENIZER).stats
    assert stats["unused"] == {"kind": 1, "system": 1, "weight": 1}  # a template names what it wants
    replaced = prepare(config_of(tmp_path, [{**LAYOUTS["messages"], "system": "Hi"}], system="Ho"), TOKENIZER).stats
    assert replaced["unused"] == {"system": 1}


def test_columns_of_other_kinds_of_rows(tmp_path: Path) -> None:
    pair = {**LAYOUTS["preference"], "margin": 2, "probability": 0.9, "source": "web"}
    assert prepare_pairs(config_of(tmp_path, [pair]), TOKENIZER).stats["unused"] == {"source": 1}
    without = prepare_pairs(config_of(tmp_path, [pair]), TOKENIZER, margins=False)
    assert without.stats["unused"] == {"margin": 1, "source": 1}
    many = LAYOUTS["ultrafeedback"]["completions"]
    row = {"instruction": "2+2?", "models": ["a"], "completions": [{**c, "model": "a"} for c in many]}
    stats = prepare_pairs(config_of(tmp_path, [row]), TOKENIZER).stats
    assert stats["unused"] == {"completions[].model": 1, "models": 1}
    thumb = {**LAYOUTS["prompt_completion"], "label": "up", "user": 7}
    assert prepare_unpaired(config_of(tmp_path, [thumb]), TOKENIZER).stats["unused"] == {"user": 1}
    steps = {"prompt": "2+2?", "steps": ["4"], "labels": [1], "answer": 4, **BESIDE}
    read = read_step_chains(config_of(tmp_path, [steps]), TOKENIZER, "\n")
    assert read.stats["unused"] == {"answer": 1}
    assert TOKENIZER.decode(list(read.samples[0].tokens)).startswith("<|im_start|>system\nBe calm<|im_end|>")
    problem = {**LAYOUTS["verifiable"], "level": 3, "source": "web", **BESIDE}
    asked = load_prompts(RowPrompts.Config(data=config_of(tmp_path, [problem]), template=None), TOKENIZER, context=None)
    assert asked.stats["passed_on"] == {"level": 1} and asked.stats["unused"] == {"source": 1}
    assert asked.items[0].problem["messages"] == WHOLE[:-1] and asked.items[0].problem["level"] == 3


def test_columns_of_feedback(tmp_path: Path) -> None:
    answers = [{"response": "4", "score": 2, "model": "a"}, {"response": "5", "score": 1}]
    rows = [{"prompt": "2+2?", "completions": answers, "source": "web", **BESIDE}]
    read = read_answers(CandidatesConfig(data=config_of(tmp_path, rows)))
    assert read.stats["unused"] == {"completions[].model": 1, "source": 1} and read.pairs[0].prompt == WHOLE[:-1]
    thumbs = [{**LAYOUTS["prompt_completion"], "label": label, "user": 3} for label in ("👍", "thumbs_down", "up")]
    read = read_answers(ThumbsConfig(data=config_of(tmp_path, thumbs)))
    assert read.stats["unused"] == {"user": 3} and read.thumbs[0]["probability"] == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="column 'tools' is not supported here .it would not reach the model"):
        read_answers(CandidatesConfig(data=config_of(tmp_path, [{**rows[0], "tools": [TOOL]}])))


REFUSED = [
    ({"videos": ["a.mp4"]}, "column 'videos' is not supported here (it would not reach the model)"),
    ({"audio": {"path": "a.wav"}}, "column 'audio' is not supported"),
    ({"weight": 0.5}, "column 'weight' is not supported here (it changes the loss in other programs)"),
    ({"mask": "User"}, "column 'mask' is not supported"),
    ({"logprobs": [-1.0]}, "column 'logprobs' is not supported"),
]


@pytest.mark.parametrize(("column", "message"), REFUSED)
def test_columns_that_change_the_meaning_are_refused_by_name(
    tmp_path: Path, column: dict[str, Any], message: str
) -> None:
    (name,) = column
    for layout, prepared in (("messages", prepare), ("preference", prepare_pairs)):
        rows = [{**LAYOUTS[layout], **column}]
        with pytest.raises(DataError) as error:
            prepared(config_of(tmp_path, rows), TOKENIZER)
        assert f"rows.jsonl:1: {message}" in str(error.value) and f"data.ignore: [{name}]" in str(error.value)
        ignoring = prepared(config_of(tmp_path, rows, ignore=[name]), TOKENIZER).stats
        assert ignoring["ignored"] == {name: 1} and "unused" not in ignoring
    for neutral in (None, [], "", False):
        prepare(config_of(tmp_path, [{**LAYOUTS["messages"], name: neutral}]), TOKENIZER)


def test_what_can_not_be_ignored() -> None:
    with pytest.raises(ValueError, match="ignore: every turn needs content and role"):
        DataConfig(source="x", ignore=["role", "content"])


def test_a_row_weight_of_one_changes_nothing(tmp_path: Path) -> None:
    assert prepare(config_of(tmp_path, [{**LAYOUTS["messages"], "weight": 1.0}]), TOKENIZER).stats["unused"] == {
        "weight": 1
    }


def test_plain_text_refuses_what_it_can_not_show(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    thought = {**SAY, "reasoning_content": "2+2"}
    for more, turns, name in (
        ({"tools": [TOOL]}, [ASK, SAY], "tools"),
        ({"chat_template_kwargs": {"a": 1}}, [ASK, SAY], "(chat_template_kwargs|template_args)"),
        ({}, [ASK, call, ASK, SAY], "tool_calls"),
        ({}, [ASK, thought, ASK, SAY], "reasoning_content"),
        ({}, [ASK, call], "tool_calls"),
    ):
        config = config_of(tmp_path, [{"messages": turns, **more}], chat=False)
        with pytest.raises(DataError, match=f"rows.jsonl:1: {name} can't be written as plain text"):
            prepare(config, TOKENIZER)
        if turns[-1] != call:
            with pytest.raises(DataError, match=f"rows.jsonl:1: {name} can't be written as plain text"):
                load_prompts(RowPrompts.Config(data=config), TOKENIZER, context=None)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_infinity_are_missing_texts(layout: str, value: float) -> None:
    for column in LAYOUTS[layout]:
        if column not in ("completions", "conversations", "messages"):
            with pytest.raises(BadRow, match=f"missing field '{column}' .it is {value}"):
                to_record({**LAYOUTS[layout], column: value}, layout, CONFIG)
    for column in ("system", "history", "tools", "input"):
        given = {**LAYOUTS[layout], column: value}
        assert list(to_record(given, layout, CONFIG).messages) == [ASK, SAY]


def test_labels_in_the_usual_spellings() -> None:
    good = ["up", "thumbs_up", "Thumbs Up", "thumbs-up", "chosen", "desirable", "Positive", "like", "yes", "good",
            "true", "+1", "1", "1.0", 1, 1.0, True, "👍", "👍🏽", ":thumbsup:"]  # fmt: skip
    bad = ["down", "thumbs_down", "Thumbs Down", "rejected", "undesirable", "negative", "dislike", "no", "bad",
           "FALSE", "-1", "0", 0, -1, 0.0, -1.0, False, "👎", "👎🏿"]  # fmt: skip
    assert all(is_good_label(word) for word in good) and not any(is_good_label(word) for word in bad)
    for word in ("maybe", "2", 0.5, ["good"], "", "goood"):
        with pytest.raises(BadRow, match="label out of range: it is .*, which is neither good nor bad") as error:
            is_good_label(word)
        assert error.value.hint.startswith("A label is one of 1, 0, -1, true, yes, good, up, thumbs_up")
    for nothing in (None, NAN):
        with pytest.raises(BadRow, match="missing field 'label'"):
            is_good_label(nothing)


def test_labels_under_other_names(tmp_path: Path) -> None:
    rows = [{**LAYOUTS["sharegpt"], "kto_tag": tag} for tag in (True, False)]
    assert [u.desirable for u in prepare_unpaired(config_of(tmp_path, rows), TOKENIZER).items] == [True, False]


def test_choices_of_rows_have_an_effect_on_an_evaluation_of_choices(tmp_path: Path) -> None:
    data = config_of(tmp_path, [{**LAYOUTS["prompt_completion"], "choices": ["4", "5"], "id": 1}])
    for choices, unused in ((None, {"id": 1}), (["4", "5"], {"choices": 1, "id": 1})):
        task = ChoiceTask(ChoiceTask.Config(name="c", data=data, choices=choices))
        assert task.read(TOKENIZER, None).stats["unused"] == unused


def test_what_fields_in_words_says() -> None:
    assert fields_in_words({"source": 1200}) == "column source 1,200"
    assert fields_in_words({"m[].a": 1, "m[].b": 2, "c": 1}) == "column c 1; fields m[].a 1, m[].b 2"


def test_nulls_that_arrow_fills_in_are_no_values(tmp_path: Path) -> None:
    """Arrow gives every object of a column all fields; a JSON file's null stays what it is."""
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    def calls(**arguments: Any) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        return [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]

    rows = [{"messages": calls(city="Oslo")}, {"messages": calls(city="Rome", day=None, hour=3)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = {}
    for kind in ("parquet", "jsonl"):
        opened = open_rows(DataConfig(source=str(tmp_path / f"x.{kind}")))
        made = opened.read(lambda row: row.record())
        read[kind] = [r.messages[-1]["tool_calls"][0]["function"]["arguments"] for r in made]
        assert not opened.fields.entry()
    assert read["parquet"] == [{"city": "Oslo"}, {"city": "Rome", "hour": 3}]
    assert read["jsonl"] == [{"city": "Oslo"}, {"city": "Rome", "day": None, "hour": 3}]
