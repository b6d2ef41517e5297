"""Stacks of rewards, and what becomes of those that hang, raise, die or return nonsense: in real worker processes."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.config.rewards import RewardsConfig
from posttrain.core.errors import RewardError
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.rewards import RewardStack, worker_pool

STRANGE = "tests.rewards.strange:"


def group(*texts: str, finish: str = "end", **example: Any) -> RolloutGroup:
    rollouts = [Rollout(tuple(range(len(t))), (0.0,) * len(t), finish, t) for t in texts]
    return RolloutGroup((1,), {"answer": "4", "prompt": "2+2", **example}, rollouts)


def stack(*terms: dict[str, Any], functions: Any = None, **settings: Any) -> RewardStack:
    return RewardStack(RewardsConfig.model_validate({"terms": list(terms), **settings}), functions)


def strange(name: str, **settings: Any) -> dict[str, Any]:
    return {"kind": "function", "name": name, "function": STRANGE + name, "timeout": 0.5, **settings}


def test_the_sum_is_weighted_and_every_part_is_kept() -> None:
    parts = [
        {"kind": "exact", "name": "right"},
        {"kind": "math", "weight": 0.5},
        {"kind": "length", "unit": "characters", "target": 1, "width": 10, "weight": 0.1},
        {"kind": "function", "name": "given", "function": "f", "weight": 0, "isolated": False},
    ]
    with stack(*parts, functions={"f": lambda text, example: 100.0}) as rewards:
        scored = rewards([group("4", "8/2"), group("nothing")])
    (a, b), (c,) = (g.rollouts for g in scored.groups)
    assert dict(a.rewards) == {"right": 1, "math": 1, "length": 0, "given": 100}
    assert dict(b.rewards) == {"right": 0, "math": 1, "length": -0.2, "given": 100}
    assert [a.reward, b.reward, c.reward] == pytest.approx([1.5, 0.48, -0.06])
    assert scored.metrics["reward/right/mean"] == pytest.approx(1 / 3)
    assert scored.metrics["reward/mean"] == pytest.approx((1.5 + 0.48 - 0.06) / 3)
    assert scored.metrics["reward/excluded"] == 0 and not scored.failed


def process(rewards: RewardStack) -> int:
    assert rewards.pool is not None and rewards.pool.workers[0] is not None
    return rewards.pool.workers[0].process.pid


def test_a_process_that_ran_no_code_of_the_user_s_calls_the_next_stack_s_rewards() -> None:
    def starts_with(letter: str) -> dict[str, Any]:
        return {"kind": "format", "pattern": f"{letter}.*"}

    with stack({"kind": "math"}) as rewards:
        first = process(rewards)
        assert rewards([group("4")]).groups[0].rollouts[0].reward == 1
    with stack(starts_with("n")) as rewards, stack(starts_with("m")) as beside:
        assert process(rewards) == first != process(beside)
        for one, expected in ((rewards, [1, 0]), (beside, [0, 1])):
            assert [r.reward for r in one([group("n4", "m4")]).groups[0].rollouts] == expected
    with stack(starts_with("n"), strange("good")) as rewards:
        mixed = process(rewards)
    with stack(starts_with("n")) as rewards, stack(starts_with("n")) as beside:
        assert mixed not in (process(rewards), process(beside))
    with stack(starts_with("n")) as rewards:
        assert rewards.pool is not None and (worker := rewards.pool.workers[0]) is not None
        worker.busy = True  # its call was left by an interrupt: the reply would be taken for the next stack's
    assert worker.process.poll() is not None
    # Garbage collection ends a lost pool at any time, also while a process is looked for.
    lost = threading.Thread(target=worker_pool._close_all, args=([worker],), daemon=True)
    with worker_pool._parking:
        lost.start()
        lost.join(20)
        assert not lost.is_alive()


def test_one_that_hangs_is_cut_off_and_the_others_go_on() -> None:
    """A loop that catches everything, and a sleep: both end at the limit; what else was asked is answered."""
    began = time.monotonic()
    with stack(strange("strange"), on_timeout="exclude", workers=2) as rewards:
        scored = rewards([group("fine", "spin", "fine"), group("sleep", "fine")])
    assert time.monotonic() - began < 60
    assert [[r.rewarded for r in g.rollouts] for g in scored.groups] == [[True, False, True], [False, True]]
    assert [[r.text for r in g.rollouts] for g in scored.groups] == [["fine", "spin", "fine"], ["sleep", "fine"]]
    for failed in scored.failed:
        assert failed.failures["strange"].startswith("timeout: cut off: over 0.5 s of processor time")
        assert math.isnan(failed.reward) and not failed.rewards
    assert scored.metrics["reward/strange/timeouts"] == 2


def test_nonsense_is_counted_and_shown() -> None:
    messages = {
        "raise": "KeyError: 'this one raises'",
        "exit": "SystemExit: 3",
        "nan": "expected a finite number",
        "inf": "expected a finite number",
        "none": "expected a number, and the reward returned NoneType",
        "text": "expected a number, and the reward returned str",
        "big": "too large",
    }
    with stack(strange("strange"), on_error="exclude") as rewards:
        scored = rewards([group("fine", text, "fine") for text in messages])
        assert all([r.rewarded for r in g.rollouts] == [True, False, True] for g in scored.groups)
        for failed, message in zip(scored.failed, messages.values(), strict=True):
            assert failed.failures["strange"].startswith("error: ") and message in failed.failures["strange"]
        assert scored.metrics["reward/strange/errors"] == len(messages)
        assert "KeyError" in rewards.account_of("strange")


def test_numbers_and_weights_have_a_size_that_sums_and_float32_can_hold() -> None:
    part = {"kind": "function", "name": "f", "function": "f", "isolated": False}
    with stack(part, functions={"f": lambda text, example: float(text)}, on_error="exclude") as rewards:
        scored = rewards([group("1e30", "-1e31", "1e308")])
    assert [r.reward for r in scored.groups[0].rollouts if r.rewarded] == [1e30]
    assert all("expected a finite number of at most 1e+30" in r.failures["f"] for r in scored.failed)
    for weight in (1e308, -1e10, math.inf, math.nan):
        with pytest.raises(ValidationError, match="weight"):
            stack({**part, "weight": weight}, functions={"f": len})


def test_one_that_crashes_or_eats_memory_takes_nothing_with_it() -> None:
    with stack(strange("strange"), on_timeout="exclude", on_error="exclude") as rewards:
        scored = rewards([group("fine", "crash", "memory", "print", "fine")])
    assert [r.text for r in scored.groups[0].rollouts if r.rewarded] == ["fine", "print", "fine"]
    assert [r.failures["strange"].split(":")[0] for r in scored.failed] == ["died", "died"]


def test_a_worker_killed_from_outside_is_replaced(tmp_path: Path) -> None:
    with stack(strange("killed_once")) as rewards:
        scored = rewards([group("x", mark=str(tmp_path / "mark"))])
    assert scored.groups[0].rollouts[0].reward == 7


def test_errors_stop_the_run_with_what_was_raised() -> None:
    with stack(strange("strange"), max_errors=3) as rewards:
        rewards([group("fine", "raise", "raise")])
        with pytest.raises(RewardError, match=r"'strange' failed too often: 3 errors.*") as error:
            rewards([group("raise")])
    assert "this one raises" in str(error.value) and "on_error: exclude" in str(error.value)
    with stack(strange("strange"), on_error="exclude") as rewards, pytest.raises(RewardError, match="not worked once"):
        rewards([group("raise")])


def test_a_reward_that_is_not_there_says_so_before_anything_runs() -> None:
    with pytest.raises(RewardError, match="no_such_module"):
        stack({"kind": "function", "function": "no_such_module:f"})
    with pytest.raises(RewardError, match="nothing_here"):
        stack({"kind": "function", "function": "tests.rewards.strange:nothing_here"})


def test_results_do_not_depend_on_the_process_that_made_them() -> None:
    """Random states and hash seeds are the same for every call, in every worker."""
    results = []
    for workers in (1, 3):
        with stack(strange("draws"), workers=workers) as rewards:
            scored = rewards([group(*"abcdefgh"), group(*"ij")])
            results.append([[r.reward for r in g.rollouts] for g in scored.groups])
    assert results[0] == results[1] and len({v for g in results[0] for v in g}) == 1


def test_group_rewards_and_scorers() -> None:
    def scorer(prompts: list[str], texts: list[str]) -> list[float]:
        if any(t == "bad" for t in texts):
            raise RuntimeError("can't score")
        return [len(p) + len(t) for p, t in zip(prompts, texts, strict=True)]

    parts = [strange("ranks", group=True), {"kind": "preference", "scorer": "s"}]
    with stack(*parts, functions={"s": scorer}, on_error="exclude") as rewards:
        scored = rewards([group("b", "a"), group("x", "bad", "none")])
        assert [dict(r.rewards) for r in scored.groups[0].rollouts] == [
            {"ranks": 1, "preference": 4},
            {"ranks": 0, "preference": 4},
        ]
        # A batch that raises is asked again one by one: only the bad one is left out; so is the group reward's None.
        assert [r.text for r in scored.groups[1].rollouts if r.rewarded] == ["x"]
        assert [sorted(r.failures) for r in scored.failed] == [["preference"], ["ranks"]]
        short = rewards([group("a", "b", short=True)])
        assert "expected 2 numbers" in short.failed[0].failures["ranks"]
        assert rewards([]).groups == []


def test_a_single_answer_agrees_with_none_and_that_is_no_fault() -> None:
    """Held-out problems are answered once: self-consistency has no opinion of these, other parts have theirs."""
    parts = [
        {"kind": "self_consistency", "name": "agree", "extract": "last_line"},
        {"kind": "exact", "name": "right", "weight": 0.5},
    ]
    with stack(*parts) as rewards:
        scored = rewards([group("4"), group("4", "4", "5")])
    (alone,), (a, b, c) = (g.rollouts for g in scored.groups)
    assert dict(alone.rewards) == {"right": 1} and alone.reward == 0.5 and not scored.failed
    assert [dict(r.rewards)["agree"] for r in (a, b, c)] == [0.5, 0.5, 0]
    assert [a.reward, b.reward, c.reward] == [1.0, 1.0, 0.0]
    assert rewards.accounts["agree"].scored == 3 and rewards.accounts["agree"].errors == 0
