"""Reinforcement learning learns: from a random model to what is rewarded, by every family of methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain
from posttrain.core.files import read_lines
from posttrain.lab.lab_settings import LabSettings
from posttrain.lab.make_lab import make_lab
from tests.invariants.test_parity import flat_loop


def even(text: str, example: dict[str, Any]) -> float:
    """1 where there are digits and all are even."""
    digits = [int(d) for d in text if d.isdigit()]
    return float(bool(digits) and all(d % 2 == 0 for d in digits))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model over ten digits, and problems for it."""
    folder = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    model, tokenizer = flat_loop("grpo_loop").tiny()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": str(n), "answer": "-"} for n in range(100, 400)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


OTHERS = [pytest.param(method, marks=pytest.mark.long) for method in ("ppo", "rloo", "dapo", "gspo", "reinforce_pp")]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", *OTHERS])
def test_a_rare_reward_becomes_the_rule(method: str, digits: Path, tmp_path: Path) -> None:
    """All of eight digits even: under a tenth of a random model's answers, nearly all after 60 steps."""
    data = {"source": str(digits / "problems.jsonl"), "chat": False}
    stage = {
        "method": method,
        "name": "rl",
        "problems": {"kind": "rows", "data": {**data, "rows": [0, 250]}},
        "held_out": {"problems": {"kind": "rows", "data": {**data, "rows": [250, 300]}}, "every": 30},
        "rewards": {"terms": [{"kind": "function", "name": "even", "function": "even", "isolated": False}]},
        "sampler": {"max_tokens": 8, "min_tokens": 4},
        "prompts_per_step": 8,
        "group_size": 8,
        "steps": 60,
        "optimizer": {"lr": 2e-3},
        **({"mini_batches": 2} if method in ("ppo", "gspo") else {}),
    }
    recipe = posttrain.Recipe.model_validate(
        {"name": "digits", "model": {"source": str(digits / "model")}, "stages": [stage]}
    )
    result = posttrain.run(recipe, tmp_path / "run", rewards={"even": even})
    metrics = read_lines(result.folder / "stages" / "0-rl" / "metrics.jsonl")
    rewards = [m["reward"] for m in metrics if "reward" in m]
    assert sum(rewards[:3]) / 3 < 0.15
    assert sum(rewards[-5:]) / 5 > 0.85
    assert metrics[-1]["held_out"] > 0.85
    assert "held_out" in result.report.read_text() or "held out" in result.report.read_text().lower()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_laboratory_is_learnt_from(tmp_path: Path) -> None:
    """The recipe `lab`: from under 30% of held-out sums to over 80%, in twenty steps at half of its learning rate, at
    which RLOO learns too (docs/experiments/lab.md). benchmarks/lab.py has whole runs, on three laboratories."""
    make_lab(LabSettings(), tmp_path / "lab", shown=False)
    for method in ("grpo", "rloo", "ppo"):
        changes = [f"model.source={tmp_path / 'lab'}", f"stages.rl.method={method}", "stages.rl.steps=20"]
        changes += ["stages.rl.optimizer.lr=1e-4", "stages.rl.held_out.every=20"]
        recipe = posttrain.load_recipe("lab", [*changes, "stages.rl.held_out.problems.size=256"])
        folder = posttrain.run(recipe, tmp_path / method).folder / "stages" / "0-rl"
        held_out = [m["held_out"] for m in read_lines(folder / "metrics.jsonl") if "held_out" in m]
        assert held_out[0] < 0.3 and held_out[-1] > 0.8, (method, held_out)
