"""Preferences from rows: both answers' tokens, soft labels and margins, and every bad row found and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli.inspect_rows import _facts
from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.data.preference_rows import PreparedPairs, PreparedUnpaired, prepare_pairs, prepare_unpaired
from tests.data.tokenizers import byte_level

TOKENIZER = byte_level("chatml")
HEAD = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
ASK, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))


def config_of(tmp_path: Path, rows: list[Any], **settings: Any) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return DataConfig(source=str(path), **settings)


def pairs(tmp_path: Path, rows: list[Any], context: int | None = None, **settings: Any) -> PreparedPairs:
    return prepare_pairs(config_of(tmp_path, rows, **settings), TOKENIZER, context=context)


def unpaired(tmp_path: Path, rows: list[Any], **settings: Any) -> PreparedUnpaired:
    return prepare_unpaired(config_of(tmp_path, rows, **settings), TOKENIZER)


def text(sample: Any, *, learnt: bool) -> str:
    there = [t for t, w in zip(sample.tokens, sample.weights, strict=True) if bool(w) == learnt]
    return str(TOKENIZER.decode(there))


ROWS = {
    "text": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "turns": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "conversations": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "conversations with their prompt": {"prompt": "2+2?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "hh_rlhf": {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    "ultrafeedback": {
        "instruction": "2+2?",
        "completions": [{"response": r, "overall_score": s} for r, s in (("3", 2.0), ("4", 9), ("6", 4), ("5", 2.0))],
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_each_layout(tmp_path: Path, name: str) -> None:
    made = pairs(tmp_path, [{**ROWS[name], "raters": 3}])
    (pair,) = made.items
    for sample, answer in ((pair.chosen, "4"), (pair.rejected, "5")):
        assert text(sample, learnt=False) == HEAD.format("2+2?")
        assert text(sample, learnt=True) == f"{answer}<|im_end|>"
        assert list(sample.weights) == [0.0] * pair.prompt + [1.0, 1.0]
    assert (pair.probability, pair.margin) == (1.0, 7.0 if name == "ultrafeedback" else 0.0)
    assert pair.source == "rows.jsonl:1" and pair.row["raters"] == 3
    assert pair.row["messages"] == [ASK] and (pair.row["completion"], pair.row["rejected"]) == ("4", "5")
    assert list(made.samples) == [pair.chosen, pair.rejected]


def test_plain_text(tmp_path: Path) -> None:
    (pair,) = pairs(tmp_path, [ROWS["text"]], chat=False).items
    assert (text(pair.chosen, learnt=False), text(pair.chosen, learnt=True)) == ("2+2?", "4<|im_end|>")
    assert text(pair.rejected, learnt=True) == "5<|im_end|>" and pair.prompt == 4


def test_soft_labels_and_margins(tmp_path: Path) -> None:
    rows = [{**ROWS["text"], "probability": p, "margin": m} for p, m in ((0.75, 2), (0.25, None), (0, "1.5"), (1, 0))]
    made = pairs(tmp_path, rows)
    assert [(p.probability, p.margin) for p in made.items] == [(0.75, 2.0), (0.75, 0.0), (1.0, 1.5), (1.0, 0.0)]
    assert [text(p.chosen, learnt=True)[0] for p in made.items] == ["4", "5", "5", "4"]  # the better one, each time
    assert [p.row["completion"] for p in made.items] == ["4", "5", "5", "4"]
    assert made.stats["swapped"] == 2


PROMPT = {"prompt": "2+2?", "chosen": "4"}
LONG = "x" * 60
OTHER = {"role": "user", "content": "2+3?"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({**PROMPT, "rejected": "4"}, "the two answers are equal"),
    ({**PROMPT, "rejected": " 4\n"}, "the two answers are equal"),
    ({**PROMPT, "rejected": "5", "probability": 0.5}, "a tie: its probability is 0.5"),
    ({**PROMPT, "rejected": " "}, "the rejected answer is empty"),
    ({**PROMPT, "chosen": "", "rejected": "5"}, "the chosen answer is empty"),
    ({**PROMPT, "chosen": "2+2? ", "rejected": "5"}, "the chosen answer equals the prompt"),
    ({**PROMPT, "chosen": "5", "rejected": "2+2?", "probability": 0.1}, "the chosen answer equals the prompt"),
    ({"chosen": [ASK, GOOD], "rejected": [OTHER, BAD]}, "the prompts don't match (turn 1 differs)"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]},
     "the prompts don't match (1 turns before the chosen answer, 3 before the rejected one)"),
    ({"prompt": "2+3?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
     "the prompts don't match (the column prompt is no turn of the chosen conversation)"),
    ({"prompt": [OTHER], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
     "the prompts don't match (the column prompt ends otherwise than the chosen conversation's)"),
    ({"prompt": [OTHER, GOOD, ASK], "chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]},
     "the prompts don't match (the column prompt has other earlier turns than the conversation)"),
    ({**PROMPT, "rejected": LONG}, "too long (84 tokens, and the limit is 60)"),
    (PROMPT, "missing field 'rejected'"),
    ({**PROMPT, "chosen": None, "rejected": "5"}, "missing field 'chosen'"),
    ({"chosen": "4", "rejected": "5"}, "missing field 'prompt'"),
    ({**PROMPT, "prompt": " ", "rejected": "5"}, "empty prompt"),
    ({**PROMPT, "rejected": [BAD]}, "one answer is text and the other a list of turns"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK]},
     "the last turn is not the assistant's (the rejected answer ends with the user's)"),
    ({**PROMPT, "rejected": "5", "probability": 1.2},
     "probability out of range: it is 1.2, expected a number from 0 to 1"),
    ({**PROMPT, "rejected": "5", "probability": "high"}, "probability is 'high', expected a number"),
    ({**PROMPT, "rejected": "5", "margin": -1},
     "margin out of range: it is -1, expected a difference of scores, 0 or more"),
    ({**PROMPT, "rejected": "5", "margin": "inf"},
     "margin out of range: it is inf, expected a difference of scores, 0 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), WRONG)
def test_bad_rows_are_found_and_said(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    rows = [ROWS["text"], row]
    with pytest.raises(DataError) as error:
        pairs(tmp_path, rows, max_tokens=60)
    first, line, advice = str(error.value).split("\n")
    assert first.startswith("1 of 2 rows can't be used (1 ") and line == f"  rows.jsonl:2: {reason}"
    assert "on_bad_row: skip" in advice
    stats = pairs(tmp_path, rows, max_tokens=60, on_bad_row="skip").stats
    assert stats["used"] == 1 and sum(stats["dropped"].values()) == 1
    assert stats["bad_rows"] == [{"file": "rows.jsonl", "row": 2, "reason": reason}]


def test_bad_scores(tmp_path: Path) -> None:
    def scored(*scores: Any) -> dict[str, Any]:
        answers = [{"response": f"answer {i}", "overall_score": s} for i, s in enumerate(scores)]
        return {"instruction": "2+2?", "completions": answers}

    for row, reason in (
        (scored(3, 3.0), "a tie: all scores are 3"),
        (scored(3, None), "fewer than two scored answers (1 of 2)"),
        (scored(3, "good"), "overall_score is 'good', expected a number"),
        ({"instruction": "2+2?", "completions": "none"}, "completions: expected a list of objects"),
    ):
        with pytest.raises(DataError) as error:
            pairs(tmp_path, [row], layout="ultrafeedback", on_bad_row="skip")  # nothing is left: an error all the same
        assert f"  rows.jsonl:1: {reason}" in str(error.value)


def test_only_ten_are_named_and_all_are_counted(tmp_path: Path) -> None:
    rows = [ROWS["text"]] + [{**PROMPT, "rejected": "4"}] * 7 + [{**PROMPT, "rejected": ""}] * 6
    with pytest.raises(DataError) as error:
        pairs(tmp_path, rows)
    said = str(error.value)
    assert said.startswith("13 of 14 rows can't be used (7 the two answers are equal, 6 the rejected answer is empty):")
    assert said.count("rows.jsonl:") == 10 and "\n  and 3 more\n" in said


def test_what_is_cut_is_counted(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "y" + LONG, "rejected": "x" + LONG}
    made = pairs(tmp_path, [row, ROWS["text"]], max_tokens=60, on_long="truncate")
    assert len(made.items[0].chosen) == len(made.items[0].rejected) == 60 and made.stats["truncated"] == 1
    with pytest.raises(DataError, match=r"the two answers are equal \(once cut or tokenized\)"):
        pairs(tmp_path, [{**row, "chosen": LONG + "y", "rejected": LONG + "x"}], max_tokens=60, on_long="truncate")
    with pytest.raises(DataError, match="the limit is 50"):
        pairs(tmp_path, [row], context=50)


def test_the_manifest_s_entry(tmp_path: Path) -> None:
    stats = pairs(tmp_path, [ROWS["text"], ROWS["text"], {**ROWS["text"], "rejected": "6"}]).stats
    head = len(TOKENIZER(HEAD.format("2+2?"))["input_ids"])
    assert (stats["rows"], stats["used"], stats["duplicates"], stats["layout"]) == (3, 3, 1, "preference")
    assert (stats["tokens"], stats["loss_tokens"], stats["longest"]) == (6 * (head + 2), 12, head + 2)
    names = [("rows.jsonl:1", "chosen"), ("rows.jsonl:1", "rejected"), ("rows.jsonl:2", "chosen")]
    assert [(e["text"], e["label"]) for e in stats["examples"]] == [*names, ("rows.jsonl:2", "rejected")]


def test_rows_that_say_the_opposite_of_each_other_are_named(tmp_path: Path) -> None:
    """Used all the same, since two people may differ; a soft label below 1/2 is the pair the other way round."""
    one, other = ({"prompt": "2+2?", "chosen": a, "rejected": b} for a, b in (("4", "5"), ("5", "4")))
    rows = [one, {**one, "prompt": "1+3?"}, other, {**one, "probability": 0.2}, one]
    made = pairs(tmp_path, rows)
    at = "rows.jsonl:"
    assert len(made.items) == 5 and made.stats["contradictory"] == 3
    assert made.stats["contradictions"] == [f"{at}3 against {at}1", f"{at}4 against {at}1", f"{at}5 against {at}3"]
    assert any(f"{at}3 against {at}1" in value for _, value in _facts(made.stats))
    assert "contradictory" not in pairs(tmp_path, [one, one]).stats
    answers = [{"prompt": "2+2?", "completion": "4", "label": good} for good in (True, False, True)]
    assert unpaired(tmp_path, answers).stats["contradictions"] == [f"{at}2 against {at}1", f"{at}3 against {at}2"]


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    single = [{"prompt": "2+2?", "completion": "4", "label": True}]
    for rows, settings, message in (
        (single, {}, "laid out as prompt_completion, which holds no pairs"),
        ([ROWS["text"]], {"prompt": "{prompt}", "completion": "{chosen}"}, "a pair has two"),
        ([ROWS["text"]], {"loss_on": "all"}, "leave it at completion"),
    ):
        with pytest.raises(DataError, match=message):
            pairs(tmp_path, rows, **settings)
    bare = byte_level("chatml")
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        prepare_pairs(config_of(tmp_path, [ROWS["text"]]), bare)


def test_single_answers_with_a_label(tmp_path: Path) -> None:
    labels = [True, "no", 1, 0, "good", "False"]
    made = unpaired(tmp_path, [{"prompt": "2+2?", "completion": str(i), "label": x} for i, x in enumerate(labels)])
    assert [u.desirable for u in made.items] == [True, False, True, False, True, False]
    assert [text(u.sample, learnt=True) for u in made.items] == [f"{i}<|im_end|>" for i in range(6)]
    assert all(text(u.sample, learnt=False) == HEAD.format("2+2?") for u in made.items)
    assert made.items[1].source == "rows.jsonl:2" and made.items[1].row["completion"] == "1"
    assert (made.stats["used"], made.stats["desirable"], made.stats["layout"]) == (6, 3, "prompt_completion")


def test_ratings_become_labels(tmp_path: Path) -> None:
    rows = [{"text": f"review {i}", "stars": s} for i, s in enumerate((-2, -0.1, 0.1, 2))]
    classes = {"column": "stars", "cuts": [0], "names": ["bad", "good"], "margin": 0.5}
    settings: dict[str, Any] = {"classes": classes, "prompt": "Write a review", "completion": "{text}"}
    made = unpaired(tmp_path, rows, **settings)
    assert [(u.row["completion"], u.desirable) for u in made.items] == [("review 0", False), ("review 3", True)]
    assert made.stats["dropped"] == {"filtered": 2} and made.stats["rows"] == 4
    three = {**classes, "cuts": [-1, 1], "names": ["bad", "middling", "good"]}
    for changes, message in (
        ({"classes": three}, "expected two, the bad one first"),
        ({"classes": None}, "no column label"),
        ({"classes": {**classes, "margin": 9}}, "all 4 rows lie within"),
    ):
        with pytest.raises(DataError, match=message):
            unpaired(tmp_path, rows, **{**settings, **changes})
    rated = unpaired(
        tmp_path,
        [{"prompt": "q", "completion": "a", "rating": r} for r in (1, 5)],
        classes={"column": "rating", "cuts": [3], "names": ["bad", "good"]},
    )
    assert [u.desirable for u in rated.items] == [False, True] and rated.stats["layout"] == "rated"


def test_bad_labelled_rows(tmp_path: Path) -> None:
    fine = {"prompt": "q", "completion": "a", "label": True}
    for change, reason in (
        ({"label": None}, "missing field 'label'"),
        ({"label": "perhaps"}, "label out of range: it is 'perhaps', which is neither good nor bad"),
        ({"completion": " "}, "the answer is empty"),
        ({"completion": "q"}, "the chosen answer equals the prompt"),
        ({"completion": None}, "missing field 'completion'"),
    ):
        with pytest.raises(DataError) as error:
            unpaired(tmp_path, [fine, {**fine, **change}])
        assert f"  rows.jsonl:2: {reason}" in str(error.value)
    bad_echo = unpaired(tmp_path, [fine, {**fine, "completion": "q", "label": False}])  # a bad answer may repeat it
    assert bad_echo.stats["used"] == 2
