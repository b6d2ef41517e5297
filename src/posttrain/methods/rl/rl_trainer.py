"""Reinforcement learning, step by step: sample and score, log-probabilities, advantages, loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from posttrain.config import RLConfig
from posttrain.core import distributed
from posttrain.core.errors import MismatchError
from posttrain.core.progress import Phases, Track
from posttrain.losses.advantages import moving_average
from posttrain.losses.controllers import smoothed
from posttrain.losses.kl import kl
from posttrain.methods.rl.adaptive_group_size import AdaptiveGroupSize
from posttrain.methods.rl.collect_rollouts import RolloutBatch, RolloutCollector, score_groups
from posttrain.methods.rl.compute_advantages import Advantages, compute_advantages, outcome_reward
from posttrain.methods.rl.curriculum import Curriculum
from posttrain.methods.rl.hooks import Hook
from posttrain.methods.rl.partial_rollouts import PartialRollouts
from posttrain.methods.rl.replay import Replay
from posttrain.methods.rl.rl_loss import Extremes, TrainingBatch, policy_gradient_loss
from posttrain.methods.rl.sequence_logprobs import Logprobs, TrainingSequence, compute_logprobs, training_sequences
from posttrain.methods.rl.steering import Steering
from posttrain.methods.rl.step_recorder import StepRecorder, likeliest_completions
from posttrain.models.language_model import LanguageModel
from posttrain.trainer.loop import Trainer
from posttrain.trainer.train_step import Learner, StepResult


def hooks_of(config: RLConfig, problems: int, seed: int) -> list[Hook]:
    """Return the optional features that the settings turn on, in the order in which they are called.

    Args:
        config: Settings of the stage.
        problems: Number of prompts.
        seed: Seed of the run.
    """
    explore, hooks = config.exploration, list[Hook]()
    if explore.partial_rollouts is not None and not config.ahead:
        hooks.append(PartialRollouts(config))
    if explore.adaptive_group_size is not None:
        hooks.append(AdaptiveGroupSize(config))
    if explore.curriculum is not None:
        hooks.append(Curriculum(explore.curriculum, problems, seed=seed, success=explore.success))
    if explore.replay is not None:
        hooks.append(Replay(explore.replay, explore.max_staleness, seed=seed, success=explore.success))
    if explore.entropy_target is not None or config.kl.target is not None:
        hooks.append(Steering(config))
    return hooks


class RLTrainer(Trainer):
    """Train a policy by rewards. A step is a batch of rollouts and the updates on it."""

    def __init__(
        self,
        config: RLConfig,
        learner: Learner,
        collector: RolloutCollector,
        recorder: StepRecorder,
        reference: LanguageModel | None = None,
    ) -> None:
        """Make a trainer.

        Args:
            config: Settings of the stage.
            learner: Policy and optimizer.
            collector: Samples and scores, with the hooks of the settings.
            recorder: Keeps rollouts and measures held-out problems.
            reference: The model that the stage started from, for a KL penalty. None: there is none.
        """
        self.config, self.learner, self.collector = config, learner, collector
        self.recorder, self.reference = recorder, reference
        self.steps = config.steps
        self.baseline: float | None = None
        self.mismatch: float | None = None

    def step(self, step: int, track: Track) -> StepResult:
        phases = Phases(track)
        settings = self.config
        for hook in self.collector.hooks:
            settings = hook.before_step(step, settings)
        with distributed.summon_full_params(self.learner.model):
            rollouts = self.collector.collect(step, settings.sampler, phases)
            batch, metrics = self.prepare(step, settings, rollouts, phases)
        for hook in self.collector.hooks:
            hook.after_step(metrics)
        with phases("learn"):
            results, learned = self.learn(batch)
        self._check_mismatch(step, learned.get("mismatch_kl"))
        self.recorder.keep(step, rollouts, batch.sequences, batch.advantages.advantages)
        return self.recorder.finish(step, results, learned | metrics, phases)

    def prepare(
        self, step: int, settings: RLConfig, rollouts: RolloutBatch, phases: Phases
    ) -> tuple[TrainingBatch, dict[str, float]]:
        """Return what is trained on, and the metrics of the rollouts.

        Args:
            step: Number of the step.
            settings: Settings of the step.
            rollouts: What was sampled and scored.
            phases: Times the parts.
        """
        sequences = training_sequences(rollouts.groups, self.collector.questions, step)
        with phases("score"):
            logprobs = compute_logprobs(settings, sequences, self.learner.model, self.reference)
        metrics = {
            **rollouts.metrics,
            **staleness(settings, sequences),
            **kl_to_reference(sequences, logprobs, settings.kl.later_turns),
        }
        greedy = None
        if settings.greedy_baseline:
            greedy, metrics["greedy_failed"] = self._greedy_rewards(settings, rollouts, phases)
        advantages = compute_advantages(settings, sequences, logprobs, self.baseline, greedy)
        for hook in self.collector.hooks:
            advantages = hook.after_advantages(sequences, advantages)
        rewards = [outcome_reward(settings, s.rollout) for s in sequences if not s.replayed]
        self.baseline = moving_average(self.baseline, torch.tensor(rewards, dtype=torch.float64))
        metrics["frac_reward_zero_std"] = share_without_signal(len(rollouts.groups), sequences, advantages)
        return TrainingBatch(settings, len(rollouts.groups), sequences, logprobs, advantages), metrics

    def _greedy_rewards(self, settings: RLConfig, rollouts: RolloutBatch, phases: Phases) -> tuple[list[float], float]:
        """Return the reward of the likeliest answer to each prompt (NaN if it failed), and the number that failed."""
        questions = [self.collector.questions[i] for i in rollouts.problems]
        groups = likeliest_completions(self.collector, questions, phases)
        with phases("reward"):
            scored = score_groups(self.collector.rewards, groups)
        answers = [g.rollouts[0] for g in scored]
        rewards = [outcome_reward(settings, r) if r.rewarded else math.nan for r in answers]
        return rewards, float(sum(not r.rewarded for r in answers))

    def learn(self, batch: TrainingBatch) -> tuple[list[StepResult], dict[str, float]]:
        """Train `ppo_epochs` times on the batch, each time in `mini_batches` parts of whole groups."""
        settings, extremes, results = batch.settings, Extremes(), list[StepResult]()
        groups, parts = batch.groups, settings.mini_batches
        for epoch in range(settings.ppo_epochs):
            for part in range(parts):
                chosen = batch.select(range(part * groups // parts, (part + 1) * groups // parts))
                fresh = epoch == 0 and part == 0
                loss = policy_gradient_loss(chosen, fresh, extremes)
                results.append(self.learner.step(chosen.samples(), loss))
        return results, joined_metrics([r.metrics for r in results]) | extremes.metrics()

    def _check_mismatch(self, step: int, kl: float | None) -> None:
        """Stop the stage if the sampler's distribution has moved away from the learner's."""
        limit = self.config.max_mismatch_kl
        if limit is None or kl is None:
            return
        self.mismatch = smoothed(self.mismatch, kl)
        if not self.mismatch <= limit:
            raise MismatchError(
                f"sampler and learner differ by {self.mismatch:.3g} nats a token (mismatch_kl, over about the last five "
                f"steps, up to step {step + 1}), more than max_mismatch_kl ({limit:g}): what is trained on is no longer "
                "what the policy would write. The last checkpoint is from before. Sample and train in the same dtype "
                "(model.dtype=float32), leave out tokens that differ much (importance_sampling_cap=2, "
                "importance_sampling_mode=token_mask), or lower optimizer.lr or mini_batches"
            )

    def initial_record(self, track: Track) -> dict[str, Any] | None:
        return self.recorder.initial_record(track)

    def state_dict(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "mismatch": self.mismatch,
            **self.collector.state_dict(),
            **self.recorder.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline, self.mismatch = state["baseline"], state.get("mismatch")
        self.collector.load_state_dict(state)
        self.recorder.load_state_dict(state)


def staleness(settings: RLConfig, sequences: Sequence[TrainingSequence]) -> dict[str, float]:
    """Return the mean and the largest age of the sequences, if an earlier policy may have sampled some."""
    ages = [s.age for s in sequences]
    if not settings.off_policy or not ages:
        return {}
    return {"staleness_mean": statistics.fmean(ages), "staleness_max": float(max(ages))}


def kl_to_reference(
    sequences: Sequence[TrainingSequence], logprobs: Logprobs, later_turns: float = 1.0
) -> dict[str, float]:
    """Return `kl`: k3 from the reference, mean over the tokens sampled for this batch, before its update.

    Args:
        sequences: The batch.
        logprobs: Its log-probabilities.
        later_turns: Weight of the tokens after the environment's first reply, in the penalty and in the mean. If it is
            not 1, the means of the first turns and of the later ones are returned too.
    """
    fresh = [i for i, s in enumerate(sequences) if not s.replayed and s.length]
    if logprobs.reference is None or not fresh:
        return {}
    own, reference = (torch.cat([of[i] for i in fresh]) for of in (logprobs.before, logprobs.reference))
    values = kl(own, reference).double()
    if later_turns == 1:
        return {"kl": float(values.mean())}
    first = torch.cat([sequences[i].turn_weights(0.0) for i in fresh]).double()
    sides = {"kl": first + later_turns * (1 - first), "kl_first_turn": first, "kl_later_turns": 1 - first}
    return {name: float((values * w).sum() / w.sum()) for name, w in sides.items() if w.sum()}


def share_without_signal(groups: int, sequences: Sequence[TrainingSequence], advantages: Advantages) -> float:
    """Return the share of the groups whose advantages are all 0.

    Args:
        groups: Number of groups, those without any sequence included.
        sequences: The batch.
        advantages: Its advantages.
    """
    mixed = {s.group for s, a in zip(sequences, advantages.advantages, strict=True) if bool(a.any())}
    return 1 - len(mixed) / max(1, groups)


def joined_metrics(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return one record of several updates: sums of counts, means of the rest, the last learning rate."""
    names = [n for n in records[0] if all(n in r for r in records)]
    # What an update without any signal lacks is averaged over those that have it.
    names += sorted({n for r in records for n in r} - set(names))
    out = {}
    for name in names:
        values = [r[name] for r in records if name in r]
        counted = name in ("tokens", "loss_tokens", "skipped")
        out[name] = values[-1] if name == "lr" else sum(values) if counted else statistics.fmean(values)
    fresh = out.pop("fresh", 0.0)  # share of the tokens that the newest weights sampled: only these can be compared
    for name in ("mismatch", "mismatch_kl"):
        total = out.pop(name, None)
        if total is not None and fresh:
            out[name] = total / fresh
    squared, error = out.pop("return_squared", None), out.pop("value_error_squared", None)
    mean = out.pop("return", 0.0)
    if squared is not None and error is not None:
        spread = squared - mean**2
        out["explained_variance"] = 1 - error / spread if spread > 1e-12 else 0.0
    return out
