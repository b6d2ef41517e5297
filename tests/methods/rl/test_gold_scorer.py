"""Proxy and gold on the same samples while a policy is trained, and the KL of completions against a slow loop."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import posttrain
from posttrain.config import RLConfig
from posttrain.core.errors import RewardError
from posttrain.core.files import read_lines
from posttrain.core.progress import Phases
from posttrain.methods.rl.gold_scorer import GoldScorer
from posttrain.sampling.rollout_store import read_rollouts, rollout_steps, rollouts_path

STAGE: dict[str, Any] = {
    "method": "rloo",
    "name": "policy",
    "problems": {"kind": "lab", "size": 20},
    "held_out": {
        "problems": {"kind": "lab", "held_out": True, "size": 5},
        "every": 2,
        "samples": 2,
        "gold": {"kind": "function", "function": "gold"},
    },
    "rewards": {"terms": [{"kind": "function", "function": "proxy", "name": "proxy", "weight": 2.0}]},
    "sampler": {"max_tokens": 6, "temperature": 0.7},
    "prompts_per_step": 2,
    "group_size": 2,
    "steps": 3,
    "optimizer": {"lr": 1e-2},
}


def proxy(text: str, example: Any) -> float:
    return float(len(text))


def gold(text: str, example: Any) -> float:
    return float(sum(c.isdigit() for c in text)) - len(text)


def run(folder: Path, **changes: Any) -> Path:
    recipe = {"name": "g", "model": {"source": "tiny:llama"}, "stages": [{**STAGE, **changes}]}
    rewards = {"proxy": proxy, "gold": gold}
    return posttrain.run(posttrain.Recipe.model_validate(recipe), folder, rewards=rewards).folder / "stages/0-policy"


@pytest.mark.parametrize("adapter", [pytest.param(None, marks=pytest.mark.long), {"r": 4}])
def test_both_are_measured_on_the_same_samples(tmp_path: Path, adapter: dict[str, int] | None) -> None:
    stage = run(tmp_path / "run", adapter=adapter)
    assert rollout_steps(stage / "gold") == [0, 2, 3]  # before, every second step, after the last
    records = {r["step"]: r for r in read_lines(stage / "metrics.jsonl")}
    assert "gold" not in records[1]
    for step in (0, 2, 3):
        rows = read_rollouts(rollouts_path(stage / "gold", step))
        assert len(rows) == 10 and {r["problem"] for r in rows} == set(range(5))
        for r in rows:
            assert r["parts"] == {"proxy": proxy(r["completion"], None), "gold": gold(r["completion"], None)}
            assert r["reward"] == 2 * r["parts"]["proxy"]
        found = records[step]
        assert found["gold"] == pytest.approx(statistics.fmean(r["parts"]["gold"] for r in rows))
        assert found["proxy"] == pytest.approx(statistics.fmean(r["reward"] for r in rows))
        assert found["gold_std"] == pytest.approx(statistics.pstdev(r["parts"]["gold"] for r in rows))
        proxies, golds = ([r["parts"][name] for r in rows] for name in ("proxy", "gold"))
        expected = float(np.corrcoef(proxies, golds)[0, 1])
        assert found["proxy_gold"] == pytest.approx(expected, abs=1e-6)
        assert found["gold_low"] <= found["gold"] <= found["gold_high"]
    assert records[0]["kl_sequence"] == pytest.approx(0, abs=1e-9) and records[3]["kl_sequence"] > 1e-4


def test_the_kl_is_that_of_whole_completions(tmp_path: Path) -> None:
    """At step 3, from transformers' own logits of the model that was left and of the one that it began with."""
    stage = run(tmp_path / "run")
    last = read_rollouts(rollouts_path(stage / "gold", 3))
    after = AutoModelForCausalLM.from_pretrained(stage / "model", dtype=torch.float32)
    from posttrain.models.tiny_model import tiny_model

    first = tiny_model("llama")
    sums = []
    for r in last:
        ids = torch.tensor([[*r["prompt_tokens"], *r["tokens"]]])
        total = 0.0
        with torch.no_grad():
            both = [(m(ids).logits[0] / 0.7).log_softmax(-1) for m in (after, first)]
        for t, token in enumerate(r["tokens"], len(r["prompt_tokens"]) - 1):
            mine, other = (float(x[t, token]) for x in both)
            ratio = torch.tensor(other - mine).exp().item()
            total += ratio - 1 - (other - mine)
        sums.append(total)
    record = read_lines(stage / "metrics.jsonl")[-1]
    assert record["kl_sequence"] == pytest.approx(statistics.fmean(sums), rel=1e-3)


def test_a_run_without_gold_learns_the_same(tmp_path: Path) -> None:
    """Measuring changes nothing of what is learnt."""
    held_out = {k: v for k, v in STAGE["held_out"].items() if k not in ("gold", "samples")}
    with_it, without = run(tmp_path / "a"), run(tmp_path / "b", held_out=held_out)
    a, b = ([(r.get("reward"), r.get("loss")) for r in read_lines(s / "metrics.jsonl")] for s in (with_it, without))
    assert a == b and not (without / "gold").exists()


def test_broken_off_while_it_measures_it_goes_on_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", checkpoint_every=2)
    measure, seen = GoldScorer.measure, list[int]()

    def breaks(self: GoldScorer, step: int, phases: Phases) -> dict[str, float]:
        seen.append(step)
        if seen == [0, 2, 3]:
            raise KeyboardInterrupt
        return measure(self, step, phases)

    monkeypatch.setattr(GoldScorer, "measure", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", checkpoint_every=2)
    again = run(tmp_path / "broken", checkpoint_every=2)
    assert seen == [0, 2, 3, 3]
    assert read_lines(again / "metrics.jsonl") == read_lines(whole / "metrics.jsonl")
    for step in (0, 2, 3):
        assert read_rollouts(rollouts_path(again / "gold", step)) == read_rollouts(rollouts_path(whole / "gold", step))


def test_samples_that_gold_fails_on_are_counted_over_a_stop_too(tmp_path: Path) -> None:
    """One of ten before, one at step 2; broken off at step 3, where going on meets the third, one too many."""
    calls: list[str] = []

    def picky(text: str, example: Any) -> float:
        calls.append(text)
        if len(calls) == 21:
            raise KeyboardInterrupt
        if len(calls) in (1, 11, 22):
            raise RuntimeError("not this one")
        return gold(text, example)

    recipe = posttrain.Recipe.model_validate(
        {"name": "g", "model": {"source": "tiny:llama"}, "stages": [{**STAGE, "checkpoint_every": 2}]}
    )
    functions = {"proxy": proxy, "gold": picky}
    with pytest.raises(KeyboardInterrupt):
        posttrain.run(recipe, tmp_path / "run", rewards=functions)
    records = {r["step"]: r for r in read_lines(tmp_path / "run/stages/0-policy/metrics.jsonl")}
    assert [records[s].get("gold_failed") for s in (0, 1, 2)] == [1, None, 1]
    assert len(read_rollouts(rollouts_path(tmp_path / "run/stages/0-policy/gold", 2))) == 9
    with pytest.raises(RewardError, match="failed too often: 3 errors"):
        posttrain.run(recipe, tmp_path / "run", rewards=functions)


def test_online_dpo_measures_gold_too(tmp_path: Path) -> None:
    online = {k: v for k, v in STAGE.items() if k != "method"} | {"method": "online_dpo", "group_size": 3}
    recipe = {"name": "g", "model": {"source": "tiny:llama"}, "stages": [online]}
    rewards = {"proxy": proxy, "gold": gold}
    result = posttrain.run(posttrain.Recipe.model_validate(recipe), tmp_path / "run", rewards=rewards)
    records = read_lines(result.folder / "stages/0-policy/metrics.jsonl")
    assert records[0]["kl_sequence"] == pytest.approx(0, abs=1e-9) and records[-1]["kl_sequence"] > 0
    assert json.loads((result.folder / "manifest.json").read_text())["status"] == "done"


def test_settings_that_measure_nothing_are_refused() -> None:
    held_out = STAGE["held_out"]
    for changes, why in (
        ({"sampler": {"top_k": 5}}, "leave out sampler.top_k"),
        ({"held_out": {**held_out, "gold": None}}, "drawn for held_out.gold, and there is none"),
        ({"rewards": {"terms": [{"kind": "math", "name": "gold"}]}}, "a reward is named 'gold'"),
        ({"held_out": {**held_out, "gold": {"kind": "self_consistency"}}}, "compares the completions of a prompt"),
    ):
        with pytest.raises(ValidationError, match=why):
            RLConfig.model_validate({**STAGE, **changes})
