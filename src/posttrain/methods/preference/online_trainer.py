"""Train on pairs of the policy's own completions: the best of each prompt is preferred to the worst."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from posttrain.core import distributed
from posttrain.core.progress import Phases, Track
from posttrain.data.preference_rows import Pair
from posttrain.methods.preference.objectives import objective, pair_loss, pair_samples
from posttrain.methods.rl.sequence_logprobs import TrainingSequence, training_sequences
from posttrain.trainer.loop import Trainer
from posttrain.trainer.reference_model import sums_of, without_adapters

if TYPE_CHECKING:
    from posttrain.methods.preference.online import OnlineDPOConfig
    from posttrain.methods.rl.collect_rollouts import RolloutCollector
    from posttrain.methods.rl.step_recorder import StepRecorder
    from posttrain.models.language_model import LanguageModel
    from posttrain.trainer.train_step import Learner, StepResult


class OnlinePairTrainer(Trainer):
    """Train on pairs of the policy's own completions: rollouts are collected as in RL, each prompt gives a pair."""

    def __init__(
        self,
        config: OnlineDPOConfig,
        learner: Learner,
        collector: RolloutCollector,
        recorder: StepRecorder,
        reference: LanguageModel | None,
    ) -> None:
        """Make a trainer.

        Args:
            config: Settings of the stage.
            learner: Policy and optimizer.
            collector: Samples and scores.
            recorder: Keeps rollouts and measures held-out problems.
            reference: The model that the stage started from, or the policy with adapters. None: the loss needs none.
        """
        self.config, self.learner, self.collector, self.recorder = config, learner, collector, recorder
        self.objective, self.reference, self.steps = objective(config), reference, config.steps

    def step(self, step: int, track: Track) -> StepResult:
        phases = Phases(track)
        with distributed.summon_full_params(self.learner.model):
            rollouts = self.collector.collect(step, self.config.sampler, phases)
        pairs = best_and_worst(training_sequences(rollouts.groups, self.collector.questions, step))
        with phases("learn"):
            result = self.learn(pairs, len(rollouts.groups))
        metrics = {**result.metrics, **rollouts.metrics}
        metrics["frac_reward_zero_std"] = statistics.fmean(not g.mixed for g in rollouts.groups)
        metrics["ties"] = float(len(rollouts.groups) - len(pairs))
        if pairs:
            metrics["reward_gap"] = statistics.fmean(p.margin for p in pairs)
        self.recorder.keep(step, rollouts)
        return self.recorder.finish(step, [result], metrics, phases)

    def learn(self, pairs: Sequence[Pair], prompts: int) -> StepResult:
        """Take one optimizer step; a prompt without a pair counts as a zero of the mean."""
        samples = [pair_samples(pair, n) for n, pair in enumerate(pairs)]
        sums = None
        if self.reference is not None and pairs:
            frozen, systems = self.reference, self.config.systems
            with distributed.summon_full_params(frozen), without_adapters(frozen):
                sums = distributed.map_over_ranks(samples, lambda mine: sums_of(frozen, mine, systems))
        loss = pair_loss(self.objective, pairs, sums, count=prompts)
        return self.learner.step([s for both in samples for s in both], loss)

    def initial_record(self, track: Track) -> dict[str, Any] | None:
        return self.recorder.initial_record(track)

    def state_dict(self) -> dict[str, Any]:
        return {**self.collector.state_dict(), **self.recorder.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.collector.load_state_dict(state)
        self.recorder.load_state_dict(state)


def best_and_worst(sequences: Sequence[TrainingSequence]) -> list[Pair]:
    """Return a pair of each prompt: the first of its best completions, and the last of its worst.

    Equal rewards give none, and neither do equal completions, whatever an uncertain reward gives them.
    """
    groups: dict[int, list[TrainingSequence]] = {}
    for s in sequences:
        if s.length:
            groups.setdefault(s.group, []).append(s)
    pairs = []
    for group, members in groups.items():
        best = max(members, key=lambda s: s.rollout.reward)
        worst = min(reversed(members), key=lambda s: s.rollout.reward)
        gap = best.rollout.reward - worst.rollout.reward
        if gap > 0 and list(best.rollout.tokens) != list(worst.rollout.tokens):
            chosen, rejected = best.sample(0), worst.sample(0)
            pairs.append(Pair(chosen, rejected, len(best.prompt), margin=gap, source=f"prompt {group}"))
    return pairs
