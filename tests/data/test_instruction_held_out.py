"""Instruction rows that are held out, their copies, and how tasks are mixed."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.core.errors import DataError
from posttrain.data.instruction_builder import build_instructions
from posttrain.data.instruction_mixing import Draws, mixed_counts, mixing_rates
from posttrain.data.instruction_settings import MixingConfig
from posttrain.data.instruction_tasks import InstructionTask
from posttrain.data.text_copies import core_text, is_copy, template_words
from posttrain.data.text_similarity import words_of
from tests.data.instruction_tables import WORDS, built, sentence, sentiment, table


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
    flan = MixingConfig(kind="examples-proportional", maximum=100)
    assert mixing_rates(flan, [10, 100, 5000], [1, 1, 1]) == pytest.approx([10 / 210, 100 / 210, 100 / 210])
    assert mixed_counts(mixing_rates(flan, [10, 100, 5000], [1, 1, 1]), [10, 100, 5000], None) == [10, 100, 100]
    assert mixed_counts(mixing_rates(flan, [10, 100, 5000], [1, 1, 1]), [10, 100, 5000], 21) == [1, 10, 10]
    assert mixed_counts(mixing_rates(flan, [10, 100, 5000], [1, 1, 1]), [10, 100, 5000], 1000) == [10, 100, 890]
    assert mixed_counts(mixing_rates(MixingConfig(kind="equal"), [10, 30], [1, 1]), [10, 30], None) == [10, 10]
    assert mixed_counts(mixing_rates(MixingConfig(kind="equal"), [10, 30], [1, 2]), [10, 30], None) == [10, 20]
    assert mixed_counts(mixing_rates(MixingConfig(), [10, 30], [1, 1]), [10, 30], None) == [10, 30]
    assert mixed_counts(mixing_rates(MixingConfig(), [10, 30], [3, 1]), [10, 30], None) == [10, 10]
    assert mixed_counts(mixing_rates(MixingConfig(), [1, 1, 1], [1, 1, 1]), [9, 9, 9], 10) == [4, 3, 3]
    assert mixed_counts(mixing_rates(MixingConfig(), [0, 5], [1, 1]), [0, 5], 99) == [0, 5]


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


def test_words_in_any_script() -> None:
    """Vowel signs tell words of Hindi and Tamil apart; a few characters of Thai are inside of most long texts."""
    assert words_of("दिन दान") == ["दिन", "दान"] and words_of("வணக்கம் நன்றி") == ["வணக்கம்", "நன்றி"]
    assert words_of("abc漢字 ทด ok") == ["abc", "漢", "字", "ท", "ด", "ok"]
    letters = [chr(0x0E01 + i % 46) for i in range(0, 46 * 7, 7)]
    assert not is_copy(letters[:14], [c for letter in letters for c in (letter, "ก")], 0.7)


def test_one_table_by_two_names_has_the_same_groups(tmp_path: Path) -> None:
    rows = [{"word": WORDS[i % 17] + str(i), "means": sentence(i)} for i in range(60)]
    table(tmp_path / "d.jsonl", rows)
    shared = {"type": "question_answering", "group": "word"}
    names = str(tmp_path / "d.jsonl"), f"{tmp_path}/../{tmp_path.name}/d.jsonl"
    tasks = [
        InstructionTask.model_validate({"name": a, **shared, "data": d, "fields": {"question": f"{{{a}}}?"}, **out})
        for a, out, d in zip(("word", "means"), ({"output": "{means}"}, {"output": "{word}"}), names, strict=True)
    ]
    builder = built(tasks, tmp_path / "w", held_out=10)
    held = {r["place"] for r in builder.held_out_rows(False)}
    assert held and not held & {r["place"] for r in builder.rows()}
    stats = builder.stats()["tasks"]["word"]
    assert stats["dropped"] and stats["held_out_written"]
