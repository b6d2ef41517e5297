"""Worked examples before questions, of a file and of lm-eval's wheel."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.config.problems import PROMPTS, DemonstrationsConfig
from posttrain.core.errors import DataError, MissingExtraError
from posttrain.data.demonstrations import load_demonstrations
from posttrain.data.prompts import load_prompts
from posttrain.models.tiny_model import tiny_tokenizer

ROWS = [{"prompt": "2+3?", "answer": "5"}, {"prompt": "1+1?", "answer": "2"}]


def prompts(tmp_path: Path, **settings: Any) -> list[Any]:
    for name, rows in (("rows", ROWS), ("shown", [{"prompt": f"{i}+{i}?", "completion": f"{2 * i}"} for i in (1, 4)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shown = {"source": str(tmp_path / "shown.jsonl"), **settings.pop("demonstrations", {})}
    data = {"source": str(tmp_path / "rows.jsonl"), "chat": settings.pop("chat", True)}
    config = PROMPTS.validate({"kind": "rows", "data": data, "demonstrations": shown, **settings})
    return load_prompts(config, tiny_tokenizer(), context=None).items


def test_text_turns_and_plain_text_by_hand(tmp_path: Path) -> None:
    """The second row's question is among the demonstrations: that one is left out. Rewards see the question alone."""
    one, two = prompts(tmp_path)
    text = "Q: 1+1?\nA: 2\n\nQ: 4+4?\nA: 8\n\nQ: 2+3?\nA:"
    assert one.problem["messages"] == [{"role": "user", "content": text}] and text in one.text
    assert one.problem["prompt"] == "2+3?" and one.problem["answer"] == "5"
    assert two.problem["messages"][0]["content"] == "Q: 4+4?\nA: 8\n\nQ: 1+1?\nA:"
    plain = prompts(tmp_path, chat=False, demonstrations={"count": 1, "layout": "{question} = {answer}."})[0]
    assert plain.text == "1+1? = 2.\n\n2+3? ="
    turns = prompts(tmp_path, demonstrations={"style": "turns", "count": 1})[0].problem["messages"]
    assert [(t["role"], t["content"]) for t in turns] == [("user", "1+1?"), ("assistant", "2"), ("user", "2+3?")]


def test_what_can_not_be_shown_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="plain text: set it to text"):
        prompts(tmp_path, chat=False, demonstrations={"style": "turns"})
    with pytest.raises(DataError, match="has 2, and count is 3"):
        prompts(tmp_path, demonstrations={"count": 3})
    with pytest.raises(DataError, match="expected a JSON Lines file with prompt and completion.*bbh:NAME or mmlu:NAME"):
        load_demonstrations(DemonstrationsConfig(source=str(tmp_path / "rows.jsonl")))
    with pytest.raises(ValidationError, match="needs {question} and, after it, {answer}"):
        DemonstrationsConfig(source="bbh:navigate", layout="{answer}: {question}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"posttrain\[lm-eval\]"):
        load_demonstrations(DemonstrationsConfig(source="bbh:navigate"))


def test_chains_of_thought_of_lm_eval() -> None:
    """BBH has 27 sets of three, MMLU 57; MMLU's prompt is the text that lm-eval ships beside its tasks."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("lm-eval is not installed")
    with pytest.raises(DataError, match="no bbh:navigat. Did you mean navigate") as error:
        load_demonstrations(DemonstrationsConfig(source="bbh:navigat"))
    names = str(error.value).rpartition("There are ")[2].split(", ")
    made = [load_demonstrations(DemonstrationsConfig(source=f"bbh:{name}")) for name in names]
    assert len(made) == 27 and {len(m.pairs) for m in made} == {3}
    question = [{"role": "user", "content": "Where?"}]
    (turn,) = made[names.index("navigate")].before(question, "text")
    assert turn["content"].endswith("\n\nQ: Where?\nA: Let's think step by step.\n")
    assert turn["content"].count("Let's think step by step.\n") == 4 and "So the answer is" in turn["content"]
    turns = made[0].before(question, "turns")
    assert len(turns) == 7 and all(t["content"].startswith("Let's think step by step.\n") for t in turns[1::2])
    folder = Path(spec.submodule_search_locations[0]) / "tasks/mmlu/flan_cot_fewshot"
    theirs = json.loads((folder / "_cot_prompts.json").read_text())["anatomy"]
    (turn,) = load_demonstrations(DemonstrationsConfig(source="mmlu:anatomy")).before(question, "text")
    assert turn["content"] == theirs + "Q: Where?\nA: Let's think step by step."
