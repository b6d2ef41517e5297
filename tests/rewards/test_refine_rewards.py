"""Rewards of the self-refine loop: every answer of a chain scored, in tokens; written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from posttrain.config.environment import EnvironmentConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.core.errors import RewardError
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.rewards import RewardStack

TOKENIZER = tiny_tokenizer()
END = "<|im_end|>"
EXACT = {"kind": "exact", "extract": "last_line"}


def environment(**given: Any) -> Any:
    base = {"kind": "refine", "own": False, "answers": "inline"}
    return TypeAdapter(EnvironmentConfig).validate_python({**base, **given})


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def chain(*turns: str, finish: str = "stop") -> Rollout:
    """Turns by the model and requests in turn, the model first."""
    tokens: list[int] = []
    mask: list[bool] = []
    for i, text in enumerate(turns):
        tokens += ids(text)
        mask += [i % 2 == 0] * (len(tokens) - len(mask))
    shown = TOKENIZER.decode(tokens, skip_special_tokens=True)
    return Rollout(tokens, [-1.0] * len(tokens), finish, shown, mask=mask)


def scored(rollouts: list[Rollout], config: Any = None, functions: Any = None, **settings: Any) -> list[Rollout]:
    terms = RewardsConfig.model_validate([{"kind": "improvement", "name": "better", "reward": EXACT, **settings}])
    terms = terms.model_copy(update={"on_error": "exclude"})
    with RewardStack(terms, functions, TOKENIZER, environment=config or environment()) as rewards:
        (group,) = rewards([RolloutGroup((1,), {"answer": "5", "prompt": "2+3"}, rollouts)]).groups
    return list(group.rollouts)


def test_every_answer_is_scored_at_its_tokens() -> None:
    """r1, then r2 + bonus (r2 - r1), for all four changes; the chain's number is the last answer's."""
    chains = [chain(f"{a}{END}", "again?", f"so\n{b}{END}") for a, b in ("55", "54", "45", "43")]
    found = scored(chains, bonus=2.0, first=0.5)
    first, request, second = len(ids("5" + END)), len(ids("again?")), len(ids("so\n5" + END))
    spans = (0, first), (first, first + request + second)  # the request in it is no token of the model's
    expected = [(0.5, 1.0), (0.5, -2.0), (0.0, 3.0), (0.0, 0.0)]
    for rollout, (one, two) in zip(found, expected, strict=True):
        assert rollout.steps == {
            "better": [],
            "better@1": [(*spans[0], one)],
            "better@2": [(*spans[1], two)],
        }
    assert [r.rewards["better"] for r in found] == [r.reward for r in found] == [1, 0, 1, 0]
    names = ("first", "last", "wrong_to_right", "right_to_wrong", "edited")
    assert [[r.rewards[f"better/{n}"] for n in names] for r in found] == [
        [1, 1, 0, 0, 0], [1, 0, 0, 1, 1], [0, 1, 1, 0, 1], [0, 0, 0, 0, 1],
    ]  # fmt: skip


def test_stage_one_scores_the_revision_alone() -> None:
    (found,) = scored([chain(f"4{END}", "again?", f"5{END}")], bonus=0.0, first=0.0)
    assert set(found.steps) == {"better", "better@2"} and found.steps["better@2"][0][2] == 1.0


def test_own_feedback_belongs_to_the_revision_that_it_led_to() -> None:
    config = environment(own=True, verdict="all right")
    chains = [
        chain(f"4{END}", "check", f"wrong{END}", "again", f"5{END}"),
        chain(f"5{END}", "check", f"All right.{END}"),  # keeps its answer: as a revision without change
        chain(f"5{END}", "check", "I th", finish="length"),  # was cut: no second turn
        chain("4", finish="length"),
    ]
    found = scored(chains, config, bonus=1.0)
    length = [len(c.tokens) for c in chains]
    first = len(ids("4" + END))
    assert found[0].steps["better@2"] == [(first, length[0], 2.0)]
    assert found[1].steps["better@2"] == [(first, length[1], 1.0)] and found[1].rewards["better/edited"] == 0
    assert found[2].steps == {"better": [], "better@1": [(0, first, 1.0)]}
    assert found[3].steps == {"better": [], "better@1": [(0, 1, 0.0)]} and found[3].reward == 0


def test_several_rounds_are_paid_for_each_step_forward() -> None:
    config = environment(rounds=3, agreement=False)
    (found,) = scored([chain(*[f"4{END}", "?"], *[f"5{END}", "?"], *[f"3{END}", "?"], f"5{END}")], config, bonus=1.0)
    assert [found.steps[f"better@{k}"][0][2] for k in (1, 2, 3, 4)] == [0.0, 2.0, -1.0, 2.0]


def test_an_answer_that_the_reward_fails_on_fails_the_chain() -> None:
    def fragile(text: str, example: Any) -> float:
        if text == "x":
            raise ValueError("no number")
        return float(text == "5")

    reward = {"kind": "function", "function": "fragile", "isolated": False}
    chains = [chain(f"5{END}", "?", f"5{END}"), chain(f"5{END}", "?", f"x{END}")]
    good, bad = scored(chains, functions={"fragile": fragile}, reward=reward)
    assert good.reward == 1.0 and not bad.rewarded and "no number" in bad.failures["better"]
    assert bad.steps == {} and not any(name.startswith("better/") for name in bad.rewards)


def test_rewards_in_worker_processes_score_answers_too() -> None:
    found = scored([chain(f"4{END}", "?", f"10/2{END}")], reward={"kind": "math"})
    assert found[0].steps["better@2"][0][2] == 2.0


def test_what_can_t_be_scored_so_is_refused() -> None:
    term = {"kind": "improvement", "reward": EXACT}
    with pytest.raises(RewardError, match="environment of kind refine, and there is none"):
        RewardStack(RewardsConfig.model_validate([term]), None, TOKENIZER)
    with pytest.raises(RewardError, match="this one is calculator"):
        other = TypeAdapter(EnvironmentConfig).validate_python({"kind": "calculator"})
        RewardStack(RewardsConfig.model_validate([term]), None, TOKENIZER, environment=other)
    with pytest.raises(RewardError, match="needs the tokenizer"):
        RewardStack(RewardsConfig.model_validate([term]), environment=environment())
    for reward, why in (
        ({"kind": "self_consistency"}, "compares the completions"),
        ({"kind": "valid_steps"}, "scores steps"),
        (term, "scores steps"),
    ):
        with pytest.raises(ValidationError, match=why):
            RewardsConfig.model_validate([{"kind": "improvement", "reward": reward}])


def test_other_rewards_read_the_last_answer() -> None:
    """Not the model's own feedback that ended the chain, nor the answers and requests before the last one."""
    loop = environment(own=True, stop=[";"])
    chains = [
        chain("4;", "check", "no;", "again", " so\n5;"),
        chain("5;", "check", "it is\nright;"),  # ended by own verdict
        chain("4;", "check", "5", finish="length"),  # cut in the feedback
        chain("4;", "check", "no;", "again", "7", finish="length"),
        chain(),
    ]
    terms = RewardsConfig.model_validate(
        [
            EXACT,
            {"kind": "function", "name": "one", "function": "one", "isolated": False},
            {"kind": "function", "name": "all", "function": "all", "isolated": False, "group": True},
            {"kind": "preference", "scorer": "pairs"},
            {"kind": "improvement", "reward": EXACT},
        ]
    )
    read: dict[str, list[str]] = {"one": [], "all": [], "pairs": []}

    def one(text: str, example: Any) -> float:
        read["one"].append(text)
        return 0.0

    def every(texts: list[str], example: Any) -> list[float]:
        read["all"] += texts
        return [0.0] * len(texts)

    def pairs(prompts: list[str], texts: list[str]) -> list[float]:
        read["pairs"] += texts
        return [0.0] * len(texts)

    given = {"one": one, "all": every, "pairs": pairs}
    with RewardStack(terms, given, TOKENIZER, environment=loop) as rewards:
        (group,) = rewards([RolloutGroup((1,), {"answer": "5", "prompt": "2+3"}, chains)]).groups
    assert list(read.values()) == [["so\n5", "5", "4", "7", ""]] * 3
    assert [r.rewards["exact"] for r in group.rollouts] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [r.rewards["improvement"] for r in group.rollouts] == [1.0, 1.0, 0.0, 0.0, 0.0]  # all turns are there
    assert [r.text for r in group.rollouts] == [r.text for r in chains]
    # Without the loop, a reward reads all of the text.
    with RewardStack(terms.terms[1:2], given, TOKENIZER) as rewards:
        rewards([RolloutGroup((1,), {}, chains[1:2])])
    assert read["one"][-1] == "5;checkit is\nright;"


def test_steps_of_the_last_answer_are_at_its_tokens() -> None:
    """Characters that a reward of steps returns are those of the answer, without the spaces before it."""
    loop = environment(stop=[";"])
    rollout = chain("1+1=3;", "again\n", "\n  1+1=2\n2+2=5;")
    with RewardStack([{"kind": "valid_steps"}], None, TOKENIZER, environment=loop) as rewards:  # type: ignore[list-item]
        (group,) = rewards([RolloutGroup((1,), {}, [rollout])]).groups
    places = group.rollouts[0].steps["valid_steps"]
    told = [(TOKENIZER.decode(list(rollout.tokens[a:b])).strip(), score) for a, b, score in places]
    assert told == [("1+1=2", 1.0), ("2+2=5", 0.0)]
    assert places[0][0] >= len(ids("1+1=3;again\n"))
