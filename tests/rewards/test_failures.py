"""What becomes of answers on which a grader fails: wrong if the answer is to blame, named, and never left out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import Recipe
from posttrain.config.rewards import RewardsConfig
from posttrain.core.files import read_lines
from posttrain.core.item_statistics import compare
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.report.reward_hacking import follow_rewards
from posttrain.rewards import RewardStack
from posttrain.runs.held_out_tasks import write_held_out_tasks
from posttrain.sampling.rollout_store import write_rollouts


def group(*texts: str, **example: Any) -> RolloutGroup:
    rollouts = [Rollout(tuple(range(len(t))), (0.0,) * len(t), "end", t) for t in texts]
    return RolloutGroup((1,), {"answer": "4", "prompt": "2+2", **example}, rollouts)


def test_an_answer_that_hangs_its_grader_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """Some at once, since they can be recognised; the others when the time is over."""
    hanging = r"\boxed{(9^{9999})^{9999}}"
    towers = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{" + "(" * 400 + "}", r"\boxed{100000!}"]
    config = RewardsConfig.model_validate([{"kind": "math", "timeout": 0.8}])
    with RewardStack(config) as stack:
        scored = stack([group(r"\boxed{4}", *towers, hanging)])
    assert [r.reward for r in scored.groups[0].rollouts] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert not scored.failed
    notes = [r.notes.get("math", "") for r in scored.groups[0].rollouts]
    assert notes[:4] == [""] * 4 and notes[4].startswith("not graded; cut off: over 0.8 s of processor time")
    assert scored.metrics["reward/math/timeouts"] == 1
    assert "failed on 1 of 5 completions (20%), of which 1 were cut off and count as wrong" in capsys.readouterr().out


def test_a_reward_that_often_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def picky(text: str, example: Any) -> float:
        return {"a": 1.0}[text]

    config = RewardsConfig.model_validate(
        {"terms": [{"kind": "function", "name": "picky", "function": "p", "isolated": False}], "on_error": "exclude"}
    )
    with RewardStack(config, {"p": picky}) as stack:
        stack([group(*["a"] * 19, "b")])
        assert stack.often_failed() == []  # 5%
        stack([group("b")])
    assert "! reward 'picky' failed on 2 of 21 completions (10%)" in capsys.readouterr().out


def test_answers_without_an_end_that_count_as_wrong_are_named() -> None:
    """On the rollout by the reward, and with their number among what is worth a look."""
    terms = [{"kind": "exact", "name": "right"}, {"kind": "truncation_penalty", "name": "cut"}]
    asked = group("4", "5", "4 and", "5 and")
    asked = replace(asked, rollouts=[replace(r, finish="length") if i % 2 else r for i, r in enumerate(asked.rollouts)])
    with RewardStack(RewardsConfig.model_validate(terms)) as stack:
        scored = stack([asked]).groups
    assert [dict(r.notes) for r in scored[0].rollouts] == [{}, {"right": "no end token"}, {}, {"right": "no end token"}]
    told = [w for w in follow_rewards([scored, scored])["warnings"] if "no end token" in w]
    assert told == [
        "4 of 8 rollouts (50%) have no end token (they were cut at the longest length; see sampler.max_tokens), and "
        "count as wrong: right"
    ]
    slow = replace(scored[0].rollouts[1], notes={"right": "no end token; not graded; cut off: over 5 s"})
    told = follow_rewards([[replace(scored[0], rollouts=[slow, scored[0].rollouts[0]])]])["warnings"]
    assert (
        "1 of 2 rollouts (50%) could not be graded within the limits of time and memory, and count as wrong: right"
        in told
    )


def test_means_count_a_failed_grader_as_wrong_and_leave_out_a_failed_scorer() -> None:
    def score(text: str, example: Any) -> float:
        return {"4": 1.0, "5": 0.0, "-": -2.0}[text]

    def scorer(prompts: list[str], texts: list[str]) -> list[float]:
        return [{"4": 3.0, "5": 1.0, "-": 0.5, "?": -1.0}[t] for t in texts]

    terms = [
        {"kind": "function", "name": "f", "function": "f", "isolated": False},
        {"kind": "preference", "name": "s", "scorer": "s", "weight": 0.0},
    ]
    config = {"terms": terms, "on_error": "exclude", "max_errors": 9}
    with RewardStack(RewardsConfig.model_validate(config), {"f": score, "s": scorer}) as stack:
        (scored,) = stack([group("4", "5", "?")]).groups
        assert [r.reward for r in stack.failures_as_wrong(scored.rollouts)] == [1.0, 0.0, 0.0]
        (scored,) = stack([group("4", "-", "?")]).groups
        assert [r.reward for r in stack.failures_as_wrong(scored.rollouts)] == [1.0, -2.0, -2.0]  # never better off
        lost = Rollout((), (), "error", "refused")
        (scored,) = stack([replace(scored, rollouts=[lost, scored.rollouts[0]])]).groups
        assert [r.reward for r in stack.failures_as_wrong(scored.rollouts)] == [0.0, 1.0]
    only = [{"kind": "reward_model", "source": "tiny:llama", "name": "rm"}]
    failed = Rollout((1,), (0.0,), "end", "x", reward=math.nan, failures={"rm": "error: down"})
    stack.terms = [replace(stack.terms[0], config=RewardsConfig.model_validate(only).terms[0])]
    assert (
        stack.failures_as_wrong([failed, replace(failed, reward=2.0, failures={}, rewards={"rm": 2.0})])[0].reward
        == 2.0
    )
    assert len(stack.failures_as_wrong([failed])) == 0


def test_held_out_answers_that_a_grader_failed_on_stay_in_the_table(tmp_path: Path) -> None:
    one = Rollout((1,), (0.0,), "end", "4")
    broken = replace(one, reward=math.nan, failures={"right": "error: it broke"})

    def write(step: int, rewards: list[dict[str, float]]) -> None:
        groups = [
            RolloutGroup((1,), {"answer": "4"}, [replace(one, rewards=r, reward=sum(r.values())) if r else broken])
            for r in rewards
        ]
        numbers = list(range(len(groups)))
        write_rollouts(tmp_path / "stages/0-rl/held_out", step, groups, None, ["2+2"] * len(groups), numbers)

    write(0, [{"right": 1.0}, {"right": 0.0}, {"right": 1.0}])
    write(9, [{"right": 1.0}, {}, {}])
    rewards = [{"kind": "exact", "name": "right"}]
    stage = {"method": "grpo", "name": "rl", "problems": {"kind": "lab"}, "rewards": rewards}
    recipe = Recipe.model_validate({"name": "x", "model": {"source": "tiny:llama"}, "stages": [stage]})
    assert write_held_out_tasks(recipe, tmp_path) == [("rl-right", "generate")]
    before, after = (read_lines(tmp_path / "evaluations" / side / "rl-right.jsonl") for side in ("before", "after"))
    assert [i["correct"] for i in after] == [True, False, False]
    entry = compare(before, after, "generate")
    assert (entry["n"], entry["lost"], entry["failed"]) == (3, 1, {"before": 0, "after": 2})


def test_failures_are_wrong_on_their_side_of_a_comparison() -> None:
    """54 failures after training of 60 answers: 20 right before, 6 after, 60 items."""
    before = [{"id": i, "correct": i < 20} for i in range(60)]
    after = [{"id": i, "correct": True} if i < 6 else {"id": i, "correct": False, "failed": True} for i in range(60)]
    entry = compare(before, after, "generate")
    assert (entry["n"], entry["lost"], entry["failed"]) == (60, 14, {"before": 0, "after": 54})
    assert entry["after"]["value"] == 0.1
    assert "failed" not in compare(before, before, "generate")
    scores = [{"id": i, "value": None if i == 2 else 1.0, "answers": [{"score": 1.0}]} for i in range(4)]
    assert compare(scores, scores, "score")["failed"] == {"before": 1, "after": 1}
