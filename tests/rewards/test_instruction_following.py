"""IFEval's checkers as a reward and as an evaluation; skipped without lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.config.rewards import read_reward
from posttrain.core.errors import MissingExtraError, RewardError
from posttrain.core.files import read_lines, read_object
from posttrain.eval.ifeval_items import ifeval_shares
from posttrain.rewards import instruction_following
from posttrain.rewards.instruction_following import InstructionFollowing, import_checkers
from posttrain.rewards.outcome import LabelError
from posttrain.rewards.reward import build_reward

FRENCH = "Bonjour tout le monde, voici une longue phrase que chacun peut lire en français sans aucune peine."
THREE = "one\n***\ntwo\n***\nthree"
FOLLOWED: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["sun", "sea"]}, "The sun over the sea.", "The sun alone."),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "sea and sea", "sea"),
    ("keywords:forbidden_words", {"forbidden_words": ["rain"]}, "Only sun.", "Then rain."),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "zz", "z"),
    ("language:response_language", {"language": "fr"}, FRENCH, "This is a plain English sentence for everybody."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}, THREE, "one\n***\ntwo"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First this.\n\nThen that.",
        "First this.\n\nNow that.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name] of [city]", "Dear [name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Write soon.", "Bye."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two", "* one"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "a *bright* day", "a bright day"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    ("detectable_format:json_format", {}, '{"a": 1}', "a: 1"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "A title\ntext"),
    ("combination:two_responses", {}, "one******two", "one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say why."}, "Say why. Because.", "Because."),
    ("startend:end_checker", {"end_phrase": "The end."}, "It was so. The end.", "The end. It was so."),
    ("change_case:english_capital", {}, "THIS IS WRITTEN IN CAPITAL LETTERS ONLY", "This is not at all"),
    ("change_case:english_lowercase", {}, "this is written in small letters only", "This is not at all"),
    ("punctuation:no_comma", {}, "One and two.", "One, two."),
    ("startend:quotation", {}, '"All of it."', "All of it."),
]
WITH_PUNKT: list[tuple[str, dict[str, Any], str, str]] = [
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two.", "One."),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "It is VERY GOOD",
        "It is VERY good",
    ),
]


def row(*instructions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"prompt": "p", "instruction_id_list": [n for n, _ in instructions], "kwargs": [k for _, k in instructions]}


def check(text: str, example: dict[str, Any], **settings: Any) -> float:
    reward = build_reward(read_reward({"kind": "ifeval", **settings}), {})
    return float(reward(text, example))


def test_lm_eval_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import_checkers.cache_clear()
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(MissingExtraError, match=r"posttrain\[lm-eval\]"):
        InstructionFollowing(read_reward({"kind": "ifeval"}))


def test_every_instruction_followed_and_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 25; a table gives every argument in every row, empty where it does not belong."""
    pytest.importorskip("lm_eval")
    known = import_checkers().classes
    assert {n for n, *_ in FOLLOWED + WITH_PUNKT} == known.keys() and len(known) == 25
    assert {n for n, *_ in WITH_PUNKT} == instruction_following.NEEDS_PUNKT
    for name, arguments, good, bad in FOLLOWED + (WITH_PUNKT if instruction_following.has_punkt() else []):
        example = row((name, {"num_words": None, **arguments}))
        assert (check(good, example), check(bad, example)) == (1.0, 0.0), name
    monkeypatch.setattr(instruction_following, "has_punkt", lambda: False)
    for name, arguments, good, _ in WITH_PUNKT:
        with pytest.raises(RewardError, match=f"{name} needs NLTK's Punkt.*NLTK_DATA"):
            check(good, row((name, arguments)))


def test_strict_and_loose_all_and_share_by_hand() -> None:
    """The first line has the comma: loose leaves it out. One of two instructions is half, and not all."""
    pytest.importorskip("lm_eval")
    example = row(("punctuation:no_comma", {}), ("keywords:existence", {"keywords": ["sun"]}))
    text = "Sure, here it is:\nThe sun shines."
    assert check(text, example) == 0.0 and check(text, example, mode="loose") == 1.0
    assert check(text, example, credit="share") == 0.5
    assert check("", example, credit="share") == 0.0
    as_text = {
        **example,
        "instruction_id_list": json.dumps(example["instruction_id_list"]),
        "kwargs": '[{}, {"keywords": ["sun"]}]',
    }
    assert check("The sun shines.", as_text) == 1.0
    reward = build_reward(read_reward({"kind": "ifeval"}), {})
    assert reward("Rain, and sun.", example).reason == "not followed: punctuation:no_comma"


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"prompt": "p", "answer": "a"}, r"the columns instruction_id_list and kwargs.*\['answer', 'prompt'\]"),
        (row(("punctuation:no_commas", {})), "no instruction is called 'punctuation:no_commas'; there are change_case"),
        (row(("keywords:existence", {})), "keywords:existence needs keywords in kwargs"),
        (row(("length_constraints:number_words", {"num_words": 0, "relation": "less than"})), "needs num_words"),
        (row(("punctuation:no_comma", {"num_words": 3})), "has no argument 'num_words': expected none"),
        ({**row(("punctuation:no_comma", {})), "kwargs": []}, "1 instructions in instruction_id_list, and 0 entries"),
    ],
)  # fmt: skip
def test_a_row_that_can_not_be_checked_is_an_error(example: dict[str, Any], message: str) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(LabelError, match=message):
        check("text", example)


def test_four_shares_by_hand() -> None:
    """Prompts 1 of 3 strict, 2 of 3 loose; instructions (2 + 1 + 0) / 5 and (2 + 2 + 0) / 5; a failed check is 0."""
    items = [
        {"instructions": 2, "strict": 1.0, "loose": 1.0, "finish": "end"},
        {"instructions": 2, "strict": 0.5, "loose": 1.0, "finish": "length"},
        {"instructions": 1, "strict": None, "loose": None, "finish": "end"},
    ]
    found = ifeval_shares(items)
    assert (found["prompt_strict"], found["prompt_loose"]) == pytest.approx((1 / 3, 2 / 3))
    assert (found["instruction_strict"], found["instruction_loose"]) == (3 / 5, 4 / 5)
    assert found["instructions"] == 5 and found["cut"] == pytest.approx(1 / 3)


@pytest.mark.long  # worker processes import lm-eval
def test_a_stage_is_rewarded_and_measured_by_instructions(tmp_path: Path) -> None:
    """One step of GRPO on rows as IFEval has them, and the evaluation before and after."""
    pytest.importorskip("lm_eval")
    rows = [
        row(("punctuation:no_comma", {}), ("detectable_format:title", {})) | {"prompt": f"Write {i}."} for i in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    problems = {"kind": "rows", "data": {"source": str(tmp_path / "rows.jsonl")}, "answers": False}
    stage = {
        "method": "grpo", "problems": problems, "rewards": [{"kind": "ifeval", "credit": "share"}], "group_size": 2,
        "prompts_per_step": 2, "steps": 1, "sampler": {"max_tokens": 6}, "held_out": None,
    }  # fmt: skip
    task = {
        "kind": "ifeval",
        "name": "instructions",
        "problems": problems,
        "sampler": {"temperature": 0, "max_tokens": 6},
    }
    recipe = {"name": "r", "model": {"source": "tiny:llama"}, "stages": [stage], "evaluate": [task]}
    done = posttrain.run(posttrain.load_recipe(recipe), tmp_path / "run")
    (compared,) = done.comparison
    items = read_lines(tmp_path / "run/evaluations/after/instructions.jsonl")
    summary = read_object(tmp_path / "run/evaluations/after/instructions.json")
    assert compared["n"] == 3 and summary["metric"] == "accuracy" and summary["ifeval"]["instructions"] == 6
    for item in items:
        strict = [("," not in item["output"]) and bool(item["output"].strip()), "<<" in item["output"]]
        assert item["strict"] == sum(strict) / 2 and item["correct"] == all(strict) and item["loose"] >= item["strict"]
