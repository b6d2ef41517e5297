"""Rewards that fail, in training: never in silence, never as a zero; and settings that would do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from posttrain.core.errors import RewardError
from posttrain.core.progress import Phases, Track
from posttrain.methods.rl.collect_rollouts import counts_of_rank
from tests.methods.rl.cases import fill_advantages
from tests.methods.rl.test_policy_gradient import GREEDY, batch_of, settings, work

PART = {"kind": "function", "function": "f", "isolated": False}
QUIET = Track("t", 1, shown=False)
HELD_OUT = {"problems": {"kind": "rows", "data": {"source": "x"}}, "every": 1}


def test_a_greedy_answer_without_a_reward_teaches_nothing_and_is_counted(tmp_path: Path) -> None:
    """ReMax: every reward is 5, so that every advantage is 0; a failed baseline taken for 0 would make them 5."""
    calls: list[str] = []

    def f(text: str, example: Any) -> float:
        calls.append(text)
        if len(calls) == 18:  # 16 samples, then a greedy answer to each of 4 prompts
            raise RuntimeError("the second greedy answer")
        return 5.0

    exp = work(settings("remax", rewards={"terms": [PART], "on_error": "exclude"}), tmp_path, f=f)
    before = [p.detach().clone() for p in exp.learner.model.parameters()]
    metrics = exp.step(0, QUIET).metrics
    assert len(calls) == 20 and metrics["greedy_failed"] == 1 and "failed/function" not in metrics
    assert metrics["frac_reward_zero_std"] == 1 and metrics["grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, exp.learner.model.parameters(), strict=True))


def test_only_the_group_of_the_failed_greedy_answer_is_left_out() -> None:
    rolled = batch_of()
    fill_advantages(settings("remax"), rolled, greedy=[GREEDY[0], float("nan"), GREEDY[2]])
    for r in rolled:
        expected = 0.0 if r.group == 1 else r.rollout.reward - GREEDY[r.group]
        assert r.advantages.tolist() == pytest.approx([expected] * r.length)
        assert r.signal == (r.group != 1 and expected != 0)


def test_held_out_answers_without_a_reward_are_counted(tmp_path: Path) -> None:
    def f(text: str, example: Any) -> float:
        if example["answer"] != "0":
            raise RuntimeError("not that one")
        return 1.0

    config = settings("grpo", rewards={"terms": [PART], "on_error": "exclude"}, held_out=HELD_OUT)
    found = work(config, tmp_path, f=f).recorder.measure(0, Phases(QUIET))
    assert found["held_out"] == pytest.approx(1 / 3) and found["held_out_failed"] == 2  # of three: these are wrong
    assert found["held_out/function"] == pytest.approx(1 / 3)
    everything = work(config, tmp_path / "other", f=lambda text, example: 1.0).recorder.measure(0, Phases(QUIET))
    assert everything["held_out_failed"] == 0


def test_what_failed_before_a_kill_counts_after_it(tmp_path: Path) -> None:
    """A reward that worked once has worked; 16 errors before the kill and 16 behind it are over a limit of 20."""

    def stack(fails: bool, limit: int = 100, **how: Any) -> Any:
        def f(text: str, example: Any) -> float:
            if fails:
                raise RuntimeError("down")
            return float(len(text))

        rewards = {"terms": [PART], "max_errors": limit, **how}
        return work(settings("grpo", rewards=rewards), tmp_path, f=f)

    first = stack(False, on_error="exclude")
    first.step(0, QUIET)
    later = stack(True, on_error="exclude")
    later.load_state_dict(first.state_dict())
    assert later.step(1, QUIET).metrics["failed/function"] == 16  # not: "has not worked once"
    with pytest.raises(RewardError, match="has not worked once"):
        stack(True, on_error="exclude").step(1, QUIET)

    stopping = stack(True, limit=20)
    stopping.load_state_dict(later.state_dict())
    with pytest.raises(RewardError, match=r"failed too often: 32 errors, .* 16 scored"):
        stopping.step(2, QUIET)


def test_what_two_ranks_counted_is_added_up_for_one() -> None:
    one, two = ({"r": {"scored": n, "errors": n - 1, "timeouts": 0, "died": 0}} for n in (3, 5))
    assert counts_of_rank([one]) == one
    assert counts_of_rank([one, two]) == {"r": {"scored": 8, "errors": 6, "timeouts": 0, "died": 0}}
    assert counts_of_rank([]) == {}


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("grpo", {"advantages": {"gamma": 0.5}}, "advantages.gamma\n  Extra inputs are not permitted"),
        ("ppo", {"advantages": {"gamma": 1.5}}, "less than or equal to 1"),
        ("ppo", {"critic": None, "advantages": "gea"}, "no advantage is called 'gea'. Did you mean gae?"),
        ("grpo", {"advantages": "gae"}, "advantages gae need critic, which is off"),
        ("grpo", {"critic": {}}, "critic serves advantages gae or your own, and these are grpo: leave it out"),
        ("grpo", {"clip": {"high": 0.3}}, "clip.high: with one update per batch the ratio is 1"),
        ("rloo", {"clip": {"low": 0.1, "dual": 3.0}}, "clip.dual, clip.low: with one update"),
        ("cispo", {"clip": {"dual": 3.0}, "ppo_epochs": 2}, "cispo's weight is bounded already"),
        ("grpo", {"exploration": {"success": 0.5}}, "success is for adaptive_group_size, curriculum and replay"),
        ("grpo", {"exploration": {"max_staleness": 4}}, "max_staleness is for replay and partial_rollouts"),
        ("remax", {"group_size": 1, "exploration": {"dynamic_sampling": 2}}, "as one of one is: raise group_size"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(method: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        settings(method, **changes)


def test_the_same_settings_are_taken_where_they_do_something() -> None:
    settings("ppo", advantages={"gamma": 0.9})
    settings("reinforce_pp", advantages={"gamma": 0.9})
    settings("grpo", advantages="gae", critic={})
    assert settings("ppo", advantages="rloo", critic=None).critic is None
    settings("grpo", clip={"high": 0.3}, mini_batches=2)
    settings("grpo", clip={"high": 0.3}, exploration={"partial_rollouts": 4, "max_staleness": 4})
    settings("grpo", exploration={"success": 0.5, "curriculum": {}})
    settings("remax", group_size=2, exploration={"dynamic_sampling": 1})
    steps = {"terms": [{"kind": "valid_steps"}]}
    settings("remax", group_size=1, exploration={"dynamic_sampling": 1}, rewards=steps)
