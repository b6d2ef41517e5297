"""The sampler of a stage on rollouts: in this process, or in workers that get the policy's weights when they changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.config.rl import RolloutConfig
from posttrain.config.rollout_sampler import RolloutSamplerConfig
from posttrain.core import distributed, ray_cluster
from posttrain.core.errors import RecipeError
from posttrain.core.types import RolloutGroup
from posttrain.models.language_model import LanguageModel
from posttrain.models.published_weights import (
    adapter_settings,
    check_publishable,
    published_adapter,
    published_weights,
    write_published,
)
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.open_workers import WorkerSource, check_backend
from posttrain.sampling.protocol import OnDone, Request
from posttrain.sampling.ray_sampler import RaySamplers
from posttrain.sampling.weight_folder import WeightFolder
from posttrain.sampling.worker_sampler import WorkerSampler
from posttrain.trainer.policy import save_atomically

if TYPE_CHECKING:
    from posttrain.trainer.policy import LoadedPolicy
    from posttrain.trainer.stage import StageRun
    from posttrain.trainer.train_step import Learner

PolicyWeights = Callable[[LanguageModel], Mapping[str, Tensor]]
MODEL = "sampler-model"
"""Folder in the stage's folder with the model that workers open, while the stage runs."""


class PolicySampler:
    """Sample with workers, which get the policy's weights first if the learner has changed them since.

    Their version is the number of optimizer steps, so that it is right after a resume too. See
    `posttrain.sampling.protocol.Sampler`.
    """

    def __init__(self, workers: WorkerSampler, learner: Learner, weights: PolicyWeights = published_weights) -> None:
        """Make the sampler.

        Args:
            workers: They have been opened with the weights that the learner begins with.
            learner: Trains the policy.
            weights: Returns what is sent of a policy. See `weights_of`.
        """
        self.workers, self.learner, self.weights = workers, learner, weights

    @property
    def context(self) -> int:
        """Return the most tokens of a prompt and its completion."""
        return self.workers.context

    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        """Complete every request with the policy's present weights; order is kept.

        Args:
            requests: The prompts.
            params: How tokens are drawn.
            on_done: Called as completions end.
        """
        version = self.learner.steps_done
        if version != self.workers.version:
            self.workers.update(version, self.weights(self.learner.model))
        return self.workers.sample(requests, params, on_done)


def samples_here(config: RolloutConfig) -> bool:
    """Return True if the process that trains samples too: neither processes nor the cluster's samplers do."""
    return not config.sampler.processes and ray_cluster.workers("samplers") is None


def open_policy_sampler(
    config: RolloutConfig, loaded: LoadedPolicy, run: StageRun, learner: Learner
) -> LocalSampler | PolicySampler:
    """Open the sampler of a stage; `run.resources` closes it.

    Args:
        config: Settings of the stage.
        loaded: The policy, with the weights that the stage starts from.
        run: Folder of the stage.
        learner: Trains the policy.

    Raises:
        MissingExtraError: The engine is not installed.
        ModelError: The policy is none that workers can sample from.
    """
    if samples_here(config):
        return LocalSampler(loaded.policy, loaded.tokenizer, **config.sampler.options())
    return PolicySampler(open_workers(config, loaded, run), learner, weights_of(config.sampler))


def weights_of(config: RolloutSamplerConfig) -> PolicyWeights:
    """Return the function that returns what workers get of a policy: what is trained, all weights, or an adapter."""
    if config.separate_adapter:
        return published_adapter
    every = config.backend == "vllm"
    return partial(published_weights, every=every, stored=every)


def open_workers(config: RolloutConfig, loaded: LoadedPolicy, run: StageRun) -> WorkerSampler:
    """Open the workers of a stage, with the policy's present weights; `run.resources` closes them.

    Args:
        config: Settings of the stage.
        loaded: The policy and its tokenizer.
        run: Folder of the stage.

    Raises:
        MissingExtraError: The engine is not installed.
        ModelError: The policy is none that workers can sample from.
    """
    policy, tokenizer = loaded.policy, loaded.tokenizer
    room = ray_cluster.workers("samplers")
    check_backend(config.sampler)
    check_publishable(policy)
    if config.sampler.separate_adapter:
        adapter_settings(policy)  # raises what makes it impossible, before anything starts
    if 0 < len(config.sampler.addresses) < distributed.world():
        raise RecipeError(
            f"sampler.address names {len(config.sampler.addresses)} servers, and each of {distributed.world()} processes "
            "that train needs one at least"
        )
    model = run.folder / MODEL

    def write(folder: Any) -> None:
        with distributed.summon_full_params(policy):
            if distributed.is_main():
                separate = config.sampler.separate_adapter
                write_published(policy, tokenizer, folder, untied=config.sampler.backend == "vllm", separate=separate)

    save_atomically(model, write)
    with ExitStack() as opened:
        opened.callback(shutil.rmtree, model, ignore_errors=True)
        weights = opened.enter_context(closing(WeightFolder()))
        source = WorkerSource(config.sampler, policy, tokenizer, model, run.folder, weights)
        on_ray = RaySamplers(room, source.settings()) if room is not None else None
        open_worker, count = (on_ray.open, on_ray.count) if on_ray else (source.open, source.count)
        workers = opened.enter_context(closing(WorkerSampler(open_worker, count)))
        run.resources.push(opened.pop_all())
    return workers
