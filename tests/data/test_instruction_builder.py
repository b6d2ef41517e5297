"""Instruction rows: demonstrations without leaks, held-out rows and their copies, mixing, wordings, label words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.core.errors import DataError
from posttrain.data.instruction_builder import InstructionBuilder, build_instructions
from posttrain.data.instruction_mixing import Draws, Mixing, mixed_counts
from posttrain.data.instruction_settings import InstructionSettings
from posttrain.data.instruction_tasks import InstructionTask
from posttrain.data.instruction_wordings import (
    INPUT_FIELDS,
    INVERTED_TARGET,
    TASK_TYPES,
    Template,
    language_name,
    shipped_wordings,
)
from posttrain.data.text_copies import core_text, is_copy, template_words

WORDS = "amber birch cedar delta ember flint grove heath inlet jetty knoll larch marsh north olive pearl quartz".split()


def table(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sentence(i: int) -> str:
    """Return a text that shares few words with those of other numbers."""
    return f"{WORDS[i % 17]}{i} {WORDS[i * 7 % 17]}{i} {WORDS[i * 5 % 17]}{i} {WORDS[i * 3 % 17]}{i}"


def sentiment(tmp_path: Path, count: int = 60, name: str = "sentiment", **more: Any) -> InstructionTask:
    rows = [{"text": sentence(i), "label": i % 2, "why": f"because {i}"} for i in range(count)]
    settings = {"type": "classification", "data": table(tmp_path / f"{name}.jsonl", rows), "output": "{label}"}
    settings |= {"fields": {"input": "{text}"}, "labels": {0: ["negative", "bad"], 1: ["positive", "good"]}}
    return InstructionTask.model_validate({"name": name, **settings, **more})


def built(tasks: Sequence[InstructionTask], folder: Path, seed: int = 0, **settings: Any) -> InstructionBuilder:
    builder = InstructionBuilder(tasks, seed, InstructionSettings(**settings), folder)
    builder.read()
    builder.split()
    return builder


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


# ------------------------------------------------------------------------------------------- held-out rows, mixing


def test_copies_of_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    rows = [{"text": f"{sentence(i)} {sentence(i + 300)}", "family": i % 40, "copy": 0} for i in range(80)]
    rows += [{"text": f"{row['text']} indeed", "family": 1000 + i, "copy": 1} for i, row in enumerate(rows[:80])]
    path = table(tmp_path / "t.jsonl", rows)
    settings = {"type": "paraphrase", "data": path, "fields": {"input": "{text}"}, "group": "family"}
    task = InstructionTask.model_validate({"name": "t", **settings, "output": "{family}/{copy}/{text}"})
    builder = built([task], tmp_path / "w", held_out=12, shots={"share": 1, "counts": [2]})
    seen, trained = list(builder.held_out_rows(False)), list(builder.rows())
    assert len(seen) == 12 and len({row["completion"].split("/")[0] for row in seen}) == 12
    used = " ".join(f"{row['prompt']} {row['completion']}" for row in trained)
    for row in seen:
        assert " ".join(row["input"].split()[:8]) not in used
        assert not re.search(rf"\b{row['completion'].split('/')[0]}/[01]/", used)
    dropped = builder.stats()["dropped"]
    assert sum(dropped.values()) == 160 - 12 - len(trained) and len(dropped) >= 2
    assert all(builder.stats()["dropped_examples"][cause] for cause in dropped)


def test_large_groups_leave_something_to_train_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": sentence(i), "label": i % 2, "family": i % 3} for i in range(60)]
    task = sentiment(tmp_path, group="family")
    table(tmp_path / "sentiment.jsonl", rows)
    builder = built([task], tmp_path / "w", held_out=20)
    assert len(builder.held[0]) == 1 and len(list(builder.rows())) == 40
    assert "held_out is 20, and 1 of its 60 examples are held out: half at most, with groups" in caplog.text


def test_a_held_out_row_is_not_trained_on_as_another_task(tmp_path: Path) -> None:
    """A long input is the same row whatever is asked about it; a short one (a country) may be asked about twice."""
    long = [{"text": " ".join(sentence(7 * i + j) for j in range(4)), "label": i % 2} for i in range(40)]
    tasks = [sentiment(tmp_path, name=name) for name in ("a", "b")]
    for task in tasks:
        table(tmp_path / f"{task.name}.jsonl", long)
    builder = built(tasks, tmp_path / "w", held_out=10)
    held = {row["input"] for row in builder.held_out_rows(False)}
    assert not held & {row["input"] for row in builder.rows()}
    short = [sentiment(tmp_path, name="c"), sentiment(tmp_path, name="d")]
    table(tmp_path / "d.jsonl", [{"text": sentence(i), "label": (i + 1) % 2} for i in range(60)])  # other answers
    assert built(short, tmp_path / "v", held_out=10).stats()["dropped"] == {}


def test_held_out_clusters(tmp_path: Path) -> None:
    tasks = [sentiment(tmp_path, name=name, cluster=name) for name in ("a", "b")]
    rows = [{"text": sentence(i + 200), "label": i % 2} for i in range(60)]
    table(tmp_path / "b.jsonl", rows)
    builder = built(tasks, tmp_path / "w", held_out_clusters=["b"], unseen=25, held_out=5, held_out_shots=2)
    assert {row["task"] for row in builder.rows()} == {"a"}
    unseen = list(builder.held_out_rows(True))
    assert [row["shots"] for row in unseen] == [2] * 25 and {row["task"] for row in unseen} == {"b"}
    with pytest.raises(DataError, match=r"held_out_clusters names 'c', and the clusters of the tasks are \['a', 'b'\]"):
        built(tasks, tmp_path / "x", held_out_clusters=["c"])
    with pytest.raises(DataError, match="no task is left to train on"):
        built(tasks, tmp_path / "x", held_out_clusters=["a", "b"])


def test_mixed_counts_by_hand() -> None:
    flan = Mixing("examples-proportional", 100)
    assert flan.rates([10, 100, 5000], [1, 1, 1]) == pytest.approx([10 / 210, 100 / 210, 100 / 210])
    assert mixed_counts(flan.rates([10, 100, 5000], [1, 1, 1]), [10, 100, 5000], None) == [10, 100, 100]
    assert mixed_counts(flan.rates([10, 100, 5000], [1, 1, 1]), [10, 100, 5000], 21) == [1, 10, 10]
    assert mixed_counts(flan.rates([10, 100, 5000], [1, 1, 1]), [10, 100, 5000], 1000) == [10, 100, 890]
    assert mixed_counts(Mixing("equal").rates([10, 30], [1, 1]), [10, 30], None) == [10, 10]
    assert mixed_counts(Mixing("equal").rates([10, 30], [1, 2]), [10, 30], None) == [10, 20]
    assert mixed_counts(Mixing().rates([10, 30], [1, 1]), [10, 30], None) == [10, 30]
    assert mixed_counts(Mixing().rates([10, 30], [3, 1]), [10, 30], None) == [10, 10]
    assert mixed_counts(Mixing().rates([1, 1, 1], [1, 1, 1]), [9, 9, 9], 10) == [4, 3, 3]
    assert mixed_counts(Mixing().rates([0, 5], [1, 1]), [0, 5], 99) == [0, 5]


def test_the_same_seed_gives_the_same_rows_and_more_tasks_or_rows_change_none(tmp_path: Path) -> None:
    a, b = sentiment(tmp_path, name="a", rationale="{why}"), sentiment(tmp_path, name="b", count=30)
    more: dict[str, Any] = {"inverted_share": 0.2, "rows_per_example": 2}
    alone = list(build_instructions([a], 5, **more))
    assert alone == list(build_instructions([a], 5, **more)) != list(build_instructions([a], 6, **more))
    assert len(alone) == 60 and len({(row["place"], row["wording"], row["inverted"]) for row in alone}) == 60
    table(tmp_path / "b.jsonl", [{"text": sentence(i + 300), "label": i % 2} for i in range(30)])
    both = list(build_instructions([b, a], 5, **more))
    assert [row for row in both if row["task"] == "a"] == alone
    tasks = "".join(row["task"] for row in both)
    assert "ab" in tasks and "ba" in tasks  # mixed


def test_caps_and_the_number_of_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = [sentiment(tmp_path, 60, "a", max_rows=8), sentiment(tmp_path, 60, "b", weight=2.0)]
    table(tmp_path / "b.jsonl", [{"text": sentence(i + 300), "label": i % 2} for i in range(60)])
    counts = Counter(r["task"] for r in build_instructions(tasks, held_out=0, max_rows_per_task=20, mixing="equal"))
    assert counts == {"a": 8, "b": 16}
    rows = list(build_instructions(tasks, held_out=0, max_rows_per_task=20, rows=50, mixing="equal"))
    assert Counter(r["task"] for r in rows) == {"a": 8, "b": 20}
    assert "rows is 50, and the tasks give 28" in caplog.text
    caplog.clear()
    tiny = [sentiment(tmp_path, 4, "a"), tasks[1]]
    assert len(list(build_instructions(tiny, held_out=0, mixing="equal"))) == 12  # by weight
    assert "task a has 4 rows, which its share in the mixture limits all others to: 12 of 64 rows" in caplog.text
    sentiment(tmp_path, 60, "a")
    few = {r["place"] for r in build_instructions(tasks, held_out=0, rows=10, mixing="equal")}
    assert few <= {r["place"] for r in build_instructions(tasks, held_out=0, rows=20, mixing="equal")}


def test_no_row_is_written_twice_and_every_example_is_accounted_for(tmp_path: Path) -> None:
    builder = built(
        [sentiment(tmp_path, 40)], tmp_path / "w", held_out=4, wordings=2, rows_per_example=5, shots={"share": 0}
    )
    rows = list(builder.rows())
    assert len(rows) == 72 == len({row["prompt"] for row in rows})
    capped = [sentiment(tmp_path, 40, max_rows=10)]
    table(tmp_path / "sentiment.jsonl", [{"text": sentence(i % 38), "label": i % 2} for i in range(40)])
    builder = built(capped, tmp_path / "w", held_out=4)
    assert len(list(builder.rows())) == 10
    (task,) = builder.stats()["tasks"].values()
    assert task["examples"] == 38 and task["dropped"] == {"the same row again": 2}
    assert task["usable"] == 34 and task["not_drawn"] == 24


def test_one_wording_is_drawn_by_the_seed_and_held_out_rows_have_all(tmp_path: Path) -> None:
    builder = built([sentiment(tmp_path)], tmp_path / "w", wordings=1, held_out=30)
    assert len({row["wording"] for row in builder.rows()}) == 1
    assert len({row["wording"] for row in builder.held_out_rows(False)}) > 5


def test_copies_by_hand() -> None:
    text = "the river runs past the old mill and under two bridges of stone".split()  # 13 words
    for other, expected in (
        (text, True),
        ([*text[6:], *text[:6]], True),  # in another order
        ([*text[:5], "ancient", *text[6:9], "beneath", *text[10:]], True),  # 11 of 13
        ([*text[:8], *"across a wide plain now".split()], False),  # 8 of 13: 0.62
        (["once", "upon", "a", "time", *text, *(f"w{i}" for i in range(60))], True),  # inside of a longer one
        ([*(f"w{i}" for i in range(30)), *text[::-1], *(f"w{i}" for i in range(30))], False),
    ):
        assert is_copy(text, other, 0.7) == is_copy(other, text, 0.7) == expected, other
    assert is_copy(["3", "4"], ["3", "4"], 0.7) and not is_copy("3 4 7".split(), "7 4 3".split(), 0.7)


def test_words_of_a_template_are_found_and_others_are_kept() -> None:
    capitals = [f"what is the capital of {WORDS[i % 17]}{i}".split() for i in range(100)]
    assert template_words(capitals) == frozenset("what is the capital of".split())
    prose = [sentence(i).split() for i in range(100)]
    assert not template_words(prose)
    families = [[*prose[i // 4], f"x{i}"] for i in range(100)]  # each text four times, nearly: copies, no template
    assert not template_words(families)
    assert core_text("What is the capital of Old-France (now)?", template_words(capitals)) == "Old-France (now)?"
    assert core_text("What is  -3 + 4 =", frozenset(("what", "is"))) == "-3 + 4"
    assert core_text("what is", frozenset(("what", "is"))) == "what is"
    assert not template_words([]) and not template_words([["a"]])


def test_draws_are_even_and_different() -> None:
    draws = Draws(1)
    counts = np.bincount([draws.below(5) for _ in range(5000)])
    assert counts.min() > 900
    assert len(set(draws.several(1000, 50))) == len(set(draws.several(50, 50))) == 50
    assert 0.45 < np.mean([draws.uniform() for _ in range(2000)]) < 0.55


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


def test_the_other_way_round_is_a_copy(tmp_path: Path) -> None:
    """Pairs of paraphrases in both directions, in one table; and two tasks that ask for the two columns of one."""
    pairs = [(f"one {sentence(i)}", f"other {sentence(i + 500)}") for i in range(60)]
    path = table(tmp_path / "p.jsonl", [{"a": a, "b": b} for pair in pairs for a, b in (pair, pair[::-1])])
    task = {"name": "p", "type": "paraphrase", "data": path, "fields": {"input": "{a}"}, "output": "{b}"}
    builder = built([InstructionTask.model_validate(task)], tmp_path / "w", held_out=10, shots={"share": 1})
    unseen = {frozenset((r["input"], r["completion"])) for r in builder.held_out_rows(False)}
    rows = list(builder.rows())
    assert len(unseen) == 10 and len(rows) == 100
    assert not any(frozenset((r["input"], r["completion"])) in unseen for r in rows)
    assert all(r["shots"] and r["completion"] not in r["prompt"] for r in rows)

    path = table(tmp_path / "d.jsonl", [{"word": WORDS[i % 17] + str(i), "means": sentence(i)} for i in range(60)])
    shared = {"type": "question_answering", "data": path, "group": "word"}
    tasks = [
        InstructionTask.model_validate({"name": a, **shared, "fields": {"question": f"{{{a}}}?"}, "output": f"{{{b}}}"})
        for a, b in (("word", "means"), ("means", "word"))
    ]
    builder = built(tasks, tmp_path / "d", held_out=10)
    held = {r["place"] for r in builder.held_out_rows(False)}
    assert held and not held & {r["place"] for r in builder.rows()}


def test_copies_in_a_script_without_spaces_are_held_out(tmp_path: Path) -> None:
    texts = ["".join(chr(0x0E01 + (i * 7 + j * (3 + i % 11)) % 46) for j in range(30)) for i in range(60)]
    rows = [{"q": text + end, "a": str(i)} for i, text in enumerate(texts) for end in ("ก", "ข")]
    task = {"name": "t", "type": "question_answering", "output": "{a}", "fields": {"question": "{q}"}}
    task |= {"data": table(tmp_path / "t.jsonl", rows)}
    builder = built([InstructionTask.model_validate(task)], tmp_path / "w", held_out=10)
    held = {r["input"][:-1] for r in builder.held_out_rows(False)}
    assert len(held) == 10 and not any(r["input"][:-1] in held for r in builder.rows())


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
