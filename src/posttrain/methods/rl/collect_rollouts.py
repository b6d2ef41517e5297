"""The first half of a step: prompts are drawn, completions sampled and scored.

Everything is a function of (seed, step), the weights, and `RolloutCollector.state_dict`, so that a resumed run makes
the same rollouts again. Optional features are hooks (`posttrain.methods.rl.hooks`).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posttrain.config import SamplingConfig
from posttrain.config.rl import RLConfig, RolloutConfig
from posttrain.core import distributed
from posttrain.core.image_tokens import extended
from posttrain.core.progress import Phases
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.data.prompts import RenderedPrompt
from posttrain.methods.rl.hooks import Hook
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.protocol import Request, Sampler
from posttrain.sampling.replay_buffer import PARTIAL, Growth, rollout_from_json, rollout_to_json


@dataclass(frozen=True)
class PromptGroup:
    """The completions of one prompt.

    Attributes:
        problem: Number of the prompt.
        born: Step in which the group was begun.
        rollouts: In the order in which they were begun; scored ones have their rewards.
        scored: How many of `rollouts`, from the first on, have been scored.
        replayed: Earlier successes that stand in.
    """

    problem: int
    born: int
    rollouts: tuple[Rollout, ...] = ()
    scored: int = 0
    replayed: tuple[Rollout, ...] = ()

    @property
    def complete(self) -> bool:
        """Return True if every completion has ended."""
        return all(r.finish != PARTIAL for r in self.rollouts)

    @property
    def kept(self) -> list[Rollout]:
        """Return the completions of a scored group that have a reward."""
        return [r for r in self.rollouts if r.rewarded]

    @property
    def mixed(self) -> bool:
        """Return True if rewards differ, so that there is something to learn."""
        return has_signal([*self.kept, *self.replayed])

    def successes(self, success: float) -> int:
        """Return the number of completions with a reward of at least `success`."""
        return sum(r.reward >= success for r in self.kept)

    def expires(self, step: int, max_staleness: int) -> bool:
        """Return True if the group would be too old in the step after `step`."""
        return step + 1 - self.born > max_staleness

    def with_rewards(self, group: RolloutGroup) -> PromptGroup:
        """Return the group with the outcome of scoring its completions from number `scored` on."""
        return replace(self, rollouts=(*self.rollouts[: self.scored], *group.rollouts), scored=len(self.rollouts))

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        values = {"problem": self.problem, "born": self.born, "scored": self.scored}
        return {**values, "rollouts": [rollout_to_json(r) for r in self.rollouts]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PromptGroup:
        """Return the group that `state_dict` was called on."""
        rollouts = tuple(rollout_from_json(r) for r in state["rollouts"])
        return cls(state["problem"], state["born"], rollouts, state["scored"])


@dataclass(frozen=True)
class RolloutBatch:
    """Hold the scored groups of a step, and metrics of the completions that were sampled for them."""

    groups: tuple[PromptGroup, ...]
    metrics: Mapping[str, float]

    @property
    def problems(self) -> list[int]:
        """Return the number of each group's prompt."""
        return [g.problem for g in self.groups]


class RolloutCollector:
    """Collect the groups of a step."""

    def __init__(
        self,
        config: RolloutConfig,
        sampler: Sampler,
        rewards: RewardStack,
        questions: Sequence[RenderedPrompt],
        seed: int,
        *,
        hooks: Sequence[Hook] = (),
        tokenizer: Any = None,
        at_once: bool = False,
    ) -> None:
        """Make a collector.

        Args:
            config: Settings of the stage.
            sampler: Samples the completions.
            rewards: Score them.
            questions: Prompts to draw from.
            seed: Seed of the draws and of every random stream of the sampler.
            hooks: Optional features, in the order in which they are called.
            tokenizer: Joins the pieces of partial rollouts.
            at_once: Partial rollouts continue within their step, with the weights that the sampler has by then.
        """
        self.config, self.sampler, self.rewards = config, sampler, rewards
        self.questions, self.seed, self.hooks, self.at_once = questions, seed, list(hooks), at_once
        explore = config.exploration if isinstance(config, RLConfig) else None
        self.attempts = 1 + (explore.dynamic_sampling if explore else 0)
        context = int(getattr(sampler, "context", 2**31))
        self.growth = Growth(
            explore.partial_rollouts if explore else None,
            config.sampler,
            context,
            lambda tokens, skip_special: tokenizer.decode(tokens, skip_special_tokens=skip_special),
        )
        self.samples = self.tokens = 0
        """Completions and tokens that were sampled in the current step."""

    def collect(self, step: int, sampling: SamplingConfig, phases: Phases) -> RolloutBatch:
        """Return the groups of a step, complete and scored.

        Args:
            step: Number of the step.
            sampling: How completions are drawn in this step.
            phases: Times the parts.
        """
        self.samples = self.tokens = drawn = 0
        groups: list[PromptGroup] = []
        for attempt in range(self.attempts):  # dynamic sampling replaces groups without signal in further attempts
            flat = [i for i, g in enumerate(groups) if not g.mixed]
            if attempt and not flat:
                break
            prompts = self.draw_prompts(step, attempt)
            prompts = prompts[: len(flat)] if attempt else prompts
            drawn += len(prompts)
            fresh = self._attempt(step, attempt, prompts, sampling, phases)
            for i, group in zip(flat, [g for g in fresh if g.mixed], strict=False):
                groups[i] = group
            groups = groups if attempt else fresh
        metrics = {"drawn": float(drawn), "samples": float(self.samples)}
        for hook in self.hooks:
            metrics |= hook.metrics(step, groups)
        return RolloutBatch(tuple(groups), rollout_metrics(groups) | metrics)

    def draw_prompts(self, step: int, attempt: int) -> list[int]:
        """Return the prompts of an attempt: a fresh permutation in every epoch; later attempts use another stream."""
        count, size = len(self.questions), self.config.prompts_per_step
        if attempt:
            rng = np.random.default_rng([self.seed, 1, step, attempt])
            prompts = [int(i) for i in rng.choice(count, size, replace=count < size)]
        else:
            places = range(step * size, (step + 1) * size)
            epochs = {p // count for p in places}
            orders = {e: np.random.default_rng([self.seed, 0, e]).permutation(count) for e in epochs}
            prompts = [int(orders[p // count][p % count]) for p in places]
        for hook in self.hooks:
            prompts = hook.choose_prompts(step, attempt, prompts)
        return prompts

    def _attempt(
        self, step: int, attempt: int, prompts: Sequence[int], sampling: SamplingConfig, phases: Phases
    ) -> list[PromptGroup]:
        """Sample and score the prompts, and groups of earlier steps that continue; the groups that are complete."""
        groups = [g for hook in self.hooks for g in hook.before_sampling(step, attempt, prompts)]
        first = self.config.group_size
        for hook in self.hooks:
            first = hook.first_completions(first)
        counts: list[int] | None = [0] * len(groups) + [first] * len(prompts)
        groups += [PromptGroup(problem, step) for problem in prompts]
        salt: tuple[int, ...] = (step, attempt)
        while counts is not None:
            groups = self._sample(step, groups, counts, salt, sampling, phases)
            for hook in self.hooks:
                groups = hook.after_sampling(step, groups)
            groups = self._score(groups, phases)
            counts = next((c for h in self.hooks if (c := h.more_completions(step, groups)) is not None), None)
            salt = (step, attempt, salt[2] + 1 if len(salt) > 2 else 1)
        for hook in self.hooks:
            groups = hook.after_rewards(step, groups)
        return groups

    def _sample(
        self,
        step: int,
        groups: Sequence[PromptGroup],
        counts: Sequence[int],
        salt: tuple[int, ...],
        sampling: SamplingConfig,
        phases: Phases,
    ) -> list[PromptGroup]:
        """Return the groups with `counts` new completions each; `at_once`, with all of their pieces."""
        grown = self._sample_piece(step, groups, counts, salt, sampling, phases)
        piece = 0
        while self.at_once and not all(g.complete for g in grown):
            piece += 1
            salt = (*(*salt, 0)[:3], piece)  # another random stream for each piece
            grown = self._sample_piece(step, grown, [0] * len(grown), salt, sampling, phases)
        return grown

    def _sample_piece(
        self,
        step: int,
        groups: Sequence[PromptGroup],
        counts: Sequence[int],
        salt: tuple[int, ...],
        sampling: SamplingConfig,
        phases: Phases,
    ) -> list[PromptGroup]:
        """Return the groups with `counts` new completions each, and the next piece of what was begun before."""
        growth, rollouts = self.growth, [list(g.rollouts) for g in groups]
        continued = [
            (g, i)
            for g, of in enumerate(rollouts)
            for i, r in enumerate(of)
            if r.finish == PARTIAL and (self.at_once or r.pieces[-1].step < step)
        ]
        begun = [(g, n) for g, n in enumerate(counts) if n]
        requests = []
        for (g, i), seed in zip(continued, self._streams(5, salt, len(continued)), strict=True):
            question, before = self.questions[groups[g].problem], rollouts[g][i]
            tokens = extended(question.tokens, before.tokens)
            requests.append(Request(tokens, 1, seed, question.problem, growth.asked(before)))
        for (g, n), seed in zip(begun, self._streams(2, salt, len(begun)), strict=True):
            question = self.questions[groups[g].problem]
            requests.append(Request(question.tokens, n, seed, question.problem, growth.asked()))
        sampled = sample_groups(self.sampler, requests, sampling, phases)
        for (g, i), found in zip(continued, sampled, strict=False):
            length, before = len(self.questions[groups[g].problem].tokens), rollouts[g][i]
            rollouts[g][i] = growth.grown(length, before, found.rollouts[0], step, sampling.temperature)
        for (g, _), found in zip(begun, sampled[len(continued) :], strict=True):
            length = len(found.prompt)
            rollouts[g] += [growth.grown(length, None, r, step, sampling.temperature) for r in found.rollouts]
        self.samples += sum(counts)
        self.tokens += sum(r.length for group in sampled for r in group.rollouts)
        return [replace(g, rollouts=tuple(of)) for g, of in zip(groups, rollouts, strict=True)]

    def _streams(self, kind: int, salt: tuple[int, ...], count: int) -> list[int]:
        """Return the seeds of `count` random streams."""
        return [int(s) for s in np.random.SeedSequence([self.seed, kind, *salt]).generate_state(count, np.uint64)]

    def _score(self, groups: Sequence[PromptGroup], phases: Phases) -> list[PromptGroup]:
        """Return the groups with rewards for what is new in those that are complete."""
        todo = [i for i, g in enumerate(groups) if g.complete and g.scored < len(g.rollouts)]
        asked = [(groups[i], self.questions[groups[i].problem]) for i in todo]
        unscored = [RolloutGroup(q.tokens, q.problem, g.rollouts[g.scored :]) for g, q in asked]
        with phases("reward"):
            scored = score_groups(self.rewards, unscored)
        out = list(groups)
        for i, group in zip(todo, scored, strict=True):
            out[i] = groups[i].with_rewards(group)
        return out

    def timing(self) -> dict[str, float]:
        """Return what timings.jsonl gets of the step that was collected last."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on besides the weights."""
        states = {type(hook).__name__: hook.state_dict() for hook in self.hooks}
        # Each rank scores a part of the groups, so that every rank's counts are kept.
        return {"hooks": states, "rewards": distributed.all_gather_object(self.rewards.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for hook in self.hooks:
            hook.load_state_dict(state["hooks"][type(hook).__name__])
        self.rewards.load_state_dict(counts_of_rank(state.get("rewards", ())))


def sample_groups(
    sampler: Sampler, requests: Sequence[Request], sampling: SamplingConfig, phases: Phases
) -> list[RolloutGroup]:
    """Sample every request; each rank samples a part, and all get the groups of all.

    Args:
        sampler: Samples a list of requests.
        requests: Prompts with the number of completions of each.
        sampling: How completions are drawn.
        phases: Shows the progress of this rank.
    """
    count = phases.track.counter("sampling", -(-sum(r.n for r in requests) // distributed.world()), 8)
    with phases("sample"):
        return distributed.map_over_ranks(requests, lambda mine: sampler.sample(mine, sampling, count))


def score_groups(rewards: RewardStack, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """Score every group; each rank scores a part, and all get the rewards of all."""
    return distributed.map_over_ranks(groups, lambda mine: rewards(mine).groups)


def has_signal(rollouts: Sequence[Rollout]) -> bool:
    """Return True if the rewards of a group, or its scores of steps, differ."""
    names = {name for r in rollouts for name in r.steps}
    scores = [{score for r in rollouts for _, _, score in r.steps.get(name, ())} for name in names]
    return any(len(different) > 1 for different in ({r.reward for r in rollouts}, *scores))


def rollout_metrics(groups: Sequence[PromptGroup]) -> dict[str, float]:
    """Return means over the completions that were sampled for the groups and have a reward, and counts of failures."""
    rollouts = [r for g in groups for r in g.kept]
    out: dict[str, float] = {}
    if rollouts:
        rewards = [r.reward for r in rollouts]
        out.update(reward=statistics.fmean(rewards), reward_std=statistics.pstdev(rewards))
        out |= means_by_reward(rollouts, "reward") | means_of_figures(rollouts, "refine")
        tokens = sum(r.length for r in rollouts)
        out["completions/mean_length"] = tokens / len(rollouts)
        out["completions/clipped_ratio"] = sum(r.finish in ("length", "turns") for r in rollouts) / len(rollouts)
        if any(r.mask is not None for r in rollouts):
            out["replies"] = statistics.fmean(r.replies for r in rollouts)
        out["entropy"] = -sum(r.logprobs[i] for r in rollouts for i in r.own) / max(1, tokens)
    for name, count in Counter(name for g in groups for r in g.rollouts for name in r.failures).items():
        out[f"failed/{name}"] = float(count)
    return out


def means_by_reward(rollouts: Sequence[Rollout], prefix: str) -> dict[str, float]:
    """Return the mean of every reward over the rollouts that have it, under ``prefix/NAME``; not of further figures."""
    names = sorted({name for r in rollouts for name in r.rewards if "/" not in name})
    return {f"{prefix}/{n}": statistics.fmean(r.rewards[n] for r in rollouts if n in r.rewards) for n in names}


def means_of_figures(rollouts: Sequence[Rollout], prefix: str) -> dict[str, float]:
    """Return the means of the figures that rewards of answers and revisions return, under ``prefix/FIGURE``.

    Of several such rewards the first, in alphabetical order, has these names, and others ``prefix/REWARD/FIGURE``.
    """
    names = sorted({name for r in rollouts for name in r.rewards if "/" in name})
    first = names[0].partition("/")[0] if names else ""
    keys = {n: n.removeprefix(f"{first}/") for n in names}
    return {f"{prefix}/{keys[n]}": statistics.fmean(r.rewards[n] for r in rollouts if n in r.rewards) for n in names}


def counts_of_rank(states: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Return this rank's counts out of those of all ranks; if their number has changed, the sums of all."""
    if len(states) == distributed.world():
        return states[distributed.rank()]
    out: dict[str, dict[str, int]] = {}
    for state in states:
        for reward, counts in state.items():
            sums = out.setdefault(reward, {})
            for name, count in counts.items():
                sums[name] = sums.get(name, 0) + count
    return out
