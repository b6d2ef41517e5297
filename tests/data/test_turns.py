"""Turns of every spelling: the message that each means, and every turn that can't be used, in words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from posttrain.data.bad_rows import BadRow
from posttrain.data.row_fields import FieldNotes
from posttrain.data.turns import answer_text, make_message, read_turn, read_turns
from posttrain.judge.judge_prompts import as_text

OSLO = {"name": "weather", "arguments": {"city": "Oslo"}}
AS_JSON = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TEXT_CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}
CALL = {"type": "function", "function": OSLO}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ASKED = {"role": "user", "content": "a"}
FINE = {"role": "assistant", "content": "4"}
THOUGHT = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
RESULT = {"role": "tool", "content": "4 degrees"}

SPELLINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openai": ({"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **CALL}]},
               {**CALLS, "tool_calls": [{"id": "c1", **CALL}]}),
    "arguments as JSON": ({"role": "assistant", "content": "", "tool_calls": [AS_JSON]}, CALLS),
    "calls as JSON": ({"role": "assistant", "tool_calls": json.dumps([CALL])}, CALLS),
    "text and calls": ({"role": "assistant", "content": "Wait.", "tool_calls": [CALL]}, {**CALLS, "content": "Wait."}),
    "a call without a wrapper": ({"role": "assistant", "tool_calls": [TEXT_CALL]}, CALLS),
    "the function's name beside": ({"role": "assistant", "tool_calls": [{"function": "weather",
                                                                        "arguments": {"city": "Oslo"}}]}, CALLS),
    "no arguments": ({"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": ""}}]},
                     {**CALLS, "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}),
    "legacy": ({"role": "assistant", "content": None, "function_call": TEXT_CALL}, CALLS),
    "sharegpt": ({"from": "function_call", "value": json.dumps(OSLO)}, CALLS),
    "sharegpt, an object": ({"from": "function_call", "value": OSLO}, CALLS),
    "sharegpt, two calls": ({"from": "function_call", "value": json.dumps([OSLO, {"name": "now", "arguments": {}}])},
                            {**CALLS, "tool_calls": [CALL, {"type": "function",
                                                            "function": {"name": "now", "arguments": {}}}]}),
    "sharegpt with a thought": ({"from": "function_call", "value": f"<think>\nhm\n</think>\n\n{json.dumps(OSLO)}"},
                                {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]}),
    "ms-swift": ({"role": "tool_call", "content": json.dumps(OSLO)}, CALLS),
    "anthropic": ({"role": "assistant", "content": [{"type": "text", "text": "Wait."},
                                                    {"type": "tool_use", "id": "t1", "name": "weather",
                                                     "input": {"city": "Oslo"}}]},
                  {"role": "assistant", "content": "Wait.", "tool_calls": [{"id": "t1", **CALL}]}),
    "result": ({"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "4 degrees"},
               {**RESULT, "name": "weather", "tool_call_id": "c1"}),
    "sharegpt's result": ({"from": "observation", "value": "4 degrees"}, RESULT),
    "legacy result": ({"role": "function", "name": "weather", "content": "4 degrees"}, {**RESULT, "name": "weather"}),
    "reasoning_content": ({"role": "assistant", "reasoning_content": "2+2", "content": "4"}, THOUGHT),
    "thinking": ({"role": "assistant", "thinking": "2+2", "content": "4"}, THOUGHT),
    "reasoning": ({"from": "gpt", "reasoning": "2+2", "value": "4"}, THOUGHT),
    "a thinking part": ({"role": "assistant", "content": [{"type": "thinking", "thinking": "2+2"},
                                                          {"type": "text", "text": "4"}]}, THOUGHT),
    "a thinking part of parts": ({"role": "assistant", "content": [{"type": "thinking", "thinking": [{"text": "2+2"}]},
                                                                   "4"]}, THOUGHT),
    "reasoning alone": ({"role": "assistant", "content": "", "reasoning_content": "2+2"}, {**THOUGHT, "content": ""}),
    "think in the text stays there": ({"role": "assistant", "content": "<think>2+2</think>4"},
                                      {**FINE, "content": "<think>2+2</think>4"}),
    "empty values say nothing": ({"role": "assistant", "content": "4", "tool_calls": [], "function_call": None,
                                  "refusal": None, "audio": None, "weight": None, "reasoning": ""}, FINE),
    "one part": ({"role": "User", "content": {"type": "input_text", "text": "a"}}, {"role": "user", "content": "a"}),
    "a speaker's name": ({"role": "user", "name": "Ann", "content": "a"}, {**ASKED, "name": "Ann"}),
    "developer": ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
    "weight 0": ({"role": "assistant", "content": "4", "weight": 0}, {**FINE, "train": False}),
    "weight 1": ({"role": "assistant", "content": "4", "weight": 1.0}, FINE),
    "train": ({"role": "assistant", "content": "4", "train": False}, {**FINE, "train": False}),
    "training": ({"from": "gpt", "value": "4", "training": 0}, {**FINE, "train": False}),
    "trainable": ({"role": "assistant", "content": "4", "trainable": True}, FINE),
    "loss": ({"role": "assistant", "content": "4", "loss": False}, {**FINE, "train": False}),
    "masked": ({"role": "assistant", "content": "4", "masked": True}, {**FINE, "train": False}),
    "two that agree": ({"role": "assistant", "content": "4", "mask": True, "weight": 0}, {**FINE, "train": False}),
    "a user's turn": ({"role": "user", "content": "a", "train": False}, {**ASKED, "train": False}),
    "prefix that is none": ({"role": "assistant", "content": "4", "prefix": False, "loss_scale": 1.0}, FINE),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_message(name: str) -> None:
    turn, message = SPELLINGS[name]
    notes = FieldNotes()
    assert read_turns([turn], "messages", notes) == [message]
    assert not notes.unread


def test_results_inside_of_a_user_s_turn_become_turns() -> None:
    parts = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "4 degrees"}]},
        {"type": "tool_result", "tool_use_id": "t2", "content": "noon"},
        {"type": "text", "text": "And now?"},
    ]
    assert read_turn({"role": "user", "content": parts}) == [
        {**RESULT, "tool_call_id": "t1"},
        {"role": "tool", "content": "noon", "tool_call_id": "t2"},
        {"role": "user", "content": "And now?"},
    ]
    assert len(read_turn({"role": "user", "content": parts[:2]})) == 2


A = {"role": "assistant", "content": "4"}
BAD = [
    ({"content": "x"}, r"a turn has no role \(turn 1\)"),
    ({"role": None, "content": "x"}, "a turn has no role"),
    ({"role": ["user"], "content": "x"}, r"unknown role \['user'\]"),
    ({"role": "user", "from": "gpt", "content": "x"}, "a turn has two roles"),
    ({"role": "user", "content": "x", "value": "y"}, "content and value, which differ"),
    ({"role": "user"}, "the user turn has no content"),
    ({"role": "user", "content": float("nan")}, "the user turn has no content"),
    ({"role": "user", "content": []}, "the user turn has no content"),
    ({"role": "assistant", "content": None}, "the assistant turn has no content"),
    ({"role": "assistant", "content": None, "tool_calls": []}, "the assistant turn has no content"),
    ({"role": "user", "content": True}, "content of the user turn is bool, expected text"),
    ({"role": "user", "content": 4}, "content of the user turn is int, expected text"),
    ({"role": "tool", "content": {"degrees": 4}}, "content of the tool turn is dict, expected text"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "part of type 'image_url'"),
    ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "part of type 'input_audio'"),
    ({"role": "user", "content": [{"type": ["text"], "text": None}]}, "part of type 'text'"),
    ({"role": "user", "content": [3]}, "a list with int in it"),
    ({"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}, "part of type 'thinking'"),
    ({"role": "user", "content": "x", "tool_calls": [CALL]}, "'tool_calls' belongs to a turn of the assistant"),
    ({"role": "tool", "content": "x", "reasoning": "y"}, "'reasoning' belongs to a turn of the assistant"),
    ({**A, "reasoning": "a", "thinking": "b"}, "reasoning twice, which differs"),
    ({**A, "thinking": True}, "thinking of a turn is bool, expected text"),
    ({**A, "tool_calls": [CALL], "function_call": OSLO}, "calls in two places"),
    ({**A, "tool_calls": [{"function": {"arguments": {}}}]}, "expected a call with name and arguments"),
    ({**A, "tool_calls": "weather()"}, "expected a call with name and arguments"),
    ({**A, "tool_calls": [3]}, "expected a call with name and arguments"),
    ({**A, "tool_calls": [{"type": "custom", "name": "x", "input": "y"}]}, "a call of type 'custom'"),
    ({**A, "function_call": "auto"}, "expected a call with name and arguments"),
    ({**A, "tool_calls": [{"name": "w", "arguments": '{"city": Oslo}'}]}, "arguments of 'w' is text .* not valid JSON"),
    ({**A, "tool_calls": [{"name": "w", "arguments": "{'city': 'Oslo'}"}]}, "'w' is a list or object of Python"),
    ({**A, "tool_calls": [{"name": "w", "arguments": "Oslo"}]}, "arguments of 'w' are text, expected an object"),
    ({**A, "tool_calls": [{"name": "w", "arguments": ["Oslo"]}]}, "arguments of 'w' are list, expected an object"),
    ({**A, "tool_calls": [{"name": "w", "arguments": {}, "input": {"a": 1}}]}, "has arguments and input"),
    ({"from": "function_call", "value": "I call weather"}, "the function_call turn .*expected a call"),
    ({"from": "function_call", "value": "{'name': 'weather'}"}, "list or object of Python written as text"),
    ({"from": "function_call", "value": '{"name": "weather"'}, "not valid JSON"),
    ({**A, "weight": 0.5}, "weight of a turn is 0.5"),
    ({**A, "weight": "0"}, "weight of a turn is '0'"),
    ({**A, "train": "false"}, "train of a turn is 'false', expected true or false"),
    ({**A, "loss": 0.31}, "loss of a turn is 0.31, expected true or false"),
    ({**A, "train": True, "weight": 0}, "flags of a turn contradict each other.*: train, weight"),
    ({**A, "prefix": True}, "'prefix' of a turn is not supported"),
    ({**A, "train_detail": [{"begin_offset": 0}]}, "'train_detail' of a turn is not supported"),
    ({**A, "loss_scale": 0.5}, "'loss_scale' of a turn is not supported"),
    ({**A, "refusal": "I won't"}, "'refusal' of a turn is not supported"),
    ({**A, "images": ["a.png"]}, "'images' of a turn is not supported"),
    ({**A, "audio": {"id": "x"}}, "'audio' of a turn is not supported"),
    ({**A, "channel": "analysis"}, "'channel' of a turn is not supported"),
    ({**A, "name": ["x"]}, "name of a turn is list, expected text"),
]  # fmt: skip


@pytest.mark.parametrize(("turn", "message"), BAD)
def test_turns_that_cannot_be_used_say_why(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        read_turns([turn])


def test_a_conversation_may_be_written_as_json() -> None:
    """As CSV files hold them; Python's way of writing a list is named, and so is text that is neither."""
    turns = [{"role": "user", "content": "it's"}, FINE]
    assert read_turns(json.dumps(turns)) == turns
    for text in (repr(turns), "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]"):
        with pytest.raises(BadRow, match="conversations is a list or object of Python written as text") as error:
            read_turns(text, "conversations")
        assert ".jsonl or .parquet" in error.value.hint
    with pytest.raises(BadRow, match="begins with .* and is not valid JSON"):
        read_turns('[{"role": "user"')
    with pytest.raises(BadRow, match="not valid JSON"):
        read_turns("[" * 100_000)
    for value in ("hello", {"role": "user"}, [["user", "hi"]], 3, None):
        with pytest.raises(BadRow, match="expected a list of turns, each with role and content"):
            read_turns(value)


def test_what_nothing_reads_is_noted_and_what_is_ignored_too() -> None:
    call = {"index": 0, "id": 7, "function": {**OSLO, "strict": True}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], "id": 3},
        {"role": "assistant", "content": "", "tool_calls": [call], "model": "m", "tool_call_id": "odd"},
    ]
    notes = FieldNotes()
    assert read_turns(turns, "messages", notes)[1]["tool_calls"] == [{"id": "7", **CALL}]
    assert notes.unread == {
        *("messages[].id", "messages[].model", "messages[].tool_call_id", "messages[].content[].cache_control"),
        *("messages[].tool_calls[].index", "messages[].tool_calls[].function.strict"),
    }
    notes = FieldNotes(frozenset(["prefix", "weight", "image", "channel"]))
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "4"}]
    assert read_turns([{"role": "assistant", "content": parts, "prefix": True, "weight": 0}], "m", notes) == [FINE]
    assert notes.ignored == {"m[].prefix", "m[].weight", "m[].content[].type image"}


def test_make_message_and_answer_text() -> None:
    assert make_message("prompter", "a") == {"role": "user", "content": "a"}
    assert answer_text(read_turn({"role": "assistant", "content": "Wait.", "tool_calls": [CALL]})[0]) == (
        'Wait.\n{"name": "weather", "arguments": {"city": "Oslo"}}'
    )
    assert answer_text(make_message("assistant", "")) == ""


def test_lists_by_field_are_a_conversation() -> None:
    """As `datasets` hands out its older type of a list of objects."""
    assert read_turns({"from": ["human", "gpt"], "value": ["a", "4"]}) == [{"role": "user", "content": "a"}, FINE]
    with pytest.raises(BadRow, match="expected a list of turns"):
        read_turns({"from": ["human", "gpt"], "value": ["a"]})


def test_a_judge_reads_calls_as_json() -> None:
    turns = read_turns([ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT])
    assert as_text([dict(turn) for turn in turns]) == (
        'User: a\n\nAssistant: {"name": "weather", "arguments": {"city": "Oslo"}}\n\nTool: 4 degrees'
    )
