"""Reinforcement learning as a stage of a recipe: GRPO, PPO and the other policy-gradient methods (no torch by itself)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.config.rl import RLConfig, RolloutConfig
from posttrain.core.types import Sample
from posttrain.methods.rl.rl_metrics import RL_METRICS, RL_TITLES
from posttrain.trainer.stage import Stage, StageContext, StageRun
from posttrain.trainer.workload import Completions, Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from posttrain.data.prompts import RenderedPrompt
    from posttrain.methods.rl.rl_trainer import RLTrainer
    from posttrain.trainer.policy import LoadedPolicy

MAX_RUNNING, CPU_BUDGET = 128, 768
"""Defaults on a CPU: completions that a sampler runs at a time, and tokens of a micro-batch."""


@dataclass(frozen=True)
class StagePrompts:
    """The prompts of a stage.

    Attributes:
        trained: Prompts to train on.
        held_out: Prompts to measure on, without those that are trained on too.
    """

    trained: Sequence[RenderedPrompt]
    held_out: Sequence[RenderedPrompt] = ()


def _completed(prompt: Sequence[int], completions: int, new: int) -> list[Sample]:
    """Return samples as long as a prompt with completions of this many tokens, each of other tokens."""
    meta, weights = {"shared": len(prompt)}, [0.0] * len(prompt) + [1.0] * new
    return [Sample([*prompt, *range(i, i + new)], weights, meta=meta) for i in range(completions)]


class RolloutStage(Stage):
    """Train on the policy's own completions, scored by rewards: the part that RL and online DPO have in common."""

    def prepare(self) -> list[tuple[str, Any]]:
        """Read the prompts, and check the rewards and the environment."""
        from posttrain.data.held_out_rows import drop_training_overlap
        from posttrain.data.prompts import load_prompts
        from posttrain.rewards.stack import RewardStack
        from posttrain.sampling.open_workers import check_backend

        config: RolloutConfig = self.config
        context, name, held_out = self.context, self.config.name, config.held_out
        if context.functions is not None:  # a reward that can't be built is known before an earlier stage trains
            answered_by = getattr(config, "environment", None)
            RewardStack(config.rewards, context.functions, context.tokenizer, environment=answered_by).close()
            check_backend(config.sampler)
            if held_out is not None and held_out.gold is not None:
                RewardStack([held_out.gold], context.functions, context.tokenizer, environment=answered_by).close()
        images = getattr(config, "environment", None) is None  # environments write their turns as text
        trained = load_prompts(config.problems, context.tokenizer, context=context.context, images=images)
        self.prompts = StagePrompts(trained.items)
        if held_out is None:
            return [(name, trained)]
        others = load_prompts(held_out.problems, context.tokenizer, context=context.context, images=images)
        others = drop_training_overlap(others, trained, f"stage {name}")
        self.prompts = StagePrompts(trained.items, others.items)
        return [(name, trained), (f"{name} held out", others)]

    def workload(self) -> Workload:
        """Return what a step samples and trains on: the longest prompts, with completions of the most tokens."""
        config = self.config
        group = int(getattr(config, "group_size", 2))
        new, budget = config.sampler.max_tokens, config.systems.tokens_per_micro_batch or CPU_BUDGET
        prompts = sorted((p.tokens for p in self.prompts.trained), key=len)
        longest = len(prompts[-1])
        limit = config.sampler.max_running or MAX_RUNNING
        at_once = max(1, min(group, (budget - longest) // new))  # completions that share a pass with their prompt
        units = [_completed(p, at_once, new) for p in prompts[:: max(1, len(prompts) // 200)]]
        return Workload(
            units,
            config.prompts_per_step * -(-group // at_once),
            sums=True,
            completions=Completions(
                config.prompts_per_step, group, longest, new, limit, config.sampler.kv_cache == "int8"
            ),
            frozen=config.adapter is None and bool(getattr(getattr(config, "kl", None), "coefficient", True)),
            copied=getattr(config, "asynchronous", None) is not None,
            note=f"completions of {new:,} tokens, the most that they may have",
        )

    def end_token(self, policy: LoadedPolicy) -> int | None:
        from posttrain.data.tokenizing import end_of_turn_token

        return end_of_turn_token(policy.tokenizer)


class PolicyGradient(RolloutStage):
    """Sample completions, score them, and make the better ones more likely."""

    Config = RLConfig
    metrics = RL_METRICS
    progress = ("reward", "held_out", "completions/mean_length")

    def __init__(self, config: Any, context: StageContext) -> None:
        super().__init__(config, context)
        self.title = RL_TITLES.get(config.method, self.title or config.method)

    def prepare(self) -> list[tuple[str, Any]]:
        if self.config.environment is not None:
            from posttrain.sampling.environments import environment
            from posttrain.sampling.multi_turn import check

            environment(self.config.environment, self.context.functions)
            check(self.config.environment, self.context.tokenizer)
        return super().prepare()

    def trainer(self, policy: LoadedPolicy, run: StageRun) -> RLTrainer:
        from posttrain.methods.rl.rl_trainer import RLTrainer, hooks_of
        from posttrain.methods.rl.rollout_setup import frozen_reference, open_rollouts
        from posttrain.trainer.train_step import Learner

        config: RLConfig = self.config
        rates = None
        if config.critic is not None:
            policy.policy.add_value_head()
            rates = {"value.": config.critic.lr / config.optimizer.lr}
            run.resources.callback(setattr, policy.policy, "value", None)  # the head is not saved with the model
        updates = config.steps * config.mini_batches * config.ppo_epochs
        learner = Learner(policy.policy, config.optimizer, config.systems, updates, rates)
        penalty = bool(config.kl.coefficient)
        reference = frozen_reference(config, policy, run, needed=penalty)
        hooks = hooks_of(config, len(self.prompts.trained), run.seed)
        functions = self.context.functions
        rollouts = open_rollouts(
            config, policy, self.prompts, run, functions, learner=learner, hooks=hooks, reference=reference
        )
        return RLTrainer(config, learner, *rollouts, reference if penalty else None)
