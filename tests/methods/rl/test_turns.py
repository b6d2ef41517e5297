"""Reinforcement learning in turns: what is sampled, learnt, measured and kept, with a real sampler and learner."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from posttrain.core.progress import Track
from posttrain.data.sft_rows import prepare
from posttrain.methods.rl.rl_trainer import RLTrainer
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.sampling.environments import environment
from posttrain.sampling.multi_turn import TurnSampler
from posttrain.sampling.rollout_store import read_rollouts
from tests.invariants.plugged_in import Counting
from tests.methods.rl.test_policy_gradient import TOKENIZER, settings, work

HELD_OUT = {"problems": {"kind": "rows", "data": {"source": "x"}}, "every": 1}


def turns(folder: Path, method: str = "grpo", **changes: Any) -> RLTrainer:
    answering = {"kind": "function", "function": "counting", "stop": list("aeiounrst12345 "), "max_turns": 3}
    config = settings(method, environment=answering, held_out=HELD_OUT, **{"sampler": {"max_tokens": 40}, **changes})
    exp = work(config, folder)
    assert config.environment is not None
    answers = environment(config.environment, {"counting": Counting})
    sampler = TurnSampler(exp.collector.sampler, answers, config.environment, TOKENIZER, 2048)
    exp.collector.sampler = sampler
    return exp


@pytest.mark.parametrize("method", ["grpo", "ppo", "reinforce_pp"])
def test_a_step_in_turns(method: str, tmp_path: Path) -> None:
    exp = turns(tmp_path, method, mini_batches=2, kl={"coefficient": 0.0})
    m = exp.step(0, Track("t", 1, shown=False)).metrics
    assert m["mismatch_max"] < 1e-4  # the learner sees what the sampler saw, replies among it
    rows = read_rollouts(tmp_path / "rollouts" / "step-000001.parquet")
    own = [sum(r["mask"]) for r in rows]
    assert m["completions/mean_length"] == pytest.approx(sum(own) / len(rows)) and max(own) <= 40
    assert (
        m["replies"] == pytest.approx(sum(r["completion"].count("n°") for r in rows) / len(rows)) and m["replies"] > 0.5
    )
    mine = [p for r in rows for p, wrote in zip(r["logprobs"], r["mask"], strict=True) if wrote]
    assert m["entropy"] == pytest.approx(-sum(mine) / sum(own), rel=1e-4)
    assert m["completions/clipped_ratio"] == sum(r["finish"] in ("length", "turns") for r in rows) / len(rows)
    held = read_rollouts(tmp_path / "held_out" / "step-000001.parquet")
    assert any("n°1" in r["completion"] for r in held) and all(len(r["mask"]) == len(r["tokens"]) for r in held)
    assert m["held_out_length"] == pytest.approx(sum(sum(r["mask"]) for r in held) / len(held))


def test_the_same_step_gives_the_same_rollouts_and_cut_ones_can_be_left_out(tmp_path: Path) -> None:
    first, second = turns(tmp_path / "a"), turns(tmp_path / "b", mask_truncated=True)
    metrics = [exp.step(2, Track("t", 1, shown=False)).metrics for exp in (first, second)]
    a, b = (read_rollouts(tmp_path / f / "rollouts" / "step-000003.parquet") for f in "ab")
    assert [r["tokens"] for r in a] == [r["tokens"] for r in b]
    assert any(r["finish"] == "turns" for r in a)
    whole = [r for r in a if r["finish"] not in ("turns", "length")]
    assert metrics[1]["loss_tokens"] <= sum(sum(r["mask"]) for r in whole) < metrics[0]["loss_tokens"]


def test_conversations_in_plain_text_learn_the_assistant_s_turns_alone() -> None:
    """As an environment lays them: each turn tokenized by itself, what the tool said without loss."""
    from posttrain.config import DataConfig

    tokenizer = tiny_tokenizer()
    data = DataConfig(source="lab:calculator", chat=False, loss_on="assistant", rows=(0, 400))
    prepared = prepare(data, tokenizer, context=2048)
    called = short = 0
    for sample in prepared.samples:
        text = tokenizer.decode(list(sample.tokens))
        learnt = tokenizer.decode([t for t, w in zip(sample.tokens, sample.weights, strict=True) if w])
        prompt, _, answer = text.partition("=")
        assert answer.endswith("<|im_end|>")
        if "<" not in answer.removesuffix("<|im_end|>"):
            assert learnt == answer
            continue
        called += 1
        *lines, last = answer.removesuffix("<|im_end|>").split("\n")
        numbers, said = [int(lines[0].split("+")[0][1:])], ""
        for line in lines:
            before, number, result = map(int, re.fullmatch(r"<(\d+)\+(\d+)>=(\d+)", line).groups())  # type: ignore[union-attr]
            assert before == sum(numbers) and result == before + number
            numbers.append(number)
            said += f"<{before}+{number}>"
        assert last == str(sum(numbers)) and learnt == f"{said}{last}<|im_end|>"
        whole = list(map(int, prompt.split("+")))
        assert len(numbers) in (len(whole), len(whole) - 1)
        short += len(numbers) < len(whole)
    assert 70 < called < 130 and 0.15 < short / called < 0.45
    assert prepared.samples[0].tokens == prepare(data, tokenizer, context=2048).samples[0].tokens


def test_steps_of_what_was_sampled_are_credited_to_their_tokens(tmp_path: Path) -> None:
    """From text to advantages and files: every third character judged, by a loop over the rollouts that were kept."""

    def step_scores(prompt: str, completion: str) -> list[tuple[int, int, float]]:
        return [(i, i + 1, float(ord(completion[i]) % 5)) for i in range(0, len(completion), 3)]

    parts = [
        {"kind": "length", "unit": "characters", "target": 12, "width": 30},
        {"kind": "process", "name": "prm", "scorer": "step_scores", "weight": 0.5},
    ]
    exp = work(settings("dr_grpo", rewards={"terms": parts}), tmp_path, step_scores=step_scores)
    exp.collector.rewards.tokenizer = TOKENIZER
    metrics = exp.step(0, Track("t", 1, shown=False)).metrics
    rows = read_rollouts(tmp_path / "rollouts" / "step-000001.parquet")
    assert metrics["reward/prm"] == pytest.approx(sum(r["parts"]["prm"] for r in rows) / len(rows))
    judged = 0
    for g in range(4):
        mine = [r for r in rows if r["group"] == g]
        scores = [s for r in mine for _, _, s in r["steps"]["prm"]]
        mean = sum(scores) / len(scores)
        base = sum(r["parts"]["length"] for r in mine) / len(mine)
        for r in mine:
            text, n = r["completion"], len(r["tokens"])
            assert len(r["steps"]["prm"]) == len(range(0, len(text), 3))
            advantages = [r["parts"]["length"] - base] * n
            for start, end, score in r["steps"]["prm"]:
                seen = TOKENIZER.decode(r["tokens"][:end], skip_special_tokens=True)
                assert ord(seen[-1]) % 5 == score and 0 <= start < end <= n
                for t in range(end):
                    advantages[t] += 0.5 * (score - mean)
                judged += 1
            assert r["advantage"] == pytest.approx(sum(advantages) / n, abs=1e-5)
            assert r["reward"] == pytest.approx(r["parts"]["length"] + 0.5 * r["parts"]["prm"])
    assert judged > 20
