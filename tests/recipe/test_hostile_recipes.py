"""Recipes made to hang or crash their reader: each is one message, in two seconds of processor time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from rich.console import Console

import posttrain
from posttrain.core.errors import PosttrainError, RecipeError
from posttrain.recipe.documents import MAX_VALUES, parse_value
from posttrain.recipe.parsing import load_recipe

HEAD = 'name: small\nmodel: {source: "tiny:llama"}\n'
STAGES = "stages: [{data: {source: rows.jsonl}}]\n"


def bomb(kind: str) -> str:
    """Nine levels of ten aliases each: a billion values in half a kilobyte."""
    lines = ["a0: &a0 [" + ", ".join(["lol"] * 10) + "]"]
    for i in range(1, 10):
        one = f"*a{i - 1}"
        parts = {"list": f"[{', '.join([one] * 10)}]", "map": "{" + ", ".join(f"k{j}: {one}" for j in range(10)) + "}"}
        lines.append(f"a{i}: &a{i} {parts[kind]}")
    return "\n".join(lines) + "\n"


MERGES = (
    "a0: &a0 {"
    + ", ".join(f"k{i}: 1" for i in range(60))
    + "}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 8)}]}}\n" for i in range(1, 9))
)

HOSTILE = {
    "aliases of lists": HEAD + bomb("list"),
    "aliases of mappings": HEAD + bomb("map"),
    "merged aliases": HEAD + MERGES,
    "aliases inside options": HEAD + bomb("list").replace("a0:", "description:", 1) + STAGES,
    "an alias of itself": HEAD + "a: &a [*a]\n",
    "a key that holds itself": HEAD + "? &a [*a]\n: 1\n",
    "flow lists": HEAD + "a: " + "[" * 30_000,
    "flow mappings": HEAD + "a: " + "{b: " * 5_000,
    "closed flow lists": HEAD + "a: " + "[" * 500 + "]" * 500,
    "block mappings": HEAD + "".join(" " * i + "a:\n" for i in range(600)),
    "block lists": "- " * 20_000 + "x",
    "keys of keys": "? " * 20_000 + "x",
    "many values": HEAD + f"a: [{'1,' * 100_000}]",
    "many keys": HEAD + "\n".join(f"k{i}: {i}" for i in range(MAX_VALUES)),
    "many unknown keys": HEAD + STAGES + "\n".join(f"k{i}: {i}" for i in range(4_000)),
    "many bad stages": HEAD + "stages:\n" + "  - {epochs: x}\n" * 1_500,
    "many unknown methods": HEAD + "stages:\n" + "  - {method: dqo}\n" * 1_500,
    "many names twice": HEAD + STAGES + "seed: 1\n" * 2_000,
    "many half characters": HEAD + "a: [" + '"\\ud800", ' * 4_000 + "]\n",
    "a long text": HEAD + f"description: {'x' * 3_000_000}\n",
    "a long integer": HEAD + f"seed: {'9' * 5_000}\n" + STAGES,
    "a longer integer": HEAD + f"seed: {'9' * 200_000}\n" + STAGES,
    "a long hexadecimal integer": HEAD + f"seed: 0x{'f' * 200_000}\n" + STAGES,
    "an integer of 64 bits": HEAD + f"seed: {2**63}\n" + STAGES,
    "a number too large": HEAD + "stages: [{data: {source: a.jsonl}, epochs: 1e999}]\n",
    "infinity": HEAD + "stages: [{data: {source: a.jsonl}, epochs: .inf}]\n",
    "half of a character": HEAD + 'description: "\\ud800"\n' + STAGES,
    "half of a character in a list": HEAD + 'stages: [{data: {source: ["a\\udfff.jsonl"]}}]\n',
    "no integer": HEAD + "seed: !!int abc\n" + STAGES,
    "no boolean": HEAD + "seed: !!bool 7\n" + STAGES,
    "no number": HEAD + "seed: !!float ''\n" + STAGES,
    "no date": HEAD + "seed: !!timestamp 2020-99-99\n" + STAGES,
    "no text of a date": HEAD + "seed: !!timestamp x\n" + STAGES,
    "bytes": HEAD + "description: !!binary aGVsbG8=\n" + STAGES,
    "a date": HEAD + "description: !!timestamp 2020-01-01\n" + STAGES,
    "control characters": HEAD + "description: \x1b]0;title\x07\n" + STAGES,
    "a tag of Python": HEAD + 'description: !!python/object/apply:os.system ["id"]\n' + STAGES,
    "a list as a key": HEAD + "? [a, b]\n: 1\n",
    "an anchor that is not there": HEAD + "a: *b\n",
    "nothing but a tag": "!" + "x" * 100_000,
    "two documents": HEAD + STAGES + "---\n" + HEAD,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_one_message_in_two_seconds(tmp_path: Path, name: str) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(HOSTILE[name])
    began = time.process_time()
    with pytest.raises(RecipeError, match=r"small\.yaml") as caught:
        load_recipe(path)
    assert time.process_time() - began < 2
    assert len(str(caught.value)) < 6_000


@pytest.mark.parametrize("text", ["[" * 30_000, "9" * 5_000, "{a: &a [1], b: *a}", "!!int x", '"\\ud800"'])
def test_an_override_is_no_way_around_the_limits(text: str) -> None:
    began = time.process_time()
    with pytest.raises(RecipeError):
        load_recipe("sft", [f"stages.sft.optimizer.lr={text}"])
    with pytest.raises(RecipeError):
        load_recipe("sft", [f"seed={text}"])
    assert time.process_time() - began < 2


def test_a_name_of_an_override_has_few_parts() -> None:
    """Also among the keys of a recipe that extends another."""
    with pytest.raises(RecipeError, match="the name of a setting has at most 40 parts"):
        load_recipe("sft", ["a." * 5_000 + "b=1"])


def test_surrogates_that_belong_together_are_the_character_that_they_are() -> None:
    assert parse_value('"\\ud83d\\ude00"') == "\N{GRINNING FACE}"
    assert parse_value("[0o17, 0x1f, 1e3, 'a']") == [15, 31, 1000.0, "a"]


def test_recipes_that_extend_each_other_without_end_are_refused(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"r{i}.yaml").write_text(f"extends: r{i + 1}.yaml\n")
    with pytest.raises(RecipeError, match="more than 20 recipes"):
        load_recipe(tmp_path / "r0.yaml")


TOO_LONG = "a" * 300


@pytest.mark.parametrize(
    "setting",
    [
        f"stages.sft.data.source={TOO_LONG}",
        f"stages.sft.data.source={TOO_LONG}.jsonl",
        f"stages.sft.data.source=packaged:{TOO_LONG}",
        "stages.sft.data.source=~nobody7/rows.jsonl",
        f"model.source={TOO_LONG}",
        f"model.source=x/{TOO_LONG}",
        f"model.source={TOO_LONG}.gguf",
        "model.source=~nobody7/model",
        f"output={TOO_LONG}",
    ],
)
def test_a_name_that_no_file_can_have_is_a_message(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "data.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    with pytest.raises(PosttrainError):
        posttrain.run(load_recipe("sft", ["model.source=tiny:llama", setting]), console=Console(quiet=True))


def test_a_recipe_whose_name_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"extends: {TOO_LONG}\nname: r\n")
    for name in (TOO_LONG, f"{TOO_LONG}.yaml", str(tmp_path / "r.yaml"), "~nobody7/r.yaml"):
        with pytest.raises(RecipeError, match="no such file"):
            load_recipe(name)
