"""Reinforcement learning's glue: splits that change nothing, what a batch is made of, what steps do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import RLConfig, SystemsConfig
from posttrain.config.rl import RL_PRESETS
from posttrain.core.errors import MismatchError
from posttrain.core.progress import Phases, Track
from posttrain.core.types import Rollout
from posttrain.data.prompts import RenderedPrompt
from posttrain.methods.rl.collect_rollouts import RolloutCollector
from posttrain.methods.rl.rl_loss import TrainingBatch
from posttrain.methods.rl.rl_trainer import RLTrainer, hooks_of
from posttrain.methods.rl.rollout_setup import warn_of_sampler
from posttrain.methods.rl.sequence_logprobs import sequence_outputs
from posttrain.methods.rl.step_recorder import StepRecorder
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.rollout_store import groups_of, read_rollouts
from posttrain.trainer.train_step import Learner
from tests.methods.rl.cases import Case, fill_advantages, loss_of

TOKENIZER = tiny_tokenizer()
MAX = 9
GREEDY = [0.4, 1.0, 0.9]
"""Rewards of ReMax's greedy answers, by group."""


def settings(method: str, **changes: Any) -> RLConfig:
    base = {
        "method": method,
        "problems": {"kind": "rows", "data": {"source": "unused.jsonl"}},
        "rewards": {"terms": [{"kind": "length", "unit": "characters", "target": 12, "width": 30}]},
        "sampler": {"max_tokens": MAX},
        "prompts_per_step": 4,
        "group_size": 4,
        "steps": 3,
        "optimizer": {"lr": 1e-3},
    }
    return RLConfig.model_validate({**base, **changes})


def model(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(tiny_model("llama"))


def batch_of(seed: int = 0, groups: int = 3, size: int = 4, replies: bool = False) -> list[Case]:
    """Random rollouts: prompts longer than what is worth sharing, one group without signal.

    replies: an environment wrote some of the tokens; their log-probabilities here are nonsense that must not count.
    """
    g = torch.Generator().manual_seed(seed)
    out = []
    for group in range(groups):
        prompt = torch.randint(3, 250, (18,), generator=g).tolist()
        for i in range(size):
            n = int(torch.randint(1, MAX + 1, (1,), generator=g))
            tokens = torch.randint(3, 250, (n,), generator=g).tolist()
            logprobs = (-5.6 + 0.3 * torch.randn(n, generator=g)).tolist()
            reward = 1.0 if group == 1 else float(i % 3) + 0.25 * group
            mask = None
            if replies and i:
                mask = [True] * n
                for at in (1, n // 2 + 1):
                    reply = torch.randint(3, 250, (i,), generator=g).tolist()
                    tokens[at:at], logprobs[at:at], mask[at:at] = reply, [-77.0] * i, [False] * i
            out.append(Case(prompt, Rollout(tokens, logprobs, "end", reward=reward, mask=mask), group))
    return out


def plain_pass(lm: LanguageModel, cases: Sequence[Case]) -> Any:
    """transformers' own pass over all cases (logits, hidden states), padded behind: attention looks back alone."""
    rows = [[*c.prompt, *c.rollout.tokens] for c in cases]
    longest = max(map(len, rows))
    padded = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
    lm.base.set_attn_implementation("eager")
    out = lm.base(padded, use_cache=False, output_hidden_states=True)
    lm.base.set_attn_implementation("posttrain")
    return out


def picked_logprobs(case: Case, logits_T_V: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of what the model wrote in a case."""
    ids = torch.tensor([*case.prompt, *case.rollout.tokens])
    start, end = len(case.prompt), len(ids)
    logs = (logits_T_V[start - 1 : end - 1] / temperature).log_softmax(-1)
    picked = logs.gather(1, ids[start:, None]).squeeze(1)
    return picked if case.rollout.mask is None else picked[torch.tensor(case.rollout.mask)]


def plain_logprobs(lm: LanguageModel, rolled: Case, temperature: float) -> torch.Tensor:
    """transformers' own log-probabilities of what the model wrote."""
    return picked_logprobs(rolled, plain_pass(lm, [rolled]).logits[0], temperature)


def capture(learner: Learner) -> dict[str, torch.Tensor]:
    """Takes the place of the update: the unclipped gradients, which Adam would turn into signs."""
    captured: dict[str, torch.Tensor] = {}

    def take(lr: float) -> None:
        captured.update({n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None})

    learner.optimizer.step = take  # type: ignore[method-assign]
    learner.optimizer.clip = lambda norms: 1.0  # type: ignore[method-assign]
    return captured


@pytest.mark.parametrize("method", ["rloo", "reinforce", "remax", "dr_grpo", "grpo"])
def test_naming_the_constant_sum_is_the_method_s_own(method: str) -> None:
    """With several updates REINFORCE's ratio is a sequence's, and counts once for it, however many tokens there are; of
    the others a sum of tokens is divided by the limit, as in Dr. GRPO."""
    losses = []
    constant = "seq-mean-token-sum-norm" if method in ("dr_grpo", "grpo") else "seq-mean-token-sum"
    own = {} if method != "grpo" else {"loss_aggregation": "seq-mean-token-mean"}
    for changes in ({"loss_aggregation": constant}, own):
        config = settings(method, mini_batches=2, **changes)
        rolled, lm = batch_of(), model()
        fill_advantages(config, rolled, greedy=GREEDY)
        for r in rolled:
            r.old = r.sampled()
        learner = Learner(lm, config.optimizer, SystemsConfig(), 1)
        capture(learner)
        if method == "grpo":  # of advantage 1 and ratio 1: -1 a token
            for r in rolled:
                r.advantages, r.old, r.signal = torch.ones(r.length), None, True
        samples = [r.sample(i) for i, r in enumerate(rolled)]
        used = [s for s in samples if any(s.weights)]
        losses.append(learner.step(used, loss_of(config, rolled, False)).metrics["loss"])
    if method == "grpo":
        assert losses == pytest.approx([-sum(r.length for r in rolled) / MAX / len(rolled), -1.0])
    else:
        assert losses[0] == pytest.approx(losses[1], abs=1e-9) and losses[0] != 0


@pytest.mark.parametrize("method", sorted(RL_PRESETS))
def test_split_and_sharing_change_nothing(method: str) -> None:
    """Token budgets that split groups, and prefixes computed once or each time."""
    results = []
    for budget, share in ((4096, True), (30, True), (100, False)):
        config = settings(method, mini_batches=2, kl={"coefficient": 0.1}, entropy_coef=0.01)
        rolled, lm = batch_of(), model()
        if config.critic is not None:
            lm.add_value_head()
        for r in rolled:
            r.old = torch.tensor(r.rollout.logprobs)
            r.reference = r.old - 0.1
            r.values = torch.linspace(0, 1, r.length)
        fill_advantages(config, rolled, greedy=[0.5, 1.0, 0.0])
        systems = SystemsConfig(tokens_per_micro_batch=budget, share_prefixes=share)
        learner = Learner(lm, config.optimizer, systems, 1)
        gradients = capture(learner)
        samples = [r.sample(i) for i, r in enumerate(rolled)]
        result = learner.step(samples, loss_of(config, rolled, True))
        results.append((result, gradients))
    (first, gradients), *others = results
    assert first.computed_tokens < others[1][0].computed_tokens  # sharing saves something
    assert others[0][0].micro_batches > 3
    for other, moved in others:
        assert other.metrics.keys() == first.metrics.keys()
        for name, value in first.metrics.items():
            assert other.metrics[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name
        for name, g in gradients.items():
            torch.testing.assert_close(moved[name], g, atol=1e-6 * float(g.abs().max() + 1), rtol=1e-4)


def test_the_critic_s_clip_cuts_its_gradient() -> None:
    """Old values -10, returns 5, and a new head's values 0: a clip of 0.2 holds them at -9.8, 14.8 from the return."""
    gradients, losses = [], []
    for clip in (None, 0.2):
        config = settings("ppo", mini_batches=2, critic={"clip": clip, "coefficient": 2.0})
        rolled, lm = batch_of(), model()
        lm.add_value_head()
        with torch.no_grad():
            for p in lm.value.parameters():  # type: ignore[union-attr]
                p.zero_()
        for r in rolled:
            r.old = torch.tensor(r.rollout.logprobs)
            r.values = torch.full((r.length,), -10.0)
        fill_advantages(config, rolled)
        for r in rolled:
            r.returns = torch.full((r.length,), 5.0)
        learner = Learner(lm, config.optimizer, SystemsConfig(), 1)
        captured = capture(learner)
        samples = [r.sample(i) for i, r in enumerate(rolled)]
        metrics = learner.step(samples, loss_of(config, rolled, False)).metrics
        losses.append(metrics["value_loss"])
        gradients.append(max(float(g.abs().max()) for n, g in captured.items() if n.startswith("value.")))
        assert metrics.get("value_clip") == (None if clip is None else 1.0)
    assert losses == pytest.approx([0.5 * 5**2, 0.5 * 14.8**2])
    assert gradients[0] > 1 and gradients[1] == 0


def questions(count: int = 8) -> list[RenderedPrompt]:
    out = []
    for i in range(count):
        text = f"{i} + {i} ="
        out.append(
            RenderedPrompt(TOKENIZER(text)["input_ids"], text, {"answer": str(2 * i), "prompt": text, "source": "q"})
        )
    return out


def work(config: RLConfig, folder: Path, **functions: Any) -> RLTrainer:
    lm = model()
    critic = config.critic is not None
    if critic:
        lm.add_value_head()
    learner = Learner(lm, config.optimizer, config.systems, 100, {"value.": 10.0} if critic else None)
    stack = RewardStack(config.rewards, functions, TOKENIZER, environment=config.environment)
    hooks = hooks_of(config, len(questions()), 0)
    sampler = LocalSampler(lm, TOKENIZER, **config.sampler.options())
    collector = RolloutCollector(config, sampler, stack, questions(), 0, hooks=hooks)
    return RLTrainer(config, learner, collector, StepRecorder(config, lm, collector, folder, questions(3)))


def collect(trainer: RLTrainer, step: int) -> tuple[list[int], TrainingBatch, dict[str, float]]:
    """(numbers of the prompts, what is trained on, metrics) of a step before its updates, as in `RLTrainer.step`."""
    phases, settings = Phases(Track("t", 1, shown=False)), trainer.config
    for hook in trainer.collector.hooks:
        settings = hook.before_step(step, settings)
    rollouts = trainer.collector.collect(step, settings.sampler, phases)
    batch, metrics = trainer.prepare(step, settings, rollouts, phases)
    for hook in trainer.collector.hooks:
        hook.after_step(metrics)
    return rollouts.problems, batch, metrics


@pytest.mark.parametrize("method", sorted(RL_PRESETS))
def test_every_method_takes_a_step_and_keeps_its_rollouts(method: str, tmp_path: Path) -> None:
    held_out = {"problems": {"kind": "rows", "data": {"source": "x"}}, "every": 1}
    exp = work(settings(method, mini_batches=2, ppo_epochs=2, held_out=held_out), tmp_path)
    before = [p.detach().clone() for p in exp.learner.model.parameters()]
    result = exp.step(0, Track("t", 1, shown=False))
    assert exp.learner.steps_done == 4
    assert any(not torch.equal(a, b) for a, b in zip(before, exp.learner.model.parameters(), strict=True))
    m = result.metrics
    assert m["mismatch_max"] < 1e-4 and 0 <= m["frac_reward_zero_std"] < 1 and "held_out" in m
    assert m["ratio_max"] >= 1
    rows = read_rollouts(tmp_path / "rollouts" / "step-000001.parquet")
    assert len(rows) == 16
    assert m["reward"] == pytest.approx(sum(r["reward"] for r in rows) / 16)
    for row in rows:
        assert row["reward"] == pytest.approx(-min(1, abs(len(row["completion"]) - 12) / 30))
    assert ("clip_fraction" in m) == ("ratio" in m)
    if RL_PRESETS[method]["advantages"] in ("grpo", "dr_grpo", "rloo"):
        for g in range(4):
            mine = [r for r in rows if r["group"] == g]
            assert sum(r["advantage"] for r in mine) == pytest.approx(0, abs=1e-5)
            order = sorted(mine, key=lambda r: r["reward"])
            assert [r["advantage"] for r in order] == sorted(r["advantage"] for r in mine)
    groups = groups_of(rows)
    assert [len(g.rollouts) for g in groups] == [4] * 4


def test_an_int8_cache_is_a_sampler_with_other_numbers(tmp_path: Path) -> None:
    """Ratios start at the learner's own log-probabilities, and weights of importance correct for the sampler's."""
    sampler = {"max_tokens": MAX, "kv_cache": "int8"}
    weights = {"importance_sampling_cap": 2.0, "importance_sampling_mode": "token_mask"}
    config = settings("grpo", mini_batches=2, sampler=sampler, max_mismatch_kl=0.01, **weights)
    trainer = work(config, tmp_path)
    batch = collect(trainer, 0)[1]
    own = sequence_outputs(config, batch.sequences, trainer.learner.model)[0]
    assert batch.logprobs.old is not None
    for old, mine, sampled in zip(batch.logprobs.old, own, batch.logprobs.sampled, strict=True):
        assert torch.equal(old, mine) and 0 < float((old - sampled).abs().max()) < 0.1
    metrics = trainer.step(0, Track("t", 1, shown=False)).metrics
    assert 1e-5 < metrics["mismatch"] < 0.02 and 0 < abs(metrics["importance"] - 1) < 0.02
    assert trainer.state_dict()["mismatch"] == metrics["mismatch_kl"]
    trainer.config = config.model_copy(update={"max_mismatch_kl": 1e-12})
    with pytest.raises(MismatchError, match="differ by .* up to step 2"):
        trainer.step(1, Track("t", 1, shown=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_sampler(config)
        warn_of_sampler(settings("grpo"))
    with pytest.warns(UserWarning, match="sampler.kv_cache is int8: .* Set importance_sampling_cap"):
        warn_of_sampler(settings("grpo", sampler=sampler))


def test_groups_without_signal_cost_no_learning(tmp_path: Path) -> None:
    """Rewards all alike: nothing is computed, the weights stay. Half of the groups alike: half is computed."""
    config = settings("grpo", rewards={"terms": [{"kind": "function", "function": "f", "isolated": False}]})
    exp = work(config, tmp_path / "a", f=lambda text, example: 1.0)
    before = [p.detach().clone() for p in exp.learner.model.parameters()]
    result = exp.step(0, Track("t", 1, shown=False))
    assert (
        result.computed_tokens == 0 and result.metrics["frac_reward_zero_std"] == 1 and result.metrics["grad_norm"] == 0
    )
    assert all(torch.equal(a, b) for a, b in zip(before, exp.learner.model.parameters(), strict=True))

    def some(text: str, example: Any) -> float:
        return float(len(text)) if int(example["answer"]) % 4 == 0 else 1.0

    exp = work(config, tmp_path / "b", f=some)
    problems, batch, _ = collect(exp, 0)
    trained = [s for s, on in zip(batch.sequences, batch.advantages.trained, strict=True) if on]
    signal = {s.group for s in trained}
    odd = {g for g, p in enumerate(problems) if int(questions()[p].problem["answer"]) % 4}
    assert odd and not odd & signal
    results, _ = exp.learn(batch)
    tokens = sum(len(s.prompt) + s.length for s in trained)
    assert sum(r.tokens for r in results) == tokens < sum(len(s.prompt) + s.length for s in batch.sequences)


def test_a_rollout_whose_reward_failed_is_left_out_and_shown(tmp_path: Path) -> None:
    def picky(text: str, example: Any) -> float:
        if len(text) % 2:
            raise RuntimeError("odd text")
        return float(len(text))

    part = {"kind": "function", "function": "picky", "isolated": False}
    config = settings("grpo", rewards={"terms": [part], "on_error": "exclude"})
    exp = work(config, tmp_path, picky=picky)
    result = exp.step(0, Track("t", 1, shown=False))
    rows = read_rollouts(tmp_path / "rollouts" / "step-000001.parquet")
    failed = [r for r in rows if r["reward"] is None]
    assert len(rows) == 16 and failed and result.metrics["failed/function"] == len(failed)
    for row in rows:
        assert (row["reward"] is None) == (len(row["completion"]) % 2 == 1) == (row["advantage"] is None)
    assert "odd text" in failed[0]["failures"]["function"]


def test_redraws_replace_groups_without_signal(tmp_path: Path) -> None:
    """DAPO's sampling: with a reward that only varies for some problems, redraws find more of those."""
    part = {"kind": "function", "function": "f", "isolated": False}

    def some(text: str, example: Any) -> float:
        return float(len(text)) if int(example["answer"]) % 4 == 0 else 1.0

    shares = []
    for redraws in (0, 6):
        exp = work(
            settings("dapo", rewards={"terms": [part]}, exploration={"dynamic_sampling": redraws}),
            tmp_path / str(redraws),
            f=some,
        )
        metrics = exp.step(0, Track("t", 1, shown=False)).metrics
        shares.append(metrics["frac_reward_zero_std"])
        assert metrics["drawn"] == 4 if not redraws else metrics["drawn"] > 4
    assert shares[0] > 0 and shares[1] == 0


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    def tokens(step: int, exp: RLTrainer) -> list[Any]:
        problems, batch, _ = collect(exp, step)
        return [(problems[s.group], s.prompt, s.rollout.tokens) for s in batch.sequences]

    a, b = work(settings("grpo"), tmp_path), work(settings("grpo"), tmp_path)
    later = tokens(1, a)
    assert tokens(0, b) != later
    assert tokens(1, b) == later
    # An epoch asks everything once.
    seen = [p for s in range(2) for p in a.collector.draw_prompts(s, 0)]
    assert sorted(seen) == list(range(8))


@pytest.mark.parametrize(
    ("method", "where", "estimator", "lr", "steps"),
    [("grpo", "loss", "k3", 4e-3, 12), pytest.param("reinforce_pp", "reward", "k1", 2e-3, 24, marks=pytest.mark.long)],
)
def test_kl_to_the_reference_pulls_back(
    method: str, where: str, estimator: str, lr: float, steps: int, tmp_path: Path
) -> None:
    """With a large beta and no reward to speak of, the policy returns to its reference."""
    part = {"kind": "function", "function": "f", "isolated": False}
    config = settings(
        method,
        rewards={"terms": [part]},
        kl={"coefficient": 5.0, "where": where, "estimator": estimator},
        group_size=8 if where == "loss" else 16,
        optimizer={"lr": lr},
    )
    exp = work(config, tmp_path, f=lambda text, example: 0.0)
    frozen = model()
    with torch.no_grad():
        for p in exp.learner.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    exp.reference = frozen
    kls = [exp.step(s, Track("t", 1, shown=False)).metrics["kl"] for s in range(steps)]
    assert sum(kls[-3:]) < 0.75 * sum(kls[:3]), kls


@pytest.mark.long
def test_the_critic_s_clip_holds_it_back(tmp_path: Path) -> None:
    """With many passes over a batch values run to the constant reward; clipped ones can't, and it is counted."""
    part = {"kind": "function", "function": "f", "isolated": False}
    steps = {}
    for clip in (None, 0.01):
        config = settings("ppo", rewards={"terms": [part]}, ppo_epochs=8, critic={"clip": clip})
        exp = work(config, tmp_path / str(clip), f=lambda text, example: 1.0)
        first, *_, last = (exp.step(s, Track("t", 1, shown=False)).metrics for s in range(5))
        assert ("value_clip" in first) == (clip is not None)
        steps[clip] = last["value_loss"]
        if clip is not None:
            assert first["value_clip"] > 0.5
    assert steps[None] < 0.5 * steps[0.01]


def test_the_critic_learns_what_to_expect(tmp_path: Path) -> None:
    """PPO's value head, on a constant reward: values go to it, and what they leave unexplained shrinks."""
    part = {"kind": "function", "function": "f", "isolated": False}
    config = settings("ppo", rewards={"terms": [part]}, ppo_epochs=6, optimizer={"lr": 2e-3})
    exp = work(config, tmp_path, f=lambda text, example: 1.0)
    losses = [exp.step(s, Track("t", 1, shown=False)).metrics["value_loss"] for s in range(6)]
    assert losses[0] > 0.2 and losses[-1] < losses[0] / 3
