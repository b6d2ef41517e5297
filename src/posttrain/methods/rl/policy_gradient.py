"""Reinforcement learning: batches of rollouts, what is learnt from each, held-out problems now and then."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from posttrain.config import ModelConfig, RLConfig
from posttrain.core import distributed
from posttrain.core.progress import Phases, Track
from posttrain.core.statistics import mean_interval
from posttrain.core.types import Rollout
from posttrain.data.chat_template import end_of_turn_token
from posttrain.data.prompts import RenderedPrompt
from posttrain.methods.rl.collect import Batch, Collector, counts_of, filled, in_passes, with_failed
from posttrain.methods.rl.gather import judge
from posttrain.methods.rl.gold_scorer import Gold
from posttrain.methods.rl.policy_objectives import METHODS, Extremes, Rolled, policy_loss, temperatures
from posttrain.models.language_model import LanguageModel
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.environments import environment
from posttrain.sampling.multi_turn import TurnSampler, in_turns
from posttrain.sampling.protocol import Sampler
from posttrain.sampling.rollout_store import write_rollouts
from posttrain.trainer.loop import OnStep, train
from posttrain.trainer.policy import open_policy, save_policy, summary
from posttrain.trainer.reference_model import frozen_beside, without_adapters
from posttrain.trainer.stage import Functions
from posttrain.trainer.train_step import Learner, StepResult


class Experience:
    """Trainer of a stage: a step is a batch of rollouts and the updates made of it."""

    def __init__(
        self,
        config: RLConfig,
        learner: Learner,
        collector: Collector,
        folder: Path,
        held_out: Sequence[RenderedPrompt] = (),
        seed: int = 0,
        gold: Gold | None = None,
        turns: Callable[[Rollout], list[tuple[bool, str]]] | None = None,
    ) -> None:
        self.config, self.learner, self.collector, self.gold = config, learner, collector, gold
        self.folder, self.held_out, self.seed, self.turns = folder, held_out, seed, turns
        self.steps = config.steps

    def step(self, step: int, track: Track) -> StepResult:
        phases = Phases(track)
        with distributed.summon_full_params(self.learner.model):
            batch = self.collector.collect(step, phases)
        with phases("learn"):
            results, extremes = self._learn(batch)
        metrics = _joined([r.metrics for r in results]) | batch.metrics
        if extremes.mismatch:
            metrics["mismatch_max"] = extremes.mismatch
        metrics["ratio_max"] = extremes.ratio
        asked = [self.collector.questions[i].text for i in batch.problems]
        groups, advantages, failures = batch.everything()
        if distributed.is_main():
            where = self.folder / "rollouts"
            write_rollouts(where, step + 1, groups, advantages, asked, batch.problems, failures, self.turns)
        last = step + 1 == self.steps
        every = self.config.held_out.every if self.config.held_out else 0
        seconds = sum(phases.seconds.values())
        if self.held_out and every and (last or (step + 1) % every == 0):
            metrics |= self.measure(step + 1, phases)
        sampled = self.collector.gatherer.counted["tokens"]
        timing = {
            "phases": phases.seconds,
            "sampled_tokens": sampled,
            "learned_tokens": sum(r.tokens for r in results),
        }
        computed = sum(r.computed_tokens for r in results)
        return StepResult(metrics, seconds, sampled, computed, sum(r.micro_batches for r in results), timing)

    def _learn(self, batch: Batch) -> tuple[list[StepResult], Extremes]:
        """`passes` times over the batch, each time in `updates` parts of whole groups."""
        config, extremes, results = batch.config, Extremes(), []
        groups = len(batch.groups)
        for round_ in range(config.passes):
            for u in range(config.updates):
                part = range(u * groups // config.updates, (u + 1) * groups // config.updates)
                rolled = [r for r in batch.rolled if r.group in part]
                fresh = round_ == 0 and u == 0
                loss = policy_loss(config, rolled, fresh, self.collector.comparable, extremes)
                samples = [r.sample(i) for i, r in enumerate(rolled)]
                results.append(self.learner.step([s for s in samples if any(s.weights)], loss))
        everywhere = distributed.all_gather_object(extremes)
        return results, Extremes(max(e.mismatch for e in everywhere), max(e.ratio for e in everywhere))

    def measure(self, step: int, phases: Phases) -> dict[str, float]:
        """What is measured on held-out problems: greedy answers, and where there is a gold scorer samples."""
        with distributed.summon_full_params(self.learner.model):
            return self._greedy(step, phases) | (self.gold.measure(step, phases) if self.gold is not None else {})

    def _greedy(self, step: int, phases: Phases) -> dict[str, float]:
        """Mean reward of greedy answers to the held-out problems, with its 95% interval; they are kept."""
        with phases("held_out"):
            groups = self.collector.answer(self.held_out, Phases(phases.track))
            scored = judge(self.collector.rewards, groups)
            asked, numbers = [q.text for q in self.held_out], list(range(len(self.held_out)))
            kept, _, failures = with_failed(scored)
            if distributed.is_main():
                write_rollouts(self.folder / "held_out", step, kept, None, asked, numbers, failures, self.turns)
        rollouts = [r for g in scored.groups for r in g.rollouts]
        failed = {"held_out_failed": float(len(scored.excluded))}
        if not rollouts:
            return failed
        rewards = [r.reward for r in rollouts]
        low, high = mean_interval(rewards, seed=self.seed)
        out = {"held_out": statistics.fmean(rewards), "held_out_low": low, "held_out_high": high} | failed
        out["held_out_length"] = statistics.fmean(r.length for r in rollouts)
        for name in sorted({n for r in rollouts for n in r.rewards}):
            out[f"held_out/{name}"] = statistics.fmean(r.rewards[name] for r in rollouts if name in r.rewards)
        return out

    def initial_record(self, track: Track) -> dict[str, Any] | None:
        return self.measure(0, Phases(track)) if self.held_out else None

    def state_dict(self) -> dict[str, Any]:
        return self.collector.state_dict() | (
            {"gold": distributed.all_gather_object(self.gold.scorer.state_dict())} if self.gold is not None else {}
        )

    def load_state_dict(self, numbers: dict[str, Any]) -> None:
        self.collector.load_state_dict(numbers)
        if self.gold is not None:
            self.gold.scorer.load_state_dict(counts_of(numbers.get("gold", ())))


def _joined(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """One record of several updates: sums of what is counted, means of the rest, the last learning rate."""
    names = [n for n in records[0] if all(n in r for r in records)]
    # What a step without any signal lacks is averaged over those that have it.
    names += sorted({n for r in records for n in r} - set(names))
    out = {}
    for name in names:
        values = [r[name] for r in records if name in r]
        counted = name in ("tokens", "loss_tokens", "skipped")
        out[name] = values[-1] if name == "lr" else sum(values) if counted else statistics.fmean(values)
    fresh = out.pop("fresh", 0.0)  # share of the tokens that the newest weights sampled: the others can't be compared
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


def run_rl(
    config: RLConfig,
    model: ModelConfig,
    questions: Sequence[RenderedPrompt],
    held_out: Sequence[RenderedPrompt],
    folder: Path,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    functions: Functions | None = None,
) -> dict[str, Any]:
    """Train `model` on `questions` by rewards; the result is `folder`/model, an ordinary Hugging Face folder.

    functions: rewards that the recipe names and that live in this program. Goes on from the newest checkpoint in
    `folder` where there is one. Returns what the manifest says of the stage.
    """
    opened = open_policy(config, model, seed)
    policy, tokenizer = opened.policy, opened.tokenizer
    critic = METHODS[config.method].advantages == "critic"
    if critic:
        policy.add_value_head()
    learner = Learner(
        policy,
        config.optimizer,
        config.systems,
        config.steps * config.updates * config.passes,
        {"value.": config.value_lr / config.optimizer.lr} if critic else None,
    )
    gold = config.held_out is not None and config.held_out.gold is not None
    reference = reference_of(config, model, policy) if config.kl.coefficient or gold else None
    with RewardStack(config.rewards, functions, tokenizer) as rewards, ExitStack() as until:
        local = LocalSampler(policy, tokenizer, **config.sampler.limits())
        sampler: Sampler = local
        turns = None
        if config.environment is not None:
            answering = environment(config.environment, functions)
            sampler = TurnSampler(local, answering, config.environment, tokenizer, local.context)
            turns = partial(in_turns, tokenizer=tokenizer)
        penalty = reference if config.kl.coefficient else None
        collector = Collector(config, policy, sampler, rewards, questions, seed, penalty, tokenizer)
        meter = None
        if gold and reference is not None:
            meter = until.enter_context(closing(Gold(config, collector, held_out, reference, folder, seed, functions)))
        work = Experience(config, learner, collector, folder, held_out, seed, meter, turns)
        result = train(
            learner,
            work,
            folder,
            checkpoint_every=config.checkpoint_every,
            keep=config.keep_checkpoints,
            title=config.name,
            on_step=on_step,
            shown=("reward", "held_out", "length"),
        )
    policy.value = None
    save_policy(opened, config, model, folder, seed, end_of_turn_token(tokenizer))
    return summary(result, opened)


def reference_of(
    config: RLConfig, model: ModelConfig, policy: LanguageModel, frozen: LanguageModel | None = None
) -> Callable[[Sequence[Rolled]], None]:
    """Fills in log-probabilities of the model before the stage: the policy without its adapters, or a frozen copy
    (`frozen`, where there is one already)."""
    frozen = frozen or frozen_beside(policy, model, config.adapter is not None)

    @torch.no_grad()
    def score(rolled: Sequence[Rolled]) -> None:
        with without_adapters(frozen), filled(rolled, "reference") as here:
            for mine, batch, targets in in_passes(frozen, here, config.systems.budget(frozen.device.type)):
                temperature = temperatures(config, mine, targets.device)
                logprobs = frozen(batch, "logprobs", targets, temperature=temperature)[0].float().cpu()
                for r, part in zip(mine, logprobs.split([r.length for r in mine]), strict=True):
                    r.reference = part

    return score
