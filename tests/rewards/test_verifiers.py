"""Every kind of reward, on answers judged by hand."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from posttrain.config.rewards import RewardConfig
from posttrain.rewards.outcome import LabelError
from posttrain.rewards.reward import build_reward


def reward(kind: str, text: Any, example: dict[str, Any], **settings: Any) -> Any:
    config = TypeAdapter(RewardConfig).validate_python({"kind": kind, **settings})
    return build_reward(config, {})(text, example)


@pytest.mark.parametrize(
    ("label", "text", "right"),
    [
        ("0.5", r"\boxed{\frac{1}{2}}", 1),
        ("1/2", "so it is 0.5", 1),
        (r"\frac{1}{2}", r"\boxed{50\%}", 1),
        ("(x+1)^2", r"\boxed{x^2+2x+1}", 1),
        (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", 1),
        ("4", r"\boxed{3 \text{ or } 4}", 0),
        ("1234", r"\boxed{1\,234}", 1),
        ("1234", r"\boxed{1,234}", 1),
        ("72 / 2 = 36\n#### 36", "The answer is 36", 1),
        ("36", r"\boxed{37}", 0),
        ("36", "no idea", 0),
        ("36", "", 0),
    ],
)
def test_math(label: str, text: str, right: int) -> None:
    assert reward("math", text, {"answer": label}) == right


def test_a_label_that_cannot_be_read_is_an_error_and_not_a_wrong_answer() -> None:
    with pytest.raises(LabelError):
        reward("math", "5", {"answer": ""})
    with pytest.raises(LabelError, match="'gold'"):
        reward("exact", "5", {"answer": "5"}, label="gold")
    with pytest.raises(LabelError, match="expected one number, and nothing else"):
        reward("numeric", "5", {"answer": "3 or 4"})
    with pytest.raises(LabelError):
        reward("choice", "A", {"answer": "Paris", "choices": ["Rome", "Oslo"]})


@pytest.mark.parametrize(
    ("label", "text", "settings", "right"),
    [
        ("Paris", "<answer> paris. </answer>", {}, 1),
        ("Paris", "<answer>paris</answer>", {"ignore_case": False}, 0),
        ("Paris", "I think:\nParis", {}, 1),
        (["Paris", "City of Light"], "city of light", {}, 1),
        ("Paris", "Paris or Rome", {}, 0),
        ("Paris", "#### Paris", {"extract": "boxed"}, 0),
        ("25", "slowly\n7+4=11\n25", {"extract": "last_line"}, 1),
    ],
)
def test_exact(label: Any, text: str, settings: dict[str, Any], right: int) -> None:
    assert reward("exact", text, {"answer": label}, **settings) == right


@pytest.mark.parametrize(
    ("label", "text", "settings", "right"),
    [
        ("42", "The answer is 42.", {}, 1),
        ("42", "#### 42.0", {}, 1),
        ("1,000", r"\boxed{1000}", {}, 1),
        ("-3", "-3", {}, 1),
        ("-3", "3", {}, 0),
        ("3.14159", "3.14", {}, 0),
        ("3.14159", "3.14", {"tolerance": 0.01}, 1),
        ("1000", "1009", {"relative": 0.01}, 1),
        ("1000", "1011", {"relative": 0.01}, 0),
        ("0.3", "0.1 and then 0.3", {"extract": "whole"}, 1),
        ("5", "five", {}, 0),
    ],
)
def test_numeric(label: str, text: str, settings: dict[str, Any], right: int) -> None:
    assert reward("numeric", text, {"answer": label}, **settings) == right


@pytest.mark.parametrize(
    ("label", "text", "right"),
    [
        ("B", "The answer is B.", 1),
        ("B", "(B)", 1),
        ("Oslo", r"\boxed{B}", 1),
        ("B", "Oslo", 1),
        (1, "B", 1),
        ("B", "A or B", 0),
        ("B", "Bern", 0),
    ],
)
def test_choice(label: Any, text: str, right: int) -> None:
    assert reward("choice", text, {"answer": label, "choices": ["Rome", "Oslo", "Bern"]}) == right


@pytest.mark.parametrize(
    ("text", "settings", "right"),
    [
        ("<think>a</think> <answer>b</answer>", {"tags": ["think", "answer"]}, 1),
        ("<think>a</think> so <answer>b</answer>", {"tags": ["think", "answer"]}, 0),
        ("<answer>b</answer><think>a</think>", {"tags": ["think", "answer"]}, 0),
        ("<think> </think><answer>b</answer>", {"tags": ["think", "answer"]}, 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", {"tags": ["think", "answer"]}, 0),
        ("a</think><answer>b</answer>", {"tags": ["think", "answer"], "prompt_ends_with_tag": True}, 1),
        ("a</think><answer>b</answer>", {"tags": ["think", "answer"]}, 0),
        ("12", {"pattern": r"\d+"}, 1),
        ("12!", {"pattern": r"\d+"}, 0),
        ("a\nb", {"pattern": "a.b"}, 1),
    ],
)
def test_format(text: str, settings: dict[str, Any], right: int) -> None:
    assert reward("format", text, {}, **settings) == right


@pytest.mark.parametrize(
    ("tokens", "settings", "expected"),
    [
        # DAPO, eq. 13: longest 20, buffer 4.
        (16, {"max": 20, "cache": 4}, 0.0),
        (17, {"max": 20, "cache": 4}, -0.25),
        (20, {"max": 20, "cache": 4}, -1.0),
        (99, {"max": 20, "cache": 4}, -1.0),
        (20, {"max": 20}, 0.0),
        (21, {"max": 20}, -1.0),
        (8, {"min": 6, "cache": 4}, -0.5),
        (0, {"min": 1}, -1.0),
        (10, {"target": 10, "width": 5}, 0.0),
        (12, {"target": 10, "width": 5}, -0.4),
        (99, {"target": 10, "width": 5}, -1.0),
    ],
)
def test_length(tokens: int, settings: dict[str, Any], expected: float) -> None:
    assert reward("length", "x" * tokens, {"completion_tokens": tokens}, **settings) == pytest.approx(expected)
    characters = reward("length", "x" * tokens, {}, unit="characters", **settings)
    assert characters == pytest.approx(expected)


@pytest.mark.parametrize(("finish", "expected"), [("end", 0), ("stop", 0), ("length", -1), ("turns", -1)])
def test_truncation_penalty(finish: str, expected: float) -> None:
    assert reward("truncation_penalty", "Well,", {"finish": finish}) == expected
    with pytest.raises(LabelError, match="RewardStack"):
        reward("truncation_penalty", "Well,", {})


def test_self_consistency() -> None:
    """By hand: 4, 4.0 and "it is 4" agree, 5 is alone, an empty text has no answer and counts among the others."""
    texts = ["4", r"\boxed{4.0}", "it is 4", "5", ""]
    assert reward("self_consistency", texts, {}) == [0.5, 0.5, 0.5, 0.0, 0.0]
    assert reward("self_consistency", texts, {}, mode="majority") == [1, 1, 1, 0, 0]
    assert reward("self_consistency", ["1", "2"], {}, mode="majority") == [0, 0]
    halves = [r"\boxed{\frac12}", r"\boxed{0.5}", r"\boxed{2}"]
    assert reward("self_consistency", halves, {}, compare="math") == [0.5, 0.5, 0.0]
    with pytest.raises(ValueError, match="two or more"):
        reward("self_consistency", ["1"], {})


def test_reasoning_gym_scores_its_own_items() -> None:
    from reasoning_gym.factory import create_dataset

    item = create_dataset("chain_sum", size=1, seed=3)[0]
    example = {"entry": item, "task": "chain_sum", "answer": item["answer"]}
    assert reward("reasoning_gym", f"#### {item['answer']}", example) == 1
    assert reward("reasoning_gym", "#### 123456789", example, full_only=True) == 0
    with pytest.raises(LabelError, match="reasoning-gym task"):
        reward("reasoning_gym", "1", {"answer": "1"})


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "format"},
        {"kind": "format", "pattern": "("},
        {"kind": "length"},
        {"kind": "length", "target": 3},
        {"kind": "length", "max": 5, "cache": 4, "min": 3},
        {"kind": "exact", "weight": float("nan")},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(RewardConfig).validate_python(settings)
