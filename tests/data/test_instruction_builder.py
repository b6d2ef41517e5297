"""Instruction rows: wordings, label words, demonstrations without leaks, rows and tasks that can't be used."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.core.errors import DataError
from posttrain.data.instruction_builder import build_instructions
from posttrain.data.instruction_tasks import InstructionTask
from posttrain.data.instruction_wordings import (
    INPUT_FIELDS,
    INVERTED_TARGET,
    TASK_TYPES,
    Template,
    language_name,
    shipped_wordings,
)
from tests.data.instruction_tables import built, sentence, sentiment, table

# ------------------------------------------------------------------------------------------------------ wordings


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_the_wordings_that_ship_fit_every_task_of_their_type(kind: str) -> None:
    shipped = shipped_wordings()[kind]
    needed, target = set(INPUT_FIELDS[kind]), INVERTED_TARGET[kind]
    known = {*needed, "context", "labels", "options", "language", "output_language"}
    without = [text for text in shipped["wordings"] if "{context}" not in text]
    assert len(without) == 10 and len(set(shipped["wordings"])) == len(shipped["wordings"])
    for text in shipped["wordings"]:
        fields = set(Template(text).fields)
        assert needed <= fields <= known
        assert kind not in ("classification", "inference") or fields & {"labels", "options"}
    for text in shipped["inverted"]:
        fields = set(Template(text).fields)
        assert "output" in fields and target not in fields and needed - {target} <= fields


def test_a_row_has_the_words_of_its_wording_and_choices_to_pick_from(tmp_path: Path) -> None:
    rows = list(build_instructions([sentiment(tmp_path)], shots={"share": 0}))
    assert {row["wording"] for row in rows} == set(range(10))
    for row in rows:
        words = ["negative", "positive"] if row["wording"] % 2 == 0 else ["bad", "good"]
        assert row["choices"] == words
        assert row["completion"] == words[int(row["label"])]  # numbers of JSON are values of labels
        assert row["input"] in row["prompt"] and all(word in row["prompt"] for word in words)
        assert row["place"] == f"sentiment.jsonl:{int(re.findall('[0-9]+', row['input'])[0]) + 1}"


def test_own_wordings_and_texts_with_braces(tmp_path: Path) -> None:
    path = table(tmp_path / "t.jsonl", [{"q": f"{{input}} {sentence(i)}", "a": f"{{'x': {i}}}"} for i in range(8)])
    task = InstructionTask.model_validate(
        {"name": "t", "type": "question_answering", "data": path, "fields": {"question": "{q}"}, "output": "{a}"}
        | {"wordings": ["Write {{}}: {question}"], "shipped_wordings": False}
    )
    rows = list(build_instructions([task], held_out=0, shots={"share": 1, "counts": [1]}))
    assert len(rows) == 8
    for row in rows:
        assert row["prompt"].count("Write {}: {input} ") == 2 and row["completion"].startswith("{'x': ")


def test_a_context_has_wordings_that_name_it(tmp_path: Path) -> None:
    rows = [{"q": f"Q {sentence(i)}", "c": f"C{i}." if i % 2 else "", "a": str(i)} for i in range(40)]
    settings = {"type": "question_answering", "data": table(tmp_path / "t.jsonl", rows), "output": "{a}"}
    task = InstructionTask.model_validate({"name": "t", **settings, "fields": {"question": "{q}", "context": "{c}"}})
    for row in build_instructions([task], held_out=0, inverted_share=0.4):
        asked = row["completion"] if row["inverted"] else row["prompt"]
        number = int(row["place"].split(":")[1]) - 1
        assert rows[number]["q"] in asked
        assert (f"C{number}." in row["prompt"]) == bool(number % 2)
        assert len(re.findall(r"C\d+\.", row["prompt"])) == (number % 2) * (row["shots"] + 1)


def test_reasoning_is_asked_for_and_inverted_rows_have_none(tmp_path: Path) -> None:
    task = sentiment(tmp_path, rationale="{why}")
    rows = list(build_instructions([task], rationale_share=0.5, inverted_share=0.3, held_out=0))
    kinds = Counter((row["rationale"], row["inverted"]) for row in rows)
    assert min(kinds[True, False], kinds[False, False], kinds[False, True]) > 5 and not kinds[True, True]
    for row in rows:
        assert ("Answer:" in row["prompt"]) == row["rationale"]
        assert ("choices" in row) == (not row["rationale"] and not row["inverted"])
        if row["rationale"]:
            reasoning, last = row["completion"].rsplit("\n", 1)
            assert reasoning.startswith("because ") and last in {
                f"Answer: {w}" for w in "negative positive bad good".split()
            }
            assert row["prompt"].count("because") == row["shots"]
        if row["inverted"]:
            assert row["completion"] == row["input"] and row["input"] not in row["prompt"]


def test_translations_name_both_languages_and_invert(tmp_path: Path) -> None:
    rows = [{"de": f"Satz {sentence(i)}", "en": f"Sentence {sentence(i + 100)}"} for i in range(30)]
    settings = {"type": "translation", "data": table(tmp_path / "t.jsonl", rows), "language": "en"}
    task = InstructionTask.model_validate(
        {"name": "t", **settings, "output_language": "pt-BR", "fields": {"input": "{en}"}, "output": "{de}"}
    )
    for row in build_instructions([task], held_out=0, inverted_share=0.5, shots={"share": 0}):
        assert ("English" if row["inverted"] else "Brazilian Portuguese") in row["prompt"]
        assert row["completion"].startswith("Sentence" if row["inverted"] else "Satz")
    assert language_name("de") == "German" and language_name("Old Norse") == "Old Norse"
    with pytest.raises(ValueError, match="'xx' is no language code"):
        language_name("xx")
    assert language_name("german") == "German" and language_name("Klingon") == "Klingon"
    with pytest.raises(ValueError, match="'Portugese' is no language that is known here: did you mean Portuguese"):
        language_name("Portugese")


def test_labels_of_which_the_rows_have_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": sentence(i), "label": "good"} for i in range(8)]
    task = InstructionTask.model_validate(
        {
            **{"name": "one", "type": "classification", "data": table(tmp_path / "t.jsonl", rows)},
            **{"fields": {"input": "{text}"}, "output": "{label}", "labels": {"good": ["fine"], "bad": ["poor"]}},
        }
    )
    assert len(list(build_instructions([task], held_out=0))) == 8
    assert "task one: all 8 rows have the label 'good', so 'bad' can't be learnt" in caplog.text


def test_values_inside_of_columns_and_labels_that_look_like_other_types(tmp_path: Path) -> None:
    rows = [{"q": sentence(i), "a": {"text": [f"A{i}", "x"], "start": [i]}, "ok": i % 2 == 0} for i in range(20)]
    rows.append({"q": "no answer", "a": {"text": [], "start": []}, "ok": True})
    path = table(tmp_path / "t.jsonl", rows)
    base: dict[str, Any] = {"name": "t", "data": {"source": path, "on_bad_row": "skip"}}
    squad = InstructionTask.model_validate(
        base | {"type": "question_answering", "fields": {"question": "{q}"}, "output": "{a.text.0}"}
    )
    builder = built([squad], tmp_path / "w", held_out=0, shots={"share": 0})
    assert sorted(row["completion"] for row in builder.rows()) == sorted(f"A{i}" for i in range(20))
    assert builder.stats()["dropped"] == {"missing field 'a.text.0'": 1}
    yes_no = base | {"type": "classification", "fields": {"input": "{q}"}, "output": "{ok}"}
    task = InstructionTask.model_validate(yes_no | {"labels": {True: "right", False: "wrong"}})
    for row in build_instructions([task], held_out=0):
        assert row["completion"] == {"true": "right", "false": "wrong"}[row["label"]]


# ------------------------------------------------------------------------------------------------- demonstrations


def test_no_demonstration_is_the_row_a_copy_or_of_its_group(tmp_path: Path) -> None:
    """Each text is there five times: once again in other case, in another order, with one more word, and by group."""
    rows = []
    for i in range(30):
        text = f"{sentence(i)} and then {sentence(i + 500)}"
        swapped = " ".join([*text.split()[4:], *text.split()[:4]])
        copies = [text, text.upper() + "!", swapped, f"{text} again", f"wholly other words {sentence(i + 900)}"]
        rows += [{"text": copy, "family": i, "label": f"L{i}-{j}"} for j, copy in enumerate(copies)]
    path = table(tmp_path / "t.jsonl", rows)
    base = {"name": "t", "type": "summarisation", "data": path, "fields": {"input": "{text}"}, "output": "{label}"}
    for group in ("family", None):
        task = InstructionTask.model_validate(base | {"group": group})
        seen = 0
        for row in build_instructions([task], held_out=0, shots={"share": 1, "counts": [3]}):
            family, copy = re.fullmatch(r"L(\d+)-(\d)", row["completion"]).groups()  # type: ignore[union-attr]
            shown = re.findall(r"L(\d+)-(\d)", row["prompt"])
            assert len(shown) == row["shots"] == 3
            if group:
                assert family not in [f for f, _ in shown]
            elif copy != "4":  # the fifth has other words, and only the group tells
                assert family not in [f for f, c in shown if c != "4"]
            families = [f for f, c in shown if c != "4"]
            assert len(set(families)) == len(families)  # nor are two demonstrations copies of one another
            seen += 1
        assert seen == 150


def test_words_of_a_template_do_not_make_rows_alike(tmp_path: Path) -> None:
    rows = [{"q": f"State the final answer to this arithmetic problem: {i} + {2 * i + 7} =", "a": i} for i in range(50)]
    settings = {"type": "question_answering", "data": table(tmp_path / "t.jsonl", rows)}
    task = InstructionTask.model_validate({"name": "t", **settings, "fields": {"question": "{q}"}, "output": "{a}"})
    made = list(build_instructions([task], held_out=10, shots={"share": 1, "counts": [2]}))
    assert len(made) == 40 and {row["shots"] for row in made} == {2}


def test_fewer_rows_than_demonstrations(tmp_path: Path) -> None:
    builder = built([sentiment(tmp_path, 3)], tmp_path / "w", held_out=50, shots={"share": 1, "counts": [5]})
    rows = list(builder.rows())
    assert len(builder.held[0]) == 1 and [row["shots"] for row in rows] == [1, 1]
    written = builder.stats()["tasks"]["sentiment"]["written"]
    assert written["rows with fewer demonstrations than drawn: no more that are free of leaks"] == 2


def test_demonstrations_by_hand_as_turns(tmp_path: Path) -> None:
    shown = [{"input": f"shown {i} {sentence(i + 70)}", "output": str(i % 2)} for i in range(3)]
    shown.append(
        {"input": sentence(5).upper(), "output": "1"}
    )  # a copy of a row: never before it, and it is not held out
    task = sentiment(tmp_path, demonstrations=shown)
    builder = built([task], tmp_path / "w", held_out=30, shots={"share": 1, "counts": [4], "style": "turns"})
    held = [row["input"] for row in builder.held_out_rows(False)]
    assert sentence(5) not in held and len(held) == 30
    for row in builder.rows():
        assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant"] * row["shots"] + ["user"]
        assert row["shots"] == (3 if row["input"] == sentence(5) else 4)
        assert all(turn["content"] in row["choices"] for turn in row["prompt"][1::2])


def test_long_prompts_lose_demonstrations_then_the_row(tmp_path: Path) -> None:
    builder = built([sentiment(tmp_path)], tmp_path / "w", held_out=0, shots={"share": 1, "counts": [3]})
    longest = sentence(11)
    rows = list(builder.rows(lambda prompt, completion: len(prompt) < 500 and not prompt.endswith(longest)))
    assert all(len(row["prompt"]) < 500 for row in rows)
    stats = builder.stats()
    assert sum(stats["dropped"].values()) == 60 - len(rows)
    assert {row["shots"] for row in rows} > {1}


# -------------------------------------------------------------------------------------------------- rows and tasks


def test_rows_that_cannot_be_used_are_named_and_skipped_on_request(tmp_path: Path) -> None:
    rows = [{"text": sentence(i), "label": float(i % 2)} for i in range(20)]
    rows += [
        {"text": " ", "label": 1},
        {"text": None, "label": 1},
        {"text": "x", "label": -1},
        {"text": "y", "label": ""},
    ]
    rows.append({"text": sentence(3), "label": 1.0})
    path = table(tmp_path / "sentiment.jsonl", rows)
    task = sentiment(tmp_path)
    table(tmp_path / "sentiment.jsonl", rows)
    with pytest.raises(DataError, match=r"(?s)task 'sentiment': 4 of 25 rows.*sentiment.jsonl:23: unknown label: '-1'"):
        list(build_instructions([task]))
    skipping = sentiment(tmp_path, data={"source": path, "on_bad_row": "skip"})
    table(tmp_path / "sentiment.jsonl", rows)
    builder = built([skipping], tmp_path / "w", held_out=0)
    assert len(list(builder.rows())) == 20
    stats = builder.stats()
    causes = {
        "empty input": 1,
        "missing field 'text'": 1,
        "unknown label": 1,
        "empty output": 1,
        "the same row again": 1,
    }
    assert stats["dropped"] == causes and stats["tasks"]["sentiment"]["dropped"] == causes
    assert stats["dropped_examples"]["unknown label"] == [
        {"place": "sentiment.jsonl:23", "text": "unknown label: '-1' is not in labels"}
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": {"text": "{text}"}}, "fields.input is missing"),
        ({"fields": {"input": "text"}}, "fields name no column"),
        ({"fields": {"input": "{text"}}, "fields.input: expected '}'"),
        ({"fields": {"input": "{text!r}"}}, r"fields.input: a field is a name alone, \{text\}"),
        (
            {"wordings": ["What of {inputt}?"]},
            r"wordings.0 names \{inputt\}, and there are: description, input, labels",
        ),
        ({"wordings": ["Choose from {labels}."]}, r"wordings.0 does not name \{input\}"),
        ({"inverted": ["From {output} to {input}"]}, r"inverted.0 names \{input\}, which is the answer"),
        ({"inverted": ["Go."]}, r"inverted.0 does not name \{output\}"),
        ({"shipped_wordings": False}, "there is no way to ask for the task"),
        ({"labels": {"a": ["x"], "b": ["x"]}}, "'a' and 'b' would both be called 'x'"),
        ({"labels": {"a": ["x", "y"], "b": ["z", "y"]}}, "'a' and 'b' would both be called 'y'"),
        ({"labels": {"a": []}}, "labels has 1 value"),
        ({"labels": {"a": [], "b": ["c"]}}, "labels.a: expected one or more words"),
        (
            {"type": "extraction", "fields": {"input": "{text}", "what": "a"}},
            "labels are for classification and inference",
        ),
        ({"output_language": "de"}, "output_language is for translation"),
        ({"language": "zz"}, "'zz' is no language code"),
        ({"data": {"source": "a.tsv", "prompt": "x"}}, "prompt is not for the rows of a task"),
        ({"demonstrations": [{"input": "a"}]}, "demonstrations.0.output is missing"),
        ({"demonstrations": [{"input": "a", "output": "2"}]}, "demonstrations.0.output is '2', and labels has"),
        ({"demonstrations": [{"input": "a", "output": "1", "x": "y"}]}, "demonstrations.0.x: no such field"),
        ({"weight": 0}, "greater than 0"),
    ],
)
def test_a_wrong_task_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        sentiment(tmp_path, **change)


def test_a_task_with_all_its_defaults_written_out_is_the_same(tmp_path: Path) -> None:
    task = sentiment(tmp_path)
    assert type(task).model_validate(task.model_dump()) == task


def test_tables_that_do_not_fit_their_task(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task 'sentiment': fields.input names \{txt\}, and the columns are \['label'"):
        list(build_instructions([sentiment(tmp_path, fields={"input": "{txt}"})]))
    with pytest.raises(DataError, match="group names family, and the columns are"):
        list(build_instructions([sentiment(tmp_path, group="family")]))
    with pytest.raises(DataError, match="task 'sentiment': data source .*there is no such file"):
        list(build_instructions([sentiment(tmp_path, data=str(tmp_path / "none.tsv"))]))
    with pytest.raises(DataError, match="two tasks are named 'sentiment'"):
        list(build_instructions([sentiment(tmp_path), sentiment(tmp_path)]))
    many = [{"text": sentence(i), "label": f"l{i}"} for i in range(300)]
    task = sentiment(tmp_path, labels=None)
    table(tmp_path / "sentiment.jsonl", many)
    with pytest.raises(DataError, match="more than 200 different answers"):
        list(build_instructions([task]))
    table(tmp_path / "sentiment.jsonl", [{"text": sentence(i), "label": "same"} for i in range(30)])
    with pytest.raises(DataError, match="the answer is 'same' in all rows"):
        list(build_instructions([task]))


def test_another_example_takes_the_place_of_one_that_is_too_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{"text": sentence(i) + " word" * (200 * (i % 2)), "label": i // 2 % 2} for i in range(80)]
    task = sentiment(tmp_path).model_dump() | {"data": {"source": table(tmp_path / "long.jsonl", long)}}
    builder = built([InstructionTask.model_validate(task)], tmp_path / "w", held_out=0, rows=30)
    rows = list(builder.rows(lambda prompt, completion: len(prompt) < 600))
    stats = builder.stats()["tasks"]["sentiment"]
    assert len(rows) == len({row["place"] for row in rows}) == 30
    assert stats["not_drawn"] + 30 + builder.dropped().counts["longer than max_tokens"] == 80
    builder = built([InstructionTask.model_validate(task)], tmp_path / "w2", held_out=0, rows=60)
    assert len(list(builder.rows(lambda prompt, completion: len(prompt) < 600))) == 40
    assert "20 rows are missing" in caplog.text


def test_a_text_that_no_context_fits_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{"text": sentence(i) * (1 + 200_000 * (i == 3)), "label": i % 2} for i in range(9)]
    task = sentiment(tmp_path).model_dump() | {"data": {"source": table(tmp_path / "huge.jsonl", rows)}}
    with pytest.raises(DataError, match="huge.jsonl:4.*characters"):
        list(build_instructions([InstructionTask.model_validate(task)]))
