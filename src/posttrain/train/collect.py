"""One batch of experience: problems drawn, completions sampled, rewards, what the models say of them, advantages.

Everything is a function of (seed, step) and the weights, so that a run that goes on makes the same batch again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from posttrain.config import RLConfig, SamplingConfig
from posttrain.data.questions import Question
from posttrain.functional.advantages import moving_average
from posttrain.models.lm import LanguageModel
from posttrain.models.ragged import micro_batches
from posttrain.progress import Track
from posttrain.rewards.stack import RewardStack, Scored
from posttrain.rollout.sampler import Request, Sampler
from posttrain.train.methods import METHODS, Rolled, give_advantages, mixed, outcome
from posttrain.types import RolloutGroup

Failures = list[list[dict[str, str]]]
"""By group and rollout: what went wrong with a reward, by its name."""


@dataclass
class Batch:
    """What a step learns from. problems: the number of each group's problem. scored: every group with its rewards.
    rolled: the same rollouts as the learner takes them."""

    problems: list[int]
    scored: Scored
    rolled: list[Rolled]
    metrics: dict[str, float]

    @property
    def groups(self) -> list[RolloutGroup]:
        return self.scored.groups

    def everything(self) -> tuple[list[RolloutGroup], list[list[float | None]], Failures]:
        """Groups, advantages (means over a rollout's tokens) and failures; those without a reward in their places."""
        given: list[list[float]] = [[] for _ in self.groups]
        for r in self.rolled:
            given[r.group].append(float(r.advantages.mean()) if r.length else 0.0)
        groups, places, failures = with_failed(self.scored)
        advantages: list[list[float | None]] = []
        for g, group in enumerate(groups):
            there = iter(given[g])
            advantages.append([None if i in places[g] else next(there) for i in range(len(group.rollouts))])
        return groups, advantages, failures


def with_failed(scored: Scored) -> tuple[list[RolloutGroup], list[set[int]], Failures]:
    """The groups with what was left out of them back in its place; where that is; what failed."""
    out: list[RolloutGroup] = []
    places: list[set[int]] = []
    failures: Failures = []
    for g, group in enumerate(scored.groups):
        failed = {e.index: e for e in scored.excluded if e.group == g}
        kept = iter(group.rollouts)
        count = len(group.rollouts) + len(failed)
        rollouts = [failed[i].rollout if i in failed else next(kept) for i in range(count)]
        out.append(replace(group, rollouts=rollouts))
        places.append(set(failed))
        failures.append([{e.reward: f"{e.failure}: {e.message}"} if (e := failed.get(i)) else {} for i in range(count)])
    return out, places, failures


class Phases:
    """Seconds by phase, and the phase on the screen."""

    def __init__(self, track: Track) -> None:
        self.track = track
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self.track.phase(name)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


class Collector:
    """Makes batches. reference: fills in log-probabilities of the model that the stage began with; None: not needed."""

    def __init__(
        self,
        config: RLConfig,
        model: LanguageModel,
        sampler: Sampler,
        rewards: RewardStack,
        questions: Sequence[Question],
        seed: int,
        reference: Callable[[Sequence[Rolled]], None] | None = None,
    ) -> None:
        self.config, self.model, self.sampler, self.rewards = config, model, sampler, rewards
        self.questions, self.seed, self.reference = questions, seed, reference
        self.method = METHODS[config.method]
        self.baseline: float | None = None
        sampling = config.sampling
        self.comparable = (
            sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0 and not sampling.min_tokens
        )
        """Whether the sampler's numbers are those of the whole distribution, as the learner's are."""

    def collect(self, step: int, phases: Phases) -> Batch:
        """The batch of a step, whole, with its advantages."""
        chosen = self._problems(step, 0)
        groups, scored = self._attempt(chosen, step, 0, phases)
        drawn = len(groups)
        for redraw in range(1, self.config.redraws + 1):
            flat = [i for i, g in enumerate(scored.groups) if not mixed(g.rollouts)]
            if not flat:
                break
            fresh = self._problems(step, redraw)[: len(flat)]
            _, more = self._attempt(fresh, step, redraw, phases)
            drawn += len(fresh)
            for i, j in zip(flat, [j for j, g in enumerate(more.groups) if mixed(g.rollouts)], strict=False):
                chosen[i] = fresh[j]
                _replace(scored, i, more, j)
        batch = self._batch(chosen, scored)
        self._judge(batch, step, phases)
        batch.metrics["drawn"] = float(drawn)
        return batch

    def _problems(self, step: int, redraw: int) -> list[int]:
        """Every epoch a fresh permutation; what is drawn again comes from a stream of its own."""
        count, size = len(self.questions), self.config.prompts_per_step
        if redraw:
            rng = np.random.default_rng([self.seed, 1, step, redraw])
            return [int(i) for i in rng.choice(count, size, replace=count < size)]
        places = range(step * size, (step + 1) * size)
        orders = {e: np.random.default_rng([self.seed, 0, e]).permutation(count) for e in {p // count for p in places}}
        return [int(orders[p // count][p % count]) for p in places]

    def _attempt(
        self, chosen: Sequence[int], step: int, redraw: int, phases: Phases
    ) -> tuple[list[RolloutGroup], Scored]:
        """Sample and score. A problem that is there twice has streams of its own each time."""
        streams = np.random.SeedSequence([self.seed, 2, step, redraw]).generate_state(len(chosen), np.uint64)
        requests = [
            Request(self.questions[i].tokens, self.config.group_size, int(s), self.questions[i].problem)
            for i, s in zip(chosen, streams, strict=True)
        ]
        groups = self._sample(requests, self.config.sampling, phases)
        with phases("reward"):
            return groups, self.rewards(groups)

    def _sample(self, requests: list[Request], sampling: SamplingConfig, phases: Phases) -> list[RolloutGroup]:
        total, done = sum(r.n for r in requests), 0

        def count(*_: Any) -> None:
            nonlocal done
            done += 1
            if done % 8 == 0:
                phases.track.phase(f"sampling {done}/{total}")

        with phases("sample"):
            return self.sampler.sample(requests, sampling, count)

    def _batch(self, chosen: list[int], scored: Scored) -> Batch:
        rolled = [
            Rolled(group.prompt, rollout, g) for g, group in enumerate(scored.groups) for rollout in group.rollouts
        ]
        return Batch(chosen, scored, rolled, _metrics(scored))

    def _judge(self, batch: Batch, step: int, phases: Phases) -> None:
        """Log-probabilities before the update, of the reference, values of the critic; advantages from all of these."""
        config, rolled = self.config, batch.rolled
        many = config.updates * config.passes > 1
        in_reward = bool(config.kl.coefficient) and config.kl.where == "reward"
        exact = self.comparable and next(self.model.parameters()).dtype == torch.float32
        with phases("score"):
            if self.method.advantages == "critic" or ((many or in_reward) and not exact):
                self._own(rolled)
            elif many or in_reward:
                for r in rolled:
                    r.old = r.sampled()
            if self.reference is not None:
                self.reference(rolled)
        greedy: list[float] = []
        if self.method.advantages == "greedy":
            greedy = self._greedy(batch, phases)
        give_advantages(config, rolled, self.baseline, greedy)
        if not many and in_reward and exact:
            for r in rolled:  # served the penalty; on a single fresh update the learner's own are better
                r.old = None
        rewards = torch.tensor([outcome(config, r.rollout) for r in rolled], dtype=torch.float64)
        self.baseline = moving_average(self.baseline, rewards)
        signal: dict[int, bool] = dict.fromkeys(range(len(batch.groups)), False)
        for r in rolled:
            signal[r.group] |= bool(r.advantages.any())
        batch.metrics["no_signal"] = 1 - sum(signal.values()) / max(1, len(signal))

    @torch.no_grad()
    def _own(self, rolled: Sequence[Rolled]) -> None:
        """The learner's log-probabilities (and the critic's values) before the first update."""
        critic = self.method.advantages == "critic"
        for mine, batch, targets in in_passes(self.model, rolled, self.config.systems.tokens_per_micro_batch):
            out = self.model(
                batch, "values" if critic else "logprobs", targets, temperature=self.config.sampling.temperature
            )
            lengths = [r.length for r in mine]
            for r, part in zip(mine, out[0].float().cpu().split(lengths), strict=True):
                r.old = part
            if critic:
                for r, part in zip(mine, out[2].float().cpu().split(lengths), strict=True):
                    r.values = part

    def _greedy(self, batch: Batch, phases: Phases) -> list[float]:
        """ReMax: the reward of the likeliest answer to each prompt; 0 where it can't be judged."""
        groups = self.answer([self.questions[i] for i in batch.problems], phases)
        with phases("reward"):
            answered = self.rewards(groups).groups
        return [outcome(self.config, g.rollouts[0]) if g.rollouts else 0.0 for g in answered]

    def answer(self, questions: Sequence[Question], phases: Phases) -> list[RolloutGroup]:
        """Greedy answers."""
        greedy = self.config.sampling.model_copy(update={"temperature": 0.0})
        return self._sample([Request(q.tokens, 1, 0, q.problem) for q in questions], greedy, phases)


def _replace(scored: Scored, i: int, other: Scored, j: int) -> None:
    """Group j of another attempt in place of group i, and what was left out of it."""
    scored.groups[i] = other.groups[j]
    scored.excluded[:] = [e for e in scored.excluded if e.group != i]
    scored.excluded.extend(replace(e, group=i) for e in other.excluded if e.group == j)


def _metrics(scored: Scored) -> dict[str, float]:
    """Of the rollouts that are kept."""
    rollouts = [r for g in scored.groups for r in g.rollouts]
    out: dict[str, float] = {}
    if rollouts:
        rewards = [r.reward for r in rollouts]
        out.update(reward=statistics.fmean(rewards), reward_std=statistics.pstdev(rewards))
        for name in sorted({n for r in rollouts for n in r.rewards}):
            out[f"reward/{name}"] = statistics.fmean(r.rewards[name] for r in rollouts if name in r.rewards)
        tokens = sum(r.length for r in rollouts)
        out["length"] = tokens / len(rollouts)
        out["cut"] = sum(r.finish in ("length", "turns") for r in rollouts) / len(rollouts)
        if any(r.mask is not None for r in rollouts):
            out["replies"] = statistics.fmean(r.replies for r in rollouts)
        out["entropy"] = -sum(r.logprobs[i] for r in rollouts for i in r.own) / max(1, tokens)
    for e in scored.excluded:
        out[f"failed/{e.reward}"] = out.get(f"failed/{e.reward}", 0.0) + 1
    return out


def in_passes(model: LanguageModel, rolled: Sequence[Rolled], budget: int) -> Iterator[tuple[list[Rolled], Any, Any]]:
    """(rollouts, ragged batch, T-indices of the tokens they wrote), group by group within the token budget."""
    there = [r for r in rolled if r.length]
    sizes = [len(r.prompt) + len(r.rollout.tokens) for r in there]
    for chosen in micro_batches(sizes, budget):
        mine = [there[i] for i in chosen]
        batch = model.pack([r.sample(0) for r in mine])
        yield mine, batch, torch.cat([r.targets(row) for row, r in zip(batch.rows, mine, strict=True)])
