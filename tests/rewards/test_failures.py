"""What becomes of answers on which a grader fails: wrong if the answer is to blame, named, and never left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.config import Recipe
from posttrain.config.rewards import RewardsConfig
from posttrain.core.files import read_lines
from posttrain.core.statistics import compare
from posttrain.core.types import Rollout, RolloutGroup
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
    assert not scored.excluded
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


def test_held_out_answers_that_a_grader_failed_on_stay_in_the_table(tmp_path: Path) -> None:
    def write(step: int, rewards: list[dict[str, float]]) -> None:
        groups = [
            RolloutGroup((1,), {"answer": "4"}, [Rollout((1,), (0.0,), "end", "4", rewards=r, reward=sum(r.values()))])
            for r in rewards
        ]
        failures = [[{} if r else {"right": "error: it broke"}] for r in rewards]
        numbers = list(range(len(groups)))
        write_rollouts(tmp_path / "stages/0-rl/held_out", step, groups, None, ["2+2"] * len(groups), numbers, failures)

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
