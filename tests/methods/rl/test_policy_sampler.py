"""Reinforcement learning with a sampler worker: the same run as with the sampler in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from posttrain.config.rollout_sampler import RolloutSamplerConfig
from posttrain.core.progress import Track
from posttrain.methods.rl.policy_sampler import PolicySampler
from posttrain.models.published_weights import write_published
from posttrain.sampling.weight_folder import WeightFolder
from posttrain.sampling.worker_sampler import WorkerSampler
from tests.methods.rl.test_policy_gradient import TOKENIZER, settings, work
from tests.sampling.test_workers import WarmSource


def test_steps_with_a_worker_are_those_without(tmp_path: Path) -> None:
    """Each step needs the weights of the one before; held-out problems those after it. A resume sends them again."""
    held_out = {"problems": {"kind": "rows", "data": {"source": "x"}}, "every": 1}
    config = settings("grpo", mini_batches=2, held_out=held_out)
    here, there = work(config, tmp_path / "here"), work(config, tmp_path / "there")
    write_published(there.learner.model, TOKENIZER, tmp_path / "model")
    weights = WeightFolder(tmp_path)
    sampler = RolloutSamplerConfig(workers=1)
    source = WarmSource(sampler, there.learner.model, TOKENIZER, tmp_path / "model", tmp_path, weights)
    workers = WorkerSampler(source.open)
    there.collector.sampler = PolicySampler(workers, there.learner)
    for step in range(2):
        expected, found = (t.step(step, Track("t", 3, shown=False)).metrics for t in (here, there))
        assert found.keys() == expected.keys()
        for name in ("reward", "held_out", "loss", "entropy", "held_out_length"):
            assert found[name] == pytest.approx(expected[name], abs=1e-5), name
        assert found["mismatch_max"] < 1e-4
    for a, b in zip(here.learner.model.parameters(), there.learner.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert workers.version == there.learner.steps_done == 4
    workers.close()
    weights.close()


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ({"python": "python3"}, "sampler.python is for sampler.backend vllm"),
        ({"backend": "vllm", "workers": 0}, "vLLM samples in a process of its own"),
        ({"backend": "vllm", "kv_cache": "int8"}, "for vLLM set engine_args"),
        ({"backend": "vllm", "min_p": 0.1, "top_p": 0.9}, "min_p before top_p"),
        ({"backend": "vllm", "engine_args": {"max_num_seqs": 4}}, "engine_args.max_num_seqs is set by posttrain"),
        ({"backend": "sglang"}, "'local' or 'vllm'"),
    ],
)
def test_sampler_settings_that_contradict_are_refused(sampler: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        settings("grpo", sampler=sampler)


def test_corrections_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="no weights unless importance_sampling_cap"):
        settings("grpo", importance_sampling_mode="token_mask")
    with pytest.raises(ValidationError, match="leave out sampler.top_p"):
        settings("grpo", max_mismatch_kl=0.1, sampler={"top_p": 0.9})
