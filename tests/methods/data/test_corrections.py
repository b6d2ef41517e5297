"""Corrections: what becomes of each chain, balanced rows that are read back as they were sampled, and resuming."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from posttrain.config import DataConfig, ModelConfig
from posttrain.config.environment import EnvironmentConfig
from posttrain.core.errors import DataError
from posttrain.core.files import read_lines
from posttrain.core.types import Rollout
from posttrain.data.prompt_sources import LabPrompts, RowPrompts
from posttrain.data.prompts import load_prompts
from posttrain.data.sft_rows import prepare
from posttrain.methods.data import corrections
from posttrain.methods.data.correction_rows import AnswerChain, carries_loss, correction_row, outcome_of
from posttrain.methods.data.corrections import CorrectionsConfig
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.runs.registry import prepare_stage
from posttrain.sampling.refine_turns import RefineTurn, refine_turns
from posttrain.sampling.rollout_store import read_rollouts, rollout_steps, rollouts_path
from posttrain.trainer.stage import StageContext

TOKENIZER = tiny_tokenizer()
MODEL = ModelConfig(source="tiny:llama")


def settings(**changes: Any) -> CorrectionsConfig:
    base = {
        "problems": {"kind": "lab", "size": 9},
        "environment": {"kind": "refine", "own": False, "answers": "inline", "agreement": False},
        "rewards": [{"kind": "function", "name": "even", "function": "even", "isolated": False}],
        "sampler": {"max_tokens": 90, "stop": []},
        "n": 4,
    }
    base["environment"]["stop"] = list("aeiou")  # type: ignore[index]
    return CorrectionsConfig.model_validate({**base, **changes})


def chain(*turns: tuple[str, str], rewards: list[float], cut: bool = False) -> AnswerChain:
    made = [RefineTurn(kind, text, i, i + 1) for i, (kind, text) in enumerate(turns)]  # type: ignore[arg-type]
    return AnswerChain(0, made, [text for _, text in turns], rewards, cut, len(made))


A, B, C = ("answer", "1"), ("answer", "2"), ("answer", "3")
R, F = ("request", "?"), ("feedback", "no")


def test_each_chain_has_one_outcome() -> None:
    cases = [
        (chain(A, R, B, rewards=[0, 1]), ("corrected", 2)),
        (chain(A, R, F, R, B, rewards=[0, 1]), ("corrected", 4)),
        (chain(A, R, B, R, C, rewards=[0, 0, 1]), ("corrected", 4)),
        (chain(A, R, B, R, C, rewards=[0, 1, 0]), ("corrected", 2)),  # up to the right answer
        (chain(A, R, B, rewards=[1, 1]), ("kept right", 2)),
        (chain(A, R, B, R, C, rewards=[1, 1, 0]), ("kept right", 2)),
        (chain(A, R, F, rewards=[1]), ("kept right", 2)),  # by its own verdict
        (chain(A, R, B, rewards=[1, 0]), ("right answer lost", 2)),
        (chain(A, R, B, rewards=[0, 0]), ("still wrong", 2)),
        (chain(A, R, F, rewards=[0]), ("wrong answer kept by the model's verdict", -1)),
        (chain(A, rewards=[0], cut=True), ("cut in the first answer", -1)),
        (chain(A, R, B, rewards=[0, 1], cut=True), ("cut before the end of the revision", -1)),
        (chain(A, R, F, rewards=[1], cut=True), ("cut before the end of the revision", -1)),
        (chain(A, R, B, R, C, rewards=[0, 1, 1], cut=True), ("corrected", 2)),
        (chain(A, rewards=[1]), ("ended before a revision", -1)),
        (chain(A, R, B, rewards=[]), ("no reward", -1)),
    ]
    for given, expected in cases:
        assert outcome_of(given, 1.0) == expected, given


def question(**data: Any) -> Any:
    return load_prompts(LabPrompts.Config(size=1), TOKENIZER, context=None).items[0]


def test_only_what_led_to_the_right_answer_carries_loss() -> None:
    environment = settings().environment
    both = ["answer", "feedback", "revision"]

    def trained(given: AnswerChain, last: int, outcome: str, on: list[str]) -> list[str]:
        row = correction_row(question(), given, outcome, last, environment, on)
        assert [m["role"] for m in row["messages"]][:2] == ["user", "assistant"]
        return [m["content"] for m in row["messages"][1:] if m["role"] == "assistant" and m.get("train", True)]

    long = chain(A, R, F, R, B, R, ("feedback", "still"), R, C, rewards=[0, 0, 1])
    assert trained(long, 8, "corrected", both) == ["still", "3"]
    assert trained(long, 8, "corrected", ["revision"]) == ["3"]
    assert trained(chain(A, R, B, rewards=[1, 1]), 2, "kept right", both) == ["1", "2"]
    assert trained(chain(A, R, B, rewards=[1, 1]), 2, "kept right", ["revision"]) == ["2"]
    verdict = chain(A, R, F, rewards=[1])
    assert trained(verdict, 2, "kept right", both) == ["1", "no"]
    assert not carries_loss(correction_row(question(), verdict, "kept right", 2, environment, ["revision"]))


def test_feedback_that_did_its_work_teaches_a_critic() -> None:
    """What led to a right answer at once, or left a right one alone; not what needed a second round."""
    from posttrain.methods.data.correction_rows import critique_rows
    from posttrain.methods.data.corrections import CriticRowsConfig

    source = CriticRowsConfig(template="{prompt} {answer} Right?", verdict="no").source()
    chains = [
        (chain(A, R, F, R, B, rewards=[0, 1]), "corrected", 4),
        (chain(A, R, ("feedback", "fine"), rewards=[1]), "kept right", 2),
        (chain(A, R, ("feedback", "far"), R, B, R, F, R, C, rewards=[0, 0, 1]), "corrected", 8),
        (chain(A, R, F, R, C, rewards=[0, 1]), "corrected", 4),  # the same question, answer and feedback again
    ]
    asked, loop = question(), settings().environment
    kept = [(c, o, correction_row(asked, c, o, last, loop, ["revision"])) for c, o, last in chains]
    rows = critique_rows(kept, [asked], source)
    request = f"{asked.text} 1 Right?"
    assert [(r["prompt"], r["completion"], r["outcome"]) for r in rows] == [
        (request, "no", "corrected"),
        (request, "fine", "kept right"),
    ]


@pytest.mark.parametrize("answers", ["inline", "turn"])
def test_rows_are_read_back_as_they_were_sampled(answers: str, tmp_path: Path) -> None:
    """Token by token: the prompt, the answer, the request and the revision; loss on the revision and its end."""
    environment: Any = TypeAdapter(EnvironmentConfig).validate_python(
        {"kind": "refine", "own": False, "answers": answers}
    )
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "2+2?", "answer": "4"}) + "\n")
    data = DataConfig(source=str(tmp_path / "q.jsonl"), chat=answers == "turn")
    (prompt,) = load_prompts(RowPrompts.Config(data=data), TOKENIZER, context=None).items
    sampler = scripted([["It is 5.<|im_end|>", "It is 4.<|im_end|>"]], environment)
    rollout = sampler(prompt)
    turns = refine_turns(rollout, TOKENIZER, environment)
    texts = [TOKENIZER.decode(list(rollout.tokens[t.first : t.last])) for t in turns]
    given = AnswerChain(0, turns, texts, [0.0, 1.0], False, rollout.length)
    row = correction_row(prompt, given, "corrected", 2, environment, ["revision"])
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = DataConfig(source=str(tmp_path / "rows.jsonl"), chat=answers == "turn", loss_on="assistant")
    (sample,) = prepare(config, TOKENIZER).samples
    whole = [*prompt.tokens, *rollout.tokens]
    assert list(sample.tokens[: len(whole)]) == whole
    revision = len(prompt.tokens) + turns[-1].first
    assert not any(sample.weights[:revision]) and all(sample.weights[revision : len(whole)])


def scripted(scripts: list[list[str]], environment: Any) -> Any:
    """A function from a prompt to the rollout that a model with these turns gives."""
    from posttrain.config import SamplingConfig
    from posttrain.sampling.environments import environment as opened
    from posttrain.sampling.multi_turn import TurnSampler
    from posttrain.sampling.protocol import Request
    from tests.sampling.scripted_sampler import Script

    def sample(prompt: Any) -> Rollout:
        sampler = TurnSampler(Script(*scripts), opened(environment), environment, TOKENIZER, 4000)
        (group,) = sampler.sample([Request(prompt.tokens, 1, 0, prompt.problem)], SamplingConfig(max_tokens=500))
        return group.rollouts[0]

    return sample


def even(text: str, example: Any) -> float:
    return float(len(text) % 2 == 0)


def carry_out(config: CorrectionsConfig, folder: Path, reward: Any = even) -> dict[str, Any]:
    return prepare_stage(config, StageContext(TOKENIZER, None, {"even": reward})).run(MODEL, folder, 1)


def test_it_resumes_after_a_crash_and_accounts_for_every_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corrections, "CHAINS_TOGETHER", 32)  # four problems a chunk
    config = settings(n=8, keep=3)
    calm = carry_out(config, tmp_path / "calm")
    calls = 0

    def dies(text: str, example: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 70:
            raise KeyboardInterrupt
        return even(text, example)

    with pytest.raises(KeyboardInterrupt):
        carry_out(config, tmp_path / "killed", dies)
    assert rollout_steps(tmp_path / "killed" / "rollouts") == [1] and not (tmp_path / "killed" / "data").exists()
    again = carry_out(config, tmp_path / "killed", dies)
    assert {**again, "seconds": 0} == {**calm, "seconds": 0}
    for name in ("rows.jsonl", "stats.json"):
        one, two = (tmp_path / side / "data" / name for side in ("calm", "killed"))
        assert one.read_bytes() == two.read_bytes()
    stats, rows = (
        json.loads((tmp_path / "calm/data/stats.json").read_text()),
        list(read_lines(tmp_path / "calm/data/rows.jsonl")),
    )
    assert stats["chains"] == 72 == len(rows) + sum(stats["dropped"].values())
    kinds = Counter(row["outcome"] for row in rows)
    assert (
        dict(kinds) == {k: n for k, n in stats["kept"].items() if n} and 0 < kinds["kept right"] <= kinds["corrected"]
    )
    assert max(Counter((row["problem"], row["outcome"]) for row in rows).values()) <= 3
    assert all(1 <= len(stats["examples"][why]) <= min(3, n) for why, n in stats["dropped"].items())
    for row in rows:
        assert all(m["content"].strip() for m in row["messages"])
        assert even(row["last"], {}) == 1 and row["rewards"][-1] == 1
        assert (even(row["first"], {}) == 1) == (row["outcome"] == "kept right")
    stored = read_rollouts(rollouts_path(tmp_path / "calm" / "rollouts", 1))
    assert len(stored) == 32 and any("answer@2" in r["steps"] for r in stored)


def test_the_balance_can_be_set(tmp_path: Path) -> None:
    counts = {}
    for share in (0.0, 0.5, None):
        entry = carry_out(settings(n=8, keep=None, kept_right=share), tmp_path / str(share))["made"]
        counts[share] = entry.get("rows: kept right", 0), entry["rows: corrected"]
    assert counts[0.0][0] == 0 and counts[0.5][0] == -(-counts[0.5][1] // 2) < counts[None][0]
    assert len({corrected for _, corrected in counts.values()}) == 1


def test_a_stage_without_rows_says_what_became_of_its_chains(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"kept none of 36 chains \(.*still wrong"):
        carry_out(settings(), tmp_path, lambda text, example: 0.0)


def test_settings_that_contradict_one_another() -> None:
    for changes, why in (
        ({"environment": {"kind": "calculator"}}, "environment: {kind: refine}"),
        ({"sampler": {"temperature": 0.0}}, "all n chains would be the same"),
        ({"rewards": [{"kind": "self_consistency"}]}, "apart from its chain"),
        ({"rewards": [{"kind": "valid_steps"}]}, "apart from its chain"),
    ):
        with pytest.raises(ValidationError, match=why):
            settings(**changes)
