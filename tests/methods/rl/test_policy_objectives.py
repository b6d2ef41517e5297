"""What the settings of a method do to its loss: `methods.rl.policy_objectives` against loops over tokens.

The loops are the formulas of docs/policy-gradients.md on plain numbers, with the model's own forward pass, and call
nothing of `posttrain.losses`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from posttrain.config import RLConfig, SystemsConfig
from posttrain.config.rl import RL_PRESETS
from posttrain.core.types import Rollout
from posttrain.methods.rl.rl_loss import Extremes
from posttrain.models.language_model import LanguageModel
from posttrain.trainer.train_step import Learner
from tests.methods.rl.cases import Case, fill_advantages, loss_of
from tests.methods.rl.test_policy_gradient import (
    GREEDY,
    MAX,
    batch_of,
    capture,
    model,
    picked_logprobs,
    plain_pass,
    settings,
)

TEMPERATURE = 0.8
BASELINE = 0.3
"""REINFORCE's moving average."""

SEQUENCES = ("rloo", "reinforce", "remax")
"""Methods whose ratio is the whole sequence's, and which have none on a single update."""

ESTIMATORS = ("k1", "k2", "k3")


def some_pairs(values: Sequence[str], *methods: str) -> list[tuple[str, str]]:
    """All values with each of these methods; with every other method one of them, in turn."""
    every = [(m, v) for m in methods for v in values]
    others = [m for m in sorted(RL_PRESETS) if m not in methods]
    return every + [(m, values[i % len(values)]) for i, m in enumerate(others)]


# --- the loops --------------------------------------------------------------------------------------------------------


def aggregations(method: str) -> dict[str, str]:
    """Our names, by what they do: of the methods whose ratio is a sequence's, sums are not divided by the limit."""
    constant = "seq-mean-token-sum" if method in SEQUENCES else "seq-mean-token-sum-norm"
    return {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": constant}


def test_methods_are_what_their_papers_have() -> None:
    """The clip, and what a token counts, where a recipe says nothing."""
    clips = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
    kinds = {"grpo": "sequence", "gspo": "sequence", "dr_grpo": "constant", **dict.fromkeys(SEQUENCES, "constant")}
    for method in RL_PRESETS:
        config = settings(method)
        assert (config.clip.low, config.clip.high, config.clip.dual) == (*clips.get(method, (0.2, 0.2)), None)
        assert config.loss_aggregation == aggregations(method)[kinds.get(method, "token")]
        assert RLConfig.model_validate(config.model_dump(mode="json")) == config


def once(config: RLConfig) -> bool:
    """A single update by fresh samples: there is no older policy, and every ratio is 1."""
    return config.mini_batches * config.ppo_epochs == 1 and config.exploration.partial_rollouts is None


def of_own(rolled: Case) -> list[float]:
    """The sampler's log-probabilities of what the model wrote."""
    wrote = rolled.rollout.mask or [True] * len(rolled.rollout.tokens)
    return [p for p, mine in zip(rolled.rollout.logprobs, wrote, strict=True) if mine]


def divergence(estimator: str, d: Any) -> Any:
    """d: log pi - log reference, a number or a tensor."""
    return {"k1": d, "k2": d * d / 2, "k3": math.e ** (-d) - 1 + d}[estimator]


def beta_at(config: RLConfig, rolled: Case, token: int) -> float:
    """Beta at a token that the model wrote: another one after the environment's first reply."""
    wrote = [i for i, mine in enumerate(rolled.rollout.mask or [True] * rolled.length) if mine]
    replied = rolled.rollout.mask is not None and not all(rolled.rollout.mask[: wrote[token]])
    return config.kl.coefficient * (config.kl.later_turns if replied else 1.0)


def slow_advantages(config: RLConfig, rolled: Sequence[Case]) -> tuple[list[list[float]], list[list[float]]]:
    """(advantage of each token, return of each token: of PPO alone), by completion."""
    name, gamma = config.method, config.advantages.settings.get("gamma", 1.0)
    lam = config.advantages.settings.get("gae_lambda", 1.0)
    penalties = [[0.0] * r.length for r in rolled]
    if config.kl.where == "reward":
        for i, r in enumerate(rolled):
            before = of_own(r) if r.old is None else r.old.tolist()
            for t, reference in enumerate(r.reference.tolist()):  # type: ignore[union-attr]
                penalties[i][t] = beta_at(config, r, t) * divergence(config.kl.estimator.name, before[t] - reference)
    by_token = name in ("reinforce_pp", "ppo")
    rewards = [r.rollout.reward - (0 if by_token else sum(p)) for r, p in zip(rolled, penalties, strict=True)]
    out, returns = [], []
    for i, r in enumerate(rolled):
        n, mates = r.length, [x for x, y in zip(rewards, rolled, strict=True) if y.group == r.group]
        mean, mine = statistics.fmean(mates), rewards[i]
        earned = [(mine if t == n - 1 else 0.0) - penalties[i][t] for t in range(n)]
        if name in ("grpo", "dapo", "gspo", "cispo"):
            row = [(mine - mean) / (statistics.stdev(mates) + 1e-4)] * n
        elif name in ("dr_grpo", "reinforce_pp_baseline"):
            row = [mine - mean] * n
        elif name == "rloo":
            row = [mine - (sum(mates) - mine) / (len(mates) - 1)] * n
        elif name == "remax":
            row = [mine - GREEDY[r.group]] * n
        elif name == "reinforce":
            row = [mine - BASELINE] * n
        elif name == "reinforce_pp":
            row = [sum(gamma ** (k - t) * earned[k] for k in range(t, n)) for t in range(n)]
        else:
            v = [*r.values.tolist(), 0.0]  # type: ignore[union-attr]
            delta = [earned[t] + gamma * v[t + 1] - v[t] for t in range(n)]
            row = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
            returns.append([a + b for a, b in zip(row, v[:n], strict=True)])
        out.append(row)
    if by_token or name == "reinforce_pp_baseline":
        everything = [a for row in out for a in row]
        mean, s = statistics.fmean(everything), statistics.stdev(everything)
        out = [[(a - mean) / (s + 1e-8) for a in row] for row in out]
    return out, returns


def seen(config: RLConfig, lm: LanguageModel, cases: Sequence[Case]) -> list[list[tuple[Any, Any, Any]]]:
    """(log-probability, entropy, value) at each token that the model wrote, by transformers' own pass."""
    out, found = plain_pass(lm, cases), []
    for rolled, logits, hidden in zip(cases, out.logits, out.hidden_states[-1], strict=True):
        hidden = hidden.detach() if config.critic is None or config.critic.detach else hidden
        logs, tokens, row = (logits / TEMPERATURE).log_softmax(-1), [*rolled.prompt, *rolled.rollout.tokens], []
        for i in range(len(rolled.prompt), len(tokens)):
            if rolled.rollout.mask is None or rolled.rollout.mask[i - len(rolled.prompt)]:
                value = None
                if lm.value is not None:
                    value = (lm.value.weight[0] * hidden[i - 1]).sum() / math.sqrt(len(hidden[0])) + lm.value.bias[0]
                row.append((logs[i - 1, tokens[i]], -(logs[i - 1].exp() * logs[i - 1]).sum(), value))
        found.append(row)
    return found


def slow_token(config: RLConfig, a: float, logp: Any, ratio: Any) -> Any:
    """The policy's loss at a token."""
    name = config.method
    if name in SEQUENCES and once(config):
        return -a * logp
    low, high = config.clip.low, config.clip.high
    if name == "cispo":
        return -min(max(float(ratio), 1 - low, 0.0), 1 + high) * a * logp
    gain = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
    if config.clip.dual is not None and a < 0:
        gain = max(gain, config.clip.dual * a)
    return -gain


def slow(config: RLConfig, lm: LanguageModel, rolled: Sequence[Case]) -> Any:
    """The whole loss."""
    name, beta = config.method, config.kl.coefficient if config.kl.where == "loss" else 0.0
    kind, tokens = {v: k for k, v in aggregations(name).items()}[config.loss_aggregation], sum(r.length for r in rolled)
    if name in SEQUENCES and kind == "constant" and not once(config):
        kind = "sequence"
    advantages, returns = slow_advantages(config, rolled)
    total, outputs = torch.zeros(()), seen(config, lm, rolled)
    for i, r in enumerate(rolled):
        if config.mask_truncated and r.rollout.finish in ("length", "turns"):
            continue
        found, n = outputs[i], r.length
        old = [float(logp) for logp, *_ in found] if r.old is None else r.old.tolist()
        product = sum(logp - b for (logp, *_), b in zip(found, old, strict=True))
        for t, (logp, entropy, value) in enumerate(found):
            log_ratio = product if name in SEQUENCES else product / n if name == "gspo" else logp - old[t]
            loss = slow_token(config, advantages[i][t], logp, log_ratio.exp())
            if config.importance_sampling_cap is not None:
                loss = loss * min(math.exp(old[t] - of_own(r)[t]), config.importance_sampling_cap)
            if beta:
                reference = float(r.reference[t])  # type: ignore[index]
                loss = loss + beta_at(config, r, t) * divergence(config.kl.estimator.name, logp - reference)
            loss = loss - config.entropy_coef * entropy
            if kind == "token":
                total = total + loss / tokens
            elif kind == "sequence":
                total = total + loss / n / len(rolled)
            else:
                total = total + loss / (1 if name in SEQUENCES else MAX) / len(rolled)
            if name == "ppo":
                before, error = float(r.values[t]), (value - returns[i][t]) ** 2  # type: ignore[index]
                if config.critic.clip is not None:
                    held = before + min(max(value - before, -config.critic.clip), config.critic.clip)
                    error = max(error, (held - returns[i][t]) ** 2)
                total = total + config.critic.coefficient * error / 2 / tokens
    return total


# --- what is held to them ---------------------------------------------------------------------------------------------


@cache
def learner(critic: bool) -> Learner:
    """One for all tests: its updates are captured, so that the weights stay."""
    lm = model()
    if critic:
        lm.add_value_head()
        with torch.no_grad():
            for p in lm.value.parameters():  # type: ignore[union-attr]
                p.normal_(generator=torch.Generator().manual_seed(1))
    return Learner(lm, settings("grpo").optimizer, SystemsConfig(tokens_per_micro_batch=60), 1)


@cache
def logprobs_now(replies: bool) -> list[torch.Tensor]:
    """Of the batch's completions, by the model."""
    cases = batch_of(size=3, replies=replies)
    with torch.no_grad():
        logits = plain_pass(learner(False).model, cases).logits
    return [picked_logprobs(c, row, TEMPERATURE) for c, row in zip(cases, logits, strict=True)]


def setup(method: str, replies: bool = False, **changes: Any) -> tuple[RLConfig, LanguageModel, list[Case]]:
    """Two updates unless said otherwise. Older policy, sampler, reference and critic all differ from the model."""
    sampling = {"max_tokens": MAX, "temperature": TEMPERATURE}
    config = settings(method, **{"mini_batches": 2, "sampler": sampling, **changes})
    g, rolled = torch.Generator().manual_seed(2), batch_of(size=3, replies=replies)
    for r, now in zip(rolled, logprobs_now(replies), strict=True):
        moved = 0.25 * torch.randn(r.length, generator=g) + 0.15 * (1 - r.group)  # sequences' ratios on both sides
        r.old = None if once(config) else now + moved
        r.reference = now + 0.5 * torch.randn(r.length, generator=g)
        r.values = torch.randn(r.length, generator=g)
    return config, learner(method == "ppo").model, rolled


def learnt(
    config: RLConfig, lm: LanguageModel, rolled: Sequence[Case], extremes: Extremes | None = None
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of the step, in several micro-batches."""
    fill_advantages(config, rolled, BASELINE, GREEDY)
    lm.zero_grad()
    one = learner(config.method == "ppo")
    assert one.model is lm and one.optimizer.config == config.optimizer
    gradients = capture(one)
    result = one.step([r.sample(i) for i, r in enumerate(rolled)], loss_of(config, rolled, once(config), extremes))
    assert result.micro_batches > 1
    return result.metrics, gradients


def check(config: RLConfig, lm: LanguageModel, rolled: Sequence[Case]) -> dict[str, float]:
    """Loss and every gradient are the loops'; the step's metrics."""
    metrics, gradients = learnt(config, lm, rolled)
    lm.zero_grad()
    expected = slow(config, lm, rolled)
    expected.backward()
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5, abs=2e-6)
    for name, p in lm.named_parameters():
        assert p.grad is not None and bool(p.grad.any())
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-4 * float(p.grad.abs().max()), rtol=1e-4, msg=name)
    return metrics


@pytest.mark.parametrize("method", [m for m in RL_PRESETS if m != "ppo"])
@pytest.mark.parametrize(("updates", "replies"), [(1, False), (2, True)])
def test_loss_and_gradient_equal_a_slow_loop(method: str, updates: int, replies: bool) -> None:
    """Two updates without replies: the tests below."""
    check(*setup(method, replies, mini_batches=updates))


@pytest.mark.parametrize(("method", "updates"), [("grpo", 2), ("rloo", 1), ("rloo", 2), ("ppo", 1)])
def test_the_entropy_bonus_is_taken_off_the_loss(method: str, updates: int) -> None:
    check(*setup(method, mini_batches=updates, entropy_coef=0.2))


@pytest.mark.parametrize(
    ("method", "replies"), [("grpo", False), ("cispo", True), ("rloo", False), ("rloo", True), ("ppo", True)]
)
def test_importance_weights_multiply_the_policy_s_loss_alone(method: str, replies: bool) -> None:
    """Where KL and entropy are, which have no such weight."""
    changes: dict[str, Any] = {"importance_sampling_cap": 1.1, "kl": {"coefficient": 0.3}, "entropy_coef": 0.1}
    assert 0.1 < check(*setup(method, replies, **changes))["importance_truncated"] < 0.9
    if method == "rloo":  # without a ratio: by what the model says now
        assert 0.1 < check(*setup(method, replies, **changes, mini_batches=1))["importance_truncated"] < 0.9


@pytest.mark.parametrize("method", ["grpo", "gspo", "rloo", "reinforce_pp", "ppo"])
def test_the_dual_clip_bounds_the_loss(method: str) -> None:
    assert 0 < check(*setup(method, clip={"dual": 1.05}))["clip_dual"] < 0.9


@pytest.mark.parametrize(
    ("method", "clip"),
    [
        *((m, {}) for m in ("grpo", "dapo", "gspo", "cispo", "remax", "ppo")),
        *((m, {"low": 0.05}) for m in ("grpo", "cispo", "remax")),
        *((m, {"high": 0.05}) for m in ("dapo", "gspo", "cispo", "ppo")),
    ],
)
def test_the_clips_of_the_method_or_the_recipe(method: str, clip: dict[str, Any]) -> None:
    metrics = check(*setup(method, clip=clip, ppo_epochs=2, mini_batches=1))
    assert all(metrics[f"clip_{name}"] > 0 for name in clip)


def test_what_was_carried_over_has_a_ratio_on_a_single_update() -> None:
    for method in ("rloo", "grpo"):
        assert check(*setup(method, mini_batches=1, exploration={"partial_rollouts": 4}))["clip_fraction"] > 0


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_reinforce_pp_discounts(gamma: float) -> None:
    check(*setup("reinforce_pp", advantages={"gamma": gamma}))


@pytest.mark.parametrize(("gamma", "lam"), [(0.8, 1.0), (0.9, 0.6), (1.0, 0.0)])
def test_ppo_s_advantages_and_returns(gamma: float, lam: float) -> None:
    config, lm, rolled = setup("ppo", advantages={"gamma": gamma, "gae_lambda": lam})
    metrics = check(config, lm, rolled)
    assert 0.05 < metrics["clip_fraction"] < 0.95
    advantages, returns = slow_advantages(config, rolled)
    for r, a, b in zip(rolled, advantages, returns, strict=True):
        assert r.advantages.tolist() == pytest.approx(a, abs=1e-5) and r.returns is not None
        assert r.returns.tolist() == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize(
    ("trunk", "clip", "coefficient"),
    [("probe", None, 0.5), ("probe", 0.5, 2.0), ("shared", None, 2.0), ("shared", 0.5, 0.5)],
)
def test_ppo_s_critic(trunk: str, clip: float | None, coefficient: float) -> None:
    def changes(coefficient: float) -> dict[str, Any]:
        critic = {"detach": trunk == "probe", "clip": clip, "coefficient": coefficient}
        return {"critic": critic, "advantages": {"gamma": 0.9, "gae_lambda": 0.8}}

    metrics = check(*setup("ppo", **changes(coefficient)))
    assert ("value_clip" in metrics) == (clip is not None)
    assert clip is None or 0.1 < metrics["value_clip"] < 0.9
    if coefficient == 2.0:  # what reaches the trunk
        _, alone = learnt(*setup("ppo", **changes(0.0)))
        _, both = learnt(*setup("ppo", **changes(coefficient)))
        for name in alone:
            if name.startswith("value."):
                assert not alone[name].any() and bool(both[name].any())
            elif trunk == "probe" or "lm_head" in name:
                torch.testing.assert_close(alone[name], both[name])
            else:
                assert float((alone[name] - both[name]).abs().max()) > 1e-3 * float(alone[name].abs().max())


def test_the_critic_learns_where_all_advantages_are_zero() -> None:
    config, lm, rolled = setup("ppo")
    for r in rolled:
        r.rollout, r.values = replace(r.rollout, reward=1.0), torch.zeros(r.length)
    metrics, gradients = learnt(config, lm, rolled)
    lm.zero_grad()
    expected = slow(config, lm, rolled)
    expected.backward()
    assert not any(r.advantages.any() for r in rolled) and metrics["loss"] == pytest.approx(float(expected))
    torch.testing.assert_close(gradients["value.weight"], lm.value.weight.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("method", "estimator"),
    [
        *(("grpo", e) for e in ESTIMATORS),
        ("dr_grpo", "k1"),
        ("rloo", "k2"),
        ("reinforce_pp_baseline", "k3"),
        ("ppo", "k3"),
    ],
)
def test_kl_in_the_loss(method: str, estimator: str) -> None:
    """Of every completion, those whose rewards teach nothing among them."""
    check(*setup(method, kl={"coefficient": 0.3, "estimator": estimator}))


@pytest.mark.parametrize(("method", "estimator"), some_pairs(ESTIMATORS, "grpo", "reinforce_pp", "ppo"))
def test_kl_in_the_reward(method: str, estimator: str) -> None:
    """Of a whole completion; REINFORCE++ and PPO: of each token, discounted with the rest.

    It is the older policy's where there is one, and the sampler's where there is not.
    """
    changes: dict[str, Any] = {"advantages": {"gamma": 0.9}} if method in ("reinforce_pp", "ppo") else {}
    changes["kl"] = {"coefficient": 0.3, "estimator": estimator, "where": "reward"}
    config, lm, rolled = setup(method, **changes, mini_batches=1 if estimator == "k1" else 2)
    check(config, lm, rolled)
    advantages, _ = slow_advantages(config, rolled)
    for r, a in zip(rolled, advantages, strict=True):
        assert r.advantages.tolist() == pytest.approx(a, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "aggregation"), some_pairs(["constant", "token", "sequence"], "grpo", "gspo", "rloo", "ppo")
)
def test_what_a_token_counts(method: str, aggregation: str) -> None:
    """Of all terms of the loss but the critic's, which is a mean over tokens."""
    changes: dict[str, Any] = {
        "loss_aggregation": aggregations(method)[aggregation],
        "kl": {"coefficient": 0.1},
        "entropy_coef": 0.05,
    }
    check(*setup(method, **changes, mini_batches=1 if method in SEQUENCES else 2))


@pytest.mark.parametrize("method", SEQUENCES)
def test_what_a_token_counts_with_ratios_of_sequences(method: str) -> None:
    for aggregation in (None, *aggregations(method).values()) if method == "rloo" else (None,):
        check(*setup(method, loss_aggregation=aggregation))


def test_dr_grpo_divides_by_the_limit() -> None:
    for aggregation in (None, "seq-mean-token-sum-norm"):
        check(*setup("dr_grpo", loss_aggregation=aggregation))


@pytest.mark.parametrize("method", ["grpo", "reinforce_pp", "ppo"])
@pytest.mark.parametrize("where", ["loss", "reward"])
def test_what_an_environment_wrote_is_context(method: str, where: str) -> None:
    """With everything on."""
    kl = {"coefficient": 0.3, "where": where, "estimator": "k2"}
    changes: dict[str, Any] = {"kl": kl, "entropy_coef": 0.1, "clip": {"dual": 1.1}, "importance_sampling_cap": 1.1}
    if method != "grpo":
        changes["advantages"] = {"gamma": 0.9}
    if method == "ppo":
        changes |= {"advantages": {"gamma": 0.9, "gae_lambda": 0.8}, "critic": {"clip": 0.5, "detach": False}}
    check(*setup(method, True, **changes))


@pytest.mark.parametrize(
    ("method", "where", "later"),
    [
        ("grpo", "loss", 0.0),
        ("grpo", "reward", 0.2),
        ("rloo", "loss", 0.2),
        ("reinforce", "reward", 0.0),
        ("reinforce_pp", "reward", 0.2),
        ("ppo", "loss", 0.2),
        ("ppo", "reward", 0.0),
    ],
)
def test_the_penalty_of_later_turns_has_a_factor(method: str, where: str, later: float) -> None:
    kl = {"coefficient": 0.3, "where": where, "estimator": "k2", "later_turns": later}
    config, lm, rolled = setup(method, True, kl=kl, environment={"kind": "calculator"})
    check(config, lm, rolled)
    assert len({beta_at(config, r, t) for r in rolled for t in range(r.length)}) == 2


@pytest.mark.parametrize(("method", "of"), [("grpo", "token"), ("gspo", "mean"), ("rloo", "sum")])
def test_the_largest_ratio_is_the_method_s_own(method: str, of: str) -> None:
    config, lm, rolled = setup(method)
    extremes, ratios = Extremes(), []
    learnt(config, lm, rolled, extremes)
    for r, now in zip(rolled, logprobs_now(False), strict=True):
        moved = now - r.old
        if r.signal:
            ratios.append(float({"token": moved.max(), "mean": moved.mean(), "sum": moved.sum()}[of].exp()))
    assert extremes.metrics()["ratio_max"] == pytest.approx(max(ratios), rel=1e-5) and max(ratios) > 1


@pytest.mark.parametrize(
    ("method", "mask"), [*((m, True) for m in ("grpo", "dapo", "rloo", "reinforce_pp", "ppo")), ("grpo", False)]
)
def test_what_was_cut_off_teaches_nothing(method: str, mask: bool) -> None:
    """It stays in its group's mean and in the batch's counts."""
    config, lm, rolled = setup(method, mask_truncated=mask, kl={"coefficient": 0.1}, entropy_coef=0.05)
    for i, finish in ((1, "length"), (4, "length"), (6, "turns"), (7, "stop")):
        rolled[i].rollout = replace(rolled[i].rollout, finish=finish)
    check(config, lm, rolled)
    assert [i for i, r in enumerate(rolled) if not r.signal] == ([1, 4, 6] if mask else [])


@pytest.mark.parametrize("method", ["grpo", "dapo", "reinforce", "reinforce_pp", "ppo"])
def test_an_empty_completion_counts_in_means(method: str) -> None:
    config, lm, rolled = setup(method, kl={"coefficient": 0.1, "where": "reward"})
    nothing = torch.zeros(0)
    empty = Rollout([], [], "end", reward=1.5)
    rolled.insert(2, Case(rolled[0].prompt, empty, 0, old=nothing, reference=nothing, values=nothing))
    check(config, lm, rolled)
    assert not rolled[2].signal
