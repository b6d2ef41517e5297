"""Online DPO: the policy's own completions, judged by rewards; the best of each prompt is preferred to the worst."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.config import ModelConfig
from posttrain.core import distributed
from posttrain.core.progress import Track
from posttrain.data.chat_template import end_of_turn_token
from posttrain.data.preference_rows import Pair
from posttrain.data.prompts import RenderedPrompt
from posttrain.methods.preference.objectives import objective, pair_loss, pair_samples
from posttrain.methods.preference.online import OnlineDPOConfig
from posttrain.methods.rl.collect import Batch, Collector
from posttrain.methods.rl.gold_scorer import Gold
from posttrain.methods.rl.policy_gradient import Experience, reference_of
from posttrain.methods.rl.policy_objectives import Extremes, Rolled
from posttrain.models.language_model import LanguageModel
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.engine import LocalSampler
from posttrain.trainer.loop import OnStep, train
from posttrain.trainer.policy import open_policy, save_policy, summary
from posttrain.trainer.reference_model import frozen_beside, sums_of, without_adapters
from posttrain.trainer.stage import Functions
from posttrain.trainer.train_step import Learner, StepResult


class OnlinePairs(Experience):
    """As reinforcement learning collects its rollouts; what is learnt from them is a pair of each prompt.

    frozen: the model that the stage began with (the policy itself where adapters train); None: no reference is needed.
    """

    def __init__(
        self,
        online: OnlineDPOConfig,
        learner: Learner,
        collector: Collector,
        folder: Path,
        held_out: Sequence[RenderedPrompt],
        seed: int,
        frozen: LanguageModel | None,
        gold: Gold | None = None,
    ) -> None:
        super().__init__(online.collecting(), learner, collector, folder, held_out, seed, gold)
        self.online, self.what, self.frozen = online, objective(online), frozen

    def step(self, step: int, track: Track) -> StepResult:
        result = super().step(step, track)
        result.metrics.pop("ratio_max", None)  # there is no ratio here
        return result

    def _learn(self, batch: Batch) -> tuple[list[StepResult], Extremes]:
        """One step on the pairs of the batch; prompts whose answers are all alike give none, and are counted."""
        pairs = pairs_of(batch.rolled)
        samples = [pair_samples(pair, n) for n, pair in enumerate(pairs)]
        reference = None
        if self.frozen is not None and pairs:
            frozen, systems = self.frozen, self.online.systems
            with distributed.summon_full_params(frozen), without_adapters(frozen):
                reference = distributed.map_over_ranks(samples, lambda mine: sums_of(frozen, mine, systems))
        loss = pair_loss(self.what, pairs, reference, count=len(batch.groups))
        result = self.learner.step([s for both in samples for s in both], loss)
        result.metrics["ties"] = float(len(batch.groups) - len(pairs))
        if pairs:
            result.metrics["reward_gap"] = statistics.fmean(p.margin for p in pairs)
        return [result], Extremes()


def pairs_of(rolled: Sequence[Rolled]) -> list[Pair]:
    """The first of the best-rewarded completions of each prompt against the last of the worst; none where they tie.

    Equal rewards tie, and so do equal completions, whatever a reward that isn't sure of itself says of them.
    """
    groups: dict[int, list[Rolled]] = {}
    for r in rolled:
        if r.length:
            groups.setdefault(r.group, []).append(r)
    pairs = []
    for group, members in groups.items():
        best = max(members, key=lambda r: r.rollout.reward)
        worst = min(reversed(members), key=lambda r: r.rollout.reward)
        gap = best.rollout.reward - worst.rollout.reward
        if gap > 0 and list(best.rollout.tokens) != list(worst.rollout.tokens):
            chosen, rejected = (replace(r, signal=True).sample(0) for r in (best, worst))
            pairs.append(Pair(chosen, rejected, len(best.prompt), margin=gap, source=f"prompt {group}"))
    return pairs


def run_online(
    config: OnlineDPOConfig,
    model: ModelConfig,
    questions: Sequence[RenderedPrompt],
    held_out: Sequence[RenderedPrompt],
    folder: Path,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    functions: Functions | None = None,
) -> dict[str, Any]:
    """Train `model` on pairs of its own completions; the result is `folder`/model, an ordinary Hugging Face folder.

    functions: rewards that the recipe names and that live in this program. Goes on from the newest checkpoint in
    `folder` where there is one. Returns what the manifest says of the stage.
    """
    opened = open_policy(config, model, seed)
    policy, tokenizer = opened.policy, opened.tokenizer
    frozen = None
    if objective(config).preset.reference:
        frozen = frozen_beside(policy, model, config.adapter is not None)
    learner = Learner(policy, config.optimizer, config.systems, config.steps)
    collecting = config.collecting()
    with RewardStack(config.rewards, functions) as rewards, ExitStack() as until:
        sampler = LocalSampler(policy, tokenizer, **config.sampler.limits())
        collector = Collector(collecting, policy, sampler, rewards, questions, seed)
        meter = None
        if config.held_out is not None and config.held_out.gold is not None:
            first = reference_of(collecting, model, policy, frozen)
            meter = until.enter_context(closing(Gold(collecting, collector, held_out, first, folder, seed, functions)))
        result = train(
            learner,
            OnlinePairs(config, learner, collector, folder, held_out, seed, frozen, meter),
            folder,
            checkpoint_every=config.checkpoint_every,
            keep=config.keep_checkpoints,
            title=config.name,
            on_step=on_step,
            shown=("reward", "held_out", "accuracy", "margin"),
        )
    save_policy(opened, config, model, folder, seed, end_of_turn_token(tokenizer))
    return summary(result, opened)
