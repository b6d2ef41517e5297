"""Self-Instruct: what is asked and how answers are read, what is dropped and why, resumed stages, the same file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.core.errors import DataError
from posttrain.core.files import read_lines
from posttrain.core.types import Rollout
from posttrain.data.text_similarity import RougeIndex, common_subsequence, interval_counts, rouge_l, words_of
from posttrain.methods.data import instruction_prompts as prompts
from posttrain.methods.data import self_instruct
from posttrain.methods.data.instruction_filter import (
    BLOCKED,
    fault_of_instruction,
    faults_of_instances,
    verb_and_object,
)
from posttrain.methods.data.seed_tasks import read_seed_tasks
from posttrain.methods.data.self_instruct import SelfInstructConfig
from posttrain.report import build_report

from .task_writer import answer_to, served_tasks


def slow_subsequence(a: Sequence[Any], b: Sequence[Any]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_by_hand() -> None:
    assert words_of("Don't stop, 3.5 µm_x!") == ["don", "t", "stop", "3", "5", "µm", "x"]
    assert words_of("画蛇 add 足") == ["画", "蛇", "add", "足"]
    # police [killed] the gunman / police [kill] the gunman: 3 of 4 words
    assert rouge_l(words_of("police killed the gunman"), words_of("police kill the gunman")) == 0.75
    assert rouge_l(words_of("police killed the gunman"), words_of("the gunman kill police")) == 0.5
    assert rouge_l(words_of("a b c d e f"), words_of("a c e")) == pytest.approx(2 * 3 / 9)
    assert rouge_l([], ["a"]) == rouge_l(["a"], []) == 0.0
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.randrange(5) for _ in range(rng.randrange(80))] for _ in range(2))
        assert common_subsequence(a, b) == slow_subsequence(a, b)


def test_the_index_finds_what_comparing_with_all_finds() -> None:
    rng = random.Random(1)
    words = [f"w{i}" for i in range(12)]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 15))) for _ in range(300)]
    index, found = RougeIndex(0.7), 0
    for i, text in enumerate(texts):
        scores = [rouge_l(words_of(text), words_of(t)) for t in texts[:i]]
        best = max(scores, default=0.0)
        score, place = index.nearest(text)
        if best >= 0.7:
            found += 1
            assert score == pytest.approx(best) and place == scores.index(best)
        else:
            assert (score, place) == (0.0, None)
        index.add(text)
    assert found > 30 and len(index) == 300
    assert RougeIndex(0.7).nearest("anything") == (0.0, None) == RougeIndex(0.7, ["a"]).nearest("...")
    assert interval_counts([0.0, 0.1, 0.19, 0.95, 7.0], [0, 0.1, 0.9]) == [1, 2, 2]


@pytest.mark.parametrize(
    ("answer", "ended", "tasks", "cut"),
    [
        ("9. Name a river.\n10. Sort\n the words.\n", True, ["Name a river.", "Sort the words."], 0),
        ("9. Name a river.\n10. Sort the", False, ["Name a river."], 1),
        ("Sure! Here they are:\n\n9) Name a river.\n 10) Sort.", True, ["Name a river.", "Sort."], 0),
        ("- Name a river.\n* Sort.", True, ["Name a river.", "Sort."], 0),
        ("9.\n10. Sort 3. things.", True, ["Sort 3. things."], 0),
        ("I can't do that.", True, [], 0),
        ("", True, [], 0),
    ],
)
def test_reading_tasks(answer: str, ended: bool, tasks: list[str], cut: int) -> None:
    assert prompts.read_instructions(answer, ended) == (tasks, cut)


def test_reading_kinds_and_examples() -> None:
    assert [prompts.read_kind(t) for t in ("Answer: Yes", " no.", "Yes, it is", "Maybe", "", "nothing")] == [
        True, False, True, None, None, None,
    ]  # fmt: skip
    text = "Example 1\nInput: none\nOutput: Four.\nExample 2\nInput: a\nb\nOutput: c\nd\n"
    assert prompts.read_instances(text, False, True) == (
        [{"input": "", "output": "Four."}, {"input": "a\nb", "output": "c\nd"}],
        0,
    )
    assert prompts.read_instances(text, False, False) == ([{"input": "", "output": "Four."}], 1)
    text = "Example 1\nLabel: spam\nInput: Buy now!\nExample 2\nLabel: fine\nInput:"
    assert prompts.read_instances(text, True, True)[0] == [
        {"input": "Buy now!", "output": "spam"},
        {"input": "", "output": "fine"},
    ]
    assert prompts.read_instances("Example 1\nLabel: spam", True, True) == ([], 1)
    assert prompts.read_instances("It depends.", False, True) == ([], 0)


def test_why_tasks_and_examples_are_dropped() -> None:
    def why(text: str) -> str:
        return fault_of_instruction(text, BLOCKED, 3, 8)

    assert [why(t) for t in ("Name a river.", "¿Qué río es el más largo?", '"Carpe diem": explain it.')] == [""] * 3
    assert why("Name it.") == "fewer than 3 words" and why("word " * 9) == "more than 8 words"
    assert why("Draw a red circle.") == "the blocked word 'draw'" and why("- Name a river") == "begins with punctuation"
    assert why("Write a program that sorts.") == "asks for a program"
    assert why("Here is the new task: sing.") == "speaks of its rewriting"
    pairs = [("a", "1"), ("a", "2"), ("b", "b"), ("c", ""), ("d", "x"), ("d", "x"), ("s", "t"), ("e", "long" * 9)]
    found = faults_of_instances([{"input": a, "output": b} for a, b in pairs], [("s", "t")], 20)
    assert found == [
        "several outputs for one input", "several outputs for one input", "the output repeats the input", "no output",
        "", "the same example twice", "copied from a seed task", "an output of more than 20 characters",
    ]  # fmt: skip
    assert verb_and_object("Write a short poem about the sea.") == ("write", "poem") and verb_and_object("Sing") is None


def test_seed_tasks(tmp_path: Path) -> None:
    seeds = read_seed_tasks("packaged:self_instruct_seeds.jsonl")
    assert len(seeds) == 60 and sum(t.classification for t in seeds) == 18 and len({t.language for t in seeds}) == 9
    index = RougeIndex(0.7)
    for t in seeds:
        assert index.nearest(t.instruction)[1] is None, t.instruction  # they differ as new tasks have to
        index.add(t.instruction)
        assert t.language != "en" or not fault_of_instruction(t.instruction, BLOCKED, 3, 150)
    file = tmp_path / "seeds.jsonl"
    good = {"instruction": "Sort.", "classification": False, "instances": [{"input": "b a", "output": "a b"}]}
    for change, message in (
        ({"instruction": " "}, "the instruction is empty"),
        ({"classification": "no"}, "neither true nor false"),
        ({"instances": []}, "no instances"),
        ({"instances": [{"input": "x", "output": ""}]}, "output is empty"),
    ):
        file.write_text(json.dumps(good) + "\n" + json.dumps({**good, "instruction": "Other.", **change}) + "\n")
        with pytest.raises(DataError, match=rf"line 2: .*{message}"):
            read_seed_tasks(str(file))
    file.write_text(json.dumps(good))
    with pytest.raises(DataError, match="no classification"):
        read_seed_tasks(str(file))


class Scripted:
    """A writer of tasks that are numbered in the order of the requests, each with two examples."""

    answered = 0
    fail_after = 10**9

    def __init__(self, config: SelfInstructConfig, model: Any) -> None:
        pass

    def __call__(self, asks: Sequence[prompts.Ask], seeds: Sequence[int], sampling: Any) -> list[Rollout]:
        out = []
        for ask, seed in zip(asks, seeds, strict=True):
            Scripted.answered += 1
            if Scripted.answered > Scripted.fail_after:
                raise KeyboardInterrupt
            out.append(Rollout((), (), *answer_to(ask.text, seed)))
        return out


def stage(**changes: Any) -> dict[str, Any]:
    return {"method": "self_instruct", "name": "tasks", "instructions": 12, "requests_per_round": 2, **changes}


def recipe(**changes: Any) -> posttrain.Recipe:
    return posttrain.Recipe.model_validate(
        {"name": "made", "model": {"source": "tiny:llama", "device": "cpu"}, "stages": [stage(**changes)]}
    )


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(self_instruct, "LazyWriter", Scripted)
    monkeypatch.setattr(Scripted, "answered", 0)
    monkeypatch.setattr(Scripted, "fail_after", 10**9)
    return Scripted


def test_a_stage_counts_all_that_was_written(tmp_path: Path, scripted: type[Scripted]) -> None:
    run = posttrain.run(recipe(), tmp_path / "run").folder
    data = run / "stages" / "0-tasks" / "data"
    rows, stats = read_lines(data / "rows.jsonl"), json.loads((data / "stats.json").read_text())
    tasks = stats["tasks"]
    assert tasks["kept"] == 12 and tasks["written"] == 12 + sum(tasks["dropped"].values())
    assert tasks["dropped"]["the blocked word 'picture'"] == tasks["dropped"]["cut at the longest length"] >= 6
    assert tasks["dropped"]["too similar to a task that is kept"] >= 6  # a seed task, word for word
    assert tasks["examples"]["the blocked word 'picture'"][0] == "Draw a picture of a house on a hill."
    written = [r for r in rows if r["origin"] == "written"]
    assert len(rows) - len(written) == sum(
        len(t.instances) for t in read_seed_tasks("packaged:self_instruct_seeds.jsonl")
    )
    # Of a classification two rows; of another task one, the second example being cut off.
    kinds = [r["classification"] for r in written]
    assert len(written) == stats["rows"]["kept"] and kinds.count(True) == 2 * stats["rows"]["tasks"]["classification"]
    assert (
        kinds.count(False) == stats["rows"]["tasks"]["other"] == stats["rows"]["dropped"]["cut at the longest length"]
    )
    assert all(r["prompt"].startswith(r["instruction"]) and r["completion"] for r in rows)
    assert sum(tasks["similarity"]["counts"]) == sum(tasks["instruction_words"]["counts"]) == 12
    page = build_report(run).read_text()
    assert 'id="tasks"' in page and "Draw a picture of a house" in page and "describe item" in page


def test_interrupted_anywhere_it_ends_in_the_same_file(tmp_path: Path, scripted: type[Scripted]) -> None:
    made = recipe(deepen=1, votes=3, prompts_at_once=5)
    whole = posttrain.run(made, tmp_path / "whole").folder / "stages" / "0-tasks" / "data" / "rows.jsonl"
    total = scripted.answered
    rows = read_lines(whole)
    assert {r["origin"] for r in rows} == {"seed", "written", "deepened"} and {r.get("votes") for r in rows} >= {2, 3}
    for stop in (3, 9, 30, total - 20):
        scripted.answered, scripted.fail_after = 0, stop
        with pytest.raises(KeyboardInterrupt):
            posttrain.run(made, tmp_path / f"stopped-{stop}")
        scripted.answered, scripted.fail_after = 0, 10**9
        again = posttrain.run(made, tmp_path / f"stopped-{stop}").folder / "stages" / "0-tasks" / "data" / "rows.jsonl"
        assert again.read_bytes() == whole.read_bytes() and scripted.answered <= total - stop + 15


def test_rewards_filter_rows(tmp_path: Path, scripted: type[Scripted]) -> None:
    rewards = [{"kind": "length", "unit": "characters", "target": 3, "width": 1}]
    run = posttrain.run(recipe(rewards=rewards, threshold=-0.5, include_seeds=False), tmp_path / "run").folder
    rows = read_lines(run / "stages" / "0-tasks" / "data" / "rows.jsonl")
    assert {r["completion"] for r in rows} == {"yes"} and all(r["reward"] == 0 for r in rows)
    stats = json.loads((run / "stages" / "0-tasks" / "data" / "stats.json").read_text())
    assert stats["rows"]["dropped"]["a reward below the threshold"] > 0


def test_a_model_that_writes_nothing_of_use_is_said_and_settings_are_checked(tmp_path: Path) -> None:
    small = {"sampler": {"max_tokens": 8}, "answers": {"max_tokens": 8}, "rounds": 2}
    with pytest.raises(DataError, match="made no row: .* tasks were written and 0 kept"):
        posttrain.run(recipe(**small, include_seeds=False), tmp_path / "run")
    assert read_lines(tmp_path / "run" / "stages" / "0-tasks" / "tasks" / "round-000001.jsonl")
    for change, message in (
        ({"votes": 2}, "can't outvote"),
        ({"votes": 3, "answers": {"temperature": 0}}, "all votes would be the same"),
        ({"min_words": 9, "max_words": 8}, "min_words"),
        ({"chat": False, "server": {"model": "m"}}, "asked by chat"),
    ):
        with pytest.raises(ValueError, match=message):
            SelfInstructConfig.model_validate(stage(**change))


def test_a_server_writes(tmp_path: Path) -> None:
    with served_tasks() as url:
        server = {"model": "teacher", "base_url": url}
        sampler = {"max_tokens": 99, "temperature": 0.9}
        run = posttrain.run(recipe(server=server, sampler=sampler, answers=sampler), tmp_path / "run").folder
    rows = read_lines(run / "stages" / "0-tasks" / "data" / "rows.jsonl")
    assert {r["completion"] for r in rows if r["origin"] == "written"} >= {"yes", "no"}
