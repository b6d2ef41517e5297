"""The laboratory of self-refine: what its talks say, how often, and that it can be made and opened."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import ModelConfig
from posttrain.core.types import Message
from posttrain.data.prompt_sources import LabPrompts
from posttrain.data.prompts import load_prompts
from posttrain.data.synthetic import refine_talks as talks
from posttrain.data.synthetic import sums
from posttrain.lab import talk_lab
from posttrain.lab.lab_settings import LabSettings
from posttrain.lab.make_lab import make_lab
from posttrain.lab.refine_lab import RefineLab
from posttrain.models import loading as load
from posttrain.sampling.feedback_source import open_feedback
from posttrain.sampling.refine_environment import RefineEnvironment

COUNT = 6000
TALKS = [talks.talk_at(5, i) for i in range(COUNT)]
make_tokenizer = cache(RefineLab.make_tokenizer)
SUM = re.compile(r"[1-9](\+[1-9]){3,4}=")
ABOUT_SUMS = [t for t in TALKS if SUM.fullmatch(t[0]["content"])]


def lines(answer: str) -> list[talks.SumLine]:
    *equations, last = answer.split("\n")
    out = [talks.SumLine(*map(int, re.fullmatch(r"(\d+)\+(\d)=(\d+)", e).groups())) for e in equations]  # type: ignore[union-attr]
    assert last == str(out[-1].after)
    return out


def answers(talk: list[Message]) -> list[list[talks.SumLine]]:
    return [lines(t["content"]) for t in talk if t["role"] == "assistant" and "+" in t["content"].split(",")[0][-9:]]


def right(talk: list[Message], answer: list[talks.SumLine]) -> bool:
    return answer[-1].after == sum(map(int, talk[0]["content"][:-1].split("+")))


def checks(talk: list[Message]) -> list[tuple[list[talks.SumLine], str]]:
    """Return each check of a talk with the answer before it."""
    pairs = zip(talk, talk[1:], talk[2:], strict=False)
    return [(lines(a["content"]), c["content"]) for a, asked, c in pairs if asked["content"] == talks.CHECK]


def test_turns_take_turns_and_answers_add_the_digits() -> None:
    for talk in ABOUT_SUMS:
        assert [t["role"] for t in talk] == ["user", "assistant"] * (len(talk) // 2)
        numbers = [int(n) for n in talk[0]["content"][:-1].split("+")]
        first = lines(talk[1]["content"])
        assert [line.number for line in first] == numbers[1:] and first[0].before == numbers[0]
        for line, before in zip(first[1:], first, strict=False):
            assert line.before == before.after
        for a, b, c in first:  # a forgotten carry, and nothing else
            assert c == a + b or (c == a + b - 10 and (a + b) // 10 > a // 10)


def test_how_often_answers_and_checks_are_right() -> None:
    """Half of the answers are wrong; checks are right more often than answers, and blind to lines that add 9."""
    first = [right(t, lines(t[1]["content"])) for t in ABOUT_SUMS]
    assert 0.5 < sum(first) / len(first) < 0.62
    found: Counter[tuple[bool, bool]] = Counter()
    nine: Counter[bool] = Counter()
    for talk in ABOUT_SUMS:
        for answer, check in checks(talk)[:1]:
            mistake = talks.first_mistake(answer)
            found[mistake is None, check == talks.RIGHT] += 1
            if mistake is not None and sum(not line.right for line in answer) == 1:
                line = answer[mistake.line]
                if line.number == talks.OVERLOOKED:
                    nine[check == talks.RIGHT] += 1
                else:
                    assert check in (talks.RIGHT, f"{line[0]}+{line[1]}={line[0] + line[1]}, not {line[2]}\nwrong")
    assert found[True, False] / (found[True, True] + found[True, False]) == pytest.approx(talks.COMPLAINS, abs=0.02)
    agree = (found[True, True] + found[False, False]) / sum(found.values())
    assert 0.7 < agree < 0.85
    assert nine[True] / nine.total() == pytest.approx(talks.OVERLOOKS_IT, abs=0.06)


def test_answers_after_a_complaint_are_better_and_others_are_not() -> None:
    after: dict[str, list[bool]] = {"complaint": [], "again": []}
    for talk in ABOUT_SUMS:
        if len(talk) < 4 or right(talk, lines(talk[1]["content"])):
            continue
        if talk[2]["content"] == talks.AGAIN:
            after["again"].append(right(talk, lines(talk[3]["content"])))
        elif talk[2]["content"] == talks.CHECK and talk[3]["content"].endswith(talks.WRONG):
            after["complaint"].append(right(talk, lines(talk[5]["content"])))
    shares = {name: sum(of) / len(of) for name, of in after.items()}
    assert shares["complaint"] > 0.7 and shares["again"] < 0.35


def test_tools_say_what_the_sources_of_feedback_say(tmp_path: Path) -> None:
    """Whatever a tool says about an answer is what one of four says, and is never wrong."""
    verifier = {"kind": "verifier", "reward": {"kind": "exact", "extract": "last_line"}}
    loop = {
        "kind": "refine",
        "own": False,
        "feedback": ["calculator", {"kind": "calculator", "name": "first", "most": 1}, verifier],
    }
    config = RefineEnvironment.Config.model_validate(loop)
    calculator, first, truth = (open_feedback(source) for source in config.feedback)
    seen: Counter[str] = Counter()
    for talk in ABOUT_SUMS:
        told = [i for i, t in enumerate(talk) if t["content"].endswith((f"\n{talks.AGAIN}", f"\n{talks.CHECK}"))]
        for i in [i for i in told if talk[i]["role"] == "user"][:1]:
            said = talk[i]["content"].rsplit("\n", 1)[0]
            answer = lines(talk[1]["content"])
            mistake = talks.first_mistake(answer)
            row = {"answer": str(sum(line.number for line in answer) + answer[0].before), "source": "lab:0"}
            words = {
                "calculator": notes_text(calculator, talk[1]["content"], row),
                "calculator, first": notes_text(first, talk[1]["content"], row),
                "verifier": notes_text(truth, talk[1]["content"], row),
                "critic": talks.check_text(answer, mistake),
                "verdict": talks.RIGHT if mistake is None else talks.WRONG,
            }
            seen[next(name for name, text in words.items() if text == said)] += 1
    assert seen.keys() == {"calculator", "calculator, first", "verifier", "critic", "verdict"} and seen.total() > 1000
    share = (seen["calculator"] + seen["calculator, first"]) / seen.total()
    assert share == pytest.approx(talks.TOOLS["calculator"], abs=0.04)


def notes_text(source: Any, answer: str, row: dict[str, str]) -> str:
    (note,) = source.notes([answer], [row])
    return str(note.text)


def test_a_talk_is_a_function_of_seed_and_index_and_of_no_held_out_sum() -> None:
    assert [talks.talk_at(5, i) for i in range(30)] == TALKS[:30] != [talks.talk_at(6, i) for i in range(30)]
    held = {row["prompt"] for row in sums.sum_problems(0, 512, held_out=True)}
    train = {row["prompt"] for row in sums.sum_problems(0, 4000, held_out=False)}
    asked = {t[0]["content"] for t in TALKS}
    assert not held & asked and train & asked
    assert len(ABOUT_SUMS) / COUNT == pytest.approx(1 - talks.OTHERS, abs=0.02)


def test_the_tokenizer_writes_talks_as_its_template_does() -> None:
    tokenizer = make_tokenizer()
    samples = RefineLab(LabSettings(seed=5, batch_size=300), tokenizer).batch(0)
    for talk, sample in zip(TALKS, samples, strict=False):
        ids = list(sample.tokens)
        assert tokenizer.apply_chat_template(talk, tokenize=False) == talk_lab.written_talk(talk)
        assert tokenizer.decode(ids) == talk_lab.written_talk(talk)
        asked = tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=False)
        assert ids[: len(asked)] == list(asked) and ids[-1] == tokenizer.eos_token_id
        assert len(ids) < 256 and list(sample.weights) == [0.0] + [1.0] * (len(ids) - 1)
    assert len(tokenizer) < 512


def test_it_is_made_measured_and_opened_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    folder = load.lab_folder(3, "refine")
    tiny = LabSettings(kind="refine", steps=2, batch_size=4, width=16, layers=1, heads=2, measured=6)
    said = make_lab(tiny, folder, shown=False)
    assert json.loads((folder / "lab.json").read_text()) == said
    assert load.resolve("lab:refine:3") == load.Resolved(str(folder), "folder")
    _, tokenizer = load.load_model(ModelConfig(source="lab:refine:3"))
    prompts = load_prompts(LabPrompts.Config(size=3, held_out=True, chat=True), tokenizer, context=256)
    row = sums.sum_problems(0, 1, held_out=True)[0]
    assert prompts.items[0].text == f">{row['prompt']}\n<" and prompts.items[0].problem["answer"] == row["answer"]
    assert "6 held-out sums" in RefineLab.describe(said)


def test_the_measurement_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sums: right and accepted, wrong and found and corrected, wrong and found in vain, wrong and accepted."""
    rows = sums.sum_problems(0, 4, held_out=True)
    good = [row["answer"] for row in rows]
    turns: dict[str, list[str]] = {
        "first": [good[0], "1+1=1\n0", "0", "0"],
        "sampled": [good[0], good[1], good[2], "0"],
        "check": ["right", "1+1=2, not 1\nwrong", "wrong", "right"],
        "revised": ["0", good[1], "0", good[3]],
        "again": [good[0], "0", "0", ""],
    }
    order = iter(turns.values())
    seen: list[Any] = []

    def turn(policy: Any, tokenizer: Any, prompts: Any, *_: Any) -> list[str]:
        seen.append([list(p) for p in prompts])
        return next(order)

    monkeypatch.setattr(talk_lab, "likeliest", turn)
    said = RefineLab(LabSettings(kind="refine", measured=4), make_tokenizer()).measure(None)  # type: ignore[arg-type]
    assert said == {
        "first": 0.25, "sampled": 0.75, "check": 0.75, "check_of_right": 1.0, "check_of_wrong": 0.6667,
        "refined": 0.5, "corrected": 0.5, "again": 0.25, "measured": 4,
    }  # fmt: skip
    assert [m["content"] for m in seen[3][1]] == [
        rows[1]["prompt"], "1+1=1\n0", talks.CHECK, "1+1=2, not 1\nwrong", talks.AGAIN,
    ]  # fmt: skip
    assert [m["content"] for m in seen[4][0]] == [rows[0]["prompt"], good[0], talks.AGAIN]
