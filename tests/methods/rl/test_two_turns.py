"""Two-turn reinforcement learning (SCoRE) with a real sampler and learner: from texts to advantages and metrics."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from posttrain.config import RLConfig
from posttrain.core.progress import Track
from posttrain.methods.rl.rl_trainer import RLTrainer
from posttrain.sampling.environments import environment
from posttrain.sampling.multi_turn import TurnSampler
from posttrain.sampling.refine_turns import refine_turns
from posttrain.sampling.rollout_store import groups_of, read_rollouts
from tests.methods.rl.test_policy_gradient import TOKENIZER, capture, model, settings, work

TURNS = {"kind": "refine", "own": False, "answers": "inline", "agreement": False, "stop": list("aeiounrst12345 ")}
HELD_OUT = {"problems": {"kind": "rows", "data": {"source": "x"}}, "every": 1}
LENGTH = {"kind": "length", "unit": "characters", "target": 3, "width": 9}


def two_turns(method: str, folder: Path, bonus: float = 2.0, first: float = 1.0, **changes: Any) -> RLTrainer:
    reward = {"kind": "improvement", "name": "better", "bonus": bonus, "first": first, "right_at": -0.1}
    base = {
        "environment": TURNS,
        "rewards": [{**reward, "reward": LENGTH}],
        "sampler": {"max_tokens": 60},
        "held_out": HELD_OUT,
    }
    config = settings(method, **{**base, **changes})
    trainer = work(config, folder)
    answers = config.environment
    assert answers is not None
    trainer.collector.sampler = TurnSampler(trainer.collector.sampler, environment(answers), answers, TOKENIZER, 2048)
    return trainer


def judge(text: str) -> float:
    return -min(1.0, abs(len(text) - 3) / 9)


def step(trainer: RLTrainer) -> dict[str, float]:
    return trainer.step(0, Track("t", 1, shown=False)).metrics


def test_the_penalty_of_one_answer_is_what_the_test_says(tmp_path: Path) -> None:
    from posttrain.rewards.text_shape import Length

    reward = Length(Length.Config.model_validate(LENGTH))
    for text in ("", "a", "abc", "abcdef", "a" * 40):
        assert reward(text, {"completion_tokens": 1}) == pytest.approx(judge(text))


@pytest.mark.parametrize("method", ["grpo", "rloo", "reinforce", "ppo"])
def test_advantages_from_texts(method: str, tmp_path: Path) -> None:
    """Of the rollouts that were kept: each answer judged by hand, each turn compared with its like in the group."""
    trainer = two_turns(method, tmp_path)
    metrics = step(trainer)
    groups = groups_of(read_rollouts(tmp_path / "rollouts" / "step-000001.parquet"))
    rows = read_rollouts(tmp_path / "rollouts" / "step-000001.parquet")
    scores: list[list[list[float]]] = []
    before, after, edited = [], [], []
    for group in groups:
        scores.append([])
        for rollout in group.rollouts:
            turns = refine_turns(rollout, TOKENIZER, trainer.config.environment)  # type: ignore[arg-type]
            texts = [t.text for t in turns if t.kind == "answer"]
            earned = [judge(t) for t in texts]
            scores[-1].append([earned[0], *(b + 2 * (b - a) for a, b in zip(earned, earned[1:], strict=False))])
            assert rollout.reward == pytest.approx(earned[-1])
            before.append(earned[0] >= -0.1)
            after.append(earned[-1] >= -0.1)
            edited.append(texts[0] != texts[-1])
    pairs = list(zip(before, after, strict=True))
    assert metrics["refine/first"] == statistics.fmean(before) and metrics["refine/last"] == statistics.fmean(after)
    assert metrics["refine/wrong_to_right"] == statistics.fmean(b and not a for a, b in pairs) > 0
    assert metrics["refine/right_to_wrong"] == statistics.fmean(a and not b for a, b in pairs)
    assert metrics["refine/edited"] == statistics.fmean(edited)
    assert {"held_out_refine/first", "held_out_refine/last"} <= metrics.keys()
    assert not any(name.startswith("reward/better/") for name in metrics) and "reward/better" in metrics
    if method == "ppo":
        return
    everybody = [[s[t] for of_group in scores for s in of_group if len(s) > t] for t in (0, 1)]
    flat = [row for row in rows if row["advantage"] is not None]
    for row in flat:
        mine, mates = scores[row["group"]][row["rollout"]], scores[row["group"]]
        own, mean = [i for i, wrote in enumerate(row["mask"]) if wrote], []
        for t, s in enumerate(mine):
            same = [x[t] for x in mates if len(x) > t]
            others = [x[t] for j, x in enumerate(mates) if len(x) > t and j != row["rollout"]]
            if method == "grpo":
                a = (s - statistics.fmean(same)) / (statistics.stdev(same) + 1e-4) if len(same) > 1 else 0.0
            elif method == "rloo":
                a = s - statistics.fmean(others) if others else 0.0
            else:
                a = s - statistics.fmean(everybody[t])
            edge = next(i for i, wrote in enumerate([*row["mask"], False]) if not wrote)  # the first request
            mean += [a] * sum((i < edge) == (t == 0) for i in own)
        assert len(mean) == len(own) and row["advantage"] == pytest.approx(statistics.fmean(mean), abs=1e-4)


@pytest.mark.parametrize("method", ["grpo", "rloo", "reinforce", "ppo"])
def test_the_gradient_does_not_depend_on_the_split(method: str, tmp_path: Path) -> None:
    found = []
    for budget in (70, 4000):
        changes = {"systems": {"tokens_per_micro_batch": budget}}
        trainer = two_turns(method, tmp_path / str(budget), **changes)
        gradients = capture(trainer.learner)
        parts = trainer.step(0, Track("t", 1, shown=False))
        found.append((parts.metrics["loss"], parts.micro_batches, gradients))
    (loss, many, one), (other, few, two) = found
    assert many > few and loss == pytest.approx(other, rel=1e-4, abs=1e-6)
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, two[name], atol=1e-5 * float(gradient.abs().max() + 1e-3), rtol=1e-3)


def test_stage_one_rewards_the_revision_alone_and_holds_the_first_answer(tmp_path: Path) -> None:
    """The first answer's tokens have no score; the penalty counts their KL alone, and keeps it down."""
    moved = {}
    for beta in (1e-6, 50.0):
        folder, penalty = tmp_path / str(beta), {"coefficient": beta, "later_turns": 0.0}
        trainer = two_turns("rloo", folder, bonus=0.0, first=0.0, kl=penalty, optimizer={"lr": 3e-3})
        trainer.reference = model()
        metrics = [step_of(trainer, i) for i in range(8)]
        for group in groups_of(read_rollouts(folder / "rollouts" / "step-000001.parquet")):
            assert all(set(r.steps) <= {"better", "better@2"} for r in group.rollouts)
        assert metrics[0]["kl_later_turns"] == pytest.approx(0, abs=1e-6)
        assert all(m["kl"] == m["kl_first_turn"] for m in metrics)
        assert metrics[-1]["kl_later_turns"] > 0
        moved[beta] = metrics[-1]["kl_first_turn"]
    free, held = moved.values()
    assert held < 0.5 * free


def step_of(trainer: RLTrainer, number: int) -> dict[str, float]:
    return trainer.step(number, Track("t", 9, shown=False)).metrics


def test_recipes_that_would_do_nothing_are_refused() -> None:
    term = {"kind": "improvement", "reward": LENGTH}
    with pytest.raises(ValidationError, match=r"environment: \{kind: refine\}"):
        settings("grpo", rewards=[term])
    with pytest.raises(ValidationError, match=r"environment: \{kind: refine\}"):
        settings("grpo", rewards=[term], environment={"kind": "calculator"})
    with pytest.raises(ValidationError, match="only an environment answers"):
        settings("grpo", kl={"coefficient": 0.1, "later_turns": 0.0})
    with pytest.raises(ValidationError, match="there is no penalty"):
        settings("grpo", kl={"later_turns": 0.0}, environment=TURNS)
    config = settings("grpo", rewards=[term], environment=TURNS, kl={"coefficient": 0.1, "later_turns": 0.1})
    assert RLConfig.model_validate(config.model_dump(mode="json")) == config
