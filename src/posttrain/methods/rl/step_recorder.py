"""The record of a stage: rollouts of each step, greedy answers to held-out problems, the gold scorer."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from posttrain.config.rl import RolloutConfig
from posttrain.core import distributed
from posttrain.core.progress import Phases, Track
from posttrain.core.statistics import mean_interval
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.data.prompts import RenderedPrompt
from posttrain.methods.rl.collect_rollouts import (
    RolloutBatch,
    RolloutCollector,
    counts_of_rank,
    means_by_reward,
    means_of_figures,
    sample_groups,
    score_groups,
)
from posttrain.methods.rl.gold_scorer import GoldScorer
from posttrain.methods.rl.sequence_logprobs import TrainingSequence
from posttrain.models.language_model import LanguageModel
from posttrain.sampling.protocol import Request
from posttrain.sampling.rollout_store import write_rollouts
from posttrain.trainer.train_step import StepResult

Turns = Callable[[Rollout], list[tuple[bool, str]]]
"""Splits a completion into the texts of the model and of the environment."""


class StepRecorder:
    """Keep the rollouts of every step, and measure held-out problems every few steps."""

    def __init__(
        self,
        config: RolloutConfig,
        policy: LanguageModel,
        collector: RolloutCollector,
        folder: Path,
        held_out: Sequence[RenderedPrompt] = (),
        *,
        seed: int = 0,
        gold: GoldScorer | None = None,
        turns: Turns | None = None,
    ) -> None:
        """Make a recorder.

        Args:
            config: Settings of the stage.
            policy: The model that is trained.
            collector: Its sampler and rewards are used.
            folder: The stage's folder; rollouts are kept in `folder`/rollouts and `folder`/held_out.
            held_out: Held-out problems. Empty: nothing is measured.
            seed: Seed of the confidence intervals.
            gold: Scores samples of the held-out problems.
            turns: For completions with an environment.
        """
        self.config, self.policy, self.collector, self.folder = config, policy, collector, folder
        self.held_out, self.seed, self.gold, self.turns = held_out, seed, gold, turns
        self.every = config.held_out.every if config.held_out is not None and held_out else 0

    def keep(
        self,
        step: int,
        rollouts: RolloutBatch,
        sequences: Sequence[TrainingSequence] = (),
        advantages: Sequence[Tensor] = (),
    ) -> None:
        """Write the rollouts of a step, each with the mean of its advantages; failed ones are in their places.

        Args:
            step: Number of the step.
            rollouts: Its groups.
            sequences: The rollouts that have advantages.
            advantages: Those of each.
        """
        means = defaultdict[int, list[float]](list)
        for s, a in zip(sequences, advantages, strict=True):
            means[s.group].append(float(a.mean()) if s.length else 0.0)
        groups, columns = [], []
        for g, group in enumerate(rollouts.groups):
            question, of_group = self.collector.questions[group.problem], iter(means[g])
            written = [*group.rollouts, *group.replayed]
            groups.append(RolloutGroup(question.tokens, question.problem, written))
            columns.append([next(of_group, None) if r.rewarded else None for r in written])
        if distributed.is_main():
            texts, numbers = [self.collector.questions[i].text for i in rollouts.problems], rollouts.problems
            write_rollouts(self.folder / "rollouts", step + 1, groups, columns, texts, numbers, self.turns)

    def finish(
        self, step: int, results: Sequence[StepResult], metrics: Mapping[str, float], phases: Phases
    ) -> StepResult:
        """Return the result of a step, with the held-out metrics if they are due.

        Args:
            step: Number of the step.
            results: Its optimizer steps.
            metrics: Metrics of the step.
            phases: Seconds of its parts.
        """
        out, seconds = dict(metrics), sum(phases.seconds.values())
        if self.every and (step + 1 == self.config.steps or (step + 1) % self.every == 0):
            out |= self.measure(step + 1, phases)
        sampled, computed = self.collector.tokens, sum(r.computed_tokens for r in results)
        learned = sum(r.tokens for r in results)
        timing = {"phases": phases.seconds, "sampled_tokens": sampled, "learned_tokens": learned}
        timing |= self.collector.timing()
        return StepResult(out, seconds, sampled, computed, sum(r.micro_batches for r in results), timing)

    def initial_record(self, track: Track) -> dict[str, Any] | None:
        """Return the held-out metrics before the first step. None: there are none."""
        return self.measure(0, Phases(track)) if self.every else None

    def measure(self, step: int, phases: Phases) -> dict[str, float]:
        """Return the metrics of greedy answers to the held-out problems, and those of the gold scorer."""
        with distributed.summon_full_params(self.policy):
            return self._greedy(step, phases) | ({} if self.gold is None else self.gold.measure(step, phases))

    def _greedy(self, step: int, phases: Phases) -> dict[str, float]:
        """Return the mean reward of greedy answers with its 95% interval; the answers are kept.

        Failures of a reward that says right or wrong count as wrong, so that they can't make the curve rise.
        """
        with phases("held_out"):
            groups = likeliest_completions(self.collector, self.held_out, Phases(phases.track))
            groups = score_groups(self.collector.rewards, groups)
            texts, numbers = [q.text for q in self.held_out], list(range(len(self.held_out)))
            if distributed.is_main():
                write_rollouts(self.folder / "held_out", step, groups, None, texts, numbers, self.turns)
        answers = [r for g in groups for r in g.rollouts]
        failed = {"held_out_failed": float(sum(not r.rewarded for r in answers))}
        rollouts = self.collector.rewards.failures_as_wrong(answers)
        if not rollouts:
            return failed
        rewards = [r.reward for r in rollouts]
        low, high = mean_interval(rewards, seed=self.seed)
        out = {"held_out": statistics.fmean(rewards), "held_out_low": low, "held_out_high": high} | failed
        out["held_out_length"] = statistics.fmean(r.length for r in rollouts)
        return out | means_by_reward(rollouts, "held_out") | means_of_figures(rollouts, "held_out_refine")

    def state_dict(self) -> dict[str, Any]:
        """Return the gold scorer's counts of every rank."""
        return {} if self.gold is None else {"gold": distributed.all_gather_object(self.gold.scorer.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.gold is not None:
            self.gold.scorer.load_state_dict(counts_of_rank(state.get("gold", ())))


def likeliest_completions(
    collector: RolloutCollector, questions: Sequence[RenderedPrompt], phases: Phases
) -> list[RolloutGroup]:
    """Return the likeliest completion of each prompt, without rewards.

    Args:
        collector: Its sampler is used.
        questions: The prompts.
        phases: Times the sampling.
    """
    greedy = collector.config.sampler.model_copy(update={"temperature": 0.0})
    requests = [Request(q.tokens, 1, 0, q.problem) for q in questions]
    return sample_groups(collector.sampler, requests, greedy, phases)
