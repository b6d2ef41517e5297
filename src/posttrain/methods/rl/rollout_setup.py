"""Sampler, rewards and recorder of a stage on rollouts are opened."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from posttrain.config.rl import RLConfig, RolloutConfig
from posttrain.methods.rl.collect_rollouts import RolloutCollector
from posttrain.methods.rl.gold_scorer import GoldScorer
from posttrain.methods.rl.policy_sampler import open_policy_sampler
from posttrain.methods.rl.step_recorder import StepRecorder
from posttrain.rewards.reward_log import LOG
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.environments import environment
from posttrain.sampling.multi_turn import TurnSampler, in_turns
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
    local = open_policy_sampler(config, loaded, run, learner)
    sampler: Sampler = local
    turns = None
    if isinstance(config, RLConfig) and config.environment is not None:
        answering = environment(config.environment, functions)
        run.resources.callback(getattr(answering, "close", lambda: None))
        sampler = TurnSampler(local, answering, config.environment, tokenizer, local.context)
        turns = partial(in_turns, tokenizer=tokenizer)
    collector = RolloutCollector(config, sampler, rewards, prompts.trained, run.seed, hooks=hooks, tokenizer=tokenizer)
    gold = None
    if config.held_out is not None and config.held_out.gold is not None:
        assert reference is not None
        scorer = GoldScorer(config, collector, prompts.held_out, policy, reference, run.folder, run.seed, functions)
        gold = run.resources.enter_context(closing(scorer))
    recorder = StepRecorder(
        config, policy, collector, run.folder, prompts.held_out, seed=run.seed, gold=gold, turns=turns
    )
    return collector, recorder


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
