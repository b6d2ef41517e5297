"""Reward workers and samplers as actors on a Ray cluster: the same answers as in this process, also after a loss."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config.rewards import RewardsConfig
from posttrain.config.rollout_sampler import RolloutSamplerConfig
from posttrain.core import ray_cluster
from posttrain.core.errors import RewardError
from posttrain.models.language_model import LanguageModel
from posttrain.models.published_weights import write_published
from posttrain.models.tiny_model import tiny_model
from posttrain.rewards import RewardStack
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.open_workers import WorkerSource
from posttrain.sampling.ray_sampler import RaySamplers
from posttrain.sampling.worker_sampler import WorkerSampler
from tests.rewards.test_stack import group, strange
from tests.sampling.test_engine import spread
from tests.sampling.test_workers import PARAMS, REQUESTS, TOKENIZER, same

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]


@pytest.fixture
def two_bundles(cluster: Any) -> Iterator[str]:
    """Have room for two workers of a kind."""
    reserved, values = ray_cluster.reserve_workers(cluster, [{"CPU": 1}] * 2, 60, print)
    ray_cluster.set_workers({"rewards": values, "samplers": values})
    yield values["group"]
    ray_cluster.set_workers({})
    ray_cluster.release(cluster, reserved)


def test_reward_actors_score_like_processes(two_bundles: str, tmp_path: Path) -> None:
    """An actor that is killed in a call is replaced, and the call repeated; failures are what they are in processes."""
    groups = [group("4", "8/2", "none", "raise", mark=str(tmp_path / f"mark{i}")) for i in range(2)]
    terms = [{"kind": "math"}, strange("strange"), strange("killed_actor_once", timeout=30)]
    settings = RewardsConfig.model_validate({"terms": terms, "on_error": "exclude"})

    def scores() -> list[Any]:
        with RewardStack(settings) as rewards:
            assert type(rewards.pool).__name__ == kind
            return [(dict(r.rewards), r.failures) for g in rewards(groups).groups for r in g.rollouts]

    kind = "RayPool"
    found = scores()
    assert (tmp_path / "mark0").exists() and (tmp_path / "mark1").exists()
    with pytest.raises(RewardError, match="there is no 'nothing'"):
        RewardStack(RewardsConfig.model_validate([strange("nothing")]))
    ray_cluster.set_workers({})
    kind = "Pool"
    assert scores() == found and any(failures for _, failures in found)


def test_samplers_on_the_cluster_sample_what_this_process_samples(two_bundles: str, tmp_path: Path) -> None:
    """One actor and two, before and after new weights, and after one was killed: the same completions."""
    policy = LanguageModel(spread(tiny_model("llama")))
    here = LocalSampler(policy, TOKENIZER)
    write_published(policy, TOKENIZER, tmp_path / "model")
    source = WorkerSource(RolloutSamplerConfig(), policy, TOKENIZER, tmp_path / "model", tmp_path, None)  # type: ignore[arg-type]
    room = ray_cluster.workers("samplers")
    assert room is not None
    samplers = RaySamplers(room, source.settings())
    two = WorkerSampler(samplers.open, samplers.count)
    expected = here.sample(REQUESTS, PARAMS)
    assert samplers.count == 2 and two.context == here.context
    same(two.sample(REQUESTS, PARAMS), expected)
    one = WorkerSampler(samplers.open, 1)
    same(one.sample(REQUESTS, PARAMS), expected)
    one.close()
    with torch.no_grad():
        weight = policy.base.get_output_embeddings().weight
        weight.mul_(0.5)
    two.update(3, {"lm_head.weight": weight})
    ray = ray_cluster.joined(room)
    pid = ray.get(two.workers[1].actor.process.remote())  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGKILL)
    found = two.sample(REQUESTS, PARAMS)
    same(found, here.sample(REQUESTS, PARAMS))
    assert {p.step for g in found for r in g.rollouts for p in r.pieces} == {3}
    assert ray.get(two.workers[1].actor.process.remote()) != pid  # type: ignore[attr-defined]
    two.close()
