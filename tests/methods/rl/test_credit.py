"""What an environment wrote counts for nothing; what steps earned goes to the tokens that led to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import RLConfig, SystemsConfig
from posttrain.config.rl import RL_PRESETS
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.methods.rl.collect_rollouts import has_signal
from posttrain.methods.rl.compute_advantages import outcome_reward
from posttrain.methods.rl.sequence_logprobs import forward_batches
from posttrain.sampling.rollout_store import groups_of, read_rollouts, write_rollouts
from posttrain.trainer.train_step import Learner
from tests.methods.rl.cases import Case, fill_advantages, loss_of
from tests.methods.rl.test_policy_gradient import batch_of, capture, model, plain_logprobs, settings


def learnt(method: str, rolled: list[Case], values: Any = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """Metrics and gradients of one step with everything on: KL, entropy, importance weights."""
    config = settings(method, mini_batches=2, kl={"coefficient": 0.1}, entropy_coef=0.01, importance_sampling_cap=2.0)
    lm = model()
    if config.critic is not None:
        lm.add_value_head()
    for r in rolled:
        r.old = r.sampled()
        r.reference = r.old - 0.1
        r.values = torch.linspace(0, 1, r.length)
    fill_advantages(config, rolled, greedy=[0.5, 1.0, 0.0])
    learner = Learner(lm, config.optimizer, SystemsConfig(), 1)
    gradients = capture(learner)
    result = learner.step([r.sample(i) for i, r in enumerate(rolled)], loss_of(config, rolled, True))
    return result.metrics, gradients


@pytest.mark.parametrize("method", sorted(RL_PRESETS))
def test_what_the_environment_wrote_is_context_alone(method: str) -> None:
    """Every number of the step is the same whatever log-probability and advantage its tokens might have had, and the
    same as when its tokens are the prompt's: a reply at the very beginning is a longer prompt."""
    plain, led = batch_of(), batch_of()
    for a, b in zip(plain, led, strict=True):
        reply = [7, 8, 9]
        a.prompt = [*a.prompt, *reply]
        r = b.rollout
        b.rollout = Rollout(
            [*reply, *r.tokens],
            [-50.0] * 3 + list(r.logprobs),
            r.finish,
            reward=r.reward,
            mask=[False] * 3 + [True] * len(r.tokens),
        )
        assert b.length == a.length and b.rollout.own == list(range(3, 3 + a.length))
    (first, gradients), (second, others) = learnt(method, plain), learnt(method, led)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name
    for name, g in gradients.items():
        torch.testing.assert_close(others[name], g, atol=1e-6 * float(g.abs().max() + 1), rtol=1e-4)


def test_passes_give_the_log_probabilities_of_own_tokens_alone() -> None:
    lm, rolled = model(), batch_of(replies=True)
    assert any(r.rollout.mask for r in rolled)
    for places, batch, targets in forward_batches(lm, [r.sequence for r in rolled], 100):
        out, mine = lm(batch, "logprobs", targets, temperature=0.7)[0], [rolled[i] for i in places]
        for r, part in zip(mine, out.split([r.length for r in mine]), strict=True):
            torch.testing.assert_close(part, plain_logprobs(lm, r, 0.7), atol=2e-5, rtol=0)


# --- steps ------------------------------------------------------------------------------------------------------------


def stepwise(method: str, outcome_weight: float = 1.0, step_weight: float = 0.5, **changes: Any) -> RLConfig:
    parts = [
        {"kind": "exact", "name": "right", "weight": outcome_weight},
        {"kind": "function", "name": "steps", "function": "f", "weight": step_weight},
    ]
    return settings(method, rewards={"terms": parts}, **changes)


def rollout(right: float, length: int, *steps: tuple[int, int, float], mask: list[bool] | None = None) -> Rollout:
    mean = sum(s[2] for s in steps) / len(steps) if steps else 0.0
    rewards = {"right": right, "steps": mean}
    return Rollout([5] * length, [-1.0] * length, "end", "", rewards, right + 0.5 * mean, mask, {"steps": steps})


def group() -> list[Case]:
    """Right, with steps 1 and 0 of two tokens each and a token more; wrong, with one step 1 of all its three."""
    return [Case([3], rollout(1.0, 5, (0, 2, 1.0), (2, 4, 0.0)), 0), Case([3], rollout(0.0, 3, (0, 3, 1.0)), 0)]


def advantages(config: RLConfig, rolled: list[Case], **given: Any) -> list[list[float]]:
    fill_advantages(config, rolled, **given)
    return [r.advantages.tolist() for r in rolled]


def test_grpo_by_hand() -> None:
    # Outcomes 1, 0: +-0.5 / (sqrt(0.5) + 1e-4). Steps 1, 0, 1: mean 2/3, deviation sqrt(1/3); weight 0.5.
    a = 0.5 / (0.5**0.5 + 1e-4)
    s = 1 / ((1 / 3) ** 0.5 + 1e-4)
    good, bad = 0.5 * s / 3, -0.5 * s * 2 / 3
    got = advantages(stepwise("grpo"), group())
    assert got[0] == pytest.approx([a + good + bad, a + good + bad, a + bad, a + bad, a], rel=1e-5)
    assert got[1] == pytest.approx([-a + good] * 3, rel=1e-5)


def test_dr_grpo_rloo_reinforce_and_remax_by_hand() -> None:
    # Dr. GRPO: outcomes +-0.5; steps less 2/3: 1/3, -2/3, 1/3, times 0.5.
    got = advantages(stepwise("dr_grpo"), group())
    assert got[0] == pytest.approx([0.5 - 1 / 6] * 2 + [0.5 - 1 / 3] * 2 + [0.5], abs=1e-6)
    assert got[1] == pytest.approx([-0.5 + 1 / 6] * 3, abs=1e-6)
    # RLOO: outcomes +-1; steps of the first less 1 (the other's): 0, -1; of the second less 0.5: 0.5.
    got = advantages(stepwise("rloo"), group())
    assert got[0] == pytest.approx([0.5, 0.5, 0.5, 0.5, 1.0], abs=1e-6)
    assert got[1] == pytest.approx([-1 + 0.25] * 3, abs=1e-6)
    # REINFORCE: outcomes less a baseline of 0.25; ReMax: less a greedy answer of 1. Steps less the batch's 2/3.
    for method, given, b in (("reinforce", {"baseline": 0.25}, 0.25), ("remax", {"greedy": [1.0]}, 1.0)):
        got = advantages(stepwise(method), group(), **given)
        assert got[0] == pytest.approx([1 - b - 1 / 6] * 2 + [1 - b - 1 / 3] * 2 + [1 - b], abs=1e-6)
        assert got[1] == pytest.approx([-b + 1 / 6] * 3, abs=1e-6)


def test_reinforce_pp_and_ppo_by_hand() -> None:
    """Token rewards: 0.5 times the score at the step's last token, the outcome at the last token of all."""
    # First: rewards 0, 0.5, 0, 0, 1: to go 1.5, 1.5, 1, 1, 1. Second: 0, 0, 0.5 + 0: 0.5 each.
    returns = torch.tensor([1.5, 1.5, 1, 1, 1, 0.5, 0.5, 0.5], dtype=torch.float64)
    white = ((returns - returns.mean()) / returns.std()).tolist()
    got = advantages(stepwise("reinforce_pp"), group())
    assert got[0] + got[1] == pytest.approx(white, rel=1e-5)
    rolled = group()
    for r in rolled:
        r.values = torch.zeros(r.length)
    got = advantages(stepwise("ppo"), rolled)
    assert got[0] + got[1] == pytest.approx(white, rel=1e-5)
    assert torch.cat([r.returns for r in rolled]).tolist() == pytest.approx(returns.tolist())  # type: ignore[misc]
    # With the baseline of the group: centred outcome +-0.5 and steps as in Dr. GRPO, whitened.
    raw = torch.tensor([0.5 - 1 / 6] * 2 + [0.5 - 1 / 3] * 2 + [0.5] + [-0.5 + 1 / 6] * 3, dtype=torch.float64)
    got = advantages(stepwise("reinforce_pp_baseline"), group())
    assert got[0] + got[1] == pytest.approx(((raw - raw.mean()) / raw.std()).tolist(), rel=1e-4)


def test_a_step_ends_with_the_last_of_its_tokens_that_the_model_wrote() -> None:
    """Tokens 1, 2 are the environment's: the step of tokens 0-2 ends with token 0, that of 1-2 alone counts nowhere."""
    mask = [True, False, False, True]
    rolled = [
        Case([3], rollout(0.0, 4, (0, 3, 1.0), (1, 3, 9.0), (3, 4, 0.0), mask=mask), 0),
        Case([3], rollout(0.0, 2, (0, 2, 0.5)), 0),
    ]
    got = advantages(stepwise("dr_grpo", step_weight=1.0), rolled)
    assert got == [pytest.approx([0.5 - 0.5, -0.5], abs=1e-6), pytest.approx([0, 0], abs=1e-6)]


def test_steps_alike_teach_nothing_and_outcomes_alike_do_not_hide_steps() -> None:
    same = [Case([3], rollout(1.0, 2, (0, 1, 0.3), (1, 2, 0.3)), 0), Case([3], rollout(1.0, 3, (0, 3, 0.3)), 0)]
    assert not has_signal([r.rollout for r in same])
    for method in ("grpo", "dr_grpo", "rloo"):
        advantages(stepwise(method), same)
        assert not any(r.signal for r in same)
    differ = [Case([3], rollout(1.0, 2, (0, 1, 1.0), (1, 2, 0.0)), 0), Case([3], rollout(1.0, 3, (0, 3, 0.5)), 0)]
    assert outcome_reward(stepwise("grpo"), differ[0].rollout) == 1.0
    assert differ[0].rollout.reward == differ[1].rollout.reward and has_signal([r.rollout for r in differ])
    got = advantages(stepwise("grpo"), differ)
    assert any(got[0]) and not any(got[1])
    # Weight 0: logged, not learnt from.
    assert not any(map(any, advantages(stepwise("grpo", step_weight=0.0), differ)))


@pytest.mark.parametrize("method", ["gspo", "rloo"])
def test_a_ratio_of_the_whole_sequence_leaves_each_token_its_own_advantage(method: str) -> None:
    """-sum_t sg[s] A_t grad log pi(y_t), by a loop, off the policy that sampled."""
    config = stepwise(method, mini_batches=2, clip={"low": 1.0, "high": 100.0})
    rolled, lm = batch_of(), model()
    for i, r in enumerate(rolled):
        n = len(r.rollout.tokens)
        steps = ((0, (n + 1) // 2, float(i % 2)), ((n + 1) // 2, n, 0.25 * (i % 3))) if n > 1 else ((0, 1, 1.0),)
        rewards = {"right": r.rollout.reward, "steps": 0.0}
        r.rollout = Rollout(
            r.rollout.tokens, r.rollout.logprobs, "end", "", rewards, r.rollout.reward, None, {"steps": steps}
        )
        r.old = r.sampled()
    fill_advantages(config, rolled)
    assert any(len(set(r.advantages.tolist())) > 1 for r in rolled)
    learner = Learner(lm, config.optimizer, SystemsConfig(), 1)
    captured = capture(learner)
    samples = [r.sample(i) for i, r in enumerate(rolled)]
    learner.step([s for s in samples if any(s.weights)], loss_of(config, rolled, False))
    lm.zero_grad()
    total = torch.zeros(())
    for r in rolled:
        logp = plain_logprobs(lm, r, 1.0)
        log_ratio = (logp - r.sampled()).detach()
        ratio = log_ratio.mean().exp() if method == "gspo" else log_ratio.sum().exp()
        surrogate = -(ratio * r.advantages * logp).sum() / len(rolled)
        total = total + (surrogate / r.length if method == "gspo" else surrogate)
    total.backward()
    for name, p in lm.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(captured[name], p.grad, atol=1e-5 * float(p.grad.abs().max()), rtol=1e-3, msg=name)


def test_masks_and_steps_are_kept_and_old_files_read(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    there = [rollout(1.0, 3, (0, 2, 0.25), mask=[True, False, True]), rollout(0.0, 2)]
    path = write_rollouts(tmp_path, 1, [RolloutGroup((1, 2), {"answer": "x"}, there)], None, ["p"], [0])
    (back,) = groups_of(read_rollouts(path))
    assert [r.mask for r in back.rollouts] == [[True, False, True], None]
    assert [dict(r.steps) for r in back.rollouts] == [{"steps": [(0, 2, 0.25)]}, {"steps": []}]
    old = pq.read_table(path).drop_columns(["mask", "steps"])
    pq.write_table(old, tmp_path / "step-000002.parquet")
    rows = read_rollouts(tmp_path / "step-000002.parquet")
    assert (
        rows[0]["mask"] is None
        and rows[0]["steps"] == {}
        and rows[0]["parts"] == json.loads('{"right": 1, "steps": 0.25}')
    )
    with pytest.raises(ValueError, match="3 tokens has a mask of 1"):
        Rollout([1, 2, 3], [0.0] * 3, "end", mask=[True])
