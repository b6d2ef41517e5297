"""Trajectories over several steps: budgets, completions carried over, replay, what is learnt from them; resume."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from posttrain.config import RLConfig
from posttrain.core.progress import Track
from posttrain.core.types import PartialRollout, Rollout
from posttrain.methods.rl.adaptive_group_size import rescale_by_group_size
from posttrain.methods.rl.collect_rollouts import PromptGroup, RolloutCollector
from posttrain.methods.rl.hooks import Hook
from posttrain.methods.rl.partial_rollouts import PartialRollouts
from posttrain.methods.rl.replay import Replay
from posttrain.methods.rl.rl_trainer import RLTrainer, hooks_of, joined_metrics
from posttrain.methods.rl.sequence_logprobs import temperatures
from posttrain.methods.rl.step_recorder import StepRecorder
from posttrain.models.language_model import LanguageModel
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.replay_buffer import PARTIAL, oldest
from posttrain.sampling.rollout_store import read_rollouts
from posttrain.trainer.loop import train
from posttrain.trainer.train_step import Learner
from tests.methods.rl.cases import Case, batch_from, fill_advantages, loss_of
from tests.methods.rl.test_policy_gradient import (
    TOKENIZER,
    capture,
    collect,
    model,
    plain_logprobs,
    questions,
    settings,
)

FUNCTION = {"kind": "function", "function": "f", "isolated": False}
H = TypeVar("H", bound=Hook)
QUIET = Track("t", 1, shown=False)
MISMATCH = ("mismatch", "mismatch_kl", "fresh")


def seldom(text: str, example: Any) -> float:
    """1 for about one text in six, whatever was asked."""
    return float(zlib.crc32(text.encode()) % 6 == 0)


def work(
    config: RLConfig, folder: Path, function: Any = seldom, count: int = 8, lm: LanguageModel | None = None
) -> RLTrainer:
    lm = lm or model()
    learner = Learner(lm, config.optimizer, config.systems, config.steps * config.mini_batches)
    stack = RewardStack(config.rewards, {"f": function})
    options: dict[str, Any] = {"hooks": hooks_of(config, count, 0), "tokenizer": TOKENIZER}
    collector = RolloutCollector(config, LocalSampler(lm, TOKENIZER), stack, questions(count), 0, **options)
    return RLTrainer(config, learner, collector, StepRecorder(config, lm, collector, folder, questions(3)))


def hook(trainer: RLTrainer, kind: type[H]) -> H:
    (found,) = [h for h in trainer.collector.hooks if isinstance(h, kind)]
    return found


def waiting(trainer: RLTrainer) -> list[PromptGroup]:
    """The groups that continue in the next step."""
    return hook(trainer, PartialRollouts).waiting


def test_the_mismatch_is_of_tokens_that_the_newest_weights_sampled() -> None:
    """Two of three completions are older: theirs are other weights' numbers, whatever the learner's are now."""
    lm, config = model(), settings("grpo", exploration={"partial_rollouts": 4}, sampler={"max_tokens": 9})
    differences = []
    for ages in ((0, 2, 1), (3, 2, 1)):
        rolled = []
        for i, age in enumerate(ages):
            tokens = [5 + i, 7, 9 + 2 * i, 11][: 2 + i]
            r = Case([3, 4, 5, 6], Rollout(tokens, [-5.0] * len(tokens), "end", reward=float(i)), 0, age=age)
            r.advantages, r.old = torch.full((r.length,), float(i - 1) or 0.5), r.sampled()
            rolled.append(r)
        learner = Learner(lm, config.optimizer, config.systems, 1)
        capture(learner)
        loss = loss_of(config, rolled, True)
        record = learner.step([r.sample(i) for i, r in enumerate(rolled)], loss).metrics
        differences.append(joined_metrics([record, {k: v for k, v in record.items() if k not in MISMATCH}]))
    d = plain_logprobs(lm, Case([3, 4, 5, 6], Rollout([5, 7], [-5.0] * 2, "end"), 0), 1.0).detach() + 5.0
    assert differences[0]["mismatch"] == pytest.approx(float(d.abs().mean()), rel=1e-4)
    assert differences[0]["mismatch_kl"] == pytest.approx(float((d.exp() - 1 - d).mean()), rel=1e-3)
    assert not set(differences[1]) & set(MISMATCH)  # nothing there to compare: no number, rather than none of it


def test_hard_prompts_get_more_of_a_fixed_budget(tmp_path: Path) -> None:
    def only_some(text: str, example: Any) -> float:
        return float(int(example["answer"]) % 4 == 0)

    adaptive = {"adaptive_group_size": {"first": 2, "max_per_prompt": 6}}
    config = settings("grpo", rewards={"terms": [FUNCTION]}, exploration=adaptive, group_size=4)
    problems, batch, metrics = collect(work(config, tmp_path, only_some), 0)
    sizes = {p: sum(s.group == g for s in batch.sequences) for g, p in enumerate(problems)}
    hard = [p for p in sizes if (2 * p) % 4]
    assert 0 < len(hard) < 4 and sum(sizes.values()) == 16 == metrics["samples"]
    assert metrics["hard"] == len(hard) and metrics["largest_group"] == max(sizes.values())
    assert min(sizes[p] for p in hard) > max(n for p, n in sizes.items() if p not in hard)
    tokens = {tuple(s.rollout.tokens) for s in batch.sequences}
    assert len(tokens) > 12  # rounds have random streams of their own


def test_groups_of_different_sizes_count_the_same() -> None:
    rolled = [
        Case([1], Rollout([2], [-1.0], "end", reward=r), g) for g, r in ((0, 1.0), (0, 0.0), *[(1, 0.0)] * 5, (1, 1.0))
    ]
    fill_advantages(settings("dr_grpo"), rolled)
    assert [float(r.advantages) for r in rolled] == pytest.approx([0.5, -0.5, *[-1 / 6] * 5, 5 / 6])
    batch = batch_from(settings("dr_grpo"), rolled)
    scaled = rescale_by_group_size(batch.sequences, batch.advantages)
    # mean size 4: times 2 and times 2/3
    assert [float(a) for a in scaled.advantages] == pytest.approx([1.0, -1.0, *[-1 / 9] * 5, 5 / 9])


def test_carried_completions_keep_the_numbers_of_what_sampled_them(tmp_path: Path) -> None:
    """Each piece's log-probabilities are those of the weights at its step; budgets and bounds hold."""
    config = settings(
        "grpo", rewards={"terms": [FUNCTION]}, exploration={"partial_rollouts": 3}, steps=6, optimizer={"lr": 5e-3}
    )
    exp = work(config, tmp_path)
    frozen, carried = [], 0
    for step in range(5):
        frozen.append(model())
        frozen[-1].load_state_dict(exp.learner.model.state_dict())
        metrics = exp.step(step, QUIET).metrics
        carried += int(metrics["carried"])
        for g in waiting(exp):
            assert any(r.finish == PARTIAL for r in g.rollouts)
            assert all(len(r.tokens) <= 3 * (step + 1 - g.born) for r in g.rollouts)
        if step == 0:
            assert metrics["carried"] > 0
    rows = [r for s in range(5) for r in read_rollouts(tmp_path / "rollouts" / f"step-{s + 1:06d}.parquet")]
    long = [r for r in rows if len(r["pieces"]) > 1]
    assert len(long) > 5 and max(len(r["tokens"]) for r in rows) == 9
    for r in long[:4]:
        at = 0
        for count, step, _ in r["pieces"]:
            rolled = Case(r["prompt_tokens"], Rollout(r["tokens"], r["logprobs"], "end"), 0)
            own = plain_logprobs(frozen[step], rolled, 1.0)[at : at + count]
            torch.testing.assert_close(own, torch.tensor(r["logprobs"][at : at + count]), atol=2e-5, rtol=1e-4)
            at += count
    assert carried > 10
    assert any(r["step"] - 1 - r["pieces"][0][1] == 2 for r in long)


def test_what_would_grow_too_old_is_dropped_and_counted(tmp_path: Path) -> None:
    config = settings(
        "grpo", rewards={"terms": [FUNCTION]}, exploration={"partial_rollouts": 2, "max_staleness": 1}, steps=6
    )
    exp = work(config, tmp_path)
    begun = ended = dropped = 0
    for step in range(4):
        _, batch, metrics = collect(exp, step)
        begun += 16
        ended += len(batch.sequences)
        dropped += int(metrics["carry_dropped"])
        assert metrics.get("staleness_max", 0) <= 1
        assert all(step - g.born < 1 for g in waiting(exp))
    assert dropped > 0 and begun == ended + dropped + sum(len(g.rollouts) for g in waiting(exp))


def test_a_rare_success_stands_in_where_there_is_none(tmp_path: Path) -> None:
    """Kept with its own log-probabilities, used as a member of a later group, learnt from, and dropped when too old."""
    chosen = {"now": 0}

    def once(text: str, example: Any) -> float:
        chosen["now"] += 1
        return float(chosen["now"] == 2)  # the second answer of all is right, and never another

    config = settings(
        "grpo",
        rewards={"terms": [FUNCTION]},
        exploration={"replay": {"share": 0.5}, "max_staleness": 3},
        steps=9,
        prompts_per_step=2,
        optimizer={"lr": 1e-3},
    )
    exp = work(config, tmp_path, once)
    first = exp.step(0, QUIET).metrics
    assert first["replay_kept"] == 1 and first["replayed"] == 0
    ((problem, kept),) = hook(exp, Replay).kept.items()
    problems, batch, collected = collect(exp, 1)
    assert problem in problems and collected["replayed"] == 1 and collected["reward"] == 0
    (at,) = [i for i, s in enumerate(batch.sequences) if s.replayed]
    again = batch.sequences[at]
    assert again.rollout == kept and again.age == 1 and batch.advantages.trained[at]
    assert batch.logprobs.old is not None and batch.logprobs.old[at].tolist() == pytest.approx(list(kept.logprobs))
    mates = [i for i, s in enumerate(batch.sequences) if s.group == again.group]
    assert [float(batch.advantages.advantages[i][0]) > 0 for i in mates] == [False] * 4 + [True]
    before = float(plain_logprobs(exp.learner.model, again, 1.0).sum())
    exp.learn(batch)
    assert float(plain_logprobs(exp.learner.model, again, 1.0).sum()) > before
    metrics = [exp.step(s, QUIET).metrics for s in (2, 3, 4)]
    assert [m["replayed"] for m in metrics] == [1, 1, 0] and metrics[-1]["replay_dropped"] == 1
    assert metrics[1]["staleness_max"] == 3


def test_every_token_is_learnt_at_its_own_temperature() -> None:
    """Loss and gradient of a batch whose tokens were sampled at two temperatures, against a slow loop."""
    config, lm = settings("dapo", exploration={"partial_rollouts": 4}), model()
    g = torch.Generator().manual_seed(0)
    rolled = []
    for i in range(4):
        tokens = torch.randint(3, 250, (6,), generator=g).tolist()
        pieces = (PartialRollout(4, 0, 0.7), PartialRollout(2, 1, 1.4))
        rolled.append(
            Case([5, 6, 7], Rollout(tokens, [-5.0] * 6, "end", reward=float(i % 2), pieces=pieces), i // 2, age=1)
        )
    assert temperatures(config.sampler, [r.sequence for r in rolled], torch.device("cpu")).tolist() == pytest.approx(
        [0.7] * 4 + [1.4] * 2 + ([0.7] * 4 + [1.4] * 2) * 3
    )  # type: ignore[union-attr]
    fill_advantages(config, rolled)
    for r in rolled:
        r.old = r.sampled()
    learner = Learner(lm, config.optimizer, config.systems, 1)
    captured = capture(learner)
    samples = [r.sample(i) for i, r in enumerate(rolled)]
    loss = learner.step(samples, loss_of(config, rolled, True)).metrics["loss"]
    lm.zero_grad()
    total = torch.zeros(())
    for r in rolled:
        cool, hot = plain_logprobs(lm, r, 0.7), plain_logprobs(lm, r, 1.4)
        ratio = (torch.cat([cool[:4], hot[4:]]) + 5.0).exp()
        total = total - torch.minimum(ratio * r.advantages, ratio.clamp(0.8, 1.28) * r.advantages).sum() / 24
    total.backward()
    assert loss == pytest.approx(float(total), abs=1e-6)
    for name, p in lm.named_parameters():
        torch.testing.assert_close(captured[name], p.grad, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("method", ["ppo", "remax", "reinforce", "reinforce_pp_baseline", "gspo", "cispo"])
def test_every_kind_of_method_learns_from_old_and_uneven_groups(method: str, tmp_path: Path) -> None:
    """Critic, greedy baseline, whitening, sequence ratios: with replay, carried completions, groups of many sizes."""
    changes = {k: v for k, v in EVERYTHING.items() if k not in ("kl", "mini_batches")}
    changes["exploration"] = {**EXPLORATION, "partial_rollouts": 7}
    exp = work(settings(method, **changes), tmp_path, count=4)
    if method == "ppo":
        exp.learner.model.add_value_head()
        exp.learner = Learner(exp.learner.model, exp.config.optimizer, exp.config.systems, 10)
    metrics = [exp.step(s, QUIET).metrics for s in range(5)]
    assert sum(m["carried"] for m in metrics) and max(m["staleness_max"] for m in metrics[1:]) >= 1
    assert any(m.get("loss") for m in metrics) and all(torch.isfinite(p).all() for p in exp.learner.model.parameters())
    assert any(m.get("approx_kl", 0) > 0 for m in metrics)  # ratios to the policies that sampled


def test_methods_without_a_ratio_get_one_where_data_is_old() -> None:
    """RLOO with replay: the clipped ratio of the whole sequence, not the plain gradient."""
    values = []
    for extra in ({}, {"exploration": {"replay": {}}}):
        config, lm = settings("rloo", **extra), model()
        rolled = [
            Case([5, 6, 7], Rollout([9 + i, 8], [-4.0, -4.0], "end", reward=float(i)), 0, age=i) for i in range(2)
        ]
        fill_advantages(config, rolled)
        for r in rolled:
            r.old = r.sampled()
        learner = Learner(lm, config.optimizer, config.systems, 1)
        values.append(learner.step([r.sample(i) for i, r in enumerate(rolled)], loss_of(config, rolled, False)).metrics)
    assert "ratio" not in values[0] and values[1]["clip_fraction"] > 0


def test_the_temperature_follows_its_target(tmp_path: Path) -> None:
    """A random model's entropy is far above the target: the temperature falls, what is sampled is less varied."""
    target = {"target": 3.0, "gain": 1.0, "low": 0.02}
    config = settings("grpo", rewards={"terms": [FUNCTION]}, exploration={"entropy_target": target}, steps=16)
    exp = work(config, tmp_path)
    metrics = [exp.step(s, QUIET).metrics for s in range(16)]
    assert [m["temperature"] for m in metrics][:3] == pytest.approx([1.0, 0.8, 0.64])
    assert metrics[0]["entropy"] > 5 and metrics[-1]["entropy"] < 4
    assert (
        max(m.get("mismatch_max", 0) for m in metrics) < 1e-3
    )  # the learner's log-probabilities are at the temperature of the sampler
    rows = read_rollouts(tmp_path / "rollouts" / "step-000002.parquet")
    assert rows[0]["pieces"][0][1:] == [1, pytest.approx(0.8)]


EXPLORATION = {
    "dynamic_sampling": 1,
    "entropy_target": {"target": 5.0, "low": 0.5},
    "adaptive_group_size": {"first": 2, "max_per_prompt": 5},
    "curriculum": {},
    "replay": {"rare": 0.5, "share": 0.5},
    "partial_rollouts": 4,
    "max_staleness": 3,
}
EVERYTHING: dict[str, Any] = {
    "rewards": {"terms": [FUNCTION]},
    "sampler": {"max_tokens": 9},
    "steps": 8,
    "mini_batches": 2,
    "exploration": EXPLORATION,
    "kl": {"coefficient": 0.1, "target": 0.001},
    "optimizer": {"lr": 5e-3},
    "checkpoint_every": 2,
}


class Killed(Exception):
    pass


def run(folder: Path, die: list[int]) -> dict[str, torch.Tensor]:
    """The whole stage, started again after each death."""
    while True:
        config = settings("grpo", **EVERYTHING)
        exp = work(config, folder, count=6)
        exp.reference = model(1)

        def on_step(step: int, *_: Any) -> None:
            if die and step == die[0]:
                die.pop(0)
                raise Killed

        try:
            train(exp.learner, exp, folder, checkpoint_every=2, keep=2, title="t", on_step=on_step)
            return exp.learner.model.state_dict()
        except Killed:
            continue


def test_with_everything_on_a_stage_that_dies_ends_bit_identical(tmp_path: Path) -> None:
    calm = run(tmp_path / "calm", [])
    killed = run(tmp_path / "killed", [1, 4, 7])
    assert all(torch.equal(killed[n], w) for n, w in calm.items())
    texts = [(tmp_path / f / "metrics.jsonl").read_text() for f in ("calm", "killed")]
    assert texts[0] == texts[1]
    for path in sorted((tmp_path / "calm" / "rollouts").glob("*.parquet")):
        assert repr(read_rollouts(path)) == repr(read_rollouts(tmp_path / "killed" / "rollouts" / path.name))
    metrics = [json.loads(line) for line in texts[0].splitlines()][1:]
    # Everything was at work, or the test would show nothing.
    assert (
        sum(m["carried"] for m in metrics) and sum(m["replayed"] for m in metrics) and sum(m["hard"] for m in metrics)
    )
    assert len({m["kl_coefficient"] for m in metrics}) > 5 and len({m["temperature"] for m in metrics}) > 5
    assert max(m.get("staleness_max", 0) for m in metrics) == 3 and metrics[-1]["problems_asked"] == 6
    assert sum(m["drawn"] for m in metrics) > 4 * 8


def test_oldest_of_a_rollout_that_does_not_say() -> None:
    assert oldest(Rollout([1], [0.0], "end"), 7) == 7
