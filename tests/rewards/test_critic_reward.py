"""The reward of a critic: what a frozen corrector makes of its critique, against a conversation written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.config import DataConfig, SamplingConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.core.errors import RewardError
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.data.chat_template import render_chat
from posttrain.data.plain_text import plain_prompts
from posttrain.data.prompt_sources import RowPrompts
from posttrain.data.prompts import load_prompts
from posttrain.data.tokenizing import tokenize
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.rewards import RewardStack
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.model_feedback import ModelFeedback
from posttrain.sampling.protocol import Request

TOKENIZER = tiny_tokenizer()
REWARD = {"kind": "function", "function": "count", "isolated": False}
LOOP = {"revision": "{feedback}\nAgain."}


def count(text: str, example: Any) -> float:
    return float(len(text))


def settings(**given: Any) -> RewardsConfig:
    base = {"kind": "corrected", "name": "helps", "source": "tiny:llama", "environment": LOOP, "reward": REWARD}
    return RewardsConfig.model_validate([{**base, "sampler": {"temperature": 0.0, "max_tokens": 12}, **given}])


def row(question: str, written: str) -> dict[str, Any]:
    return {"asked": [{"role": "user", "content": question}], "written": written, "answer": "5", "prompt": "Criticise"}


def scored(rows: list[tuple[dict[str, Any], list[str]]], **given: Any) -> list[list[Rollout]]:
    groups = [RolloutGroup((1,), r, [Rollout((1,), (0.0,), "end", c) for c in critiques]) for r, critiques in rows]
    with RewardStack(settings(**given), {"count": count}, TOKENIZER) as rewards:
        return [list(g.rollouts) for g in rewards(groups).groups]


def by_hand(tokens: list[int], stop: list[str]) -> str:
    """The likeliest continuation of these tokens by the corrector."""
    sampler = LocalSampler(LanguageModel(tiny_model("llama")), TOKENIZER)
    params = SamplingConfig(temperature=0.0, max_tokens=12, stop=stop)
    return sampler.sample([Request(tokens, 1, 0)], params)[0].rollouts[0].text


def test_the_corrector_reads_question_answer_and_critique() -> None:
    """In a chat as turns, in plain text as text; alone or beside others, the revision is the same."""
    cases = [(row("2+3?", "6"), ["Too large.", "It is 1 too much."]), (row("1+1?", "3"), ["Too large."])]
    found = scored(cases)
    for (example, critiques), rollouts in zip(cases, found, strict=True):
        for critique, rollout in zip(critiques, rollouts, strict=True):
            talk = [*example["asked"], {"role": "assistant", "content": example["written"]}]
            talk.append({"role": "user", "content": f"{critique}\nAgain."})
            (tokens,) = tokenize(TOKENIZER, [render_chat(TOKENIZER, talk, generation=True)])
            revised = by_hand(tokens, []).strip()
            assert rollout.rewards["helps"] == len(revised)
            assert rollout.notes["helps"].startswith("revised:")
            assert rollout.rewards["helps/edited"] == (revised != example["written"])
    assert scored(cases[1:])[0][0].reward == found[1][0].reward
    inline = {"revision": "{feedback}=", "answers": "inline", "stop": ["\n"]}
    ((rollout,),) = scored([(row("2+3=", "6"), ["no"])], environment=inline)
    (tokens,) = plain_prompts(["2+3="], TOKENIZER)
    tokens += [t for text in ("6\n", "no=") for t in TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    assert rollout.rewards["helps"] == len(by_hand(tokens, ["\n"]).strip())


def test_a_critique_that_finds_nothing_leaves_the_answer() -> None:
    ((kept, revised),) = scored([(row("2+3?", "12345"), ["No change needed.", "Wrong."])], right_at=5)
    assert kept.reward == 5 and kept.rewards["helps/edited"] == 0
    assert kept.rewards["helps/first"] == kept.rewards["helps/last"] == 1 and revised.reward != 5
    names = [f"helps/{n}" for n in ("wrong_to_right", "right_to_wrong")]
    assert [kept.rewards[n] for n in names] == [0, 0]
    assert [revised.rewards[n] for n in names] == [0, float(revised.reward < 5)]
    ((other,),) = scored([(row("2+3?", "12345"), ["No change needed."])], verdict=None)
    assert other.reward != 5


def test_rows_of_other_stages_get_a_message() -> None:
    with pytest.raises(RewardError, match=r"no 'asked' .*stage:NAME/data/critic.jsonl"):
        scored([({"prompt": "2+3?", "answer": "5"}, ["Wrong."])])


def test_settings_that_a_corrector_can_t_have() -> None:
    for changes, why in (
        ({"environment": {"own": True}}, "environment.own of a corrector"),
        ({"environment": {"feedback": ["calculator"]}}, "the critique is the feedback"),
        ({"environment": {"rounds": 2}}, "environment.rounds of a corrector"),
        ({"environment": {"kind": "calculator"}}, "environment.kind of a corrector"),
        ({"reward": {"kind": "self_consistency"}}, "compares the completions"),
    ):
        with pytest.raises(ValidationError, match=why):
            settings(**changes)
    config = settings()
    assert RewardsConfig.model_validate(config.model_dump(mode="json")) == config
    (term,) = RewardsConfig.model_validate([{"kind": "corrected", "source": "tiny:llama", "reward": REWARD}]).terms
    assert term.environment.kind == "refine" and not term.environment.own  # type: ignore[attr-defined]


def test_rows_for_a_critic_are_asked_in_the_words_of_the_source_of_feedback(tmp_path: Path) -> None:
    from tests.methods.data.test_corrections import carry_out
    from tests.methods.data.test_corrections import settings as stage

    config = stage(critic={"template": "{prompt} {answer} Right?", "verdict": "Yes."}, keep=2)
    entry = carry_out(config, tmp_path)
    path = tmp_path / "data" / "critic.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert entry["made"]["rows for a critic"] == len(rows) > 9
    source = ModelFeedback.Config(model={"source": "x"}, template="{prompt} {answer} Right?", verdict="Yes.")  # type: ignore[arg-type]
    prompts = load_prompts(RowPrompts.Config(data=DataConfig(source=str(path), chat=False)), TOKENIZER, context=None)
    for made, prompt in zip(rows, prompts.items, strict=True):
        asked = "".join(m["content"] for m in made["asked"])
        assert prompt.text == source.request(asked, made["written"]) and prompt.problem["answer"] == made["answer"]
        assert {k: prompt.problem[k] for k in ("asked", "written")} == {k: made[k] for k in ("asked", "written")}
    counts: dict[tuple[str, bool], int] = {}
    for made in rows:
        key = made["question_source"], made["reward"] >= 1
        counts[key] = counts.get(key, 0) + 1
    assert max(counts.values()) <= 2 and {right for _, right in counts} == {True, False}


def test_what_sources_say_teaches_a_critic(tmp_path: Path) -> None:
    """A function that finds fault with odd lengths: its words about each answer, or the verdict where it has none."""
    from posttrain.runs.registry import prepare_stage
    from posttrain.sampling.feedback_source import FeedbackNote
    from posttrain.trainer.stage import StageContext
    from tests.methods.data.test_corrections import MODEL, even
    from tests.methods.data.test_corrections import settings as stage

    def says(answer: str, example: Any) -> FeedbackNote | None:
        if "z" in answer:
            return None
        return FeedbackNote(f"{len(answer)} is odd in {example['prompt']}", len(answer) % 2 == 0)

    loop = {"kind": "refine", "own": False, "answers": "inline", "agreement": False, "stop": list("aeiou")}
    config = stage(environment={**loop, "feedback": [{"kind": "function", "function": "says"}]}, critic={})
    context = StageContext(TOKENIZER, None, {"even": even, "says": says})
    entry = prepare_stage(config, context).run(MODEL, tmp_path, 1)
    tables = [
        [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("critic", "critiques")
    ]
    expected = []
    for row in tables[0]:
        asked = "".join(m["content"] for m in row["asked"])
        said = says(row["written"], {"prompt": asked})
        if said is not None:
            expected.append((row["prompt"], "No change needed." if said.right else said.text))
    assert [(r["prompt"], r["completion"]) for r in tables[1]] == expected
    assert entry["made"]["critiques"] == len(expected) > 0 and len({text for _, text in expected}) > 2
