"""One batch of experience: problems drawn, completions sampled, rewards, what the models say of them, advantages.

Everything is a function of (seed, step), the weights, and what `Collector.numbers` puts into the checkpoint, so that a
run that goes on makes the same batch again.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from posttrain.config import RLConfig
from posttrain.core import distributed
from posttrain.core.progress import Phases
from posttrain.core.ragged import micro_batches
from posttrain.core.types import RolloutGroup
from posttrain.data.prompts import RenderedPrompt
from posttrain.losses.advantages import moving_average
from posttrain.losses.kl import kl
from posttrain.methods.rl.exploration import Controls
from posttrain.methods.rl.gather import Gatherer, judge, sample
from posttrain.methods.rl.gathering import Gathering, scored
from posttrain.methods.rl.policy_objectives import (
    METHODS,
    Rolled,
    even_out,
    give_advantages,
    outcome,
    sampled_logprobs,
    temperatures,
)
from posttrain.models.language_model import LanguageModel
from posttrain.rewards.stack import RewardStack, Scored
from posttrain.sampling.protocol import Request, Sampler
from posttrain.sampling.replay_buffer import oldest

Failures = list[list[dict[str, str]]]
"""By group and rollout: what went wrong with a reward, by its name."""


@dataclass
class Batch:
    """What a step learns from. config: its settings, what is steered in place. problems: the number of each group's
    problem. scored: every group with its rewards. rolled: the same rollouts as the learner takes them."""

    config: RLConfig
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


class Collector:
    """Makes batches. reference: fills in log-probabilities of the model that the stage began with; None: not needed.
    tokenizer: for completions that are carried over from step to step."""

    def __init__(
        self,
        config: RLConfig,
        model: LanguageModel,
        sampler: Sampler,
        rewards: RewardStack,
        questions: Sequence[RenderedPrompt],
        seed: int,
        reference: Callable[[Sequence[Rolled]], None] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.config, self.model, self.sampler, self.rewards = config, model, sampler, rewards
        self.questions, self.seed, self.reference = questions, seed, reference
        self.method = METHODS[config.method]
        self.baseline: float | None = None
        self.controls = Controls.of(config)
        self.gatherer = Gatherer(config, sampler, rewards, questions, seed, tokenizer)
        sampling = config.sampler
        self.comparable = (
            sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0 and not sampling.min_tokens
        )
        """Whether the sampler's numbers are those of the whole distribution, as the learner's are."""

    def collect(self, step: int, phases: Phases) -> Batch:
        """The batch of a step, whole, with its advantages. What is steered moves on to the next."""
        now = self.controls.applied(self.config)
        ready, accounts = self.gatherer.gather(step, now, phases)
        batch = self._batch(ready, step, now)
        self._judge(batch, step, phases)
        batch.metrics |= accounts | self.controls.metrics(self.config)
        self.controls.follow(self.config, batch.metrics)
        return batch

    def _batch(self, ready: Sequence[Gathering], step: int, now: RLConfig) -> Batch:
        """Groups as a batch. What is replayed stands behind its group's own, and counts in no measure of the policy."""
        judged = scored(ready, self.questions)
        metrics, rolled = _metrics(judged), list[Rolled]()
        for n, (gathering, group) in enumerate(zip(ready, judged.groups, strict=True)):
            own, again = group.rollouts, gathering.replayed
            rolled += [Rolled(group.prompt, r, n, age=step - oldest(r, step)) for r in own]
            rolled += [Rolled(group.prompt, r, n, age=step - oldest(r, step), replayed=True) for r in again]
        judged.groups[:] = [
            replace(group, rollouts=[*group.rollouts, *g.replayed])
            for g, group in zip(ready, judged.groups, strict=True)
        ]
        return Batch(now, [g.problem for g in ready], judged, rolled, metrics)

    def state_dict(self) -> dict[str, Any]:
        """All state besides the weights, for a checkpoint."""
        return {
            "baseline": self.baseline,
            "controls": self.controls.state_dict(),
            "gatherer": self.gatherer.state_dict(),
            "rewards": distributed.all_gather_object(self.rewards.state_dict()),  # each rank judges a part
        }

    def load_state_dict(self, numbers: dict[str, Any]) -> None:
        """Take it back."""
        self.baseline, self.controls = numbers["baseline"], Controls(**numbers["controls"])
        self.gatherer.load_state_dict(numbers["gatherer"])
        self.rewards.load_state_dict(counts_of(numbers.get("rewards", ())))

    def _judge(self, batch: Batch, step: int, phases: Phases) -> None:
        """Log-probabilities before the update, of the reference, values of the critic; advantages from all of these."""
        config, rolled = batch.config, batch.rolled
        many = config.updates * config.passes > 1 or config.off_policy
        in_reward = bool(config.kl.coefficient) and config.kl.where == "reward"
        exact = self.comparable and next(self.model.parameters()).dtype == torch.float32
        with phases("score"):
            if self.method.advantages == "critic" or ((many or in_reward) and not exact):
                self._own(rolled)
            elif many or in_reward:
                for r in rolled:
                    r.old = r.sampled()
            for r in rolled:
                if r.age:  # the policy that sampled it is gone: its own numbers are all there is
                    r.old = r.sampled()
            if self.reference is not None:
                self.reference(rolled)
                batch.metrics |= _divergence(rolled)
        greedy: list[float] = []
        if self.method.advantages == "greedy":
            greedy = self._greedy(batch, phases)
        give_advantages(config, rolled, self.baseline, greedy)
        if config.allocate is not None:
            even_out(rolled)
        if not many and in_reward and exact:
            for r in rolled:  # served the penalty; on a single fresh update the learner's own are better
                r.old = None
        rewards = torch.tensor([outcome(config, r.rollout) for r in rolled if not r.replayed], dtype=torch.float64)
        self.baseline = moving_average(self.baseline, rewards)
        signal: dict[int, bool] = dict.fromkeys(range(len(batch.groups)), False)
        for r in rolled:
            signal[r.group] |= bool(r.advantages.any())
        batch.metrics["no_signal"] = 1 - sum(signal.values()) / max(1, len(signal))

    @torch.no_grad()
    def _own(self, rolled: Sequence[Rolled]) -> None:
        """The learner's log-probabilities (and the critic's values) before the first update."""
        critic = self.method.advantages == "critic"
        with filled(rolled, "old", "values") as here:
            for mine, batch, targets in in_passes(self.model, here, self.config.systems.budget(self.model.device.type)):
                temperature = temperatures(self.config, mine, targets.device)
                out = self.model(batch, "values" if critic else "logprobs", targets, temperature=temperature)
                lengths = [r.length for r in mine]
                for r, part in zip(mine, out[0].float().cpu().split(lengths), strict=True):
                    r.old = part
                if critic:
                    for r, part in zip(mine, out[2].float().cpu().split(lengths), strict=True):
                        r.values = part

    def own_logprobs(self, rolled: Sequence[Rolled]) -> list[torch.Tensor]:
        """The policy's log-probabilities of what it has just sampled: the sampler's where they are the learner's."""
        if self.comparable and next(self.model.parameters()).dtype == torch.float32:
            return sampled_logprobs(rolled)
        self._own(rolled)
        return [torch.zeros(0) if r.old is None else r.old for r in rolled]

    def _greedy(self, batch: Batch, phases: Phases) -> list[float]:
        """ReMax: the reward of the likeliest answer to each prompt; NaN (and `greedy_failed`) where it got none."""
        groups = self.answer([self.questions[i] for i in batch.problems], phases)
        with phases("reward"):
            answered = judge(self.rewards, groups)
        batch.metrics["greedy_failed"] = float(len(answered.excluded))
        return [outcome(self.config, g.rollouts[0]) if g.rollouts else math.nan for g in answered.groups]

    def answer(self, questions: Sequence[RenderedPrompt], phases: Phases) -> list[RolloutGroup]:
        """Greedy answers."""
        greedy = self.config.sampler.model_copy(update={"temperature": 0.0})
        requests = [Request(q.tokens, 1, 0, q.problem) for q in questions]
        return sample(self.sampler, requests, greedy, phases)


def counts_of(numbers: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Of what every rank counted (`RewardStack.numbers`), this rank's; with another number of ranks the sums of all."""
    if len(numbers) == distributed.world():
        return numbers[distributed.rank()]
    out: dict[str, Counter[str]] = {}
    for of_rank in numbers:
        for part, counts in of_rank.items():
            out.setdefault(part, Counter()).update(counts)
    return {part: dict(counts) for part, counts in out.items()}


def _divergence(rolled: Sequence[Rolled]) -> dict[str, float]:
    """`kl`: from the reference, k3, mean over the tokens that were sampled for this batch, before its update."""
    fresh = [r for r in rolled if not r.replayed and r.length and r.reference is not None]
    if not fresh:
        return {}
    own = torch.cat([r.old if r.old is not None else s for r, s in zip(fresh, sampled_logprobs(fresh), strict=True)])
    return {"kl": float(kl(own, torch.cat([r.reference for r in fresh if r.reference is not None])).double().mean())}


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


@contextmanager
def filled(rolled: Sequence[Rolled], *names: str) -> Iterator[list[Rolled]]:
    """This rank's part of the rollouts, whole groups, to give them attributes of these names; then all have them."""
    n = distributed.world()
    yield [r for r in rolled if r.group % n == distributed.rank()] if n > 1 else list(rolled)
    if n > 1:
        given = distributed.all_gather_object([[getattr(r, name) for name in names] for r in rolled])
        for i, r in enumerate(rolled):
            for name, value in zip(names, given[r.group % n][i], strict=True):
                setattr(r, name, value)


def in_passes(model: LanguageModel, rolled: Sequence[Rolled], budget: int) -> Iterator[tuple[list[Rolled], Any, Any]]:
    """(rollouts, ragged batch, T-indices of the tokens they wrote), group by group within the token budget."""
    there = [r for r in rolled if r.length]
    sizes = [len(r.prompt) + len(r.rollout.tokens) for r in there]
    for chosen in micro_batches(sizes, budget):
        mine = [there[i] for i in chosen]
        batch = model.pack([r.sample(0) for r in mine])
        yield mine, batch, torch.cat([r.targets(row) for row, r in zip(batch.rows, mine, strict=True)])
