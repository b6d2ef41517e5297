"""Reinforcement learning with the self-refine loop: an interrupted run ends as one that was not interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.core.errors import PosttrainError
from posttrain.core.files import file_hash
from posttrain.sampling.rollout_store import read_rollouts

CALLS = {"left": 10**9}
"""Calls of the source of feedback until it fails."""


def failing(answer: str, example: Mapping[str, Any]) -> str:
    CALLS["left"] -= 1
    if CALLS["left"] < 0:
        raise RuntimeError("down")
    return f"{len(answer)} characters"


def test_an_interrupted_run_ends_with_the_same_rollouts_and_weights(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(20)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    stage = {
        "method": "grpo",
        "name": "rl",
        "problems": {"kind": "rows", "data": {"source": str(tmp_path / "problems.jsonl"), "chat": False}},
        "environment": {
            "kind": "refine",
            "answers": "inline",
            "stop": list("eai1"),
            "feedback": [{"kind": "function", "function": "failing"}],
            "max_reply": 20,
        },
        "rewards": [{"kind": "length", "unit": "characters", "target": 12, "width": 30}],
        "sampler": {"max_tokens": 40},
        "prompts_per_step": 2,
        "group_size": 4,
        "steps": 4,
        "checkpoint_every": 1,
    }
    recipe = posttrain.Recipe.model_validate({"name": "r", "model": {"source": "tiny:llama"}, "stages": [stage]})
    calm = posttrain.run(recipe, tmp_path / "calm", rewards={"failing": failing})
    used = 10**9 - CALLS["left"]
    CALLS["left"] = used // 2
    with pytest.raises(PosttrainError, match="feedback function: failed for .*problems.jsonl:.*RuntimeError: down"):
        posttrain.run(recipe, tmp_path / "cut", rewards={"failing": failing})
    steps = sorted((tmp_path / "cut" / "stages" / "0-rl" / "rollouts").glob("*.parquet"))
    assert 0 < len(steps) < 4
    CALLS["left"] = 10**9
    resumed = posttrain.run(recipe, tmp_path / "cut", rewards={"failing": failing})
    replies = 0
    for number in range(1, 5):
        one, two = (
            read_rollouts(r.folder / "stages" / "0-rl" / "rollouts" / f"step-{number:06d}.parquet")
            for r in (calm, resumed)
        )
        assert [r["tokens"] for r in one] == [r["tokens"] for r in two]
        assert [r["mask"] for r in one] == [r["mask"] for r in two]
        replies += sum("characters" in r["completion"] for r in one)
    assert replies > 8
    weights = [file_hash(Path(r.model) / "model.safetensors") for r in (calm, resumed)]
    assert weights[0] == weights[1]
