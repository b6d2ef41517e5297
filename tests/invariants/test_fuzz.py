"""Mutated recipes and rows: each is taken or refused with a message, without a traceback and without a hang."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from posttrain.core.errors import PosttrainError
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.recipe.machine_checks import check_machine
from posttrain.recipe.parsing import load_recipe, shipped
from posttrain.runs.registry import prepare_stage
from posttrain.trainer.stage import StageContext

SECONDS = 10.0
"""Processor time that one input may take: a hang takes more, a slow machine does not change it."""
VALUES = [
    *("", "0", "-1", "1e400", ".nan", "null", "true", "[]", "{}", "[[]]", "{a: 1}", "'x'", '"\\ud800"', "9" * 30, "~"),
    *(
        "*a",
        "stage:sft",
        "stage:",
        "tiny:t5",
        "lab:x",
        "reasoning-gym:none",
        "packaged:none",
        "../..",
        "a" * 300,
        "a:b",
    ),
    *("os:system", "{kind: x}", "[1, a, null]", "!!set {a, b}", "\x00", "\x1b[2J", "[/x]", "%", "{", "sft", "dpo"),
    *("{method: sft}", "&a 1"),
]
TURNS: list[Any] = [
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    [{"role": "assistant", "content": None, "tool_calls": [{}]}],
    [{"role": 5, "content": ["x"]}],
    [{"role": "user"}],
    [{"content": "x"}],
]
CELLS: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        1e400,
        float("nan"),
        "",
        " ",
        "text",
        "\x00",
        "\x1b[2J",
        "\ud800",
        "a" * 5000,
        "\n\n",
        "9" * 400,
    ),
    *([], {}, [[]], [None], {"": 1}, [1, "2"], {"a": {"b": [1]}}, "[{'role': 'user'}]", "<|im_end|>"),
    *TURNS,
]
COLUMNS = (
    "prompt completion messages conversations text chosen rejected label rating question answer instruction input "
    "output system history tools weight margin probability message_id parent_id role rank score ratings "
    "chat_template_kwargs"
).split()
STAGES = {
    "sft": "stages.sft.data.source",
    "dpo": "stages.dpo.data.source",
    "kto": "stages.kto.data",
    "lab": "stages.rl.problems",
    "reward_model": "stages.reward_model.data.source",
    "feedback": "stages.feedback.answers.data.source",
}


def mutated(text: str, rng: random.Random) -> str:
    """Change a recipe at a few places: values, keys, lines, indents, single characters."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(lines))
        kind, line = rng.randrange(7), lines[i]
        if kind < 3 and ":" in line:
            lines[i] = f"{line.partition(':')[0]}: {rng.choice(VALUES)}"
        elif kind == 3:
            lines.insert(i, rng.choice(lines))
        elif kind == 4:
            lines[i] = " " * rng.randint(0, 6) + line.lstrip()
        elif kind == 5 and line:
            at = rng.randrange(len(line))
            lines[i] = line[:at] + chr(rng.choice([0, 9, 27, 58, 91, 123, 38, 42, 0x202E, 0x1F600])) + line[at + 1 :]
        elif len(lines) > 1:
            del lines[i]
    return "\n".join(lines) + "\n"


def fuzz_recipes(folder: Path, count: int, seed: int) -> Counter[str]:
    rng, texts, outcomes = random.Random(seed), [f.read_text() for f in shipped().values()], Counter[str]()
    path = folder / "fuzzed.yaml"
    for number in range(count):
        text = mutated(rng.choice(texts), rng)
        path.write_text(text, encoding="utf-8")
        began = time.process_time()
        try:
            check_machine(load_recipe(path))
            outcomes["taken"] += 1
        except PosttrainError as error:
            outcomes["refused"] += 1
            assert str(error).strip()
        except Exception as error:
            raise AssertionError(f"seed {seed}, recipe {number}: {type(error).__name__}: {error}\n{text}") from error
        assert time.process_time() - began < SECONDS, f"seed {seed}, recipe {number}\n{text}"
    return outcomes


def table(rng: random.Random) -> tuple[str, bytes]:
    """Make a small file of rows: (ending, content)."""
    columns = rng.sample(COLUMNS, rng.randint(1, 5))
    rows = [{c: rng.choice(CELLS) for c in columns if rng.random() < 0.9} for _ in range(rng.randint(0, 6))]
    ending = rng.choice(["jsonl", "jsonl", "json", "csv", "tsv"])
    if ending == "jsonl":
        content = "\n".join(json.dumps(r) for r in rows)
    elif ending == "json":
        content = json.dumps(
            rng.choice([rows, {"data": rows}, {c: [r.get(c) for r in rows] for c in columns}, rows[:1]])
        )
    else:
        mark = "," if ending == "csv" else "\t"
        content = "\n".join(mark.join(map(str, r)) for r in [columns, *(list(r.values()) for r in rows)])
    data = bytearray(content.encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        if data:
            data[rng.randrange(len(data))] = rng.choice(b'\x00\xff[]{}",:\n\r\t\\')
    return ending, bytes(data)


def fuzz_rows(folder: Path, count: int, seed: int) -> Counter[str]:
    import posttrain.judge.labels  # noqa: F401  (imports torch, which is not timed)

    rng, outcomes, tokenizer = random.Random(seed), Counter[str](), tiny_tokenizer()
    for number in range(count):
        ending, content = table(rng)
        path = folder / f"rows.{ending}"
        path.write_bytes(content)
        name = rng.choice(list(STAGES))
        setting, source = STAGES[name], json.dumps(str(path))
        value = {"kto": f"{{source: {source}}}", "lab": f"{{kind: rows, data: {{source: {source}, on_bad_row: skip}}}}"}
        more = {
            "kto": ["stages.kto.held_out="],
            "lab": ["stages.rl.held_out="],
            "feedback": ["stages.feedback.judge.model.source=tiny:llama"],
        }
        began = time.process_time()
        try:
            overrides = ["model.source=tiny:llama", f"{setting}={value.get(name, source)}", *more.get(name, [])]
            recipe = load_recipe(name, [*overrides, "evaluate=[]"])
            prepare_stage(recipe.stages[0], StageContext(tokenizer, 2048))
            outcomes["taken"] += 1
        except PosttrainError as error:
            outcomes["refused"] += 1
            assert str(error).strip()
        except Exception as error:
            told = f"seed {seed}, rows {number}, {name}.{ending}: {type(error).__name__}: {error}\n{content[:2000]!r}"
            raise AssertionError(told) from error
        assert time.process_time() - began < SECONDS, f"seed {seed}, rows {number}, {name}\n{content[:2000]!r}"
    return outcomes


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))


def test_recipes(tmp_path: Path) -> None:
    outcomes = fuzz_recipes(tmp_path, 200, 18)
    assert outcomes["taken"] and outcomes["refused"] > 100


def test_rows(tmp_path: Path) -> None:
    outcomes = fuzz_rows(tmp_path, 200, 18)
    assert outcomes["taken"] and outcomes["refused"] > 50


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_thousand_recipes(tmp_path: Path) -> None:
    fuzz_recipes(tmp_path, 2000, random.SystemRandom().randrange(2**31))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_thousand_files_of_rows(tmp_path: Path) -> None:
    fuzz_rows(tmp_path, 2000, random.SystemRandom().randrange(2**31))
