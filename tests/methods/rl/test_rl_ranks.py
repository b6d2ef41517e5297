"""Reinforcement learning by two ranks is that by one: whole recipes through the command, each way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import posttrain
from posttrain.sampling.rollout_store import groups_of, read_rollouts
from tests import warm

LENGTH = {"kind": "length", "unit": "characters", "target": 12, "width": 30}
COMMON = {
    "problems": {"kind": "rows", "data": {"source": "prompts.jsonl"}, "answers": False},
    "held_out": {
        "problems": {"kind": "rows", "data": {"source": "others.jsonl"}, "answers": False},
        "every": 2,
        "gold": {"kind": "length", "unit": "characters", "target": 40, "width": 40},
        "samples": 2,
    },
    "rewards": {"terms": [LENGTH]},
    "sampler": {"max_tokens": 9},
    "prompts_per_step": 3,  # an odd number: ranks have different numbers of groups, and of passes
    "steps": 3,
    "optimizer": {"lr": 1e-3},
    "systems": {"tokens_per_micro_batch": 64},
    "checkpoint_every": 2,
}
STAGES = {
    "grpo": {
        "group_size": 4,
        "adapter": {"r": 4},
        "kl": {"coefficient": 0.05},
        "exploration": {"curriculum": {}, "dynamic_sampling": 1},
    },
    "ppo": {"group_size": 2, "ppo_epochs": 2, "kl": {"coefficient": 0.05, "where": "reward", "estimator": "k1"}},
    "remax": {},
    "rloo": {
        "environment": {"kind": "refine", "own": False, "answers": "inline", "stop": list("aeiounrst12345 ")},
        "rewards": [{"kind": "improvement", "reward": LENGTH}],
        "sampler": {"max_tokens": 40},
        "group_size": 2,
        "kl": {"coefficient": 0.05, "later_turns": 0.2},
    },
    "online_dpo": {"group_size": 2},
    "workers": {  # one for each rank, with adapters merged from sharded weights
        "method": "grpo",
        "group_size": 4,
        "adapter": {"r": 4},
        "sampler": {"max_tokens": 9, "workers": 1},
    },
    "together": {  # both ranks compute each micro-batch
        "method": "grpo",
        "group_size": 4,
        "adapter": {"r": 4},
        "kl": {"coefficient": 0.05},
        "systems": {"tokens_per_micro_batch": 32},
    },
    "critic": {  # of answers that each rank's own corrector revises
        "method": "grpo",
        "rewards": [{"kind": "corrected", "source": "tiny:llama", "reward": LENGTH, "sampler": {"max_tokens": 8}}],
        "group_size": 2,
    },
}


LONG = ["ppo", "rloo", "remax", "critic", "workers", "together"]
"""Methods whose test repeats most of another one's, or takes long to start processes."""


def runs_by_one_and_two(folder: Path, method: str) -> list[Path]:
    """Carry a recipe through by one process, and by two; return their folders."""
    for name, start in (("prompts", 0), ("others", 50)):
        told = [f"Tell of {'many ' * (i % 5)}things, number {i}." for i in range(start, start + 7)]
        rows = [{"prompt": t, "asked": [{"role": "user", "content": t}], "written": t[:9]} for t in told]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    stage = {"method": method, **COMMON, **STAGES[method], "name": "rl"}
    for ranks in (1, 2):
        systems = {"sequence_parallel": ranks if method == "together" else 1}
        recipe = {"name": method, "model": {"source": "tiny:llama"}, "stages": [stage], "systems": systems}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        warm.run(posttrain.run, "recipe.yaml", f"runs/{ranks}", folder=folder, ranks=ranks)
    return [folder / "runs" / str(ranks) for ranks in (1, 2)]


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "stages" / "0-rl" / "metrics.jsonl").read_text().splitlines()]


def written(folder: Path) -> list[list[list[tuple[tuple[int, ...], float]]]]:
    """(tokens, reward) by step, group and rollout."""
    steps = [groups_of(read_rollouts(path)) for path in sorted(folder.glob("*.parquet"))]
    return [[[(tuple(r.tokens), r.reward) for r in g.rollouts] for g in groups] for groups in steps]


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.long] * (m in LONG)) for m in STAGES])
def test_two_ranks_equal_one(tmp_path: Path, method: str) -> None:
    """The same completions with the same rewards, the same metrics to rounding, the same weights at the end."""
    one, two = runs_by_one_and_two(tmp_path, method)
    for kind in ("rollouts", "held_out", "gold"):
        first, second = (written(r / "stages" / "0-rl" / kind) for r in (one, two))
        assert len(first) == 3 and first == second, kind
    for a, b in zip(records(one), records(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-4)
    weights, others = (load_file(r / "model" / "model.safetensors") for r in (one, two))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert float((weight - others[name]).abs().max()) < 1e-4, name
