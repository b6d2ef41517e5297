"""Sampler, rewards and recorder of a stage on rollouts are opened."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from posttrain.config.rl import RLConfig, RolloutConfig
from posttrain.core import distributed
from posttrain.core.errors import RecipeError
from posttrain.methods.rl.asynchronous import AsynchronousCollector
from posttrain.methods.rl.collect_rollouts import RolloutCollector
from posttrain.methods.rl.gold_scorer import GoldScorer
from posttrain.methods.rl.policy_sampler import (
    PolicySampler,
    open_policy_sampler,
    open_workers,
    samples_here,
    weights_of,
)
from posttrain.methods.rl.step_recorder import StepRecorder
from posttrain.rewards.reward_log import LOG
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.behaviour_sampler import BehaviourSampler
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.environments import environment
from posttrain.sampling.multi_turn import TurnSampler, in_turns
from posttrain.sampling.thread_worker import ThreadWorker, trained_weights
from posttrain.trainer.reference_model import frozen_beside

if TYPE_CHECKING:
    from posttrain.methods.rl.hooks import Hook
    from posttrain.methods.rl.rl_stage import StagePrompts
    from posttrain.models.language_model import LanguageModel
    from posttrain.sampling.protocol import Sampler
    from posttrain.trainer.policy import LoadedPolicy
    from posttrain.trainer.stage import Functions, StageRun
    from posttrain.trainer.train_step import Learner


def open_rollouts(
    config: RolloutConfig,
    loaded: LoadedPolicy,
    prompts: StagePrompts,
    run: StageRun,
    functions: Functions | None = None,
    *,
    learner: Learner,
    hooks: Sequence[Hook] = (),
    reference: LanguageModel | None = None,
) -> tuple[RolloutCollector, StepRecorder]:
    """Open what collects the rollouts of a stage and what records its steps; `run.resources` closes them.

    Args:
        config: Settings of the stage.
        loaded: The policy and its tokenizer.
        prompts: The stage's prompts.
        run: Folder and seed of the stage.
        functions: Rewards and environments given from Python, by name.
        learner: Trains the policy.
        hooks: Optional features.
        reference: The model that the stage started from, for the gold scorer.
    """
    policy, tokenizer = loaded.policy, loaded.tokenizer
    answered_by = getattr(config, "environment", None)
    stack = RewardStack(config.rewards, functions, tokenizer, run.folder / LOG, answered_by)
    rewards = run.resources.enter_context(stack)
    warn_of_sampler(config)
    asynchronous = isinstance(config, RLConfig) and config.asynchronous is not None
    local: LocalSampler | PolicySampler
    if asynchronous:  # workers have other weights than the policy: what is measured is sampled here
        local = LocalSampler(policy, tokenizer, **config.sampler.options())
    else:
        local = open_policy_sampler(config, loaded, run, learner)
    in_environment: Callable[[Sampler], Sampler] = _unanswered
    turns = None
    if isinstance(config, RLConfig) and config.environment is not None:
        answering, settings = environment(config.environment, functions), config.environment
        run.resources.callback(getattr(answering, "close", lambda: None))
        lock = Lock() if asynchronous and not getattr(answering, "concurrent", False) else None
        in_environment = partial(
            TurnSampler, environment=answering, config=settings, tokenizer=tokenizer, context=local.context, lock=lock
        )
        turns = partial(in_turns, tokenizer=tokenizer)
    sampler = in_environment(local)
    options: dict[str, Any] = {"hooks": hooks, "tokenizer": tokenizer}
    if isinstance(config, RLConfig) and asynchronous:
        behaviour = open_behaviour(config, loaded, run)
        overlapping = AsynchronousCollector(
            config,
            sampler,
            in_environment(behaviour),
            rewards,
            prompts.trained,
            run.seed,
            behaviour=behaviour,
            **options,
        )
        collector: RolloutCollector = overlapping
        run.resources.callback(overlapping.close)
        run.resources.callback(behaviour.close)  # first of all: threads that wait for completions then end
    else:
        collector = RolloutCollector(config, sampler, rewards, prompts.trained, run.seed, **options)
    gold = None
    if config.held_out is not None and config.held_out.gold is not None:
        assert reference is not None
        scorer = GoldScorer(config, collector, prompts.held_out, policy, reference, run.folder, run.seed, functions)
        gold = run.resources.enter_context(closing(scorer))
    recorder = StepRecorder(
        config, policy, collector, run.folder, prompts.held_out, seed=run.seed, gold=gold, turns=turns
    )
    return collector, recorder


def _unanswered(sampler: Sampler) -> Sampler:
    return sampler


def open_behaviour(config: RLConfig, loaded: LoadedPolicy, run: StageRun) -> BehaviourSampler:
    """Open what samples while the policy is trained: a thread with a copy of it, processes, or the cluster's samplers.

    Args:
        config: Settings of the stage.
        loaded: The policy and its tokenizer, with the weights that the stage starts from.
        run: Folder of the stage; its resources close the processes.

    Raises:
        RecipeError: The policy is trained on several ranks.
    """
    if distributed.world() > 1:
        raise RecipeError(
            f"asynchronous: the policy is trained by {distributed.world()} processes, and coming steps are sampled "
            "beside a policy that one process trains. Leave asynchronous out, or start one process"
        )
    policy = loaded.policy
    if samples_here(config):
        # Another thread's work would end the recording of CUDA graphs.
        worker = ThreadWorker(policy, loaded.tokenizer, **config.sampler.options(), static_shapes=False)
        return BehaviourSampler(worker, worker, partial(trained_weights, policy))
    workers = open_workers(config, loaded, run)
    return BehaviourSampler(workers, workers, partial(weights_of(config.sampler), policy))


def warn_of_sampler(config: RolloutConfig) -> None:
    """Warn if the sampler's probabilities are not those that policy gradients train, and no setting corrects for it."""
    sampler = config.sampler
    other = "kv_cache" if sampler.kv_cache else "backend" if sampler.backend != "local" else None
    if isinstance(config, RLConfig) and other and config.importance_sampling_cap is None:
        warnings.warn(
            f"sampler.{other} is {getattr(sampler, other)}: completions are drawn with slightly other probabilities than "
            "those that are trained, and nothing corrects for it. Set importance_sampling_cap, for example to 2 (the "
            "metric mismatch has the difference)",
            stacklevel=2,
        )


def frozen_reference(config: RolloutConfig, loaded: LoadedPolicy, run: StageRun, needed: bool) -> LanguageModel | None:
    """Return the model that the stage starts from, frozen (the policy itself if adapters are trained), or None.

    Args:
        config: Settings of the stage; a gold scorer needs the model.
        loaded: The policy.
        run: The model to start from.
        needed: The loss or the reward needs it.
    """
    gold = config.held_out is not None and config.held_out.gold is not None
    return frozen_beside(loaded.policy, run.model, config.adapter is not None) if needed or gold else None
